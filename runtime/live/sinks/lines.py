"""Records as lines: JSON and CSV, in files that grow by whole lines, or on standard output."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from fbclip.errors import UsageError
from fbclip.files import lock, unlock, write_error
from fbclip.runtime.live.records import Notice, Record
from fbclip.runtime.prediction import Prediction

LOOKED_AT = 4096  # bytes of a file that is there
# of lines of records and notices; the others are those of earlier releases
JSON_BEGINS = (b'{"kind": "', b'{"source": "', b'{"time": ')


class Lines(Protocol):
    """What takes whole lines."""

    def append(self, line: str) -> None:
        """FBClipError where it can't, BrokenPipeError where the reader left; nothing of the line is there then."""

    def close(self) -> None: ...


class LineFile:
    """Whole lines at the end of a file: each is one write, so that a killed process tears the line under way at most.

    Such a torn tail is left as it is, and the next line begins afresh. A file that is full is put aside as NAME.1, the
    earlier NAME.1 as NAME.2 and so on; the oldest is removed. One that another program moved or removed, even with its
    folder, is made anew. Several processes may write lines to the same file.

    Args:
        header: first line of each file, if any.
        limit: bytes a file may have before it is put aside; None for any number.
        keep: how many files put aside stay, at least 1.

    Raises:
        FBClipError, UsageError: the file can't be written, is another's, or begins with another header.
    """

    def __init__(self, path: Path, header: str = "", limit: int | None = 100_000_000, keep: int = 5) -> None:
        if (limit is not None and limit < 1) or keep < 1:
            raise UsageError(f"{path} takes at least a byte and 1 file put aside; got {limit} bytes and {keep} files")
        self.path, self._limit, self._keep = path, limit, keep
        self._header = f"{header}\n".encode() if header else b""
        self._fd: int | None = None
        try:
            with self._alone() as fd:
                size = _size(fd)
                fits = not size or _is_ours(_read_at(fd, LOOKED_AT, 0), self._header)
                if not size:
                    _write_all(fd, self._header)
        except OSError as error:
            self.close()
            raise write_error(error, path) from error
        if not fits:
            self.close()
            form = f"does not begin with {header!r}" if header else "holds no JSON lines of results"
            raise UsageError(f"{path} is there and {form}; choose another file, or remove it")

    def append(self, line: str) -> None:
        """Add a line; an error, as `write_error` makes it, leaves the file as it was, and the next call tries anew."""
        data = line.encode(errors="surrogateescape") + b"\n"
        try:
            with self._alone() as fd:
                size = _size(fd)
                if not (size and self._limit and size + len(data) > self._limit):
                    self._write(fd, size, data)
                    return
                self._put_aside()
            self.append(line)
        except OSError as error:
            self.close()
            raise write_error(error, self.path) from error

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, fd: int, size: int | None, data: bytes) -> None:
        if size == 0:
            data = self._header + data
        elif size and _read_at(fd, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            _write_all(fd, data)
        except BaseException:
            if size is not None:
                os.ftruncate(fd, size)  # a full disk takes the beginning of a line
            raise

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Descriptor of the file that has the name, which no other process writes to or puts aside meanwhile."""
        while True:
            fd = self._current()
            if _size(fd) is not None:
                lock(fd, wait=True)
            if self._is_named(fd):
                break
            self.close()  # it was put aside while this waited
        try:
            yield fd
        finally:
            if self._fd is not None:
                unlock(self._fd)

    def _current(self) -> int:
        if self._fd is not None and self._is_named(self._fd):
            return self._fd
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        return self._fd

    def _is_named(self, fd: int) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _put_aside(self) -> None:
        old = (self._aside(number) for number in range(1, self._keep))
        moving = [self.path, *takewhile(Path.exists, old)]
        if sys.platform == "win32":
            self.close()  # an open file keeps its name there
        for number in range(len(moving), 0, -1):
            moving[number - 1].replace(self._aside(number))
        self.close()

    def _aside(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


class StandardOutput:
    """Whole lines to whoever reads this process's output."""

    def append(self, line: str) -> None:
        try:
            _write_all(sys.stdout.fileno(), line.encode(errors="surrogateescape") + b"\n")
        except BrokenPipeError:
            raise
        except OSError as error:
            raise write_error(error, "standard output") from error

    def close(self) -> None:
        """Standard output stays open."""


def _is_ours(begin: bytes, header: bytes) -> bool:
    """Whether a file that begins so holds what would be added to it; anything else may be dear to somebody."""
    return begin.startswith(header or JSON_BEGINS)


def _size(fd: int) -> int | None:
    """Bytes of a regular file; None of pipes and devices."""
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _read_at(fd: int, count: int, offset: int) -> bytes:
    """Bytes of a regular file, whose writes go to its end wherever this leaves off. Windows has no pread."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, count)


def _write_all(fd: int, data: bytes) -> None:
    while data:  # once, but where the disk fills up (then the rest raises) or a pipe is narrow
        data = data[os.write(fd, data) :]


COLUMNS = (
    "time",
    "index",
    "source",
    "score",
    "threshold",
    "is_anomalous",
    "verdict",
    "reason",
    "regions",
    "weak",
    "largest_peak",
    "model_ms",
    "alarm",
    "memory",
)
OLDER = COLUMNS[:-1]  # of tables that releases before the memory of good parts began


def csv_line(values: Sequence[Any]) -> str:
    """A row of a CSV table, without the end of the line."""
    row = io.StringIO()
    csv.writer(row, lineterminator="\r\n").writerow(values)  # both kinds of line ends are quoted in names
    return row.getvalue().removesuffix("\r\n")


def csv_row(record: Record) -> list[Any]:
    """The values of COLUMNS."""
    prediction = record.prediction
    regions = prediction.regions
    return [
        record.frame.wall,
        record.frame.index,
        record.frame.name,
        prediction.score,
        prediction.threshold,
        prediction.is_anomalous,
        prediction.verdict,
        _reason(prediction),
        len(regions),
        any(region.weak for region in regions),
        max((region.peak for region in regions), default=""),
        round(record.timings_ms["model"], 3),
        record.alarm,
        prediction.memory or "",
    ]


def _reason(prediction: Prediction) -> str:
    """Why the score did not decide; "" where it did."""
    if prediction.verdict == "absent":
        return "no_part"
    return prediction.unusable or prediction.overruled or ""


def columns_of(path: Path) -> tuple[str, ...]:
    """The columns of a table that is to be added to: those that it begins with, where they are an earlier release's."""
    older = f"{','.join(OLDER)}\n".encode()
    try:
        with path.open("rb") as file:
            return OLDER if file.read(len(older)) == older else COLUMNS
    except OSError:  # it isn't there, or can't be read: whoever opens it to write says so
        return COLUMNS


def to_json(item: Record | Notice) -> str:
    """One line of JSON; `kind` is "result", or what the notice is about."""
    kind = item.kind if isinstance(item, Notice) else "result"
    return json.dumps({"kind": kind, **item.to_dict()}, allow_nan=False)


class JsonLines:
    """Records and notices, one JSON object a line.

    Args:
        notices: whether notices are written too.
    """

    name = "json"

    def __init__(self, lines: Lines, notices: bool = True) -> None:
        self._lines, self._notices = lines, notices

    def write(self, record: Record) -> None:
        self._lines.append(to_json(record))

    def notify(self, notice: Notice) -> None:
        if self._notices:
            self._lines.append(to_json(notice))

    def close(self) -> None:
        self._lines.close()


class Csv:
    """A row for each record; a table has no place for notices.

    Args:
        columns: how many of COLUMNS the table has.
    """

    name = "csv"

    def __init__(self, lines: LineFile, columns: int = len(COLUMNS)) -> None:
        self._lines, self._columns = lines, columns

    def write(self, record: Record) -> None:
        self._lines.append(csv_line(csv_row(record)[: self._columns]))

    def notify(self, notice: Notice) -> None:
        pass

    def close(self) -> None:
        self._lines.close()
