"""A sink behind a bounded queue in a thread of its own: it may fail, hang or lag; nobody waits for it for long."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from fbclip.errors import FBClipError
from fbclip.runtime.live.records import Notice, Record, Sink
from fbclip.runtime.live.status import SinkStatus
from fbclip.runtime.live.timing import Percentiles
from fbclip.stopping import may_hang

STUCK_S = 10.0
PAUSES_S = (0.25, 8.0)
NOTICES = 256  # that may wait; a camera that flaps must not fill the memory of a sink that hangs

TOO_SLOW = "it was too slow"

Report = Callable[["Delivery", Notice], None]


class Queued(OSError):
    """What a sink raises that has taken an item and can't pass it on yet: it counts as failing, and is offered the next.

    What it has passed on until it is closed is not lost, or `close` raises Lost.
    """


class Lost(OSError):
    """What a sink raises that has lost items for good, and why: they are counted, and not offered again."""

    def __init__(self, count: int, message: str) -> None:
        super().__init__(message)
        self.count = count


class Delivery:
    """One sink's queue and thread.

    What the sink raises as OSError or FBClipError is tried again with growing pauses, but for Queued, after which the item
    is the sink's, and Lost; what else it raises is a fault of its own that would come again, and the item is given up.
    Either way the first failure after a success is reported, and so is the first success after it.

    Args:
        sink: called from the thread alone.
        room: results that may wait.
        lossless: `put` waits for room while the sink works, so that files lose nothing; otherwise, and while the sink
            fails, the oldest waiting result is dropped and counted.
        report: called with this delivery and a notice at each transition, from either thread.
        stuck_s: seconds in one write from which on a sink counts as failing.
        pauses_s: seconds between attempts of a failing sink: the first pause, doubled up to the last.
    """

    def __init__(
        self,
        sink: Sink,
        room: int,
        lossless: bool,
        report: Report,
        stuck_s: float = STUCK_S,
        pauses_s: tuple[float, float] = PAUSES_S,
    ) -> None:
        self.sink, self.room, self.lossless, self.report = sink, room, lossless, report
        self._stuck_s, self._pauses_s = stuck_s, pauses_s
        self.failure: str | None = None
        self.delivered = self.dropped = 0
        self.dropped_because: str | None = None  # the last time, and rather a failure than that it was too slow
        self._takes = True  # as it did last time, failing or not
        self._ages = Percentiles()
        self._changed = threading.Condition()
        self._waiting: deque[Record | Notice] = deque()
        self._busy_since: float | None = None  # of the present attempt
        self._deadline: float | None = None  # of attempts
        self._closing = False
        # a daemon: a sink that hangs must not keep the process alive
        self._thread = threading.Thread(target=self._work, name=f"sink {sink.name}", daemon=True)
        may_hang.add(self._thread)
        self._thread.start()

    def put(self, item: Record | Notice) -> None:
        """Hand over an item; waits at most `stuck_s`, and only where the class says so."""
        kind, limit = (Record, self.room) if isinstance(item, Record) else (Notice, NOTICES)
        with self._changed:
            if self.lossless and kind is Record:
                self._changed.wait_for(lambda: self._count(kind) < limit or not self._takes, self._stuck_s)
            if self._count(kind) >= limit:
                self._waiting.remove(next(waiting for waiting in self._waiting if isinstance(waiting, kind)))
                self._drop(1, self.failure or TOO_SLOW)
            self._waiting.append(item)
            self._changed.notify_all()
            since = self._busy_since
            stuck = since is not None and time.monotonic() - since > self._stuck_s and not self.failure
        if stuck:
            self._turn(f"has not answered for {self._stuck_s:.0f} s", takes=False)

    def settle(self) -> None:
        """Wait until nothing waits, at most `stuck_s`; not for a sink that fails."""
        with self._changed:
            self._changed.wait_for(
                lambda: not (self._waiting or self._busy_since) or not self._takes or self._deadline is not None,
                self._stuck_s,
            )

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
                self._drop(len(self._waiting) + (self._busy_since is not None), self.failure)
                self._waiting.clear()

    def status(self) -> SinkStatus:
        with self._changed:
            return SinkStatus(
                "failing" if self.failure else "working",
                self.failure,
                self.delivered,
                self.dropped,
                self.dropped_because,
                len(self._waiting),
                self._ages.summary(),
            )

    def _count(self, kind: type) -> int:
        return sum(isinstance(item, kind) for item in self._waiting)

    def _work(self) -> None:
        while (item := self._next()) is not None:
            self._deliver(item)
        with self._changed:
            self._drop(len(self._waiting), self.failure or TOO_SLOW)
            self._waiting.clear()
        try:
            self.sink.close()
        except Lost as error:
            self._give_up(error.count, str(error))
        except Exception as error:
            self._turn(f"could not close: {error}", takes=False)
        else:
            if self._takes:  # and now it has passed on what it had taken
                self._turn(None)

    def _next(self) -> Record | Notice | None:
        """The oldest item, whose delivery begins; None where the sink is to be closed."""
        with self._changed:
            self._busy_since = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting or self._late():
                return None
            self._busy_since = time.monotonic()
            return self._waiting.popleft()

    def _deliver(self, item: Record | Notice) -> None:
        pause, last = self._pauses_s
        failure = None
        while True:
            try:
                if isinstance(item, Record):
                    self.sink.write(item)
                else:
                    self.sink.notify(item)
                break
            except Queued as error:
                failure = str(error)
                break
            except Lost as error:
                self._give_up(error.count, str(error))
                return
            except (OSError, FBClipError) as error:
                self._turn(str(error) or type(error).__name__, takes=False)
            except Exception as error:
                self._give_up(1, f"{type(error).__name__}: {error}")
                return
            if not self._pause(pause):
                with self._changed:
                    self._drop(1, self.failure or TOO_SLOW)
                return
            pause = min(2 * pause, last)
        if isinstance(item, Record):
            self._ages.add((time.monotonic() - item.frame.captured) * 1e3)
            self.delivered += 1
        if failure or isinstance(item, Record):
            self._turn(failure)

    def _give_up(self, count: int, failure: str) -> None:
        with self._changed:
            self._drop(count, failure)
        self._turn(failure, takes=False)

    def _drop(self, count: int, reason: str) -> None:
        self.dropped += count
        if count and (reason != TOO_SLOW or not self.dropped_because):
            self.dropped_because = reason

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

    def _turn(self, failure: str | None, takes: bool = True) -> None:
        """Note what the sink is doing now, and report it where that is news."""
        with self._changed:
            news = (failure is None) != (self.failure is None)
            self.failure, self._takes = failure, takes
            if failure is None:
                self._busy_since = time.monotonic()  # it has answered: what follows is no part of a long wait
            self._changed.notify_all()
        if news:
            state = "failing" if failure else "working"
            counters = {"delivered": self.delivered, "dropped": self.dropped}
            notice = Notice(time.time(), "sink", self.sink.name, state, failure or "works again", counters)
            self.report(self, notice)
