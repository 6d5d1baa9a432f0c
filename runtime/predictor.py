"""`Predictor()("part.png").overlay()`: from an image to a verdict."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.errors import ImageError, UsageError
from fbclip.memory import MEMORY_LINE, Memory
from fbclip.resample import in_order, resize
from fbclip.runtime.backends import Results, make_backend, require_probabilities
from fbclip.runtime.calibration import Calibration, calibrated_bundles, checked_threshold
from fbclip.runtime.inputs import One, as_frame, listed
from fbclip.runtime.prediction import Prediction
from fbclip.runtime.regions import Rules, find_evidence
from fbclip.runtime.roi import Roi
from fbclip.runtime.sight import find_blindness
from fbclip.terminal import printable

if TYPE_CHECKING:  # what is live stands on this
    from fbclip.runtime.live.alarm import Vote
    from fbclip.runtime.live.records import Notice, Record
    from fbclip.runtime.live.sources import BaseSource

logger = logging.getLogger("fbclip")


class Predictor:
    """A loaded bundle on a device: `Predictor("part.fbclip")("photo.png").verdict`. Any number of threads may call it.

    Args:
        bundle: a bundle, its path, or None for the embedded default model.
        device: "cpu", "cuda" or "tensorrt", and never another than the one asked for; "auto" is what works here of an
            engine of the bundle, CUDA and the CPU, in this order.
        precision: "auto", "fp32", "fp16" or "int8".
        threshold: of scores, 0..1; None for the calibration's, or the model's own where there is none.
        calibrated: whether to use the bundle's calibration (see `fbclip.calibrate`), for the maps also where a
            threshold is given: scores and maps have scales of their own.
        memory: what good parts taught (see `fbclip.adapt`): "auto" is the bundle's own where it has one, None or "off" is
            the zero-shot model; a `Memory` or a file memory.npz of the same model is another product's.
        roi: where frames are inspected: a `Roi`, (x0, y0, x1, y1) in pixels, or what `Roi.parse` takes; None for all of
            them.
        min_area: pixels of the frame: smaller regions don't count, and where all that reach the map's threshold are
            smaller, the image is good. Where none reaches it, the score decides alone.
        batch: images that the model is given at once where a call has several.

    Attributes:
        bundle: the one that is loaded.
        calibration: the one in use, or None.
        memory: the one in use, or None.
        precision: that runs.
        backend: what runs it, on `backend.device`.
        map_threshold: map values from here on are regions; None without a calibration: from `threshold` on.
        map_scale: as in a Prediction.

    Raises:
        BundleError, DeviceError, UsageError.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        threshold: float | None = None,
        calibrated: bool = True,
        memory: Memory | str | Path | None = "auto",
        roi: Roi | str | Path | Sequence[int] | None = None,
        min_area: int = 0,
        batch: int = 1,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self.roi = None if roi is None else Roi.parse(roi)
        self.min_area = _count("a least area is a number of pixels", min_area, 0, "min_area")
        self.batch = _count("a batch is a number of images", batch, 1, "batch")
        self._given, self._calibrated = None if threshold is None else checked_threshold(threshold), calibrated
        self._judge_by(self._chosen(memory))
        self.backend, self.precision = make_backend(self.bundle, device, precision, self.batch)
        if self.memory:
            self._require_same_eyes(self.memory)
            self.backend.set_memory(self.memory.tensors)

    def set_memory(self, memory: Memory | str | Path | None = "auto") -> None:
        """Inspect another product: exchange what good parts taught, as at the start. No new session, no new engine.

        The threshold given at the start stays; otherwise it is the new memory's calibration's or its own. Not to be
        called while other threads predict: their frames would be judged by one memory's scores and the other's line.

        Args:
            memory: as at the start. One that is kept in Python is exchanged in milliseconds.

        Raises:
            BundleError, UsageError: none of this model, or for another region.
        """
        chosen = self._chosen(memory)
        if chosen:
            self._require_same_eyes(chosen)
        tensors = chosen.tensors if chosen else None  # what fails, fails before anything has changed
        before = vars(self).copy()
        self._judge_by(chosen)
        try:
            self.backend.set_memory(tensors)
        except BaseException:  # scores of the one memory are not judged by the other's line
            vars(self).update(before)
            raise

    def require_fit(self, memory: Memory) -> None:
        """Raise BundleError or UsageError unless a memory is of this model, region and precision."""
        self._chosen(memory)
        self._require_same_eyes(memory)

    def _chosen(self, memory: Memory | str | Path | None) -> Memory | None:
        if isinstance(memory, Memory):
            if memory.shape != self.bundle.manifest.memory_shape:
                raise UsageError(
                    f"a memory is of the model that it inspects with; this one has {memory.shape}", option="memory"
                )
            self.bundle.require_own(memory, f"memory {memory.name}")
            chosen: Memory | None = memory
        elif memory is not None and not isinstance(memory, (str, Path)):
            raise UsageError(f"a memory is a Memory, a file, auto or off; got {memory!r:.50}", option="memory")
        elif memory in (None, "off"):
            chosen = None
        else:
            chosen = self.bundle.memory(None if memory == "auto" else Path(str(memory)))
        if chosen and chosen.about.roi != (here := self.roi.identity if self.roi else None):
            raise UsageError(
                f"memory {chosen.name} was learned {_where(chosen.about.roi)}, and other frames show other things: "
                f"adapt {_where(here)}, or inspect without the memory",
                option="roi",
            )
        return chosen

    def _require_same_eyes(self, memory: Memory) -> None:
        """Half precision sees patches as float32 does; 8 bit sees them otherwise (docs/measurements/adapt.md)."""
        learned = memory.about.precision
        if learned != self.precision and "int8" in (learned, self.precision):
            raise UsageError(
                f"memory {memory.name} was learned in {learned}, and {self.precision} sees parts otherwise: adapt in "
                f"{self.precision}, or inspect in {learned}",
                option="precision",
            )

    def _judge_by(self, memory: Memory | None) -> None:
        """The threshold and the map's scale: the calibration's where it is of this memory, else the memory's or the model's."""
        found = Calibration.load(self.bundle) if self._calibrated else None
        other = found is not None and not found.is_of(memory)
        if found and not other and self._given is None:
            self._require_same_roi(found.roi)
        self.memory, self.calibration, self._set_aside = memory, None if other else found, other
        self.map_threshold, self.map_scale = None, (0.0, 1.0)
        chosen = MEMORY_LINE if memory else self.bundle.manifest.threshold
        if self.calibration:
            chosen = self.calibration.threshold
            self.map_threshold, self.map_scale = self.calibration.map_threshold, self.calibration.map_scale
        elif memory:
            self.map_threshold = MEMORY_LINE
        self._threshold = chosen if self._given is None else self._given

    def _require_same_roi(self, calibrated: str | None) -> None:
        here = self.roi.identity if self.roi else None
        if calibrated != here:
            raise UsageError(
                f"{self.bundle.path} was calibrated {_where(calibrated)}, and other frames have other scores: "
                f"calibrate {_where(here)}, or pass a threshold",
                option="roi",
            )

    def __repr__(self) -> str:
        where = f"device={self.backend.device!r}, precision={self.precision!r}"
        return f"Predictor({str(self.bundle.path)!r}, {where}, threshold={self.threshold:g})"

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory and the device back. Whoever calls it then is told: a DeviceError."""
        self.backend.close()

    @property
    def threshold(self) -> float:
        """Scores from here on are anomalous, 0..1; to set it is `set_threshold`."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self.set_threshold(threshold)

    def set_threshold(self, threshold: float) -> None:
        """Scores from here on are anomalous, in predictions that are concluded from now on; from any thread.

        Raises:
            UsageError: no probability.
        """
        self._threshold = checked_threshold(threshold)

    @property
    def launches(self) -> str | None:
        """How runs are started on a GPU: "CUDA graph", or otherwise and why. None where there is no choice."""
        return self.backend.launches

    def explain_device(self) -> str:
        """One line for a person: what "auto" took."""
        return f"the model is on {self.backend.device}, {self.precision}"

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a path is a sequence, too
        self, image: One, channel_order: str = "rgb"
    ) -> Prediction: ...
    @overload
    def __call__(self, image: Sequence[One], channel_order: str = "rgb") -> list[Prediction]: ...
    def __call__(self, image: One | Sequence[One], channel_order: str = "rgb") -> Prediction | list[Prediction]:
        """Score an image, or several in their order, `batch` at once.

        Args:
            image: a path, a Pillow image, or a frame uint8 (H, W, 3) or (H, W). Several: a list or tuple of these, an
                array uint8 (N, H, W, 3), or the path of a folder or a glob, like "parts/*.png". Their predictions are
                in memory together, 7 bytes a pixel and more: see `stream` for many.
            channel_order: of frames: "rgb", or "bgr" as OpenCV reads.

        Returns:
            A prediction; of several a list. A type checker takes a folder's path for an image's: name its files in a list for it.

        Raises:
            ImageError: unreadable file, which it names, and nothing is returned of the others; a frame of another shape
                or type, of another size than the graph was exported for, or that the region of interest doesn't fit.
            UsageError: a folder without images.
            FBClipError: as `run`.
        """
        images, is_one = listed(image)
        predictions = list(self._predict(images, channel_order))
        return predictions[0] if is_one else predictions

    def stream(
        self, source: BaseSource | str | int | Path | Sequence[str | Path], *, vote: Vote | str | None = None
    ) -> Generator[Record]:
        """Records of a camera, stream, video, folder or glob, one after the other; a camera drops what isn't in time.

        It is the pipeline of `fbclip infer` without sinks. What can't be read is logged and left out, and so are cameras
        that come and go (logger "fbclip"). The source is closed at the end, and where the loop is left.

        Args:
            source: as `open_source` takes it, or what that returns; a number is a camera's.
            vote: "K/N", an alarm where K of the last N frames are defects (`Record.alarm`); None for 1/1.

        Raises:
            UsageError: no such source or vote.
            ImageError: the first frame of a camera can't be inspected, so none will.
            FBClipError: as `run`.
        """
        from fbclip.runtime.live.alarm import Alarm, Drift, Vote
        from fbclip.runtime.live.pipeline import Pipeline
        from fbclip.runtime.live.sources import BaseSource, open_source

        votes = Vote.parse(vote) if isinstance(vote, str) else vote
        if not isinstance(source, BaseSource):
            source = open_source(source)
        if votes and source.still:
            raise UsageError(
                f"a vote is over time, and {source.name} is images, each of which is its own", option="vote"
            )
        alarm = Alarm(votes, Drift(self.calibration.scores) if self.calibration else None)
        return Pipeline(
            source, self, [_NoticeLogger(source.live)], alarm, batch=1 if source.total is None else self.batch
        ).records()

    def explain_threshold(self) -> str:
        """One line for a person: the threshold it began with, and where that comes from."""
        if self.memory:
            return f"{self.memory.explain(self.precision)}; {self._explain_line()}"
        return self._explain_line()

    def _explain_line(self) -> str:
        if self._given is not None:
            return f"threshold {self._given:g} was given"
        again = "; the calibration is of another memory: run fbclip calibrate again" if self._set_aside else ""
        if self.calibration is None and self.memory:
            cure = again or "; no calibration: run fbclip calibrate"
            return f"threshold {self.threshold:g} is where its good parts end{cure}"
        if self.calibration is None:
            if again:
                return f"threshold {self.bundle.manifest.threshold:g} is the model's own{again}"
            text = f"threshold {self.bundle.manifest.threshold:g} is the model's own"
            if self.bundle.path != EMBEDDED or not (here := calibrated_bundles(Path())):
                return f"{text}; no calibration: run fbclip calibrate"
            if len(here) == 1:
                return f"{text}; {here[0]} here is calibrated: add --bundle {here[0]}"
            return f"{text}; calibrated ones are here, choose with --bundle: {', '.join(map(str, here))}"
        return self.calibration.explain(self.bundle, self.precision)

    def prepare(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A frame uint8 (H, W, 3) RGB, or its region of interest, as the graph takes it: (1, H', W', 3).

        Raises:
            ImageError: a frame of another size than the graph or the region of interest is for.
        """
        manifest = self.bundle.manifest
        if self.roi:
            frame = self.roi.crop(frame)
        if manifest.frame_size is None:
            return in_order(resize(frame, manifest.image_size), manifest.channel_order)[None]
        if frame.shape[:2] != manifest.frame_size:
            built, here = (f"{height}x{width}" for height, width in (manifest.frame_size, frame.shape[:2]))
            raise ImageError(
                f"{self.bundle.path} takes frames of {built} (height x width) only; got {here}: "
                f"set the camera to that, or export for frames of {here}, or of any size"
            )
        return in_order(frame, manifest.channel_order)[None]

    def run(self, batch: NDArray[np.uint8], name: object) -> tuple[float, NDArray[np.float32]]:
        """What the model says of a prepared frame: score and map (H', W'), both 0..1.

        Args:
            name: of the image, for the message.

        Raises:
            FBClipError: they are not (see `require_probabilities`).
        """
        scores, maps = self.backend.run(batch)
        require_probabilities(scores, maps, [name])
        return float(scores[0]), maps[0]

    def run_each(self, batches: Iterable[tuple[NDArray[np.uint8], Sequence[object]]]) -> Iterator[Results]:
        """What the model says of batch after batch, as `Backend.run_each` has it: scores (B,) and maps (B, H', W').

        Args:
            batches: prepared frames uint8 (B, H', W', 3), and the images' names for the message.

        Raises:
            FBClipError: as `run`.
        """
        names: deque[Sequence[object]] = deque()

        def images() -> Iterator[NDArray[np.uint8]]:
            for batch, called in batches:
                names.append(called)
                yield batch

        for scores, maps in self.backend.run_each(images()):
            require_probabilities(scores, maps, names.popleft())
            yield scores, maps

    def conclude(
        self,
        frame: NDArray[np.uint8],
        score: float,
        model_map: NDArray[np.float32],
        timings_ms: dict[str, float],
        unusable: str | None = None,
        name: str = "",
    ) -> Prediction:
        """From what the model says of a prepared frame to a prediction.

        Args:
            frame: uint8 (H, W, 3) RGB, as `prepare` took it.
            score: the class token's, 0..1.
            model_map: float32 (H', W'), 0..1.
            timings_ms: milliseconds of the stages so far; postprocess is added.
            unusable: why the frame shows nothing to judge, if so.
            name: of the frame, where it has one.
        """
        start = time.perf_counter()
        threshold = self.threshold  # may be set anew meanwhile, from another thread
        height, width = frame.shape[:2]
        x0, y0, x1, y1 = self.roi.box if self.roi else (0, 0, width, height)
        part = model_map
        if part.shape != (y1 - y0, x1 - x0):
            enlarged = cv2.resize(model_map, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
            part = np.asarray(enlarged, np.float32).reshape(y1 - y0, x1 - x0)
        inside = self.roi.inside if self.roi else None
        marked_from = threshold if self.map_threshold is None else self.map_threshold
        regions, overruled = find_evidence(part, inside, score >= threshold, marked_from, Rules(self.min_area))
        anomaly_map = part
        if self.roi:
            anomaly_map = np.zeros((height, width), np.float32)
            anomaly_map[y0:y1, x0:x1] = part if inside is None else part * inside
            regions = tuple(region.moved(x0, y0) for region in regions)
        timings_ms = {**timings_ms, "postprocess": (time.perf_counter() - start) * 1e3}
        return Prediction(
            score=score,
            threshold=threshold,
            anomaly_map=anomaly_map,
            model_map=model_map,
            regions=regions,
            timings_ms=timings_ms,
            image=frame,
            map_scale=self.map_scale,
            map_threshold=marked_from,
            overruled=overruled,
            unusable=unusable,
            name=name,
            memory=self.memory.name if self.memory else None,
        )

    def _predict(self, images: Sequence[One], channel_order: str) -> Iterator[Prediction]:
        """Predictions of images in their order, `batch` at once."""
        waiting: deque[_Shown] = deque()
        preparing = 0.0  # seconds of the wait for results that were spent on images to come

        def batches() -> Iterator[tuple[NDArray[np.uint8], list[str]]]:
            nonlocal preparing
            for first in range(0, len(images), self.batch):
                start = time.perf_counter()
                shown = [self._show(image, channel_order) for image in images[first : first + self.batch]]
                waiting.extend(shown)
                batch = np.concatenate([each.batch for each in shown])
                preparing += time.perf_counter() - start
                yield batch, [each.name or "an image" for each in shown]

        start = time.perf_counter()
        for scores, maps in self.run_each(batches()):
            model_ms = (time.perf_counter() - start - preparing) * 1e3 / len(scores)
            for score, model_map in zip(scores, maps, strict=True):
                frame, _, unusable, name, timings_ms = waiting.popleft()
                timings_ms = {**timings_ms, "model": model_ms}
                yield self.conclude(frame, float(score), model_map, timings_ms, unusable, name)
            start, preparing = time.perf_counter(), 0.0

    def _show(self, image: One, channel_order: str) -> _Shown:
        """Read an image, and bring it to what the model is shown."""
        start = time.perf_counter()
        frame = as_frame(image, channel_order)
        read = time.perf_counter()
        batch = self.prepare(frame)
        timings_ms = {"read": (read - start) * 1e3, "preprocess": (time.perf_counter() - read) * 1e3}
        name = printable(image) if isinstance(image, (str, Path)) else ""
        return _Shown(frame, batch, find_blindness(batch), name, timings_ms)


class _NoticeLogger:
    """A sink for `stream`: what its source says, and what is left out."""

    name = "log"

    def __init__(self, live: bool) -> None:
        self._live = live

    def write(self, record: Record) -> None:
        """Records are handed to whoever iterates."""

    def notify(self, notice: Notice) -> None:
        if notice.kind == "source":
            told = notice.state == "lost" or (notice.state == "live" and not self._live)
            logger.log(logging.WARNING if told else logging.INFO, "%s: %s", notice.subject, notice.message)

    def close(self) -> None:
        """Nothing to release."""


class _Shown(NamedTuple):
    """An image on its way: the frame, what the model is shown of it, and what is known so far."""

    frame: NDArray[np.uint8]
    batch: NDArray[np.uint8]
    unusable: str | None
    name: str
    timings_ms: dict[str, float]


def _count(rule: str, value: int, least: int, option: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise UsageError(f"{rule}, {least} or more; got {value!r:.50}", option=option)
    return int(value)


def _where(roi: str | None) -> str:
    return f"for the region {roi}" if roi else "for whole frames"
