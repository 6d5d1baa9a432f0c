"""What flows from a camera to the sinks: frames, results, and what happens to either end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fbclip.runtime.prediction import Prediction


@dataclass(frozen=True)
class Frame:
    """One picture of a source.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        name: what results call it: the file's path, or the source and the frame's number.
        index: number of the frame since the source began, from 0; dropped ones count.
        captured: seconds of `time.monotonic()` when the frame was there: results are as old as the time since then.
        wall: seconds since 1970 at the same moment.
    """

    image: NDArray[np.uint8]
    name: str
    index: int
    captured: float
    wall: float


@dataclass(frozen=True)
class Result:
    """What is delivered of one frame.

    Attributes:
        frame, prediction: the picture, and what the model says of it alone.
        alarm: the verdict over time (`--vote`): whether an alarm is on.
        alarm_began: whether this very frame raised it.
        stages_ms: milliseconds by stage: wait (capture to model), preprocess, model, postprocess.
    """

    frame: Frame
    prediction: Prediction
    alarm: bool
    alarm_began: bool
    stages_ms: dict[str, float]
    _drawing: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)
    _drawn: dict[int | None, NDArray[np.uint8]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def overlay(self, longest: int | None = None) -> NDArray[np.uint8]:
        """`Prediction.overlay`, drawn when the first sink asks and shared by all: nothing may be drawn on it."""
        if longest and longest >= max(self.frame.image.shape[:2]):
            longest = None  # the same picture
        with self._drawing:
            if longest not in self._drawn:
                self._drawn[longest] = self.prediction.overlay(longest)
            return self._drawn[longest]

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
            "stages_ms": {stage: round(value, 3) for stage, value in self.stages_ms.items()},
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
    """Where results go. Each is called from one thread of its own; what it raises is reported and tried again."""

    name: str

    def write(self, result: Result) -> None:
        """Take one result; OSError or FBClipError where it can't now."""

    def notify(self, notice: Notice) -> None:
        """Take a notice; the same errors."""

    def close(self) -> None:
        """Flush and release everything."""
