"""`Predictor()("part.png").overlay()`: from an image to a verdict."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.errors import ImageError, UsageError
from fbclip.images import read_image, to_rgb
from fbclip.resample import in_order, resize
from fbclip.runtime.backends import make_backend, require_probabilities
from fbclip.runtime.calibration import Calibration, calibrated_bundles, checked_threshold
from fbclip.runtime.prediction import Prediction
from fbclip.runtime.regions import find_evidence
from fbclip.runtime.roi import Roi
from fbclip.runtime.sight import find_blindness


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
            raise UsageError(f"a least area is a number of pixels, 0 or more; got {min_area!r:.50}", option="min_area")
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
