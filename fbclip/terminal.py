"""What people read: text that every encoding takes, that stays in its line, and that can only be read.

Names come from elsewhere: of files, classes, cameras. They may hold line ends, bytes that are no UTF-8, codes that
colour a terminal or move its cursor, and brackets that rich would take for markup.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SPELLED = "fbclip.spelled"  # error handler of text encodings: what one lacks is spelled in ASCII
ASCII = {"…": "...", "–": "-", "—": "-", "×": "x", "·": "|", "≥": ">=", "≤": "<=", "→": "->", "±": "+-", "σ": "sigma"}


def printable(text: object) -> str:
    """One line that shows each character, or spells it as Python does: `\\n`, `\\x1b`, `\\xdf` of a byte that is no UTF-8."""
    return "".join(character if character.isprintable() else _escaped(character) for character in str(text))


def say(console: Console, line: object, style: str = "") -> None:
    """Print one line, whatever is in it, unbroken."""
    console.print(cell(line, style), soft_wrap=True)


def cell(text: object, style: str = "") -> Text:
    """The same for a table."""
    from rich.text import Text

    return Text(printable(text), style)


def open_up() -> None:
    """Let standard output and error take any text, whatever their encoding is ("…" as "...", "ü" as "\\xfc"), and wait for
    a reader who is slow, though programs that share a pipe may have set it otherwise."""
    codecs.register_error(SPELLED, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where it is closed, or captured
            stream.reconfigure(errors=SPELLED)
            with suppress(OSError):
                os.set_blocking(stream.fileno(), True)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or ("*" if _is_drawing(c) else _escaped(c)) for c in missing), error.end


def _is_drawing(character: str) -> bool:
    """Lines, blocks and Braille dots, of which bars and spinners are made."""
    return "\u2500" <= character <= "\u28ff"


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python reads a byte of a name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


# what terminals obey, writing from right to left included, spelled; the line ends of our own tables stay
_OBEYED = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
CONTROLS = {code: _escaped(chr(code)) for code in _OBEYED if chr(code) not in "\n\t"}
