"""Ctrl-C and SIGTERM as a note, so that work in progress is finished and saved before a command ends."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Inside, Ctrl-C and SIGTERM only leave a note in `signal`.

    Args:
        announce: what to say on standard error when the first one comes; None for nothing.
    """

    def __init__(self, announce: str | None) -> None:
        self.signal: int | None = None
        self.announce = announce
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.announce and not self.signal:
            print(f"{signal.Signals(number).name}: {self.announce}", file=sys.stderr)
        self.signal = number
