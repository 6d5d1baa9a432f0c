"""Frames that come when they want to: a capture thread that keeps only the newest, and outlives what happens to cameras."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from math import inf
from threading import Condition, Event, Lock, Thread, current_thread

from fbclip.errors import FBClipError, UsageError, reason
from fbclip.runtime.live.records import Frame, Notice
from fbclip.runtime.live.sources.devices import FAULTS, Device, Fault
from fbclip.stopping import may_hang

CLOSE_S = 1.0  # to let threads end
STUCK = 4  # connections that hang before no more are made: each holds a thread and a descriptor
COUNTERS = ("frames", "dropped", "reconnects", *FAULTS, "resized")


@dataclass(frozen=True)
class CaptureOptions:
    """How a source is read.

    Attributes:
        resolution: (width, height) to ask a camera for; None leaves it as it is.
        fps: frames per second to ask a camera for.
        every: take each Nth frame or image, the first included.
        give_up: seconds without a frame (or without the watched folder) after which a live source fails; None is never.
        watch: the source is a folder that images are dropped into.
        stall: seconds without a frame after which a live source counts as stalled; at least three of its frames.
        retry_s: seconds between two tries to connect, the first and the longest pause: a camera that is back must give a
            result within 2 s.
        settled_s: seconds after which a file in a watched folder that was not written to is whole.
        skip_first: frames that are left out after each connect to a live source: until a camera has found its exposure
            and a decoder its key frame, they are green, grey or dark.

    Raises:
        UsageError: a value out of range.
    """

    resolution: tuple[int, int] | None = None
    fps: float | None = None
    every: int = 1
    give_up: float | None = None
    watch: bool = False
    stall: float = 5.0
    skip_first: int = 0
    retry_s: tuple[float, float] = (0.1, 1.0)
    settled_s: float = 2.0

    def __post_init__(self) -> None:
        if self.resolution and min(self.resolution) < 1:
            raise UsageError(
                "a resolution is WIDTHxHEIGHT in pixels; got {}x{}".format(*self.resolution), option="resolution"
            )
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise UsageError(f"a rate is above 0, up to 1000 frames per second; got {self.fps:g}", option="fps")
        if self.every < 1:
            raise UsageError(f"1 is every frame, 2 every second one; got {self.every}", option="every")
        if self.skip_first < 0:
            raise UsageError(f"a number of frames is 0 or more; got {self.skip_first}", option="skip_first")
        if self.give_up is not None and not self.give_up > 0:
            raise UsageError(f"a time to give up after is above 0 s; got {self.give_up:g}", option="give_up")


class BaseSource:
    """An iterator of frames. Close it (or leave its `with`) when done.

    What it is besides a `Source`: options, counters, listeners.
    """

    live = False
    still = False
    total: int | None = None

    def __init__(self, name: str, options: CaptureOptions) -> None:
        self.name = name
        self.options = options
        self._counters = dict.fromkeys(COUNTERS, 0) | ({"warm_up": 0} if options.skip_first else {})
        self._listeners: list[Callable[[Notice], None]] = []
        self._closed = Event()

    @property
    def counters(self) -> dict[str, int]:
        """frames (handed out), dropped, reconnects, and a count per fault: missing, refused, cut, stalled, garbage, resized;
        warm_up, frames left out after a connect, where `skip_first` asks for that."""
        return dict(self._counters)

    def listen(self, callback: Callable[[Notice], None]) -> None:
        """Call back at each transition, from a thread of the source: quickly, and before the first frame to miss none."""
        self._listeners.append(callback)

    def _notify(self, state: str, message: str) -> None:
        notice = Notice(time.time(), "source", self.name, state, message, self.counters)
        for callback in self._listeners:
            callback(notice)

    def close(self) -> None:
        """End the iteration and release everything; from any thread, more than once."""
        self._closed.set()

    def __enter__(self) -> BaseSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        raise NotImplementedError


class _Link:
    """One connection and its thread, which is left to itself where a call into the device does not return."""

    def __init__(self) -> None:
        self.abandoned = False
        self.fault: Fault | None = None  # why it ended
        self.began = time.monotonic()
        self.first = self.last = 0.0  # when frames came; 0 is never
        self.skipped = self.frames = self.garbage = 0  # skipped: of `skip_first`, which count as no frames


class LiveSource(BaseSource):
    """The newest frame of a camera or stream, for ever.

    A reader thread has the device to itself and may hang in it. A supervisor thread waits for it no longer than a frame
    may take, then abandons it (it ends when the device lets it) and starts another.

    Args:
        connect: opens the device or raises Fault; called from a new thread each time.

    Iterating raises FBClipError after `give_up` seconds without a frame.
    """

    live = True

    def __init__(self, name: str, connect: Callable[[], Device], options: CaptureOptions) -> None:
        super().__init__(name, options)
        self._connect = connect
        self._stall = max(options.stall, 3 / options.fps if options.fps else 0)
        self._supervisor: Thread | None = None
        self._readers: list[Thread] = []
        self._lock = Lock()  # of everything below
        self._arrived = Condition(self._lock)  # a frame, or the end: for whoever iterates
        self._trouble = Condition(self._lock)  # news, or a link that ended: for the supervisor
        self._link = _Link()
        self._slot: Frame | None = None
        self._index = 0
        self._size: tuple[int, int] | None = None  # (width, height) of the last frame
        self._lost = 0.0  # when the last frame came, or the first try began
        self._news: list[str] = []
        self._failure: BaseException | None = None

    def __next__(self) -> Frame:
        with self._lock:
            if self._supervisor is None and not self._closed.is_set():
                self._supervisor = Thread(target=self._supervise, name=f"supervise {self.name}", daemon=True)
                self._supervisor.start()
                # a thread that comes back from OpenCV to an interpreter in ruins would end the process by abort
                atexit.register(self.close)
            while not (self._slot or self._failure or self._closed.is_set()):
                self._arrived.wait()
            if self._closed.is_set():
                raise StopIteration
            if self._slot is None:
                assert self._failure
                raise self._failure
            frame, self._slot = self._slot, None
            self._counters["frames"] += 1
            return frame

    def close(self) -> None:
        super().close()
        atexit.unregister(self.close)
        with self._lock:
            self._link.abandoned = True
            self._arrived.notify_all()
            self._trouble.notify_all()
        deadline = time.monotonic() + CLOSE_S
        for thread in [self._supervisor, *self._readers]:
            if thread and thread is not current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _supervise(self) -> None:
        try:
            self._keep_connected()
            self._notify("ended", "closed")
        except BaseException as error:  # what listeners raise too: whoever iterates must not wait for ever
            with self._lock:
                self._failure = error
                self._link.abandoned = True
                self._arrived.notify_all()
            self._notify("ended", reason(error))

    def _keep_connected(self) -> None:
        self._notify("connecting", f"connecting to {self.name}")
        self._lost = time.monotonic()
        told: set[str] = set()  # causes since the last frame: an outage of a month is a line or two
        first_pause, longest_pause = self.options.retry_s
        delay = first_pause
        fault: Fault | None = None
        while fault := self._run_link(fault):
            link = self._link
            if link.frames:
                told.clear()
                self._lost = link.last
                if link.last - link.first > longest_pause:
                    delay = first_pause
            if fault.cause not in told:
                told.add(fault.cause)
                with self._lock:
                    self._counters[fault.cause] += 1
                self._notify("lost", f"{fault}; trying again every {longest_pause:g} s")
            left = self._give_up_at() - time.monotonic()
            if left <= 0:
                raise FBClipError(
                    f"{self.name} gave no frame for {self.options.give_up:g} s: {fault}", option="give_up"
                )
            self._closed.wait(min(delay, left))
            delay = min(2 * delay, longest_pause)

    def _give_up_at(self) -> float:
        return inf if self.options.give_up is None else self._lost + self.options.give_up

    def _run_link(self, before: Fault | None) -> Fault | None:
        """Connect, and return why the connection failed, or None when the source was closed.

        Args:
            before: why the one before failed.
        """
        self._readers = [reader for reader in self._readers if reader.is_alive()]
        with self._lock:  # from here on `close` finds this link to abandon
            if self._closed.is_set():
                return None
            link = self._link = _Link()
        if len(self._readers) >= STUCK:
            return Fault("stalled", f"{STUCK} connections hang, waiting for one to end")
        reader = Thread(target=self._read, args=(link,), name=f"read {self.name}", daemon=True)
        may_hang.add(reader)
        self._readers.append(reader)
        reader.start()
        while True:
            with self._lock:
                while not self._news:
                    if self._closed.is_set() or link.fault:
                        return None if self._closed.is_set() else link.fault
                    patience = link.last + self._stall if link.last else link.began + 2 * self._stall
                    deadline = patience if link.frames else min(patience, self._give_up_at())
                    left = deadline - time.monotonic()
                    if left <= 0:
                        link.abandoned = True
                        if before and deadline < patience:  # cut short by give_up, it says nothing new
                            return before
                        undecodable = f", {link.garbage} undecodable ones" if link.garbage else ""
                        waited = time.monotonic() - (link.last or link.began)
                        return Fault("stalled", f"no frame for {waited:.1f} s{undecodable}")
                    self._trouble.wait(left)
                news, self._news = self._news, []
            for message in news:
                self._notify("live", message)

    def _read(self, link: _Link) -> None:
        """Thread: open the device and hand its frames over until it fails or is abandoned."""
        fault = Fault("cut", "abandoned")
        try:
            with closing(self._connect()) as device:
                while not link.abandoned:
                    device.grab()
                    self._publish(link, device)
        except Fault as error:
            fault = error
        except Exception as error:  # cv2.error, and whatever else a driver makes of a pulled plug
            fault = Fault("cut", reason(error))
        with self._lock:
            link.fault = fault
            self._trouble.notify()

    def _publish(self, link: _Link, device: Device) -> None:
        captured, wall = time.monotonic(), time.time()
        if link.skipped < self.options.skip_first:
            with self._lock:
                if not link.abandoned:
                    self._index += 1
                    link.skipped += 1
                    self._counters["warm_up"] += 1
                    link.last = captured
            return
        image = fault = None
        read_ms = 0.0
        if link.frames % self.options.every == 0:  # the first of each connection among them: no waiting after an outage
            try:
                start = time.perf_counter()
                image = device.retrieve()
                read_ms = (time.perf_counter() - start) * 1e3
            except Fault as error:
                fault = error
        with self._lock:
            if link.abandoned:
                return
            index = self._index
            self._index += 1
            if fault:  # no sign of life: a camera that sends nothing else has stalled
                link.garbage += 1
                self._counters["garbage"] += 1
                if link.garbage == 1:
                    self._report(f"skipped {fault}; more of them are only counted")
                return
            link.frames += 1
            link.last = captured
            if image is None:
                return
            size = (image.shape[1], image.shape[0])
            if link.frames == 1:
                link.first = captured
                self._announce(size)
            elif size != self._size:
                self._report(f"frames are {_by(size)} now, were {_by(self._size)}")
            self._counters["resized"] += self._size not in (None, size)
            self._size = size
            self._counters["dropped"] += self._slot is not None
            self._slot = Frame(image, f"{self.name}#{index}", index, captured, wall, read_ms)
            self._arrived.notify()

    def _announce(self, size: tuple[int, int]) -> None:
        asked = self.options.resolution
        but = f" (asked for {_by(asked)})" if asked not in (None, size) else ""
        but += f" (after {self.options.skip_first} frames left out)" if self.options.skip_first else ""
        if self._size is None:
            self._report(f"live at {_by(size)}{but}")
        else:
            self._counters["reconnects"] += 1
            self._report(f"live again after {time.monotonic() - self._lost:.1f} s at {_by(size)}{but}")

    def _report(self, message: str) -> None:
        self._news.append(message)
        self._trouble.notify()


def _by(size: tuple[int, int] | None) -> str:
    return "{}x{}".format(*size) if size else "of no size"
