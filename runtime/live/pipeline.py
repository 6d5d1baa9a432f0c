"""Frames to verdicts to sinks, overlapped: each stage in a thread of its own, one item ahead, bounded everywhere.

A frame is prepared while the model looks at the one before, and the one before that is concluded and handed out. The
backend is used from one thread. A live source drops frames while all of this is busy; a file waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fbclip.errors import ImageError
from fbclip.runtime.live.alarm import Decider
from fbclip.runtime.live.delivery import Delivery
from fbclip.runtime.live.records import Frame, Notice, Result, Sink
from fbclip.runtime.live.timing import Percentiles, Rate
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.sight import EXPLAINED, Repetition, find_blindness

STAGES = ("wait", "preprocess", "model", "postprocess")
LOST_S = 5.0  # without a source at the end of a run that is no mere reconnecting
T = TypeVar("T")


class Source(Protocol):
    """Where frames come from; see `fbclip.runtime.live.sources`."""

    name: str
    live: bool  # frames may be dropped

    @property
    def counters(self) -> dict[str, int]: ...
    def __iter__(self) -> Iterator[Frame]: ...
    def listen(self, callback: Callable[[Notice], None]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Limits:
    """When to end, and how much may pile up.

    Attributes:
        max_frames: results after which the run ends; None for no end.
        duration: seconds after which it ends, frames or not; None for no end.
        room: results that wait for a sink at most. Sinks share its frame and map, 14 MB at 1920x1080, and
            its overlay once one of them has asked for it, 6 MB.
        close_s: seconds that sinks have at the end for what waits.
    """

    max_frames: int | None = None
    duration: float | None = None
    room: int = 8
    close_s: float = 5.0


@dataclass(frozen=True)
class LiveSummary:
    """What a run did.

    Attributes:
        frames: results handed to the sinks.
        anomalous, alarms: of these, defects and alarms raised.
        overruled: of these, good ones whose score reaches the threshold (see `Prediction.overruled`).
        unusable: of these, such that show nothing.
        unfit, misfit: frames that could not be inspected, like one of another size than the graph takes, and why.
        absence: why the source gave nothing to inspect when the run ended; "" where it did.
        seconds: from start to end.
        status: the last `Pipeline.status()`.
    """

    frames: int
    anomalous: int
    alarms: int
    overruled: int
    unusable: int
    unfit: int
    misfit: str
    absence: str
    seconds: float
    status: dict[str, Any]


class _Prepared(NamedTuple):
    frame: Frame
    batch: NDArray[np.uint8]
    unusable: str | None
    preprocess_ms: float


class _Scored(NamedTuple):
    frame: Frame
    score: float
    model_map: NDArray[np.float32]
    unusable: str | None
    stages_ms: dict[str, float]


class Pipeline:
    """A run from a source to sinks.

    Args:
        source: iterated once, closed at the end.
        predictor: its backend is used from one thread of this run.
        sinks: each gets a queue and a thread; all are closed at the end.
        decider: from predictions to the alarm.
        limits: when to end, and how much may pile up.
    """

    def __init__(
        self,
        source: Source,
        predictor: Predictor,
        sinks: list[Sink],
        decider: Decider | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.source, self.predictor = source, predictor
        self.decider, self.limits = decider or Decider(), limits or Limits()
        self._camera = {"name": source.name, "state": "connecting", "message": ""}
        self._stopping = threading.Event()
        self._began = time.monotonic()
        self._ages, self._rate = Percentiles(), Rate()
        self._stages = {stage: Percentiles() for stage in STAGES}
        self._frames = self._anomalous = self._alarms = self._overruled = self._unusable = self._unfit = 0
        self._misfitting, self._misfit = False, ""
        self._repetition = Repetition()
        self._blindness: str | None = None  # of the last frame
        self._lost_at, self._loss = 0.0, ""  # since when the source is lost, and why; "" while it is not
        self._last: Result | None = None
        self._deliveries = [Delivery(sink, self.limits.room, not source.live, self._sink_turned) for sink in sinks]
        source.listen(self._heard)

    def run(self) -> LiveSummary:
        """Block until the source ends, a limit is reached or `stop` is called; frames in work are finished.

        Raises:
            ImageError: the first frame of a live source can't be inspected, so none will.
            FBClipError: of the source or the model. Sinks are closed before.
        """
        self._began = time.monotonic()
        self._tell_run("started", "the run began")
        with ExitStack() as stack:
            stack.callback(self._close_sinks)
            prepared = ahead(self._prepared(), "preprocess")
            stack.callback(prepared.close)
            results = ahead(self._scored(prepared), "model")
            stack.callback(results.close)
            stack.callback(self.source.close)  # first of all, for the stages may wait for a frame
            if self.limits.duration is not None:
                timer = threading.Timer(self.limits.duration, self.stop)
                timer.daemon = True
                timer.start()
                stack.callback(timer.join)  # no thread stays behind
                stack.callback(timer.cancel)
            for scored in results:
                self._conclude(*scored)
            seconds = time.monotonic() - self._began
        return LiveSummary(
            self._frames,
            self._anomalous,
            self._alarms,
            self._overruled,
            self._unusable,
            self._unfit,
            self._misfit,
            self._absence(),
            seconds,
            self.status(),
        )

    def stop(self) -> None:
        """End the run soon, from any thread: no more frames are taken, those in work are finished."""
        self._stopping.set()
        self.source.close()

    def set_threshold(self, threshold: float) -> None:
        """Scores from here on are anomalous, from the next concluded frame on.

        Raises:
            UsageError: no probability.
        """
        self.predictor.set_threshold(threshold)

    def status(self) -> dict[str, Any]:
        """What is going on, as plain values; from any thread.

        Milliseconds are p50, p95 and p99 over the last thousand results (None before the first): `age_ms` from
        capture until handed to the sinks, `stages_ms` by stage, and each sink's own age until it was written.
        """
        last, drift = self._last, self.decider.drift
        return {
            "seconds": round(time.monotonic() - self._began, 1),
            "source": {**self._camera, "live": self.source.live, "counters": dict(self.source.counters)},
            "frames": self._frames,
            "anomalous": self._anomalous,
            "alarms": self._alarms,
            "overruled": self._overruled,
            "unusable": self._unusable,
            "unfit": self._unfit,
            "fps": round(self._rate.per_second(), 2),
            "age_ms": self._ages.summary(),
            "stages_ms": {stage: values.summary() for stage, values in self._stages.items()},
            "score": None if last is None else last.prediction.score,
            "threshold": self.predictor.threshold,
            "alarm": self.decider.alarm,
            "drift": None if drift is None else drift.state,
            "sinks": {delivery.sink.name: delivery.state() for delivery in self._deliveries},
        }

    def _prepared(self) -> Iterator[_Prepared]:
        """Frames as the graph takes them, until the source ends."""
        taken = 0
        for frame in self.source:
            if self._stopping.is_set():
                return
            start = time.perf_counter()
            try:
                batch = self.predictor.prepare(frame.image)
            except ImageError as error:
                self._reject(error, first=taken == 0)
                continue
            if self._misfitting:
                self._misfitting = False
                self._tell_source("live", "frames can be inspected again")
            if not self.source.live and self._camera["state"] == "connecting":  # files don't say that they are there
                self._camera["state"] = "live"
            unusable = self._look(frame, batch)
            yield _Prepared(frame, batch, unusable, (time.perf_counter() - start) * 1e3)
            taken += 1
            if taken == self.limits.max_frames:
                return

    def _look(self, frame: Frame, batch: NDArray[np.uint8]) -> str | None:
        """Why a frame shows nothing, if so; told where the source begins to, and where it ends."""
        frozen = self.source.live and self._repetition.is_frozen(frame.image, frame.captured)
        self._blindness = find_blindness(batch) or ("frozen" if frozen else None)
        was_blind = self._camera["state"] == "blind"
        if self._blindness and not was_blind:
            self._tell_source("blind", f"{frame.name} is {EXPLAINED[self._blindness]}")
        elif was_blind and not self._blindness:
            self._tell_source("live", "frames show something again")
        return self._blindness

    def _absence(self) -> str:
        """`LiveSummary.absence`."""
        blind = f"the last frame is {EXPLAINED[self._blindness]}" if self._blindness else ""
        if self._frames == self._unusable:
            return self._loss or blind or f"none came from {self.source.name}"
        gone = self._loss if time.monotonic() - self._lost_at >= LOST_S else ""
        return gone or (blind if self.source.live else "")  # of files each frame is one that was asked for

    def _reject(self, error: ImageError, first: bool) -> None:
        """Count a frame that can't be inspected; a camera whose first one can't will have no other."""
        if first and self.source.live:
            raise error
        self._unfit += 1
        self._misfit = str(error)
        if not self._misfitting:
            self._misfitting = True
            self._tell_source("lost", str(error))

    def _scored(self, jobs: Iterator[_Prepared]) -> Iterator[_Scored]:
        for frame, batch, unusable, preprocess_ms in jobs:
            start, age = time.perf_counter(), time.monotonic() - frame.captured
            score, model_map = self.predictor.run(batch, frame.name)
            model_ms = (time.perf_counter() - start) * 1e3
            stages = {"wait": age * 1e3 - preprocess_ms, "preprocess": preprocess_ms, "model": model_ms}
            yield _Scored(frame, score, model_map, unusable, stages)

    def _conclude(
        self,
        frame: Frame,
        score: float,
        model_map: NDArray[np.float32],
        unusable: str | None,
        stages: dict[str, float],
    ) -> None:
        """Judge one frame and hand it to every sink."""
        prediction = self.predictor.conclude(frame.image, score, model_map, stages, unusable)
        before, steady = self.decider.alarm, self.decider.drift and self.decider.drift.state
        alarm = self.decider.decide(prediction)
        result = Result(frame, prediction, alarm, alarm and not before, prediction.timings_ms)
        self._frames += 1
        self._anomalous += prediction.verdict == "defect"
        self._overruled += prediction.overruled is not None
        self._unusable += prediction.unusable is not None
        self._alarms += result.alarm_began
        self._last = result
        for delivery in self._deliveries:
            delivery.put(result)
        self._ages.add((time.monotonic() - frame.captured) * 1e3)
        self._rate.tick()
        for stage, value in result.stages_ms.items():
            self._stages[stage].add(value)
        if alarm != before:
            counters = {"frames": self._frames, "anomalous": self._anomalous, "alarms": self._alarms}
            state, message = ("on" if alarm else "off"), self.decider.explain(prediction)
            self._tell(Notice(frame.wall, "alarm", self.source.name, state, message, counters))
        if (drift := self.decider.drift) and drift.state != steady:
            counters = {"frames": self._frames, "windows": drift.windows}
            self._tell(Notice(frame.wall, "drift", self.source.name, drift.state, drift.explain(), counters))

    def _heard(self, notice: Notice) -> None:
        """The source changed; called from its thread."""
        self._camera |= {"state": notice.state, "message": notice.message}
        if notice.state == "lost":
            self._lost_at = time.monotonic() if not self._loss else self._lost_at
            self._loss = notice.message
        elif notice.state in ("live", "blind"):
            self._loss = ""
        self._tell(notice)

    def _tell(self, notice: Notice) -> None:
        for delivery in self._deliveries:
            delivery.put(notice)

    def _sink_turned(self, turned: Delivery, notice: Notice) -> None:
        """Tell the others: a sink that fails at notices would never end telling itself."""
        for delivery in self._deliveries:
            if delivery is not turned:
                delivery.put(notice)

    def _tell_source(self, state: str, message: str) -> None:
        counters = {**self.source.counters, "unfit": self._unfit}
        self._heard(Notice(time.time(), "source", self.source.name, state, message, counters))

    def _tell_run(self, state: str, message: str) -> None:
        counters = {"frames": self._frames, "anomalous": self._anomalous, "alarms": self._alarms}
        self._tell(Notice(time.time(), "run", self.source.name, state, message, counters))

    def _close_sinks(self) -> None:
        self._tell_run("ended", "the run ended")
        deadline = time.monotonic() + self.limits.close_s
        for delivery in self._deliveries:
            delivery.drain(deadline)
        for delivery in self._deliveries:  # all before the first is closed, for they tell each other how they fare
            delivery.wait_drained()
        for delivery in self._deliveries:
            delivery.close()
        for delivery in self._deliveries:
            delivery.join()


def ahead(items: Iterator[T], name: str) -> Generator[T, None, None]:
    """The same items, each made in a thread of that name while the one before is used."""
    with ThreadPoolExecutor(1, name) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
