"""A sink behind a bounded queue in a thread of its own: it may fail, hang or lag; nobody waits for it for long."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fbclip.errors import FBClipError
from fbclip.runtime.live import Notice, Result, Sink
from fbclip.runtime.timing import Percentiles

STUCK_S = 10.0  # in one write: from then on a sink counts as failing
PAUSES_S = (0.25, 8.0)  # between attempts of a failing sink: the first, doubled up to the last
NOTICES = 256  # that may wait; a camera that flaps must not fill the memory of a sink that hangs

Report = Callable[["Delivery", Notice], None]


class Delivery:
    """One sink's queue and thread.

    What the sink raises as OSError or FBClipError is tried again with growing pauses; what else it raises is a fault of
    its own that would come again, and the item is given up. Either way the first failure after a success is reported,
    and so is the first success after it.

    Args:
        sink: called from the thread alone.
        room: results that may wait.
        lossless: `put` waits for room while the sink works, so that files lose nothing; otherwise, and while the sink
            fails, the oldest waiting result is dropped and counted.
        report: called with this delivery and a notice at each transition, from either thread.
    """

    def __init__(self, sink: Sink, room: int, lossless: bool, report: Report) -> None:
        self.sink, self.room, self.lossless, self.report = sink, room, lossless, report
        self.failure: str | None = None
        self.delivered = self.dropped = 0
        self._ages = Percentiles()
        self._changed = threading.Condition()
        self._waiting: deque[Result | Notice] = deque()
        self._busy_since: float | None = None  # of the present attempt
        self._deadline: float | None = None  # of attempts
        self._closing = False
        # a daemon: a sink that hangs must not keep the process alive
        self._thread = threading.Thread(target=self._work, name=f"sink {sink.name}", daemon=True)
        self._thread.start()

    def put(self, item: Result | Notice) -> None:
        """Hand over an item; waits at most `STUCK_S`, and only where the class says so."""
        kind, limit = (Result, self.room) if isinstance(item, Result) else (Notice, NOTICES)
        with self._changed:
            if self.lossless and kind is Result:
                self._changed.wait_for(lambda: self._count(kind) < limit or self.failure, STUCK_S)
            if self._count(kind) >= limit:
                self._waiting.remove(next(waiting for waiting in self._waiting if isinstance(waiting, kind)))
                self.dropped += 1
            self._waiting.append(item)
            self._changed.notify_all()
            since = self._busy_since
            stuck = since is not None and time.monotonic() - since > STUCK_S and not self.failure
        if stuck:
            self._turn(f"has not answered for {STUCK_S:.0f} s")

    def drain(self, deadline: float) -> None:
        """Nothing is tried again once `time.monotonic()` is at the deadline; returns at once."""
        with self._changed:
            self._deadline = deadline
            self._changed.notify_all()

    def wait_drained(self) -> None:
        """Wait until the sink has taken all that waits, at most until the deadline."""
        with self._changed:
            while (self._waiting or self._busy_since is not None) and not self._late():
                self._changed.wait(self._left())

    def close(self) -> None:
        """Close the sink once it has taken what waits, or is late; returns at once."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self, grace: float = 1.0) -> None:
        """Wait until the sink is closed, or `grace` seconds past the deadline; what it hasn't taken then is lost."""
        self._thread.join(self._left() + grace)
        with self._changed:
            if self._thread.is_alive():
                self.failure = self.failure or "did not close in time"
                self.dropped += len(self._waiting) + (self._busy_since is not None)
                self._waiting.clear()

    def state(self) -> dict[str, Any]:
        with self._changed:
            return {
                "state": "failing" if self.failure else "working",
                "error": self.failure,
                "delivered": self.delivered,
                "dropped": self.dropped,
                "waiting": len(self._waiting),
                "age_ms": self._ages.summary(),
            }

    def _count(self, kind: type) -> int:
        return sum(isinstance(item, kind) for item in self._waiting)

    def _work(self) -> None:
        while (item := self._next()) is not None:
            self._deliver(item)
        with self._changed:
            self.dropped += len(self._waiting)
            self._waiting.clear()
        try:
            self.sink.close()
        except Exception as error:
            self._turn(f"could not close: {error}")

    def _next(self) -> Result | Notice | None:
        """The oldest item, whose delivery begins; None where the sink is to be closed."""
        with self._changed:
            self._busy_since = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting or self._late():
                return None
            self._busy_since = time.monotonic()
            return self._waiting.popleft()

    def _deliver(self, item: Result | Notice) -> None:
        pause, last = PAUSES_S
        while True:
            try:
                if isinstance(item, Result):
                    self.sink.write(item)
                else:
                    self.sink.notify(item)
                break
            except (OSError, FBClipError) as error:
                self._turn(str(error) or type(error).__name__)
            except Exception as error:
                self._turn(f"{type(error).__name__}: {error}")
                self.dropped += 1
                return
            if not self._pause(pause):
                self.dropped += 1
                return
            pause = min(2 * pause, last)
        if isinstance(item, Result):
            self._ages.add((time.monotonic() - item.frame.captured) * 1e3)
            self.delivered += 1
            self._turn(None)

    def _pause(self, seconds: float) -> bool:
        """Wait before another attempt, not longer than until the end begins; whether there is time for one."""
        with self._changed:
            if self._deadline is None:
                self._changed.wait_for(lambda: self._deadline is not None, seconds)
            else:
                self._changed.wait(min(seconds, self._left()))
            self._busy_since = time.monotonic()
            return not self._late()

    def _late(self) -> bool:
        return self._deadline is not None and self._left() == 0

    def _left(self) -> float:
        """Seconds until the deadline."""
        return 0.0 if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _turn(self, failure: str | None) -> None:
        """Note what the sink is doing now, and report it where that is news."""
        with self._changed:
            news = (failure is None) != (self.failure is None)
            self.failure = failure
            if failure is None:
                self._busy_since = time.monotonic()  # it has answered: what follows is no part of a long wait
            self._changed.notify_all()
        if news:
            state = "failing" if failure else "working"
            counters = {"delivered": self.delivered, "dropped": self.dropped}
            notice = Notice(time.time(), "sink", self.sink.name, state, failure or "works again", counters)
            self.report(self, notice)
