"""Frames to verdicts to sinks, overlapped: each stage in a thread of its own, one item ahead, bounded everywhere.

A frame is read while the one before is prepared, the model looks at the one before that, and the one before that is
judged and handed out. The backend is used from one thread. A live source drops frames while all of this is busy; files
wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fbclip.errors import ImageError
from fbclip.runtime.backends import Results
from fbclip.runtime.host import give_back_memory
from fbclip.runtime.live.alarm import Alarm
from fbclip.runtime.live.delivery import PAUSES_S, STUCK_S, Delivery
from fbclip.runtime.live.records import Frame, Notice, Record, Sink, Source
from fbclip.runtime.live.status import SourceStatus, Status, Summary
from fbclip.runtime.live.timing import Percentiles, Rate
from fbclip.runtime.predictor import Predictor, Prepared
from fbclip.runtime.sight import EXPLAINED, Repetition

STAGES = ("read", "wait", "preprocess", "model", "postprocess")
LARGE = 12_000_000  # pixels: larger pictures of files are inspected one at a time, some 30 bytes a pixel each
NameFiles = Callable[[Frame, bool], tuple[str | None, str | None]]
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """When to end, and how much may pile up.

    Attributes:
        max_frames: results after which the run ends; None for no end.
        duration: seconds after which it ends, frames or not; None for no end.
        room: results that wait for a sink at most. Sinks share its frame and map, 14 MB at 1920x1080, and
            its overlay once one of them has asked for it, 6 MB.
        close_s: seconds that sinks have at the end for what waits.
        lost_s: seconds without a source at the end of a run that are no mere reconnecting.
        stuck_s, pauses_s: of sinks, see `Delivery`.
    """

    max_frames: int | None = None
    duration: float | None = None
    room: int = 8
    close_s: float = 5.0
    lost_s: float = 5.0
    stuck_s: float = STUCK_S
    pauses_s: tuple[float, float] = PAUSES_S


class _Prepared(NamedTuple):
    frame: Frame
    shown: Prepared
    preprocess_ms: float


class _Scored(NamedTuple):
    frame: Frame
    shown: Prepared
    score: float
    model_map: NDArray[np.float32]
    timings_ms: dict[str, float]


class Pipeline:
    """A run from a source to sinks.

    Args:
        source: iterated once, closed at the end.
        predictor: its backend is used from one thread of this run.
        sinks: each gets a queue and a thread; all are closed at the end. The first that fails ends a run of stills.
        alarm: the verdict over time; of stills it is each picture's own.
        limits: when to end, and how much may pile up.
        batch: images that the model is given at once, of a source that waits.
        name_files: the files where the picture and the map of a frame will be kept, also by whether it votes for an alarm
            that is on; None for nowhere.
        rejected: told of each frame that can't be inspected, and why.
    """

    def __init__(
        self,
        source: Source,
        predictor: Predictor,
        sinks: list[Sink],
        alarm: Alarm | None = None,
        limits: Limits | None = None,
        batch: int = 1,
        name_files: NameFiles | None = None,
        rejected: Callable[[Frame, ImageError], None] | None = None,
    ) -> None:
        self.source, self.predictor, self._told_rejected = source, predictor, rejected
        self.alarm, self.limits = alarm or Alarm(), limits or Limits()
        self._batch, self._name_files = batch, name_files
        self._state, self._message = "connecting", ""
        self._stopping = threading.Event()
        self._began, self._seconds = time.monotonic(), 0.0
        self._ages, self._rate = Percentiles(), Rate()
        self._stages = {stage: Percentiles() for stage in STAGES}
        self._frames = self._anomalous = self._alarms = self._overruled = self._rejected = 0
        self._unusable = self._absent = 0
        self._large = 0  # pictures that are judged or rejected
        self._rejecting, self._rejection = False, ""
        self._repetition = Repetition()
        self._blindness: str | None = None  # of the last frame
        self._lost_at, self._loss = 0.0, ""  # since when the source is lost, and why; "" while it is not
        self._failure = ""  # of the sink that ended a run of stills
        self._verdict: str | None = None  # of the last result
        self._score: float | None = None  # of the same
        self._progress = threading.Condition()  # of frames that were judged or rejected
        self._deliveries = [
            Delivery(
                sink,
                self.limits.room,
                not source.live,
                self._sink_turned,
                self.limits.stuck_s,
                self.limits.pauses_s,
            )
            for sink in sinks
        ]
        source.listen(self._heard)

    def run(self) -> Summary:
        """Block until the source ends, a limit is reached or `stop` is called; frames in work are finished.

        Raises:
            ImageError, FBClipError: as `records`.
        """
        for _ in self.records():
            pass
        return Summary(self.status(), self._rejection, self._absence(), self._failure, self._seconds)

    def records(self) -> Generator[Record]:
        """The same, and the records one by one as the sinks get them; to close it ends the run.

        Raises:
            ImageError: the first frame of a live source can't be inspected, so none will.
            FBClipError: of the source or the model. Sinks are closed before.
        """
        self._began = time.monotonic()
        self._notify_run("started", "the run began")
        with ExitStack() as stack:
            stack.callback(self._close_sinks)
            frames: Iterable[Frame] = self.source
            if not self.source.live:  # of a camera the newest frame is the one that is there when it is asked for
                frames = ahead(self._paced(), "read")
                stack.callback(frames.close)
            prepared = ahead(self._prepared(frames), "preprocess")
            stack.callback(prepared.close)
            results = ahead(self._scored(prepared), "model")
            stack.callback(results.close)
            stack.callback(self.stop)  # first of all, for the stages may wait for a frame
            if self.limits.duration is not None:
                timer = threading.Timer(self.limits.duration, self.stop)
                timer.daemon = True
                timer.start()
                stack.callback(timer.join)  # no thread stays behind
                stack.callback(timer.cancel)
            for scored in results:
                yield self._conclude(*scored)
            self._seconds = time.monotonic() - self._began

    def stop(self) -> None:
        """End the run soon, from any thread: no more frames are taken, those in work are finished."""
        self._stopping.set()
        with self._progress:
            self._progress.notify_all()
        self.source.close()

    @property
    def state(self) -> str:
        """Of the source now, see `SourceStatus`; from any thread, at no cost."""
        return self._state

    def status(self) -> Status:
        """What is going on; from any thread."""
        drift = self.alarm.drift
        return Status(
            seconds=round(time.monotonic() - self._began, 1),
            source=SourceStatus(
                self.source.name,
                self._state,
                self._message,
                self.source.live,
                self.source.still,
                dict(self.source.counters),
            ),
            total=self.source.total,
            frames=self._frames,
            anomalous=self._anomalous,
            alarms=self._alarms,
            overruled=self._overruled,
            unusable=self._unusable,
            absent=self._absent,
            rejected=self._rejected,
            fps=round(self._rate.per_second(), 2),
            age_ms=self._ages.summary(),
            stages_ms={stage: values.summary() for stage, values in self._stages.items()},
            verdict=self._verdict,
            score=self._score,
            threshold=self.predictor.threshold,
            memory=self.predictor.memory.name if self.predictor.memory else None,
            alarm=self.alarm.on,
            drift=None if drift is None else drift.state,
            sinks={delivery.sink.name: delivery.status() for delivery in self._deliveries},
        )

    def _paced(self) -> Iterator[Frame]:
        """The frames of a source that waits; after a large one nothing is read until it is delivered."""
        taken = 0
        for frame in self.source:
            is_large = _is_large(frame)
            taken += is_large
            yield frame
            if is_large:
                with self._progress:
                    self._progress.wait_for(self._is_through(taken))
                for delivery in self._deliveries:
                    delivery.settle()

    def _is_through(self, taken: int) -> Callable[[], bool]:
        return lambda: self._large >= taken or self._stopping.is_set()

    def _prepared(self, frames: Iterable[Frame]) -> Iterator[_Prepared]:
        """Frames as the graph takes them, until the source ends."""
        taken = 0
        for frame in frames:
            if self._stopping.is_set():
                return
            start = time.perf_counter()
            try:
                shown = self.predictor.prepare(frame.image, frame.name)
            except ImageError as error:
                self._reject(error, frame, first=taken == 0)
                continue
            if self._rejecting:
                self._rejecting = False
                self._notify_source("live", "frames can be inspected again")
            if not self.source.live and self._state == "connecting":  # files don't say that they are there
                self._state = "live"
            if _is_large(frame):
                give_back_memory()  # what decoding and making it smaller took, in the memory of two threads
            shown = shown._replace(unusable=self._look(frame, shown))
            yield _Prepared(frame, shown, (time.perf_counter() - start) * 1e3)
            taken += 1
            if taken == self.limits.max_frames:
                return

    def _look(self, frame: Frame, shown: Prepared) -> str | None:
        """Why a frame shows nothing, if so; told where the source begins to, and where it ends."""
        frozen = self.source.live and self._repetition.is_frozen(frame.image, frame.captured)
        self._blindness = shown.unusable or ("frozen" if frozen else None)
        was_blind = self._state == "blind"
        if self.source.still:
            return self._blindness  # it says nothing of the next one
        if self._blindness and not was_blind:
            self._notify_source("blind", f"{frame.name} is {EXPLAINED[self._blindness]}")
        elif was_blind and not self._blindness:
            self._notify_source("live", "frames show something again")
        return self._blindness

    def _absence(self) -> str:
        """`Summary.absence`."""
        blind = f"the last frame is {EXPLAINED[self._blindness]}" if self._blindness else ""
        if self._frames == self._unusable + self._absent:
            but = f", and {self._unusable} of them are unusable" if self._unusable else ""
            without = f"the part was in none of {self._frames} frames{but}" if self._absent else ""
            return self._loss or blind or without or f"none came from {self.source.name}"
        gone = self._loss if time.monotonic() - self._lost_at >= self.limits.lost_s else ""
        return gone or (blind if self.source.live else "")  # of files each frame is one that was asked for

    def _reject(self, error: ImageError, frame: Frame, first: bool) -> None:
        """Count a frame that can't be inspected; a camera whose first one can't will have no other."""
        if first and self.source.live:
            raise error
        self._rejection = str(error)
        if self._told_rejected:
            self._told_rejected(frame, error)
        if not self._rejecting:
            self._rejecting = not self.source.still
            self._notify_source("lost", f"skipped {frame.name}: {error}")
        with self._progress:
            self._rejected += 1
            self._large += _is_large(frame)
            self._progress.notify_all()

    def _scored(self, jobs: Iterator[_Prepared]) -> Iterator[_Scored]:
        """What the model says of each frame; the time of images at once is shared out among them."""
        waiting: deque[tuple[list[_Prepared], float, float]] = deque()
        ended = 0.0
        while first := next(jobs, None):
            for scores, maps in self._run_each(self._groups(first, jobs, waiting)):
                group, began, now = waiting.popleft()
                before, ended = ended, time.perf_counter()
                model_ms = (ended - max(began, before)) * 1e3 / len(group)
                for job, score, model_map in zip(group, scores, maps, strict=True):
                    waited_ms = (now - job.frame.captured) * 1e3 - job.preprocess_ms
                    timings = (job.frame.read_ms, waited_ms, job.preprocess_ms, model_ms)
                    timings_ms = dict(zip(STAGES[:-1], timings, strict=True))
                    yield _Scored(job.frame, job.shown, float(score), model_map, timings_ms)

    def _groups(
        self, first: _Prepared, jobs: Iterator[_Prepared], waiting: deque[tuple[list[_Prepared], float, float]]
    ) -> Iterator[list[Prepared]]:
        """Jobs in batches, up to a large one: its result is given out before the next is waited for, since that is read
        when the large one is delivered."""
        job: _Prepared | None = first
        while job:
            group = [job]
            while len(group) < self._batch and not _is_large(group[-1].frame) and (job := next(jobs, None)):
                group.append(job)
            waiting.append((group, time.perf_counter(), time.monotonic()))
            yield [each.shown for each in group]
            job = None if _is_large(group[-1].frame) else next(jobs, None)

    def _run_each(self, groups: Iterator[list[Prepared]]) -> Iterator[Results]:
        """Of a camera, whose next frame is yet to come, each result at once; of files the next batch goes ahead of it."""
        return map(self.predictor.run, groups) if self.source.live else self.predictor.run_each(groups)

    def _conclude(
        self,
        frame: Frame,
        shown: Prepared,
        score: float,
        model_map: NDArray[np.float32],
        timings_ms: dict[str, float],
    ) -> Record:
        """Judge one frame and hand it to every sink."""
        prediction = self.predictor.conclude(shown, score, model_map, timings_ms)
        was_on, was_steady = self.alarm.on, self._drift_state
        is_on = prediction.verdict == "defect" if self.source.still else self.alarm.decide(prediction)
        files = self._name_files(frame, is_on and self.alarm.is_for(prediction)) if self._name_files else (None, None)
        record = Record(frame, prediction, is_on, is_on and not was_on, prediction.timings_ms, *files)
        self._count(record)
        for delivery in self._deliveries:
            delivery.put(record)
        self._ages.add((time.monotonic() - frame.captured) * 1e3)
        self._rate.tick()
        for stage, value in record.timings_ms.items():
            self._stages[stage].add(value)
        if self.alarm.on != was_on:
            state = "on" if self.alarm.on else "off"
            self._notify_turn("alarm", frame.wall, state, self.alarm.explain(prediction))
        if (drift := self.alarm.drift) and drift.state != was_steady:
            self._notify_turn("drift", frame.wall, drift.state, drift.explain())
        return record

    def _count(self, record: Record) -> None:
        prediction = record.prediction
        self._anomalous += prediction.verdict == "defect"
        self._overruled += prediction.overruled is not None
        self._unusable += prediction.verdict == "unusable"
        self._absent += prediction.verdict == "absent"
        self._alarms += record.alarm_began
        self._verdict, self._score = prediction.verdict, prediction.score
        with self._progress:
            self._frames += 1
            self._large += _is_large(record.frame)
            self._progress.notify_all()

    @property
    def _drift_state(self) -> str | None:
        return self.alarm.drift.state if self.alarm.drift else None

    def _heard(self, notice: Notice) -> None:
        """The source changed; called from its thread."""
        self._state, self._message = notice.state, notice.message
        if notice.state == "lost":
            self._lost_at = time.monotonic() if not self._loss else self._lost_at
            self._loss = notice.message
        elif notice.state in ("live", "blind"):
            self._loss = ""
        self._notify(notice)

    def _sink_turned(self, turned: Delivery, notice: Notice) -> None:
        """Tell the others: a sink that fails at notices would never end telling itself."""
        for delivery in self._deliveries:
            if delivery is not turned:
                delivery.put(notice)
        if notice.state == "failing" and self.source.still:  # what is left can be inspected again
            self._failure = self._failure or notice.message
            self.stop()

    def _notify(self, notice: Notice) -> None:
        for delivery in self._deliveries:
            delivery.put(notice)

    def _notify_source(self, state: str, message: str) -> None:
        counters = {**self.source.counters, "rejected": self._rejected}
        self._heard(Notice(time.time(), "source", self.source.name, state, message, counters))

    def _notify_turn(self, kind: str, wall: float, state: str, message: str) -> None:
        counters = {"frames": self._frames, "anomalous": self._anomalous, "alarms": self._alarms}
        counters |= {name: n for name, n in (("unusable", self._unusable), ("absent", self._absent)) if n}
        self._notify(Notice(wall, kind, self.source.name, state, message, counters))

    def _notify_run(self, state: str, message: str) -> None:
        self._notify_turn("run", time.time(), state, message)

    def _close_sinks(self) -> None:
        self._notify_run("ended", "the run ended")
        deadline = time.monotonic() + (0.0 if self._failure else self.limits.close_s)
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


def _is_large(frame: Frame) -> bool:
    return frame.image.size > 3 * LARGE
