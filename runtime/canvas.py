"""A picture of a frame, or of a part of it, that is drawn on in the frame's own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.runtime.regions import Region

Colour = tuple[int, int, int]  # RGB

WHITE, MARK = (255, 255, 255), (218, 54, 51)
LEVELS = np.arange(256, dtype=np.uint8)[:, None]
COLOURS = cv2.applyColorMap(LEVELS, cv2.COLORMAP_TURBO)[..., ::-1]  # (256, 1, 3) RGB
# of a colour at each level: the surface stays visible where the map is low, the colour where it is high
ALPHA = 0.15 + 0.5 * LEVELS[..., None] / 255
HEAT = (COLOURS * ALPHA).round().astype(np.uint8)
SURFACE = np.repeat((255 * (1 - ALPHA)).round(), 3, axis=2).astype(np.uint8)  # 255ths that stay of the frame
SUBPIXEL = 4  # binary digits of an outline's coordinates
DASH, GAP = 8, 6  # of a weak region's outline, in widths of its line
ROWS = 256  # that are coloured at once: what lies between takes many times a picture's bytes


class Canvas:
    """Pixels that show a box of a frame.

    Args:
        pixels: uint8 (H, W, 3) RGB, which is drawn on; H and W are the box's or others, and the box is stretched to them.
        box: (x0, y0, x1, y1) in pixels of the frame; x1 and y1 are exclusive.
    """

    def __init__(self, pixels: NDArray[np.uint8], box: tuple[int, int, int, int]) -> None:
        x0, y0, x1, y1 = box
        self.pixels, self.box = pixels, box
        self._first, self._factor = np.array((x0, y0)), np.divide(pixels.shape[1::-1], (x1 - x0, y1 - y0))

    def place(self, points: Any) -> NDArray[np.float64]:
        """Where points (…, 2) of the frame are, in pixels of the canvas: both count from the corner of the first pixel."""
        return np.asarray((points - self._first) * self._factor)

    def show(self, image: NDArray[np.uint8]) -> None:
        """Fill it with a photograph: the frame, uint8 (H, W, 3) RGB."""
        self.pixels[:] = self._part(image)

    def show_heat(
        self, image: NDArray[np.uint8], anomaly_map: NDArray[np.float32], map_scale: tuple[float, float]
    ) -> None:
        """Fill it with the frame and its map, float32 (H, W), whose `map_scale` are the first and the last colour."""
        surface, heat = self._part(image), self._part(anomaly_map)
        low, high = map_scale
        for top in range(0, len(heat), ROWS):
            rows = slice(top, top + ROWS)
            level = ((heat[rows] - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
            # by tables of 256 levels: in floating point it takes seven times as long
            kept = cv2.multiply(surface[rows], cv2.applyColorMap(level, SURFACE), scale=1 / 255)
            self.pixels[rows] = cv2.add(kept, cv2.applyColorMap(level, HEAT))

    def mark(self, regions: Sequence[Region], line: int) -> None:
        """Draw outlines of regions, `line` pixels wide: of weak ones dashed, and a box around what was merged."""
        closed, open_ = [], []
        for region in regions:
            for outline in region.outlines:
                # steps from pixel to pixel would be stairs on a larger canvas
                smooth = (np.roll(outline, 1, axis=0) + 2 * outline + np.roll(outline, -1, axis=0)) / 4
                points = self._fixed(smooth)
                if region.weak:
                    open_ += _dashes(points, line)
                else:
                    closed.append(points)
        room = np.array(((-1, -1), (1, -1), (1, 1), (-1, 1))) * 3 * line / self._factor
        boxes = [corners(region.box) + room for region in regions if region.parts]
        self.draw(boxes, max(1, line // 2), MARK, edge=True)
        for width, colour in ((line + 2, WHITE), (line, MARK)):
            for outlines, is_closed in ((closed, True), (open_, False)):
                cv2.polylines(self.pixels, outlines, is_closed, colour, width, cv2.LINE_AA, SUBPIXEL)

    def draw(
        self, shapes: Sequence[NDArray[Any]], line: int, colour: Colour, *, edge: bool = False, closed: bool = True
    ) -> None:
        """Draw lines through points (N, 2), centres of pixels of the frame; with a white edge, legible on any surface."""
        points = [self._fixed(shape) for shape in shapes]
        for width, drawn in ((line + 2, WHITE), (line, colour)) if edge else ((line, colour),):
            cv2.polylines(self.pixels, points, closed, drawn, width, cv2.LINE_AA, SUBPIXEL)

    def _part(self, array: NDArray[Any]) -> NDArray[Any]:
        """What it shows of an array of the frame's size, in its own."""
        x0, y0, x1, y1 = self.box
        size = self.pixels.shape[1], self.pixels.shape[0]
        part = array[y0:y1, x0:x1]
        height, width = part.shape[:2]
        if size == (width, height):
            return part
        shrinks = size[0] < width or size[1] < height
        return cv2.resize(part, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    def _fixed(self, points: NDArray[Any]) -> NDArray[np.int32]:
        """Centres of pixels (N, 2) of the frame on the canvas, with fixed binary digits: they stay centres."""
        return np.asarray(((self.place(points + 0.5) - 0.5) * 2**SUBPIXEL).round(), np.int32)


def corners(box: tuple[int, int, int, int]) -> NDArray[np.float64]:
    """Of a box's outermost pixels, in turn, (4, 2)."""
    x0, y0, x1, y1 = box
    return np.array(((x0, y0), (x1 - 1, y0), (x1 - 1, y1 - 1), (x0, y1 - 1)), np.float64)


def strip(text: str, width: int, scale: float, colour: Colour) -> NDArray[np.uint8]:
    """White letters on a colour, uint8 (H, `width`, 3); smaller than `scale` (of OpenCV's) where they would not fit."""
    thickness = max(1, round(1.6 * scale))
    (text_width, text_height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    if text_width > width - 12:
        scale *= (width - 12) / text_width
        thickness = max(1, round(1.6 * scale))
        (text_width, text_height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    bar = np.full((text_height + base + 12, width, 3), colour, np.uint8)
    cv2.putText(bar, text, (6, text_height + 6), cv2.FONT_HERSHEY_SIMPLEX, scale, WHITE, thickness, cv2.LINE_AA)
    return bar


def _dashes(points: NDArray[np.int32], line: int) -> list[NDArray[np.int32]]:
    """An outline with fixed binary digits, in pieces."""
    steps = np.linalg.norm(np.diff(points, axis=0, append=points[:1]), axis=1) / 2**SUBPIXEL
    along = np.concatenate([[0.0], np.cumsum(steps)[:-1]])  # pixels from the first point to each
    place, piece = along % ((DASH + GAP) * line), along // ((DASH + GAP) * line)
    drawn = place < DASH * line
    return [points[drawn & (piece == number)] for number in np.unique(piece[drawn])]
