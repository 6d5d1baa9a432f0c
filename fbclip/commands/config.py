"""`--config line.toml`: options of any command from a file, checked as strictly as those of the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

SECRETS = "fbclip.secrets"  # in a context: the file, if a secret is in it
ELSEWHERE = "fbclip.elsewhere"  # in a context: the file, if it has tables of other commands and none of this one


def read_config(context: typer.Context, value: Path | None) -> Path | None:
    """Callback of `--config`: gives the command the options of the file as defaults.

    A key is the name of an option with - or _, or of an argument, like source; at the top of the file it is of every command that
    the file is used with, under a table like [infer] of this command.

    Raises:
        UsageError: no such file, no TOML, an unknown key or table, or a value that is no text, number, truth or list.
    """
    if value is None or context.resilient_parsing:
        return value
    document = _load(value)
    commands = context.parent.command.commands if context.parent else {}  # type: ignore[attr-defined]
    own: dict[str, Any] = {key: entry for key, entry in document.items() if not isinstance(entry, dict)}
    tables = [key for key, entry in document.items() if isinstance(entry, dict)]
    for table in tables:
        if table not in commands:
            raise _unknown(value, f"table [{table}]", table, commands)
    if tables and context.info_name not in tables:
        context.meta[ELSEWHERE] = value
    own |= document.get(context.info_name or "", {})
    known = {name: parameter for parameter in context.command.params for name in _names(parameter)}
    defaults = {}
    for key, entry in own.items():
        if not (parameter := known.get(name := key.replace("_", "-"))):
            raise _unknown(value, f"option {key}", name, known, f"fbclip {context.info_name}")
        inverted = f"--{name}" in parameter.secondary_opts
        defaults[parameter.name] = _text(value, key, entry, parameter, inverted)
        if parameter.name in ("token", "webhook") or re.search("://.*@", str(entry)):
            context.meta[SECRETS] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


def _load(path: Path) -> dict[str, Any]:
    from fbclip.errors import UsageError

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UsageError(f"{path} is no TOML: {error}") from error


def _names(parameter: Any) -> list[str]:
    """What a file may call an option or argument."""
    if parameter.name in ("config", "help"):
        return []
    if parameter.param_type_name == "argument":
        return [flag_of(parameter).lower()]
    return [name.lstrip("-") for name in (*parameter.opts, *parameter.secondary_opts)]


def flag_of(parameter: Any) -> str:
    """What users call a parameter: --min-area, or SOURCE."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar).split()[-1].strip("[].")  # of "[BUNDLE] GOOD...", GOOD
    return next((name for name in parameter.opts if name.startswith("--")), str(parameter.opts[0]))


def _unknown(path: Path, what: str, name: str, known: Iterable[str], command: str = "fbclip") -> Exception:
    from difflib import get_close_matches

    from fbclip.errors import UsageError

    near = get_close_matches(name, known, 1, 0.4)
    nearest = f": the nearest is {near[0]}" if near else ""
    return UsageError(f"{path} has an unknown {what}{nearest}; {command} -h lists them")


def _text(path: Path, key: str, entry: Any, parameter: Any, inverted: bool) -> Any:
    """A value as the command line would give it."""
    from fbclip.errors import UsageError

    several = parameter.nargs != 1 or getattr(parameter, "multiple", False)
    if getattr(parameter, "is_flag", False) != isinstance(entry, bool):
        rule = "takes no true or false" if isinstance(entry, bool) else "is true or false"
        raise UsageError(f"{key} {rule}; got {_kind(entry)} in {path}")
    if isinstance(entry, bool):
        return entry != inverted
    parts = entry if isinstance(entry, list) else [entry]
    if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in parts):
        raise UsageError(f"{key} is a text, a number or a list of them; got {_kind(entry)} in {path}")
    texts = [str(part) for part in parts]
    return texts if several else ",".join(texts)


def _kind(entry: Any) -> str:
    """What a value is, in TOML's words; it may be a secret itself."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a table"}
    return kinds.get(type(entry), "a date")
