"""What flows from a source to the sinks: frames, records of them, and what happens to either end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fbclip.runtime.prediction import Prediction

HUGE = 25_000_000  # pixels of a frame, above which its pictures are shrunk
HUGE_SIDE = 4096  # pixels of their longer side then


@dataclass(frozen=True)
class Frame:
    """One picture of a source.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        name: what records call it: the file's path, or the source and the frame's number.
        index: number of the frame since the source began, from 0; dropped ones count.
        captured: seconds of `time.monotonic()` when the frame was there: results are as old as the time since then.
        wall: seconds since 1970 at the same moment.
        read_ms: milliseconds that reading and decoding took.
    """

    image: NDArray[np.uint8]
    name: str
    index: int
    captured: float
    wall: float
    read_ms: float = 0.0


class Source(Protocol):
    """Where frames come from; see `fbclip.runtime.live.sources`.

    Attributes:
        name: as records and notices call it, without passwords.
        live: whether frames that nobody took in time are dropped; a source that isn't waits, and loses none.
        still: whether its pictures don't follow each other in time, like files of a folder: no vote, no alarm over time.
        total: how many pictures there are; None where nobody knows.
    """

    name: str
    live: bool
    still: bool
    total: int | None

    @property
    def counters(self) -> dict[str, int]:
        """Running totals: frames (handed out), dropped, reconnects, and a count for each kind of fault."""

    def __iter__(self) -> Iterator[Frame]: ...

    def listen(self, callback: Callable[[Notice], None]) -> None:
        """Call back at each notice of this source, from a thread of its own."""

    def close(self) -> None:
        """End the iteration and release everything; from any thread, more than once."""


@dataclass(frozen=True, repr=False)
class Record:
    """What is delivered of one frame.

    Attributes:
        frame, prediction: the picture, and what the model says of it alone.
        alarm: the verdict over time: whether an alarm is on. Of stills: whether this one has a defect.
        alarm_began: whether this very frame raised it.
        timings_ms: milliseconds by stage: read, wait (until the model takes it), preprocess, model, postprocess.
        overlay, map: the files where its picture and its anomaly map are kept; None for nowhere.
    """

    frame: Frame
    prediction: Prediction
    alarm: bool
    alarm_began: bool
    timings_ms: dict[str, float]
    overlay: str | None = None
    map: str | None = None
    _drawing: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)
    _drawn: dict[tuple[int | None, bool], NDArray[np.uint8]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __repr__(self) -> str:
        prediction = self.prediction
        return f"Record({self.frame.name!r}, {prediction.verdict} {prediction.score:.3f}, alarm={self.alarm})"

    def draw(self, longest: int | None = None, tiles: bool = False) -> NDArray[np.uint8]:
        """`Prediction.overlay`, drawn when the first sink asks and shared by all: nothing may be drawn on it. Of a frame of
        more than `HUGE` pixels its longer side has `HUGE_SIDE` at most."""
        sides = self.frame.image.shape[:2]
        if sides[0] * sides[1] > HUGE:
            longest = min(longest or HUGE_SIDE, HUGE_SIDE)
        if longest and longest >= max(sides):
            longest = None  # the same picture
        with self._drawing:
            if (longest, tiles) not in self._drawn:
                self._drawn[longest, tiles] = self.prediction.overlay(longest, tiles=tiles)
            return self._drawn[longest, tiles]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without the arrays."""
        values = self.prediction.to_dict()
        values.pop("timings_ms")
        return {
            "source": self.frame.name,
            "index": self.frame.index,
            "time": self.frame.wall,
            **values,
            "alarm": self.alarm,
            "overlay": self.overlay,
            "map": self.map,
            "timings_ms": {stage: round(value, 3) for stage, value in self.timings_ms.items()},
        }


@dataclass(frozen=True)
class Notice:
    """Something that happened besides results: a camera that left, scores that drift, a sink that fails.

    Attributes:
        time: seconds since 1970.
        kind: "source", "sink", "drift", "alarm" or "run".
        subject: which source or sink.
        state: what it is now: of a source "connecting", "live", "lost", "blind" (frames come, and show nothing) or
            "ended"; of a sink "failing" or "working"; of drift "drifting" or "steady"; of an alarm "on" or "off"; of a
            run "started" or "ended".
        message: one line for a person.
        counters: running totals by name (frames, dropped, reconnects, …).
    """

    time: float
    kind: str
    subject: str
    state: str
    message: str
    counters: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Sink(Protocol):
    """Where records go. Each is called from one thread of its own; what it raises is reported and tried again."""

    name: str

    def write(self, record: Record) -> None:
        """Take one record; OSError or FBClipError where it can't now."""

    def notify(self, notice: Notice) -> None:
        """Take a notice; the same errors."""

    def close(self) -> None:
        """Flush and release everything."""
