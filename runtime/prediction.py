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
from fbclip.runtime.canvas import MARK, WHITE, Canvas, corners, strip
from fbclip.runtime.regions import Region

MIN_SIDE = 320  # smaller frames are enlarged, so that the text stays legible
BARS = {"good": (46, 160, 67), "defect": MARK, "unusable": (158, 106, 3), "absent": (87, 96, 106)}  # RGB
UNJUDGED = ("absent", "unusable")  # verdicts on frames that say nothing of a part: neither good nor defects
AGAINST = {"min_area": "regions too small", "roi": "outside the mask"}  # a verdict that the score alone would give
PART, INK = (31, 111, 235), (32, 32, 32)  # RGB of the part's frame, and of what points to a region
JPEG_QUALITY = 92
SHOWN_SIDE = 1280  # pixels of the longer side of what a notebook shows
LARGE_SIDE = 2000  # pixels of a frame's longer side: in larger ones a region is shown enlarged
SMALL = 0.02  # if it is shorter than this share of that side
CONTEXT, LEAST_SHOWN = 3, 64  # that is shown then: times the region's longer side, and pixels at least


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What the model says of one image.

    Attributes:
        score: abnormal probability of the image or its region of interest (see `Roi`), 0..1.
        threshold: scores from here on are anomalous.
        anomaly_map: float32 (H, W), 0..1, in the frame's own size; 0 outside the region of interest.
        model_map: float32 (S, S), the map as the model gives it; (H, W) where the graph takes whole frames.
        regions: of the map at or above its threshold, as `Rules` have them: not smaller than `min_area`, the highest peak
            first, or the largest. A defect always has one: where no part of the map reaches its threshold, a weak one.
        timings_ms: milliseconds by stage: read, preprocess, model, postprocess.
        image: the frame itself, uint8 (H, W, 3) RGB.
        map_scale: map values (low, high) of the first and the last colour of the overlay.
        overruled: why the image is good although its score reaches the threshold: "min_area", all regions are smaller
            than that; "roi", what is anomalous lies outside the mask. None where the score decides.
        unusable: why the image shows nothing to judge: "black", "uniform", or of a live source "frozen"; with a
            calibration also "dark", "bright", "blurred" or "green" (see `fbclip.runtime.sight`). None where it does.
        absent: whether the part that frames are aligned to is not in this one (see `fbclip.runtime.align`).
        tiles: boxes (x0, y0, x1, y1) in pixels of the frame that it was inspected in one by one; x1 and y1 are exclusive.
            Empty where it was inspected as a whole, or in line with a part.
        part: the corners of what is inspected of the reference, in this frame: float64 (4, 2) of x and y in pixels,
            clockwise from its upper left one; None where frames are not aligned, or the part is absent.
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
    tiles: tuple[tuple[int, int, int, int], ...] = field(default=(), repr=False)

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

    def overlay(
        self, longest: int | None = None, *, tiles: bool = False, zoom: bool | None = None
    ) -> NDArray[np.uint8]:
        """The frame with heat map, regions, score and verdict, drawn anew: uint8 (H', W', 3) RGB.

        Args:
            longest: pixels; a frame with a longer side is shrunk to it.
            tiles: whether to draw the tiles that the frame was inspected in.
            zoom: whether to show the worst region enlarged, in a corner; None: where the frame's longer side has more than
                2,000 pixels, the region has less than 2 % of them, and a corner is free of regions.
        """
        return draw_overlay(self, longest, tiles=tiles, zoom=zoom)

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
        inside = np.zeros((y1 - y0, x1 - x0), bool)
        for outline in region.outlines:
            x, y, width, height = cv2.boundingRect(outline)
            inside[y - y0 :, x - x0 :][:height, :width] |= self._within(outline, region.weak)
        return inside

    def _within(self, outline: NDArray[np.int32], is_weak: bool) -> NDArray[np.bool_]:
        """The pixels of the connected part with this outline, in the outline's box."""
        x0, y0, width, height = cv2.boundingRect(outline)
        filled = cv2.fillPoly(np.zeros((height, width), np.uint8), [outline], (1,), offset=(-x0, -y0))
        if is_weak:
            return filled > 0
        line = self.threshold if self.map_threshold is None else self.map_threshold
        values = self.anomaly_map[y0 : y0 + height, x0 : x0 + width]
        _, parts = cv2.connectedComponents(filled * (values >= line), connectivity=8)
        x, y = outline[0]
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
        return {
            "score": self.score,
            "threshold": self.threshold,
            "is_anomalous": self.is_anomalous,
            "verdict": self.verdict,
            "overruled": self.overruled,
            "unusable": self.unusable,
            "memory": self.memory,
            **({} if self.part is None else {"part": self.part.round(2).tolist()}),
            "regions": [region.to_dict() for region in self.regions],
            "timings_ms": {k: round(v, 3) for k, v in self.timings_ms.items()},
        }


def draw_overlay(
    prediction: Prediction, longest: int | None = None, *, tiles: bool = False, zoom: bool | None = None
) -> NDArray[np.uint8]:
    """Heat map (a fixed scale, never the image's own), outlines of the regions, and a bar with score and verdict.

    The outline of a weak region is dashed: the score has a verdict there that the map alone would not have. The frame of
    the part that was found is drawn, too.

    Args:
        prediction: all that is drawn is its own: a verdict or a region is never found again here.
        longest: pixels of the longer side; larger frames are shrunk before anything is drawn. None: none is.
        tiles, zoom: as of `Prediction.overlay`.

    Returns:
        uint8 (H', W', 3) RGB: the frame, enlarged where it is small, with the bar above it.
    """
    height, width = prediction.anomaly_map.shape
    size = _canvas_size(height, width, longest)
    bar = _bar(size[0], prediction)
    picture = np.empty((len(bar) + size[1], size[0], 3), np.uint8)
    picture[: len(bar)] = bar
    canvas = Canvas(picture[len(bar) :], (0, 0, width, height))
    canvas.show_heat(prediction.image, prediction.anomaly_map, prediction.map_scale)
    line = max(1, round(min(size) / 300))
    if tiles:
        canvas.draw([corners(box) for box in prediction.tiles], max(1, line // 4), WHITE)
    if prediction.part is not None:
        canvas.draw([prediction.part], max(1, line // 2), PART, edge=True)
    canvas.mark(prediction.regions, line)
    if prediction.regions and zoom is not False:
        _magnify(canvas, prediction, line, zoom is True)
    return picture


def _magnify(canvas: Canvas, prediction: Prediction, line: int, always: bool) -> None:
    """Show the worst region enlarged in a corner of the canvas, as photographed and as marked, with a line to its place.

    Unless `always`, only where it is small in a large frame, and where a corner has room that no region is in.
    """
    height, width = prediction.anomaly_map.shape
    worst = max(prediction.regions, key=lambda region: region.peak)
    x0, y0, x1, y1 = worst.box
    extent = max(x1 - x0, y1 - y0)
    if not always and (max(height, width) <= LARGE_SIDE or extent >= SMALL * max(height, width)):
        return
    side = min(max(CONTEXT * extent, LEAST_SHOWN), height, width)  # pixels of the frame
    left, top = (int(np.clip((a + b - side) // 2, 0, end - side)) for a, b, end in ((x0, x1, width), (y0, y1, height)))
    seen = left, top, left + side, top + side
    shorter = min(canvas.pixels.shape[:2])
    panel = _close_up(prediction, worst, seen, max(shorter // 4, MIN_SIDE // 2 - 4 * line))
    size = np.array(panel.shape[1::-1])
    at, is_free = _corner(canvas, prediction.boxes, seen, size, 2 * line)
    if not is_free and not always:
        return
    first, last = canvas.place(np.reshape(seen, (2, 2)))
    near = np.clip(at + size / 2, first, last)
    pointer = Canvas(canvas.pixels, (0, 0, *canvas.pixels.shape[1::-1]))
    pointer.draw([np.array((near, np.clip(near, at, at + size)))], max(1, line // 2), INK, edge=True, closed=False)
    canvas.draw([corners(seen)], max(1, line // 2), INK, edge=True)
    canvas.pixels[at[1] :, at[0] :][: size[1], : size[0]] = panel


def _corner(
    canvas: Canvas, boxes: NDArray[np.int64], seen: tuple[int, int, int, int], size: NDArray[np.int64], margin: int
) -> tuple[NDArray[np.int64], bool]:
    """Where a panel of a size (w, h) goes in a corner that covers least of the boxes (N, 4), and near the one seen; and
    whether it covers none."""
    firsts, lasts = canvas.place(boxes.reshape(-1, 2, 2)).transpose(1, 0, 2)  # (N, 2) each
    middle = canvas.place(np.reshape(seen, (2, 2))).mean(axis=0)
    room = np.array(canvas.pixels.shape[1::-1]) - size - margin

    def cost(at: NDArray[np.int64]) -> tuple[float, float]:
        common = np.minimum(lasts, at + size + margin) - np.maximum(firsts, at - margin)
        return float(common.clip(0).prod(axis=1).sum()), float(np.linalg.norm(at + size / 2 - middle))

    at = min((np.array((x, y)) for x in (margin, room[0]) for y in (margin, room[1])), key=cost)
    return at, cost(at)[0] == 0


def _close_up(prediction: Prediction, region: Region, seen: tuple[int, int, int, int], size: int) -> NDArray[np.uint8]:
    """A square of the frame as photographed and as marked, side by side, each `size` pixels wide, below a caption."""
    line = max(1, size // 120)
    pair = np.full((size + line, 2 * size + 3 * line, 3), WHITE, np.uint8)
    photograph, marked = (Canvas(pair[:size, x : x + size], seen) for x in (line, size + 2 * line))
    photograph.show(prediction.image)
    marked.show_heat(prediction.image, prediction.anomaly_map, prediction.map_scale)
    marked.mark(prediction.regions, line)
    length, area = f"{region.length:.0f} px", f"{region.area} px"
    if region.length_mm is not None:
        length, area = f"{region.length_mm:.3g} mm", f"{region.area_mm2:.3g} mm2"
    caption = f"peak {region.peak:.2f}  length {length}  area {area}"
    return np.vstack([strip(caption, pair.shape[1], size / 260, INK), pair])


def _bar(width: int, prediction: Prediction) -> NDArray[np.uint8]:
    score, threshold, verdict = prediction.score, prediction.threshold, prediction.verdict
    text = f"{verdict.upper()}  {score:.3f} {'>=' if score >= threshold else '<'} {threshold:.3f}"
    if prediction.unusable:
        text = f"{verdict.upper()}  {prediction.unusable}"
    elif prediction.absent:
        text = f"{verdict.upper()}  the part is not in the frame"
    elif prediction.overruled:
        text += f", {AGAINST[prediction.overruled]}"
    if prediction.memory:
        text += f"  memory {prediction.memory[:6]}"
    return strip(text, width, min(max(width / 640, 0.5), 3.0), BARS[verdict])


def _canvas_size(height: int, width: int, longest: int | None) -> tuple[int, int]:
    """(width, height): at least 320 pixels on both sides; a side that is far shorter is stretched to it."""
    factor = max(1.0, MIN_SIDE / max(height, width))
    if longest:
        factor = min(factor, longest / max(height, width))
    return max(MIN_SIDE, round(width * factor)), max(MIN_SIDE, round(height * factor))
