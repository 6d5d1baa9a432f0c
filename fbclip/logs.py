"""Log lines: what commands say where nobody watches a terminal, with date and level, as text or as JSON.

A console whose file is a `LogFile` logs what is printed on it; so what people read and what services log is said once.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # takes no type before Python 3.11

RESERVED = ("time", "level", "message")  # what every line of JSON has
SAID = "fbclip.said"


@dataclass(frozen=True)
class Choice:
    """What the options of a command ask for.

    Attributes:
        level: of `logging`; what is less than that isn't said.
        form: "auto", "text" or "json". auto: plain lines, and text with date and level of a service without a terminal.
    """

    level: int = logging.INFO
    form: str = "auto"


choice = Choice()  # of this process
_handler: logging.StreamHandler[TextIO] | None = None  # of its log lines; None where what is said is printed


def choose(level: str, form: str, quiet: bool) -> None:
    """Set what is said, and how, before the first console is made.

    Args:
        level: "debug", "info", "warning" or "error".
        quiet: nothing below a warning, whatever the level.
    """
    global choice
    number = logging.getLevelName(level.upper())  # which gives the number of a name
    choice = Choice(max(number, logging.WARNING) if quiet else number, form)


def level_of(style: str) -> int:
    """How bad what is printed in a colour is."""
    return {"yellow": logging.WARNING, "red": logging.ERROR, "bold red": logging.ERROR}.get(style, logging.INFO)


class LogFile(io.TextIOBase):
    """A file for a console: each line that is written is logged."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream behind it: rich draws tables with what it has."""
        return self._encoding

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            self.log(logging.INFO, line.rstrip())
        return len(text)

    def log(self, level: int, line: str, when: float | None = None, fields: dict[str, Any] | None = None) -> None:
        """Log a line.

        Args:
            line: printable.
            when: seconds since 1970; None for now.
            fields: more values, for JSON.

        Raises:
            OSError: nobody takes it.
        """
        log = logging.getLogger(SAID)
        if log.isEnabledFor(level):
            record = log.makeRecord(SAID, level, "", 0, line, (), None, extra={"fields": fields or {}})
            record.created = record.created if when is None else when
            log.handle(record)


def open_log(stream: TextIO, service: bool) -> LogFile | None:
    """Where a console writes so that lines come out as they were asked for; None for the stream itself.

    From here on what the program's own libraries log goes to the stream too, in the same form.

    Args:
        service: whether the command runs on and on, so that its lines need a date.
    """
    global _handler
    form = choice.form
    if form == "auto":
        form = "text" if service and not stream.isatty() else "plain"
    if form == "plain" and choice.level == logging.INFO:
        return None
    _handler = _Handler(stream)
    _handler.setFormatter({"plain": Plain, "text": Dated, "json": Json}[form]())
    log = logging.getLogger("fbclip")
    log.handlers, log.propagate = [_handler], False
    log.setLevel(choice.level)
    logging.getLogger("fbclip.tensorrt").propagate = choice.level <= logging.DEBUG  # pages of its own
    return LogFile(getattr(stream, "encoding", None) or "utf-8")


def make_handler(otherwise: logging.Formatter) -> logging.Handler:
    """For loggers of other libraries: to where this command's log goes, in its form; without one to standard error."""
    handler = _Handler(_handler.stream if _handler else sys.stderr)
    handler.setFormatter(_handler.formatter if _handler else otherwise)
    handler.setLevel(choice.level)
    return handler


def warn_early(line: str) -> None:
    """Say a warning, one line, on standard error before the command's log is open."""
    if choice.level <= logging.WARNING:
        print(_alone(line, logging.WARNING, "fbclip: warning: "), file=sys.stderr)


def last_line(line: str) -> str:
    """How the error is told that ended the command, one line: as "fbclip: …", in a log of JSON as one more line of it."""
    return _alone(line, logging.ERROR, "fbclip: ")


def _alone(line: str, level: int, prefix: str) -> str:
    if choice.form != "json":
        return f"{prefix}{line}"
    return Json().format(logging.makeLogRecord({"msg": line, "levelname": logging.getLevelName(level), "fields": {}}))


class Plain(logging.Formatter):
    """What happened in one line: of an exception its kind, its words and the line it came from."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage().partition("\n")[0]
        if record.exc_info and (error := record.exc_info[1]):
            file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
            text += f": {type(error).__name__}: {error} ({Path(file).name}:{line})"
        return text if record.name == SAID else " ".join(text.split())


class Dated(Plain):
    """2026-11-27T08:30:00+01:00 WARNING …"""

    def format(self, record: logging.LogRecord) -> str:
        of = "" if record.name == SAID else f"{record.name}: "
        return f"{_iso(record.created, 'seconds')} {record.levelname:7} {of}{super().format(record)}"


class Json(Plain):
    """One object a line: time (ISO 8601 with zone), level, message, and what else there is."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {"logger": record.name})
        values = {
            "time": _iso(record.created, "milliseconds"),
            "level": record.levelname.lower(),
            "message": super().format(record),
            **{name: value for name, value in fields.items() if name not in RESERVED},
        }
        return json.dumps(values, default=str, allow_nan=False)


class _Handler(_StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        """Whoever says something is told that nobody takes it; libraries go on."""
        if record.name == SAID:
            raise  # called while the error is handled


def _iso(seconds: float, precision: str) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec=precision)
