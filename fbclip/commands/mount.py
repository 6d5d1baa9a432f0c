"""Groups of options: declared once, as a frozen dataclass, and mounted by the commands that have them.

    @dataclass(frozen=True)
    class Verdict:
        PANEL: ClassVar[str] = "Verdict"  # title over these options in -h
        threshold: Annotated[str, option("…", metavar="NUMBER")] = "auto"
        vote: Annotated[str, option("…", metavar="K/N"), STREAMS] = "1/1"  # a stream's alone

    @mounted(first=["threshold"])
    def infer(verdict: Verdict) -> None: ...

typer reads the signature of a function, so `mounted` gives it one in which each group is replaced by its fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer

from fbclip.commands.config import flag_of, read_config

OTHERS = "Other options"


@dataclass(frozen=True)
class Kind:
    """A kind of SOURCE, which an option may be for alone; in the words of a message."""

    name: str


IMAGES, STREAMS, NOTHING = Kind("images"), Kind("a stream"), Kind("left out")


def option(help: str, *names: str, metavar: str = "", panel: str | None = None, **settings: Any) -> Any:
    """An option. Of several names the help shows the first: the others are those of older releases.

    Args:
        metavar: what the help calls its value, like N or PATH; "" for a flag.
        panel: title over it in the help; that of its group if left out.
    """
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **settings)


CONFIG = option(
    "Take options from this file (TOML): NAME = VALUE, for all commands or under [COMMAND]. The command line and the "
    "environment win.",
    metavar="PATH",
    panel=OTHERS,
    envvar="FBCLIP_CONFIG",
    is_eager=True,  # before the options whose values it gives
    callback=read_config,
)


class Level(str, Enum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class Form(str, Enum):
    auto = "auto"
    text = "text"
    json = "json"


@dataclass(frozen=True)
class LogGroup:
    """What every command says, and how."""

    PANEL: ClassVar[str] = OTHERS
    quiet: Annotated[bool, option("Say nothing but warnings and errors.", "--quiet", "-q", envvar="FBCLIP_QUIET")] = (
        False
    )
    log_level: Annotated[
        Level,
        option("Say this and what is worse.", metavar="debug|info|warning|error", envvar="FBCLIP_LOG_LEVEL"),
    ] = Level.info
    log_format: Annotated[
        Form,
        option(
            "text: lines with date and level. json: an object a line. auto: text of serve and of streams where no "
            "terminal is, else plain lines.",
            metavar="auto|text|json",
            envvar="FBCLIP_LOG_FORMAT",
        ),
    ] = Form.auto


def mounted(first: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command: its parameters that are groups are built from the options of their fields.

    Args:
        first: the options used most, which the help lists first.
    """

    def mount(function: Callable[..., None]) -> Callable[..., None]:
        # not get_type_hints, which in Python 3.10 hides an option whose default is None in an Optional
        hints = inspect.get_annotations(function, eval_str=True)
        groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None)
        config = config.replace(annotation=Annotated[Path | None, CONFIG])
        parameters = [*_expanded(function, hints), *_fields(LogGroup), config]

        def command(**values: Any) -> None:
            for name in ("config", *(field.name for field in fields(LogGroup))):
                del values[name]  # `Command` has read them
            built = {
                name: group(**{field.name: values.pop(field.name) for field in fields(group)})
                for name, group in groups.items()
            }
            function(**built, **values)

        placed = sorted(map(_placed(first), parameters), key=lambda p: first.index(p.name) if p.name in first else 99)
        command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
        command.__signature__ = inspect.Signature(placed)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in placed}
        return command

    return mount


def _expanded(function: Callable[..., None], hints: dict[str, Any]) -> Iterator[inspect.Parameter]:
    """The parameters of a function, with the fields of groups in place of them."""
    for name, parameter in inspect.signature(function).parameters.items():
        if not is_dataclass(group := hints[name]):
            yield parameter.replace(annotation=group, kind=inspect.Parameter.KEYWORD_ONLY)
        else:
            yield from _fields(group)


def _fields(group: Any) -> Iterator[inspect.Parameter]:
    """The fields of a group as parameters."""
    members = get_type_hints(group, include_extras=True)
    for field in fields(group):
        annotation = _in_panel(members[field.name], getattr(group, "PANEL", None))
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
        )


def _placed(first: Sequence[str]) -> Callable[[inspect.Parameter], inspect.Parameter]:
    """Puts the options used most under no title."""

    def place(parameter: inspect.Parameter) -> inspect.Parameter:
        if parameter.name not in first:
            return parameter
        return parameter.replace(annotation=_in_panel(parameter.annotation, None, anew=True))

    return place


def _in_panel(annotation: Any, panel: str | None, anew: bool = False) -> Any:
    """An option's annotation with a title in the help, where it has none or `anew`."""
    base, *extras = get_args(annotation)
    for place, extra in enumerate(extras):
        if hasattr(extra, "rich_help_panel") and (anew or extra.rich_help_panel is None):
            extras[place] = copy(extra)
            extras[place].rich_help_panel = panel
    return Annotated[(base, *extras)]


def refuse(context: typer.Context, source: Kind, *groups: object) -> None:
    """Raise UsageError where options are given that are for another kind of source, and would be ignored."""
    from fbclip.errors import UsageError

    given = [
        _origin(context, name)
        for group in groups
        for name, hint in get_type_hints(type(group), include_extras=True).items()
        if get_origin(hint) is Annotated
        if (kinds := [kind for kind in get_args(hint) if isinstance(kind, Kind)]) and source not in kinds
        if is_given(context, name)
    ]
    if given:
        raise UsageError(
            f"SOURCE is {source.name}, which {', '.join(given)} can't be used with: leave it out, or see "
            f"fbclip {context.info_name} -h"
        )


def is_chosen(context: typer.Context, name: str) -> bool:
    """Whether an option is set on the command line itself; FBCLIP_BUNDLE, for one, is meant for many commands."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is set: on the command line, in the environment or in a file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _origin(context: typer.Context, name: str) -> str:
    """How an option was given, in the words of a message."""
    source = context.get_parameter_source(name)
    flag = next(flag_of(parameter) for parameter in context.command.params if parameter.name == name)
    where = {"ENVIRONMENT": " (of the environment)", "DEFAULT_MAP": f" (of {context.params.get('config')})"}
    return flag + where.get(source.name if source else "", "")
