"""How commands behave: their help, their errors, and the environment variables that set their options."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_args

from typer.core import TyperArgument, TyperCommand, TyperGroup

from fbclip.commands.config import SECRETS, flag_of
from fbclip.commands.mount import OTHERS
from fbclip.terminal import spelled

COLUMN = 27  # where the texts of options begin in a help page; a longer name has a line of its own
NO_BREAK = "\u00a0"  # a space where lines are not broken
ARGUMENTS, UNNAMED, MOST_USED = "Arguments", "Options", "Options used most"  # titles


class Command(TyperCommand):
    """A command whose help is plain and grouped, and which says what option an error of the library is about."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        parameter: Any
        for parameter in self.params:  # FBCLIP_INFER_MIN_AREA for --min-area
            older = [name for name in parameter.opts if name.startswith("--")]
            names = dict.fromkeys([flag_of(parameter), *older])  # the newest first, which wins
            own = [f"FBCLIP_{self.name}_{name.lstrip('-')}".replace("-", "_").upper() for name in names]
            parameter.envvar = [*own, *([parameter.envvar] if parameter.envvar else [])]

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """The command line understood. Of the environment NAME_FILE is the file that NAME's value is in."""
        from fbclip.commands.secrets import values_from_files

        with values_from_files(self._variables()) as files:
            context = super().make_context(*arguments, **settings)
        self._secrets = [*files, *filter(None, [context.meta.get(SECRETS)])]
        return context

    def invoke(self, ctx: Any) -> Any:
        from fbclip.errors import FBClipError

        self._begin_log(ctx)
        self._refuse_unknown_variables()
        try:
            return super().invoke(ctx)
        except FBClipError as error:
            for parameter in self.params:
                if parameter.name == error.option:
                    error.flag = flag_of(parameter)
            raise

    def _begin_log(self, ctx: Any) -> None:
        from fbclip.commands.secrets import is_open
        from fbclip.logs import choose, warn_early

        if "log_format" in ctx.params:  # of a command that is mounted
            choose(ctx.params["log_level"], ctx.params["log_format"], ctx.params["quiet"])
        for path in filter(is_open, self._secrets):
            warn_early(f"everybody on this machine can read {path}, which holds a secret: chmod 640 {path}")

    def _variables(self) -> list[str]:
        """The environment variables that set options of this command."""
        return [str(name) for parameter in self.params for name in getattr(parameter, "envvar", None) or ()]

    def _refuse_unknown_variables(self) -> None:
        """A variable that sets nothing may be a mistyped threshold."""
        from fbclip.errors import UsageError

        known = [each for name in self._variables() for each in (name, f"{name}_FILE")]
        for name in os.environ:
            if name.startswith(f"FBCLIP_{self.name}_".upper()) and name not in known:
                nearest = get_close_matches(name, known, 1, 0.0)[0]
                raise UsageError(f"{name} sets no option of fbclip {self.name}: the nearest is {nearest}")

    def get_help(self, ctx: Any) -> str:
        return spelled(super().get_help(ctx))  # click's echo writes UTF-8 to a console that lacks it

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*(str(p.metavar) for p in self.params if isinstance(p, TyperArgument)), "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for title, rows in self.panels(ctx).items():
            write_rows(formatter, title, rows)

    def panels(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """The help's titles, and under each the names of options with their texts."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if not getattr(parameter, "hidden", False):
                panels.setdefault(_panel(parameter), []).append((_name(parameter), _text(parameter)))
        named = panels.keys() - {ARGUMENTS, UNNAMED, OTHERS}
        return {
            MOST_USED if named and title == UNNAMED else title: panels[title]
            for title in sorted(panels, key=ARGUMENTS.__ne__)
        }


class Commands(TyperGroup):
    """The commands together. What is wrong with a command line is told in one line, as any other error."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with _in_one_line():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _in_one_line(ctx):
            return super().invoke(ctx)

    def get_help(self, ctx: Any) -> str:
        return spelled(super().get_help(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name].help or "") for name in self.list_commands(ctx)]
        for title, rows in {"Commands": commands, **self.panels(ctx)}.items():
            write_rows(formatter, title, rows)

    def panels(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """The options before a command, as `Command.panels` has them."""
        return {UNNAMED: [(_name(parameter), _text(parameter)) for parameter in self.get_params(ctx)]}

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """They come first, with the options."""


def write_rows(formatter: Any, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A title, and names with texts beside them; no word is cut or broken."""
    formatter.write(f"\n{title}:\n")
    for name, text in rows:
        lines = textwrap.wrap(text, formatter.width - COLUMN, break_on_hyphens=False, break_long_words=False)
        if len(name) > COLUMN - 4:
            formatter.write(f"  {name}\n")
            name = ""
        for line in lines or [""]:
            formatter.write(f"  {name:{COLUMN - 2}}{line}".rstrip() + "\n")
            name = ""


def _name(parameter: Any) -> str:
    if isinstance(parameter, TyperArgument):
        name = str(parameter.metavar)
        return name[1:-1] if name.startswith("[") and name.endswith("]") else name
    flag = flag_of(parameter)
    if parameter.secondary_opts:  # where it does by default, what can be asked for is that it doesn't
        without = parameter.secondary_opts[0]
        flag = without if parameter.default is True else f"{flag}, {without}"
    short = [name for name in parameter.opts if not name.startswith("--")]
    return f"{', '.join([*short, flag])} {parameter.metavar or ''}".strip()


def _text(parameter: Any) -> str:
    """The help of a parameter with its default, unless that is nothing, or the text says it."""
    text, default = parameter.help or "", parameter.default
    if default is None or isinstance(default, bool) or "efault" in text:
        return text
    shown = default.value if isinstance(default, Enum) else default
    return f"{text} [default:{NO_BREAK}{shown}]"


def _panel(parameter: Any) -> str:
    if isinstance(parameter, TyperArgument):
        return ARGUMENTS
    if parameter.name == "help":
        return OTHERS
    return getattr(parameter, "rich_help_panel", None) or UNNAMED


@contextmanager
def _in_one_line(context: Any = None) -> Iterator[None]:
    """What the library of the command line refuses, as a UsageError of ours.

    Newer releases of typer carry click inside them, so its errors have no name that could be imported from both.
    """
    from fbclip.errors import UsageError

    try:
        yield
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        running = f"fbclip {getattr(context, 'invoked_subcommand', None) or ''}".strip()
        own: Any = getattr(error, "ctx", None)
        parameter: Any = getattr(error, "param", None)
        told = UsageError(f"{_told(error, parameter)}; see {own.command_path if own else running} -h")
        if parameter is not None and str(error.__dict__.get("message") or ""):
            told.flag = flag_of(parameter)
        raise told from error


def _told(error: Any, parameter: Any) -> str:
    """The message of such an error: the rule and the value."""
    if near := getattr(error, "possibilities", None):
        nearest = get_close_matches(error.option_name, near, 1, 0.0)[0]
        return f"no such option: {error.option_name}; the nearest is {nearest}"
    if parameter is None:
        text = error.format_message()
    elif not error.message:
        return f"{_name(parameter)} is missing"
    elif rule := _rule(error.ctx.command, parameter.name):
        return f"{rule}; got {_value(error)}"
    else:
        text = error.message
    text = " ".join(text.replace(". Did", "; did").split()).rstrip(".?")
    return f"{text[:1].lower()}{text[1:]}"


def _rule(command: Any, name: str) -> str:
    """What an option that is a number or a choice takes; "" for others."""
    annotation, info = get_args(inspect.signature(command.callback).parameters[name].annotation)[:2]
    for kind in (annotation, *get_args(annotation)):
        if kind in (int, float):
            number = "a whole number" if kind is int else "a number"
            if info.min is None:
                return number
            return f"{number} from {info.min} to {info.max}" if info.max else f"{number}, {info.min} or more"
        if isinstance(kind, type) and issubclass(kind, Enum):
            return " or ".join(str(member.value) for member in kind)
    return ""


def _value(error: Any) -> str:
    """The refused value: pydantic keeps it beside its message, click says it first."""
    errors = getattr(error.__cause__, "errors", None)
    return repr(errors()[0]["input"])[:50] if errors else str(error.message).partition(" is not ")[0][:50]
