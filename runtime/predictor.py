"""`Predictor()("part.png").overlay()`: from an image to a verdict."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.bundle import EMBEDDED, Bundle
from fbclip.errors import ImageError, UsageError
from fbclip.images import read_image, to_rgb
from fbclip.resample import in_order, resize
from fbclip.runtime.backends import make_backend, require_probabilities
from fbclip.runtime.calibration import Calibration, calibrated_bundles, checked_threshold
from fbclip.runtime.draw import draw_overlay
from fbclip.runtime.roi import Roi
from fbclip.runtime.sight import find_blindness

SAMPLES = 128  # pixels of a map's shorter side that are enough for its median: it is smooth

MAX_REGIONS = 1000  # of a prediction
MAX_EDGES = 1 << 18  # neighbours in a map of which one is marked; contours of noise take seconds, and gigabytes
BLOCK = 1 << 20  # pixels that are counted at once


@dataclass(frozen=True)
class Region:
    """A connected part of the map at or above the map's threshold; or a weak one, see `weak_region`.

    Attributes:
        box: (x0, y0, x1, y1) in pixels of the frame; x1 and y1 are exclusive.
        peak: the highest value in it, 0..1.
        area: in pixels.
        outline: its outermost pixels in turn, int32 (N, 2) of x and y.
        weak: whether it stays below the map's threshold: the place of an anomaly that is the score's alone.
    """

    box: tuple[int, int, int, int]
    peak: float
    area: int
    outline: NDArray[np.int32] = field(repr=False, compare=False)
    weak: bool = False

    def moved(self, x: int, y: int) -> Region:
        """The same region where the map's corner lies at (x, y) of the frame."""
        x0, y0, x1, y1 = self.box
        return replace(self, box=(x0 + x, y0 + y, x1 + x, y1 + y), outline=self.outline + np.array((x, y), np.int32))


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        score: abnormal probability of the image or its region of interest (see `Roi`), 0..1.
        threshold: scores from here on are anomalous.
        anomaly_map: float32 (H, W), 0..1, in the frame's own size; 0 outside the region of interest.
        model_map: float32 (S, S), the map as the model gives it; (H, W) where the graph takes whole frames.
        regions: of the map at or above its threshold and not smaller than `min_area`, the highest peak first. A defect
            always has one: where no part of the map reaches its threshold, a weak one.
        timings_ms: milliseconds by stage: read, preprocess, model, postprocess.
        image: the frame itself, uint8 (H, W, 3) RGB.
        map_scale: map values (low, high) of the first and the last colour of the overlay.
        overruled: why the image is good although its score reaches the threshold: "min_area", all regions are smaller
            than that; "roi", what is anomalous lies outside the mask. None where the score decides.
        unusable: why the image shows nothing to judge: "black", "uniform", or of a live source "frozen" (see
            `fbclip.runtime.sight`); None where it does.
    """

    score: float
    threshold: float
    anomaly_map: NDArray[np.float32] = field(repr=False)
    model_map: NDArray[np.float32] = field(repr=False)
    regions: tuple[Region, ...]
    timings_ms: dict[str, float]
    image: NDArray[np.uint8] = field(repr=False)
    map_scale: tuple[float, float] = (0.0, 1.0)
    overruled: str | None = None
    unusable: str | None = None

    @property
    def verdict(self) -> str:
        """ "good", "defect" or "unusable". What isn't known to be good is never called so."""
        if self.unusable:
            return "unusable"
        return "good" if self.score < self.threshold or self.overruled else "defect"

    @property
    def is_anomalous(self) -> bool:
        """Whether the image is not known to be good: a defect, or unusable."""
        return self.verdict != "good"

    def overlay(self, longest: int | None = None) -> NDArray[np.uint8]:
        """The frame with heat map, regions, score and verdict, drawn anew: uint8 (H', W', 3) RGB.

        Args:
            longest: pixels; a frame with a longer side is shrunk to it.
        """
        return draw_overlay(self, longest)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without the arrays."""
        regions = [{"box": list(r.box), "peak": r.peak, "area": r.area, "weak": r.weak} for r in self.regions]
        return {
            "score": self.score,
            "threshold": self.threshold,
            "is_anomalous": self.is_anomalous,
            "verdict": self.verdict,
            "overruled": self.overruled,
            "unusable": self.unusable,
            "regions": regions,
            "timings_ms": {k: round(v, 3) for k, v in self.timings_ms.items()},
        }


class Predictor:
    """A loaded bundle on a device. Any number of threads may call it.

    Args:
        bundle: a bundle, its path, or None for the embedded default model.
        device: "auto", "cpu", "cuda" or "tensorrt"; never another than the one asked for.
        precision: "auto", "fp32", "fp16" or "int8".
        threshold: of scores, 0..1; None for the calibration's, or the bundle's default where there is none.
        calibrated: whether to use the bundle's calibration (see `fbclip calibrate`), for the maps also where a
            threshold is given: scores and maps have scales of their own.
        roi: where frames are inspected; None for all of them.
        min_area: pixels of the frame: smaller regions don't count, and where all that reach the map's threshold are
            smaller, the image is good. Where none reaches it, the score decides alone.
        batch_size: images that `backend.run` will be given at once; a call gives it one.

    Attributes:
        calibration: the one in use, or None.
        threshold, map_scale: as in a Prediction; each call takes what they are then.
        map_threshold: map values from here on are regions; None without a calibration: from `threshold` on.

    Raises:
        BundleError, DeviceError, UsageError.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        threshold: float | None = None,
        calibrated: bool = True,
        roi: Roi | None = None,
        min_area: int = 0,
        batch_size: int = 1,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self.calibration = Calibration.load(self.bundle) if calibrated else None
        self.threshold, self.map_threshold, self.map_scale = self.bundle.manifest.threshold, None, (0.0, 1.0)
        if self.calibration:
            self.threshold = self.calibration.threshold
            self.map_threshold = self.calibration.map_threshold
            self.map_scale = self.calibration.map_scale
        self._given = threshold
        if threshold is not None:
            self.threshold = threshold
        elif self.calibration and self.calibration.roi != (roi.identity if roi else None):
            raise UsageError(
                f"{self.bundle.path} was calibrated {_where(self.calibration.roi)}, and other frames have other scores: "
                f"calibrate {_where(roi.identity if roi else None)}, or pass a --threshold"
            )
        checked_threshold(self.threshold)
        if isinstance(min_area, bool) or not isinstance(min_area, (int, np.integer)) or min_area < 0:
            raise UsageError(f"--min-area is a number of pixels, 0 or more; got {min_area!r:.50}")
        self.roi = roi
        self.min_area = min_area
        self.backend, self.precision = make_backend(self.bundle, device, precision, batch_size)

    @property
    def launches(self) -> str | None:
        """How TensorRT's executions are started: "CUDA graph", or "enqueue" and why. None with other runtimes."""
        return getattr(self.backend, "launches", None)

    def __call__(self, image: str | Path | Image.Image | NDArray[np.uint8], channel_order: str = "rgb") -> Prediction:
        """Score one image: `prepare`, `run` and `conclude`, which a pipeline may overlap.

        Args:
            image: a path, a Pillow image, or a frame uint8 (H, W, 3) or (H, W).
            channel_order: of a frame: "rgb", or "bgr" as OpenCV reads.

        Raises:
            ImageError: unreadable file, a frame of another shape or type, of another size than the graph was
                exported for with --frame-size, or that the region of interest doesn't fit.
            FBClipError: as `run`.
        """
        start = time.perf_counter()
        frame = self._frame(image, channel_order)
        read = time.perf_counter()
        batch = self.prepare(frame)
        ready = time.perf_counter()
        score, model_map = self.run(batch, image if isinstance(image, (str, Path)) else "an image")
        done = time.perf_counter()
        timings = {"read": read - start, "preprocess": ready - read, "model": done - ready}
        timings_ms = {stage: seconds * 1e3 for stage, seconds in timings.items()}
        return self.conclude(frame, score, model_map, timings_ms, find_blindness(batch))

    def explain_threshold(self) -> str:
        """One line for a person: the threshold it began with, and where that comes from."""
        if self._given is not None:
            return f"threshold {self._given:g} was given"
        if self.calibration is None:
            text = f"threshold {self.bundle.manifest.threshold:g} is the bundle's default: no calibration; "
            if self.bundle.path == EMBEDDED and (here := calibrated_bundles(Path())):
                verb = "is" if len(here) == 1 else "are"
                return f"{text}{' and '.join(map(str, here))} here {verb} calibrated: --bundle {here[0]}"
            return f"{text}run fbclip calibrate"
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
                f"set the camera to that, or export with --frame-size {here}, or without for any size"
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

    def conclude(
        self,
        frame: NDArray[np.uint8],
        score: float,
        model_map: NDArray[np.float32],
        timings_ms: dict[str, float],
        unusable: str | None = None,
    ) -> Prediction:
        """From what the model says of a prepared frame to a prediction.

        Args:
            frame: uint8 (H, W, 3) RGB, as `prepare` took it.
            score: the class token's, 0..1.
            model_map: float32 (H', W'), 0..1.
            timings_ms: milliseconds of the stages so far; postprocess is added.
            unusable: why the frame shows nothing to judge, if so.
        """
        start = time.perf_counter()
        threshold = checked_threshold(self.threshold)  # may be set anew, also from another thread
        height, width = frame.shape[:2]
        x0, y0, x1, y1 = self.roi.box if self.roi else (0, 0, width, height)
        part = model_map
        if part.shape != (y1 - y0, x1 - x0):
            enlarged = cv2.resize(model_map, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
            part = np.asarray(enlarged, np.float32).reshape(y1 - y0, x1 - x0)
        inside = self.roi.inside if self.roi else None
        marked_from = threshold if self.map_threshold is None else self.map_threshold
        regions, overruled = find_evidence(part, inside, score >= threshold, marked_from, self.min_area)
        anomaly_map = part
        if self.roi:
            anomaly_map = np.zeros((height, width), np.float32)
            anomaly_map[y0:y1, x0:x1] = part if inside is None else part * inside
            regions = tuple(region.moved(x0, y0) for region in regions)
        timings_ms = {**timings_ms, "postprocess": (time.perf_counter() - start) * 1e3}
        return Prediction(
            score,
            threshold,
            anomaly_map,
            model_map,
            regions,
            timings_ms,
            frame,
            self.map_scale,
            overruled,
            unusable,
        )

    @staticmethod
    def _frame(image: str | Path | Image.Image | NDArray[np.uint8], channel_order: str) -> NDArray[np.uint8]:
        if isinstance(image, (str, Path)):
            return read_image(Path(image))
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if not isinstance(image, np.ndarray):
            raise ImageError(f"an image is a path, a Pillow image or an array; got {type(image).__name__}")
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.size == 0:
            raise ImageError(f"a frame is uint8 (H, W, 3) or (H, W); got {image.dtype} {image.shape}")
        if channel_order not in ("rgb", "bgr"):
            raise UsageError(f"channel_order is rgb or bgr; got {channel_order!r}")
        if image.ndim == 2:
            return np.repeat(image[..., None], 3, axis=2)
        return image if channel_order == "rgb" else np.ascontiguousarray(image[..., ::-1])


def _where(roi: str | None) -> str:
    return f"with --roi {roi}" if roi else "without --roi"


def find_evidence(
    anomaly_map: NDArray[np.float32], inside: NDArray[np.uint8] | None, reached: bool, line: float, min_area: int = 0
) -> tuple[tuple[Region, ...], str | None]:
    """Where an image is anomalous, and what speaks against the verdict of its score.

    Args:
        anomaly_map: float32 (H, W), 0..1.
        inside: uint8 (H, W) of 0 and 1, what counts of it; None where all does.
        reached: whether the score reaches its threshold.
        line: map values from here on are regions.
        min_area: pixels: smaller regions don't count.

    Returns:
        The regions; where the score is reached and none is at the line, the weak one. And `Prediction.overruled`.
    """
    counted = anomaly_map
    if inside is not None:
        counted = anomaly_map.copy()
        counted[inside == 0] = -1  # below every line
    regions = find_regions(counted, line, min_area)
    if regions or not reached:
        return regions, None
    if (highest := counted.max()) >= np.float32(line):
        return (), "min_area"
    if highest < anomaly_map.max():  # the score sees what the mask leaves out
        return (), "roi"
    return (weak_region(counted),), None


def weak_region(anomaly_map: NDArray[np.float32]) -> Region:
    """The connected pixels (8 neighbours) around the highest value of a map (H, W) that lie at least midway between
    its median and that value. Negative values don't count."""
    _, peak, _, place = cv2.minMaxLoc(anomaly_map)
    step = max(1, min(anomaly_map.shape) // SAMPLES)
    sample = anomaly_map[::step, ::step]
    sample = sample[sample >= 0]
    middle = float(np.median(sample)) if sample.size else peak
    level = np.float32((middle + peak) / 2)
    around = (anomaly_map >= level).view(np.uint8)
    _, _, _, (x, y, width, height) = cv2.floodFill(around, None, place, 2, flags=8)
    box = slice(y, y + height), slice(x, x + width)
    (region,) = find_regions(np.where(around[box] == 2, anomaly_map[box], np.float32(-1)), float(level))
    return replace(region.moved(x, y), weak=True)


def find_regions(anomaly_map: NDArray[np.float32], threshold: float, min_area: int = 0) -> tuple[Region, ...]:
    """Connected regions (8 neighbours) of a map (H, W) at or above the threshold, the highest peak first.

    Those of less than `min_area` pixels are left out, and of more than `MAX_REGIONS` those with the lowest peaks. Work
    grows with the regions' boxes, not with the frame: labels for every pixel of a camera's frame would take many times
    longer than everything else after the model. Only a map that is noise is labelled, for its contours take longer.
    """
    mask = (anomaly_map >= threshold).view(np.uint8)
    edges = sum(int(np.count_nonzero(a != b)) for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])))
    find = _by_contours if edges <= MAX_EDGES else _by_labels
    return tuple(sorted(find(anomaly_map, mask, min_area), key=lambda region: (-region.peak, region.box))[:MAX_REGIONS])


def _by_contours(anomaly_map: NDArray[np.float32], mask: NDArray[np.uint8], min_area: int) -> list[Region]:
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    found = []
    for index, outline in enumerate(contours):
        _, _, hole, parent = hierarchy[0, index]
        if parent >= 0:  # a hole's edge
            continue
        edges = [outline]
        while hole >= 0:
            edges.append(contours[hole])
            hole = hierarchy[0, hole, 0]
        x, y, w, h = cv2.boundingRect(outline)
        inside = cv2.fillPoly(np.zeros((h, w), np.uint8), edges, 1, offset=(-x, -y))
        area = cv2.countNonZero(inside)
        if area >= min_area:
            _, peak, _, _ = cv2.minMaxLoc(anomaly_map[y : y + h, x : x + w], inside)
            found.append(Region((x, y, x + w, y + h), peak, area, outline[:, 0].astype(np.int32)))
    return found


def _by_labels(anomaly_map: NDArray[np.float32], mask: NDArray[np.uint8], min_area: int) -> list[Region]:
    """The `MAX_REGIONS` with the highest peaks, of any number."""
    number, labels = cv2.connectedComponents(mask, connectivity=8, ltype=cv2.CV_32S)
    areas, seeds = np.zeros(number, np.int64), np.zeros(number, np.int64)
    peaks = np.full(number, -np.inf, np.float32)
    height, width = mask.shape
    rows = max(1, BLOCK // width)
    for top in range(0, height, rows):
        block = np.asarray(labels[top : top + rows], np.int32).ravel()
        areas += np.bincount(block, minlength=number)
        np.maximum.at(peaks, block, anomaly_map[top : top + rows].ravel())
        seeds[block] = np.arange(top * width, top * width + len(block))
    found = []
    seen = np.zeros((height + 2, width + 2), np.uint8)  # OpenCV would make one for every region
    large = 1 + np.flatnonzero(areas[1:] >= min_area)
    for label in large[np.argsort(-peaks[large], kind="stable")][:MAX_REGIONS]:
        seed_y, seed_x = divmod(int(seeds[label]), width)
        area, _, _, (x, y, w, h) = cv2.floodFill(mask, seen, (seed_x, seed_y), 2, flags=8)
        inside = (mask[y : y + h, x : x + w] == 2).view(np.uint8)
        (outline, *_), _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=(x, y))
        mask[y : y + h, x : x + w][inside > 0] = 0
        found.append(Region((x, y, x + w, y + h), float(peaks[label]), area, outline[:, 0].astype(np.int32)))
    return found
