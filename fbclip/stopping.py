"""How a command ends: Ctrl-C and SIGTERM as a note, so that work in progress is finished and saved; threads that hang."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any
from weakref import WeakSet

may_hang: WeakSet[threading.Thread] = WeakSet()  # daemon threads in calls into drivers, which need not return


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
            heard = (n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN)
            self.before = {n: signal.signal(n, self._note) for n in heard}  # what the shell has ignored stays so
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.announce and not self.signal:
            print(f"{signal.Signals(number).name}: {self.announce}", file=sys.stderr)
        self.signal = number


@contextmanager
def ending() -> Iterator[None]:
    """Around a command: where a thread of `may_hang` does, the process ends at once when the command has, with its exit code.

    Such a thread would come back from C++ to an interpreter that is being taken apart, which ends the process by abort.
    """
    try:
        yield
    finally:
        if any(thread.is_alive() for thread in may_hang):
            error = sys.exc_info()[1]
            code = error.code if isinstance(error, SystemExit) else 1 if error else 0
            with suppress(OSError, ValueError):  # nobody reads them any more
                if error and not isinstance(error, SystemExit):
                    sys.excepthook(type(error), error, error.__traceback__)
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1 if code else 0)
