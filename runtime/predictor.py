"""`Predictor()("part.png").overlay()`: from an image to a verdict."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.errors import ImageError, UsageError
from fbclip.memory import MEMORY_LINE, Memory
from fbclip.resample import in_order, resize
from fbclip.runtime.align import Align, Pose
from fbclip.runtime.backends import Results, make_backend, require_probabilities
from fbclip.runtime.calibration import Calibration, calibrated_bundles, checked_threshold
from fbclip.runtime.inputs import One, as_frame, listed
from fbclip.runtime.prediction import Prediction
from fbclip.runtime.regions import Region, Rules, find_evidence
from fbclip.runtime.roi import Roi
from fbclip.runtime.sight import find_blindness, look
from fbclip.runtime.tiles import Layout, Tiles, inspect
from fbclip.runtime.view import Place, Taken, View
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
        min_area: pixels of the frame, or mm2 with `mm_per_pixel`: smaller regions don't count, and where all that reach
            the map's threshold are smaller, the image is good. Where none reaches it, the score decides alone.
        mm_per_pixel: how much of the part a pixel of the frame shows, in mm; with `align` a pixel of the reference.
        merge: regions with fewer pixels than so many between them are one.
        max_regions: so many are told at most, the largest first; None for all, the highest peak first.
        batch: images that the model is given at once where a call has several; with tiles, views of one image.
        tiles: how frames are cut into tiles, which the model sees beside the whole: "3x4", a side in pixels, "auto", or a
            `Tiles`; None for the whole alone.
        align: a picture of the part in place, its path or an `Align`: frames are brought in line with it, and a frame
            without the part is "absent". The region of interest is in its pixels then. None for frames as they lie.

    Attributes:
        bundle: the one that is loaded.
        calibration: the one in use, or None.
        memory: the one in use, or None.
        view: how frames are looked at: `roi`, `tiles` and `align` in one.
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
        min_area: float = 0,
        mm_per_pixel: float | None = None,
        merge: int = 0,
        max_regions: int | None = None,
        batch: int = 1,
        tiles: Tiles | str | int | None = None,
        align: Align | str | Path | NDArray[np.uint8] | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self.view = View.of(
            None if roi is None else Roi.parse(roi),
            None if tiles is None else Tiles.parse(tiles),
            None if align is None else Align.parse(align),
        )
        self.roi, self.tiles, self.align = self.view.roi, self.view.tiles, self.view.align
        self._require_tileable()
        self._turn = Lock()  # of frames whose views each have a memory of their own
        self.rules = Rules(min_area, mm_per_pixel, merge, max_regions)
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
        with self._turn:
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
        if chosen:
            self.view.place.require_same(
                Place(*chosen.about.place),
                f"memory {chosen.name} was learned {{learned}}, and other frames show other things: inspect {{learned}}, adapt "
                f"{{here}}, or inspect without the memory",
            )
        return chosen

    def _require_tileable(self) -> None:
        if self.tiles and (taken := self.bundle.manifest.frame_size):
            raise UsageError(
                f"tiles are for models that take pictures of any size; {self.bundle.path} takes {taken[0]}x{taken[1]} "
                f"(height x width) only: export it for no frame size",
                option="tiles",
            )

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
            self.view.place.require_same(
                Place(*found.place),
                f"{self.bundle.path} was calibrated {{learned}}, and other frames have other scores: inspect {{learned}}, "
                f"calibrate {{here}}, or pass a threshold",
            )
        self.memory, self.calibration, self._set_aside = memory, None if other else found, other
        self.map_threshold, self.map_scale = None, (0.0, 1.0)
        chosen = MEMORY_LINE if memory else self.bundle.manifest.threshold
        if self.calibration:
            chosen = self.calibration.threshold
            self.map_threshold, self.map_scale = self.calibration.map_threshold, self.calibration.map_scale
        elif memory:
            self.map_threshold = MEMORY_LINE
        self._threshold = chosen if self._given is None else self._given

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
    def identity(self) -> dict[str, str]:
        """What inspects, for logs and metrics: bundle (its name), sha256, memory (its name, "" for none), calibrated (when,
        "unknown" of an older release's, "" for never), precision and device."""
        calibration = self.calibration
        return {
            "bundle": self.bundle.name,
            "sha256": self.bundle.sha256,
            "memory": self.memory.name if self.memory else "",
            "calibrated": (calibration.made or "unknown") if calibration else "",
            "precision": self.precision,
            "device": self.backend.device,
        }

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
        self,
        source: BaseSource | str | int | Path | Sequence[str | Path],
        *,
        vote: Vote | str | None = None,
        alarm_on: str | Collection[str] | None = None,
    ) -> Generator[Record]:
        """Records of a camera, stream, video, folder or glob, one after the other; a camera drops what isn't in time.

        It is the pipeline of `fbclip infer` without sinks. What can't be read is logged and left out, and so are cameras
        that come and go (logger "fbclip"). The source is closed at the end, and where the loop is left.

        Args:
            source: as `open_source` takes it, or what that returns; a number is a camera's.
            vote: "K/N", an alarm where K of the last N frames are defects (`Record.alarm`); None for 1/1.
            alarm_on: "absent", "unusable" or "absent,unusable": such frames vote as defects do, else they have no vote.

        Raises:
            UsageError: no such source, vote or verdict to raise an alarm.
            ImageError: the first frame of a camera can't be inspected, so none will.
            FBClipError: as `run`.
        """
        from fbclip.runtime.live.alarm import Alarm, Drift, Vote, parse_kinds
        from fbclip.runtime.live.pipeline import Pipeline
        from fbclip.runtime.live.sources import BaseSource, open_source

        votes, kinds = Vote.parse(vote) if isinstance(vote, str) else vote, parse_kinds(alarm_on)
        if not isinstance(source, BaseSource):
            source = open_source(source)
        if (votes or kinds) and source.still:
            option = "vote" if votes else "alarm_on"
            raise UsageError(
                f"a vote is over time, and {source.name} is images, each of which is its own", option=option
            )
        alarm = Alarm(votes, Drift(self.calibration.scores) if self.calibration else None, kinds)
        return Pipeline(
            source, self, [_NoticeLogger(source.live)], alarm, batch=1 if source.total is None else self.frames_at_once
        ).records()

    def explain_threshold(self) -> str:
        """One line for a person: the threshold it began with, and where that comes from."""
        if self.memory:
            return f"{self.memory.explain(self.precision)}; {self._explain_line()}"
        return self._explain_line()

    def _explain_line(self) -> str:
        text = self._explain_source()
        if self.tiles and self.calibration is None:
            text += "; with many tiles a small defect raises the score less than it would alone: calibrate with these"
        return text

    def _explain_source(self) -> str:
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

    def prepare(self, frame: NDArray[np.uint8], name: str = "") -> Prepared:
        """A frame uint8 (H, W, 3) RGB on its way to the model.

        Args:
            name: of the frame, where it has one.

        Raises:
            ImageError: a frame of another size than the graph, the region of interest or the memory is for, or that would
                have too many tiles.
        """
        taken = self.view.take(frame)
        batch = self._batch_of(taken.shown)
        unusable = find_blindness(batch) or self._find_fault(taken)
        layout = None
        if not (unusable or taken.absent):
            layout = self.view.layout(taken.shown, self.bundle.manifest.grid)
            if self.memory:
                self.memory.require_views(1 + len(layout or ()))
        return Prepared(frame, taken.shown, batch, layout, taken.pose, taken.absent, unusable, name)

    def _find_fault(self, taken: Taken) -> str | None:
        """What the good parts of the calibration say against a frame that is looked at as they were."""
        found = self.calibration
        if found is None or found.usual is None or taken.absent or Place(*found.place) != self.view.place:
            return None
        return found.usual.find_fault(look(taken.shown))

    def _batch_of(self, shown: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is inspected, or a tile of it, as the graph takes it: (1, H', W', 3)."""
        manifest = self.bundle.manifest
        if manifest.frame_size is None:
            return in_order(resize(shown, manifest.image_size), manifest.channel_order)[None]
        if shown.shape[:2] != manifest.frame_size:
            built, here = (f"{height}x{width}" for height, width in (manifest.frame_size, shown.shape[:2]))
            raise ImageError(
                f"{self.bundle.path} takes frames of {built} (height x width) only; got {here}: "
                f"set the camera to that, or export for frames of {here}, or of any size"
            )
        return in_order(shown, manifest.channel_order)[None]

    def views(self, frame: Prepared) -> Iterator[NDArray[np.uint8]]:
        """What the model is shown of a frame, each (1, H', W', 3): the whole, then its tiles, cut when their turn comes."""
        if frame.layout is None:
            return iter([frame.batch])
        return frame.layout.views(frame.shown, lambda pictures: self._batch_of(pictures[0]))

    @property
    def frames_at_once(self) -> int:
        """Prepared frames that `run` and `run_each` take at once; one where each is a batch of tiles itself."""
        return 1 if self.tiles else self.batch

    def run(self, frames: Sequence[Prepared]) -> Results:
        """What the model says of prepared frames: scores (B,) and maps (B, H', W'), both 0..1.

        Raises:
            FBClipError: they are not (see `require_probabilities`).
        """
        (results,) = self._run_in_turn([frames])
        return results

    def run_each(self, groups: Iterable[Sequence[Prepared]]) -> Iterator[Results]:
        """The same of group after group, as `Backend.run_each` has it: the next is taken before a result is given."""
        return self._run_in_turn(groups) if self.tiles else self._run_ahead(groups)

    def _run_in_turn(self, groups: Iterable[Sequence[Prepared]]) -> Iterator[Results]:
        """One after the other, with or without tiles."""
        for group in groups:
            if len(group) > 1 and any(frame.layout for frame in group):
                raise ValueError(f"frames in tiles are run one at a time; got {len(group)}")
            if layout := group[0].layout:
                score, anomaly_map = self._inspect(group[0], layout)
                yield np.array([score], np.float32), anomaly_map[None]
                continue
            with self._turn if self._by_place else nullcontext():
                scores, maps = self.backend.run(_stacked(group))
            require_probabilities(scores, maps, _names(group))
            yield scores, maps

    def _run_ahead(self, groups: Iterable[Sequence[Prepared]]) -> Iterator[Results]:
        names: deque[list[str]] = deque()

        def images() -> Iterator[NDArray[np.uint8]]:
            for group in groups:
                names.append(_names(group))
                yield _stacked(group)

        for scores, maps in self.backend.run_each(images()):
            require_probabilities(scores, maps, names.popleft())
            yield scores, maps

    def _inspect(self, frame: Prepared, layout: Layout) -> tuple[float, NDArray[np.float32]]:
        """A frame by its tiles."""
        views, (name,) = self.views(frame), _names([frame])
        if not self._by_place:
            return inspect(self.backend, views, layout, self.batch, name=name)
        with self._turn:  # another product may be set, but not between two views of a frame
            memory = self.memory
            if memory is None or memory.about.views != 1 + len(layout):
                return inspect(self.backend, views, layout, self.batch, name=name)
            try:
                return inspect(self.backend, views, layout, 1, memory.tensors_of, name)
            finally:
                self.backend.set_memory(memory.tensors)  # the whole frame's, for frames that are seen whole alone

    @property
    def _by_place(self) -> bool:
        """Whether each view of a frame has expectations of its own, and the backend is told them in turn."""
        return self.memory is not None and self.memory.about.views > 1

    def judge(self, frame: Prepared) -> tuple[float, NDArray[np.float32]]:
        """Score and map of one prepared frame, the map (H', W') in the pixels of what is inspected of it."""
        (score,), (model_map,) = self.run([frame])
        return float(score), _resized(model_map, frame.shown.shape[:2])

    def conclude(
        self, frame: Prepared, score: float, model_map: NDArray[np.float32], timings_ms: dict[str, float]
    ) -> Prediction:
        """From what the model says of a prepared frame to a prediction.

        Args:
            score: of the image, 0..1.
            model_map: float32 (H', W'), 0..1, of what is inspected.
            timings_ms: milliseconds of the stages so far; postprocess is added.
        """
        start = time.perf_counter()
        threshold = self.threshold  # may be set anew meanwhile, from another thread
        marked_from = threshold if self.map_threshold is None else self.map_threshold
        anomaly_map, regions, overruled = self._evidence(frame, model_map, score >= threshold, marked_from)
        timings_ms = {**timings_ms, "postprocess": (time.perf_counter() - start) * 1e3}
        return Prediction(
            score=score,
            threshold=threshold,
            anomaly_map=anomaly_map,
            model_map=model_map,
            regions=regions,
            timings_ms=timings_ms,
            image=frame.image,
            map_scale=self.map_scale,
            map_threshold=marked_from,
            overruled=overruled,
            unusable=frame.unusable,
            name=frame.name,
            memory=self.memory.name if self.memory else None,
            absent=frame.absent,
            part=frame.pose.corners(self.view.box) if frame.pose else None,
            tiles=self.view.boxes(frame.layout) if frame.layout and frame.pose is None else (),
        )

    def _evidence(
        self, frame: Prepared, model_map: NDArray[np.float32], reached: bool, line: float
    ) -> tuple[NDArray[np.float32], tuple[Region, ...], str | None]:
        """The map in the frame's own pixels, its regions, and why these overrule the score, if they do."""
        height, width = frame.image.shape[:2]
        if frame.absent:
            return np.zeros((height, width), np.float32), (), None
        part = _resized(model_map, frame.shown.shape[:2])
        roi = self.roi
        if frame.pose:
            part, inside = self.view.onto_frame(part, frame.pose, (height, width))
            regions, overruled = find_evidence(part, inside, reached, line, self.rules, frame.pose.scale)
            regions = tuple(replace(each, place=self.view.place_of(each.centre, frame.pose)) for each in regions)
            return np.multiply(part, inside, out=part), regions, overruled
        mask = roi.inside if roi else None
        regions, overruled = find_evidence(part, mask, reached, line, self.rules)
        regions = tuple(_placed(each, part.shape) for each in regions)
        if roi is None:
            return part, regions, overruled
        x0, y0, x1, y1 = roi.box
        anomaly_map = np.zeros((height, width), np.float32)
        anomaly_map[y0:y1, x0:x1] = part if mask is None else part * mask
        return anomaly_map, tuple(region.moved(x0, y0) for region in regions), overruled

    def _predict(self, images: Sequence[One], channel_order: str) -> Iterator[Prediction]:
        """Predictions of images in their order, as many at once as the model takes."""
        waiting: deque[tuple[Prepared, dict[str, float]]] = deque()
        preparing = 0.0  # seconds of the wait for results that were spent on images to come
        size = self.frames_at_once

        def groups() -> Iterator[list[Prepared]]:
            nonlocal preparing
            for first in range(0, len(images), size):
                start = time.perf_counter()
                shown = [self._show(image, channel_order) for image in images[first : first + size]]
                waiting.extend(shown)
                preparing += time.perf_counter() - start
                yield [frame for frame, _ in shown]

        start = time.perf_counter()
        for scores, maps in self.run_each(groups()):
            model_ms = (time.perf_counter() - start - preparing) * 1e3 / len(scores)
            for score, model_map in zip(scores, maps, strict=True):
                frame, timings_ms = waiting.popleft()
                yield self.conclude(frame, float(score), model_map, {**timings_ms, "model": model_ms})
            start, preparing = time.perf_counter(), 0.0

    def _show(self, image: One, channel_order: str) -> tuple[Prepared, dict[str, float]]:
        """Read an image, and bring it to what the model is shown; and the milliseconds of both."""
        start = time.perf_counter()
        frame = as_frame(image, channel_order)
        read = time.perf_counter()
        name = printable(image) if isinstance(image, (str, Path)) else ""
        prepared = self.prepare(frame, name)
        return prepared, {"read": (read - start) * 1e3, "preprocess": (time.perf_counter() - read) * 1e3}


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


class Prepared(NamedTuple):
    """A frame on its way to the model.

    Attributes:
        image: uint8 (H, W, 3) RGB, the frame itself.
        shown: uint8 (H', W', 3), what is inspected of it.
        batch: the same as the graph takes it, (1, S, S, 3).
        layout: of the tiles that the model sees as well; None for none.
        pose, absent: see `fbclip.runtime.view.Taken`.
        unusable: as in a `Prediction`.
        name: of the frame; "" where it has none.
    """

    image: NDArray[np.uint8]
    shown: NDArray[np.uint8]
    batch: NDArray[np.uint8]
    layout: Layout | None
    pose: Pose | None
    absent: bool
    unusable: str | None
    name: str


def _placed(region: Region, size_hw: tuple[int, ...]) -> Region:
    """With its place in a map of this size."""
    x, y = region.centre
    return replace(region, place=(x / size_hw[1], y / size_hw[0]))


def _stacked(group: Sequence[Prepared]) -> NDArray[np.uint8]:
    return group[0].batch if len(group) == 1 else np.concatenate([frame.batch for frame in group])


def _names(group: Sequence[Prepared]) -> list[str]:
    return [frame.name or "an image" for frame in group]


def _resized(model_map: NDArray[np.float32], size_hw: tuple[int, ...]) -> NDArray[np.float32]:
    height, width = size_hw
    if model_map.shape == (height, width):
        return model_map
    enlarged = cv2.resize(model_map, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(enlarged, np.float32).reshape(height, width)


def _count(rule: str, value: int, least: int, option: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise UsageError(f"{rule}, {least} or more; got {value!r:.50}", option=option)
    return int(value)
