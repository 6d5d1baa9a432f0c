"""`Predictor()("part.png").overlay()`: from an image to a verdict."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.bundle import Bundle
from fbclip.errors import ImageError, UsageError
from fbclip.image import in_order, resize
from fbclip.reading import read_image, to_rgb
from fbclip.runtime.backends import make_backend
from fbclip.runtime.draw import draw_overlay


@dataclass(frozen=True)
class Region:
    """A connected part of the map at or above the threshold.

    Attributes:
        box: (x0, y0, x1, y1) in pixels of the frame; x1 and y1 are exclusive.
        peak: the highest value in it, 0..1.
        area: in pixels.
    """

    box: tuple[int, int, int, int]
    peak: float
    area: int


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        score: abnormal probability of the image, 0..1.
        threshold: scores and map values from here on are anomalous.
        anomaly_map: float32 (H, W), 0..1, in the frame's own size.
        model_map: float32 (S, S), the map as the model gives it; (H, W) where the graph takes whole frames.
        regions: of the map at or above the threshold, the highest peak first.
        timings_ms: milliseconds by stage: read, preprocess, model, postprocess.
        image: the frame itself, uint8 (H, W, 3) RGB.
    """

    score: float
    threshold: float
    anomaly_map: NDArray[np.float32] = field(repr=False)
    model_map: NDArray[np.float32] = field(repr=False)
    regions: tuple[Region, ...]
    timings_ms: dict[str, float]
    image: NDArray[np.uint8] = field(repr=False)

    @property
    def is_anomalous(self) -> bool:
        return self.score >= self.threshold

    def overlay(self) -> NDArray[np.uint8]:
        """The frame with heat map, contours, score and verdict: uint8 (H', W', 3) RGB."""
        return draw_overlay(self.image, self.anomaly_map, self.score, self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without the arrays."""
        regions = [{"box": list(r.box), "peak": r.peak, "area": r.area} for r in self.regions]
        return {
            "score": self.score,
            "threshold": self.threshold,
            "is_anomalous": self.is_anomalous,
            "regions": regions,
            "timings_ms": {k: round(v, 3) for k, v in self.timings_ms.items()},
        }


class Predictor:
    """A loaded bundle on a device.

    Args:
        bundle: a bundle, its path, or None for the embedded default model.
        device: "auto", "cpu", "cuda" or "tensorrt"; never another than the one asked for.
        precision: "auto", "fp32", "fp16" or "int8".
        threshold: 0..1, or None for the bundle's.

    Raises:
        BundleError, DeviceError, UsageError.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        threshold: float | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self.threshold = self.bundle.manifest.threshold if threshold is None else threshold
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold is a probability between 0 and 1; got {self.threshold}")
        self.backend, self.precision = make_backend(self.bundle, device, precision)

    @property
    def launches(self) -> str | None:
        """How TensorRT's executions are started: "CUDA graph", or "enqueue" and why. None with other runtimes."""
        return getattr(self.backend, "launches", None)

    def __call__(self, image: str | Path | Image.Image | NDArray[np.uint8], channel_order: str = "rgb") -> Prediction:
        """Score one image.

        Args:
            image: a path, a Pillow image, or a frame uint8 (H, W, 3) or (H, W).
            channel_order: of a frame: "rgb", or "bgr" as OpenCV reads.

        Raises:
            ImageError: unreadable file, a frame of another shape or type, or of another size than the graph was
                exported for with --frame-size.
        """
        start = time.perf_counter()
        frame = self._frame(image, channel_order)
        read = time.perf_counter()
        batch = self._input(frame)[None]
        ready = time.perf_counter()
        scores, maps = self.backend.run(batch)
        done = time.perf_counter()
        height, width = frame.shape[:2]
        anomaly_map = maps[0]
        if anomaly_map.shape != (height, width):
            anomaly_map = cv2.resize(anomaly_map, (width, height), interpolation=cv2.INTER_LINEAR)
            anomaly_map = anomaly_map.reshape(height, width)
        regions = find_regions(anomaly_map, self.threshold)
        end = time.perf_counter()
        timings = {"read": read - start, "preprocess": ready - read, "model": done - ready, "postprocess": end - done}
        return Prediction(
            float(scores[0]),
            self.threshold,
            anomaly_map,
            maps[0],
            regions,
            {stage: seconds * 1e3 for stage, seconds in timings.items()},
            frame,
        )

    def _input(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A frame uint8 (H, W, 3) RGB as the graph takes it."""
        manifest = self.bundle.manifest
        if manifest.frame_size is None:
            return in_order(resize(frame, manifest.image_size), manifest.channel_order)
        if frame.shape[:2] != manifest.frame_size:
            built, here = (f"{height}x{width}" for height, width in (manifest.frame_size, frame.shape[:2]))
            raise ImageError(
                f"{self.bundle.path} takes frames of {built} (height x width) only; got {here}: "
                f"set the camera to that, or export with --frame-size {here}, or without for any size"
            )
        return in_order(frame, manifest.channel_order)

    @staticmethod
    def _frame(image: str | Path | Image.Image | NDArray[np.uint8], channel_order: str) -> NDArray[np.uint8]:
        if isinstance(image, (str, Path)):
            return read_image(Path(image))
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.size == 0:
            raise ImageError(f"a frame is uint8 (H, W, 3) or (H, W); got {image.dtype} {image.shape}")
        if channel_order not in ("rgb", "bgr"):
            raise UsageError(f"channel_order is rgb or bgr; got {channel_order!r}")
        if image.ndim == 2:
            return np.repeat(image[..., None], 3, axis=2)
        return image if channel_order == "rgb" else np.ascontiguousarray(image[..., ::-1])


def find_regions(anomaly_map: NDArray[np.float32], threshold: float) -> tuple[Region, ...]:
    """Connected regions (8 neighbours) of a map (H, W) at or above the threshold, the highest peak first."""
    mask = (anomaly_map >= threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    regions = []
    for label in range(1, count):
        x, y, w, h, area = (int(v) for v in stats[label])
        window = (slice(y, y + h), slice(x, x + w))
        peak = float(anomaly_map[window][labels[window] == label].max())
        regions.append(Region((x, y, x + w, y + h), peak, area))
    return tuple(sorted(regions, key=lambda r: r.peak, reverse=True))
