"""What the model says of one image, as values and as a picture."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageShow

from fbclip.errors import UsageError
from fbclip.files import replacing
from fbclip.runtime.regions import Region

MIN_SIDE = 320  # smaller frames are enlarged, so that the text stays legible
GOOD, BAD = (46, 160, 67), (218, 54, 51)  # RGB
BARS = {"good": GOOD, "defect": BAD, "unusable": (158, 106, 3), "absent": (87, 96, 106)}
AGAINST = {"min_area": "regions too small", "roi": "outside the mask"}  # a verdict that the score alone would give
LEVELS = np.arange(256, dtype=np.uint8)[:, None]
COLOURS = cv2.applyColorMap(LEVELS, cv2.COLORMAP_TURBO)[..., ::-1]  # (256, 1, 3) RGB
# of a colour at each level: the surface stays visible where the map is low, the colour where it is high
ALPHA = 0.15 + 0.5 * LEVELS[..., None] / 255
HEAT = (COLOURS * ALPHA).round().astype(np.uint8)
SURFACE = np.repeat((255 * (1 - ALPHA)).round(), 3, axis=2).astype(np.uint8)  # 255ths that stay of the frame
SUBPIXEL = 4  # binary digits of an outline's coordinates
JPEG_QUALITY = 92
SHOWN_SIDE = 1280  # pixels of the longer side of what a notebook shows
DASH, GAP = 8, 6  # of a weak region's outline, in widths of its line


@dataclass(frozen=True, kw_only=True, eq=False)
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
        absent: whether the part that frames are aligned to is not in this one (see `fbclip.runtime.align`).
        part: the corners of the reference in this frame, float64 (4, 2) of x and y in pixels, clockwise from its upper
            left one; None where frames are not aligned, or the part is absent.
        map_threshold: map values from here on are regions; None for `threshold`.
        name: the image's path, or a source's name and the frame's number; "" of an array.
        memory: the name of the memory of good parts that it was scored with (`fbclip.memory.Memory.name`); None of the
            zero-shot model.
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
    map_threshold: float | None = None
    name: str = ""
    memory: str | None = None
    absent: bool = False
    part: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def verdict(self) -> str:
        """ "good", "defect", "unusable" or "absent". What isn't known to be good is never called so."""
        if self.unusable:
            return "unusable"
        if self.absent:
            return "absent"
        return "good" if self.score < self.threshold or self.overruled else "defect"

    @property
    def is_anomalous(self) -> bool:
        """Whether the image is not known to be good: a defect, unusable, or without the part."""
        return self.verdict != "good"

    def overlay(self, longest: int | None = None) -> NDArray[np.uint8]:
        """The frame with heat map, regions, score and verdict, drawn anew: uint8 (H', W', 3) RGB.

        Args:
            longest: pixels; a frame with a longer side is shrunk to it.
        """
        return draw_overlay(self, longest)

    @property
    def label(self) -> str:
        """The verdict, as it is called elsewhere."""
        return self.verdict

    @property
    def boxes(self) -> NDArray[np.int64]:
        """The regions' boxes, int64 (N, 4) of x0, y0, x1, y1 in pixels; x1 and y1 are exclusive."""
        return np.array([region.box for region in self.regions], np.int64).reshape(-1, 4)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The pixels of all regions that reach the map's threshold, bool (H, W): weak ones do not."""
        marked = np.zeros(self.anomaly_map.shape, bool)
        for region in self.regions:
            if not region.weak:
                x0, y0, x1, y1 = region.box
                marked[y0:y1, x0:x1] |= self._inside(region)
        return marked

    def _inside(self, region: Region) -> NDArray[np.bool_]:
        """The pixels of a region in its box; of a weak one with its holes."""
        x0, y0, x1, y1 = region.box
        filled = cv2.fillPoly(np.zeros((y1 - y0, x1 - x0), np.uint8), [region.outline], (1,), offset=(-x0, -y0))
        if region.weak:
            return filled > 0
        line = self.threshold if self.map_threshold is None else self.map_threshold
        _, parts = cv2.connectedComponents(filled * (self.anomaly_map[y0:y1, x0:x1] >= line), connectivity=8)
        x, y = region.outline[0]
        return np.asarray(parts == parts[y - y0, x - x0])  # without what lies in its holes

    def save(self, path: str | Path) -> None:
        """Write the overlay as a picture of the kind that the path ends in: .jpg, .png, .webp and others.

        Raises:
            UsageError: an ending that no picture has, or a place that can't be written to.
            FBClipError: the disk is full.
        """
        path = Path(path)
        kind = Image.registered_extensions().get(path.suffix.lower())
        if kind not in Image.SAVE:
            raise UsageError(f"a picture's name ends in .jpg, .png, .webp or the like; got {path.name}", option="path")
        options = {"quality": JPEG_QUALITY} if kind == "JPEG" else {}
        with replacing(path, durable=False) as file:
            Image.fromarray(self.overlay()).save(file, kind, **options)

    def show(self) -> None:
        """Display the overlay: in a notebook below its cell, elsewhere in the system's picture viewer.

        Raises:
            UsageError: there is no display, or no viewer.
        """
        if "ipykernel" in sys.modules:
            from IPython.display import display

            display(self)
            return
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UsageError("a picture is shown on a display, and there is none here: save() it, or use a notebook")
        if not ImageShow.show(Image.fromarray(self.overlay())):
            raise UsageError("a picture is shown by a viewer like xdg-open, and there is none here: save() it")

    def _repr_png_(self) -> bytes:
        """The overlay as a notebook shows it."""
        data = io.BytesIO()
        Image.fromarray(self.overlay(SHOWN_SIDE)).save(data, "PNG")
        return data.getvalue()

    def to_supervision(self, masks: bool = False) -> Any:
        """The regions as `supervision.Detections`: boxes, peaks as confidence, class 0 (a defect), and `data["weak"]`.

        Args:
            masks: also what is inside of each, bool (N, H, W); of a weak one with its holes.

        Raises:
            UsageError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UsageError(
                f"to_supervision() needs supervision ({error}): pip install 'fbclip[supervision]'"
            ) from error
        inside = np.zeros((len(self.regions), *self.anomaly_map.shape), bool) if masks else None
        if inside is not None:
            for mask, region in zip(inside, self.regions, strict=True):
                x0, y0, x1, y1 = region.box
                mask[y0:y1, x0:x1] = self._inside(region)
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=inside,
            confidence=np.array([region.peak for region in self.regions], np.float32),
            class_id=np.zeros(len(self.regions), int),  # annotators choose a colour by it
            data={"weak": np.array([region.weak for region in self.regions], bool)},
        )

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
            "memory": self.memory,
            "regions": regions,
            "timings_ms": {k: round(v, 3) for k, v in self.timings_ms.items()},
        }


def draw_overlay(prediction: Prediction, longest: int | None = None) -> NDArray[np.uint8]:
    """Heat map (a fixed scale, never the image's own), outlines of the regions, and a bar with score and verdict.

    The outline of a weak region is dashed: the score has a verdict there that the map alone would not have.

    Args:
        prediction: all that is drawn is its own: a verdict or a region is never found again here.
        longest: pixels of the longer side; larger frames are shrunk before anything is drawn. None: none is.

    Returns:
        uint8 (H', W', 3) RGB: the frame, enlarged where it is small, with the bar above it.
    """
    height, width = prediction.anomaly_map.shape
    size = _canvas_size(height, width, longest)
    image, anomaly_map = (_resized(array, size) for array in (prediction.image, prediction.anomaly_map))
    low, high = prediction.map_scale
    level = ((anomaly_map - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    # by tables of 256 levels: in floating point it takes seven times as long
    surface = cv2.multiply(image, cv2.applyColorMap(level, SURFACE), scale=1 / 255)
    canvas = cv2.add(surface, cv2.applyColorMap(level, HEAT))
    line = max(1, round(min(size) / 300))
    factor = np.divide(size, (width, height))
    closed = [_scaled(region.outline, factor) for region in prediction.regions if not region.weak]
    open_ = [dash for region in prediction.regions if region.weak for dash in _dashes(region, factor, line)]
    for thickness, colour in ((line + 2, (255, 255, 255)), (line, BAD)):
        for outlines, is_closed in ((closed, True), (open_, False)):
            cv2.polylines(canvas, outlines, is_closed, colour, thickness, cv2.LINE_AA, SUBPIXEL)
    return np.vstack([_bar(size[0], prediction), canvas]).astype(np.uint8)


def _dashes(region: Region, factor: NDArray[np.float64], line: int) -> list[NDArray[np.int32]]:
    """A region's outline on a canvas that is larger by a factor (2,), in pieces."""
    points = _scaled(region.outline, factor)
    steps = np.linalg.norm(np.diff(points, axis=0, append=points[:1]), axis=1) / 2**SUBPIXEL
    along = np.concatenate([[0.0], np.cumsum(steps)[:-1]])  # pixels from the first point to each
    place, piece = along % ((DASH + GAP) * line), along // ((DASH + GAP) * line)
    drawn = place < DASH * line
    return [points[drawn & (piece == number)] for number in np.unique(piece[drawn])]


def _scaled(outline: NDArray[np.int32], factor: NDArray[np.float64]) -> NDArray[np.int32]:
    """Points (N, 2) of the frame on a canvas that is larger by a factor (2,), with fixed binary digits."""
    # steps from pixel to pixel would be stairs on a larger canvas; centres of pixels stay centres
    smooth = (np.roll(outline, 1, axis=0) + 2 * outline + np.roll(outline, -1, axis=0)) / 4
    return np.asarray((((smooth + 0.5) * factor - 0.5) * 2**SUBPIXEL).round(), np.int32)


def _bar(width: int, prediction: Prediction) -> NDArray[np.uint8]:
    score, threshold, verdict = prediction.score, prediction.threshold, prediction.verdict
    text = f"{verdict.upper()}  {score:.3f} {'>=' if score >= threshold else '<'} {threshold:.3f}"
    if prediction.unusable:
        text = f"{verdict.upper()}  {prediction.unusable}"
    elif prediction.overruled:
        text += f", {AGAINST[prediction.overruled]}"
    if prediction.memory:
        text += f"  memory {prediction.memory[:6]}"
    scale = min(max(width / 640, 0.5), 3.0)
    thickness = max(1, round(1.6 * scale))
    (text_width, text_height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    if text_width > width - 12:
        scale *= (width - 12) / text_width
        thickness = max(1, round(1.6 * scale))
        (text_width, text_height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    bar = np.full((text_height + base + 12, width, 3), BARS[verdict], np.uint8)
    cv2.putText(
        bar, text, (6, text_height + 6), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thickness, cv2.LINE_AA
    )
    return bar


def _canvas_size(height: int, width: int, longest: int | None) -> tuple[int, int]:
    """(width, height): at least 320 pixels on both sides; a side that is far shorter is stretched to it."""
    factor = max(1.0, MIN_SIDE / max(height, width))
    if longest:
        factor = min(factor, longest / max(height, width))
    return max(MIN_SIDE, round(width * factor)), max(MIN_SIDE, round(height * factor))


def _resized(array: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    height, width = array.shape[:2]
    if size == (width, height):
        return array
    shrinks = size[0] < width or size[1] < height
    return cv2.resize(array, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
