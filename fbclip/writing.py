"""Small text results to a file or to standard output."""

from __future__ import annotations

import sys
from pathlib import Path

from fbclip.errors import UsageError


def write_text(text: str, target: str) -> None:
    """Write to a file, which takes its name when it is whole, or to standard output for "-".

    Raises:
        UsageError: the file can't be written.
    """
    if target == "-":
        sys.stdout.write(text)
        return
    path = Path(target)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error}") from error
