"""What people read: text that every encoding takes, that stays in its line, and that can only be read.

Names come from elsewhere: of files, classes, cameras. They may hold line ends, bytes that are no UTF-8, codes that
colour a terminal or move its cursor, and brackets that rich would take for markup.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table
    from rich.text import Text

T = TypeVar("T")
LINE_EVERY_S = 10.0  # of long work, where no terminal shows a bar
SPELLED = "fbclip.spelled"  # error handler of text encodings: what one lacks is spelled in ASCII
PIPE_WIDTH = 1000  # characters: a pipe has no width, and a name that is broken there is lost to who looks for it
ASCII = {"…": "...", "–": "-", "—": "-", "×": "x", "·": "|", "≥": ">=", "≤": "<=", "→": "->", "±": "+-", "σ": "sigma"}


def printable(text: object) -> str:
    """One line that shows each character, or spells it as Python does: `\\n`, `\\x1b`, `\\xdf` of a byte that is no UTF-8."""
    return "".join(character if character.isprintable() else _escaped(character) for character in str(text))


def make_console(stderr: bool = False, service: bool = False) -> Console:
    """Where people read: no text can colour the terminal or move its cursor there, and a reader who leaves is an error.

    Rich lets escape codes through, and where the reader of a console left it sends standard output nowhere, another's
    JSON lines perhaps, and ends the thread that printed.

    Args:
        stderr: standard error instead of standard output.
        service: whether the command runs on and on: then lines have a date and a level where no terminal is. What the
            options of logs ask for, see `fbclip.logs`, is heeded either way.
    """
    from rich.console import Console

    from fbclip.logs import open_log

    class Harmless(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(text.translate(CONTROLS), **options)

        def on_broken_pipe(self) -> None:
            raise

    log = open_log(sys.stderr if stderr else sys.stdout, service)
    console = Harmless(file=cast("TextIO", log), stderr=stderr, emoji=False, force_terminal=False if log else None)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def say(
    console: Console,
    line: object,
    style: str = "",
    *,
    level: int | None = None,
    when: float | None = None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Print one line, whatever is in it, unbroken; or log it, where the console's file is a log.

    Args:
        line: a text, or rich's.
        style: its colour; of a log its level, if none is given: yellow is a warning, red an error.
        level: of `logging`.
        when: seconds since 1970 that it is of; printed with the time of day then.
        fields: more values for a log of JSON.
    """
    from rich.text import Text

    from fbclip.logs import LogFile, level_of

    if isinstance(log := console.file, LogFile):
        log.log(level or level_of(style), printable(line), when, fields)
    else:
        stamp = "" if when is None else f"{time.strftime('%H:%M:%S', time.localtime(when))} "
        console.print(line if isinstance(line, Text) else cell(f"{stamp}{line}", style), soft_wrap=True)


def warn(console: Console, line: object) -> None:
    """The same, of what was not as it should be."""
    say(console, line, "yellow")


def cell(text: object, style: str = "") -> Text:
    """The same for a table."""
    from rich.text import Text

    return Text(printable(text), style)


def print_table(console: Console, table: Table) -> None:
    """Print a table; its columns that have `no_wrap`, of names and figures, stay whole though it be wider than a screen."""
    wide = console.options.update(width=PIPE_WIDTH)
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(console.measure(c, options=wide).maximum for c in (column.header, *column.cells))
    least = console.measure(table, options=wide).minimum
    console.print(table, width=max(console.width, least), crop=False, highlight=False)


def progress(console: Console, *columns: ProgressColumn, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Bars that vanish at their end; where there is no terminal, a line every ten seconds instead.

    Args:
        columns: of the bars; rich's own if left out. A field `note` of a task is in its lines, too.
        clock: seconds.
    """
    from rich.progress import Progress, TaskID

    if console.is_terminal:
        return Progress(*columns, console=console, transient=True)

    class Lines(Progress):
        last = clock()

        def update(self, task_id: TaskID, **changes: Any) -> None:
            super().update(task_id, **changes)
            self._say(task_id)

        def advance(self, task_id: TaskID, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self._say(task_id)

        def _say(self, task_id: TaskID) -> None:
            now = clock()
            if now - self.last >= LINE_EVERY_S:
                self.last = now
                task = self.tasks[self.task_ids.index(task_id)]
                of = f" of {task.total:g}" if task.total else ""
                left = task.time_remaining
                about = f"about {timedelta(seconds=round(left))} left" if left else ""
                parts = (f"{task.completed:g}{of}", task.fields.get("note"), about)
                say(console, f"{task.description}: {', '.join(filter(None, parts))}")

    return Lines(console=console, disable=True, auto_refresh=False, get_time=clock)


def track(items: Iterable[T], what: str, console: Console, total: int | None = None) -> Iterator[T]:
    """The items one by one, under `progress`."""
    with progress(console) as bars:
        yield from bars.track(items, total, description=what)


def spelled(text: str) -> str:
    """Text as standard output can show it; for those who write it past our streams."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, SPELLED).decode(encoding)


def open_up() -> None:
    """Let standard output and error take any text, whatever their encoding is ("…" as "...", "ü" as "\\xfc"), and wait for
    a reader who is slow, though programs that share a pipe may have set it otherwise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where it is closed, or captured
            stream.reconfigure(errors=SPELLED)
            with suppress(OSError, AttributeError):  # Windows has it from Python 3.12 on
                os.set_blocking(stream.fileno(), True)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or ("*" if _is_drawing(c) else _escaped(c)) for c in missing), error.end


codecs.register_error(SPELLED, _spell)


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
