"""The library's errors state the rule and the value; how the command line calls a parameter is the command line's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HOUSE = Path(__file__).parents[1]
NAMES_OPTIONS = ("cli.py", "fbclip/main.py", "fbclip/commands/*")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
COMMAND = re.compile(r"(?:\bfbclip (?:[a-z]+|\{\})|\bpip install\b)[^,;:]*")  # a whole command may be the cure


def raised_texts(program: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string in a raised error; what is filled in reads {}."""
    for statement in ast.walk(ast.parse(program)):
        if not isinstance(statement, ast.Raise) or statement.exc is None:
            continue
        parts = {
            id(part) for each in ast.walk(statement.exc) if isinstance(each, ast.JoinedStr) for part in each.values
        }
        for node in ast.walk(statement.exc):
            if isinstance(node, ast.JoinedStr):
                yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                yield node.lineno, node.value


def flags(program: str) -> list[tuple[int, str]]:
    """Line and name of each option in a raised error that is no part of a whole command."""
    found = ((line, FLAG.findall(COMMAND.sub("", text))) for line, text in raised_texts(program))
    return [(line, flag) for line, names in found for flag in names]


def test_what_counts_as_an_option() -> None:
    assert flags('raise E(f"--roi is {a}; got {b}")') == [(1, "--roi")]
    assert flags('x = "--roi"\nraise E("pass " + "--camera", option="camera")') == [(2, "--camera")]
    assert not flags('raise E(f"{a} is old: run fbclip export --engine --bundle {b}", option="bundle")')
    assert flags('raise E(f"run fbclip export --engine, or pass --precision")') == [(1, "--precision")]


def test_errors_of_the_library_name_no_options() -> None:
    library = [path for folder in ("export", "runtime", "fbclip") for path in (HOUSE / folder).rglob("*.py")]
    files = [path.relative_to(HOUSE) for path in library if not path.is_symlink()]
    assert len(files) > 80
    found = [
        f"{file}:{line}: {flag}"
        for file in sorted(files)
        if not any(file.match(pattern) for pattern in NAMES_OPTIONS)
        for line, flag in flags((HOUSE / file).read_text())
    ]
    assert not found, "\n".join(found)
