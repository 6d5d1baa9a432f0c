"""Where an anomaly map is anomalous: connected regions, and what they say of the score's verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.errors import UsageError

SAMPLES = 128  # pixels of a map's shorter side that are enough for its median: it is smooth


MAX_REGIONS = 1000  # of a prediction


MAX_MERGE = 200  # pixels between regions that are one; to find them takes 0.25 s in 12 megapixels full of regions


MAX_EDGES = 1 << 18  # neighbours in a map of which one is marked; contours of noise take seconds, and gigabytes


MM_PER_PIXEL = (1e-9, 1e6)  # the least and the most: squares of others are not told from 0


BLOCK = 1 << 20  # pixels that are counted at once


COUNTED, BRIDGE = 1, 2  # marks of pixels at the line, and of those between them that make regions one


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _require_whole(rule: str, value: object, least: int, most: int, option: str) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{rule}, {least} to {most}; got {value!r:.50}", option=option)


@dataclass(frozen=True)
class Rules:
    """Which regions of a map count, and how they are told.

    Attributes:
        min_area: smaller regions don't count: whole pixels of the frame, or mm2 where mm_per_pixel is given.
        mm_per_pixel: how much of the part a pixel shows, in mm; of frames that are aligned, a pixel of the reference.
        merge: regions with fewer pixels than so many between them are one, counted along rows and along columns: a
            scratch that the map shows in five pieces is one defect. Before min_area is asked, so its pieces may each be
            smaller. 0: what touches is one.
        most: so many regions are told at most, the largest first; None: `MAX_REGIONS`, the highest peak first.

    Raises:
        UsageError: no such number.
    """

    min_area: float = 0
    mm_per_pixel: float | None = None
    merge: int = 0
    most: int | None = None

    def __post_init__(self) -> None:
        least, most = MM_PER_PIXEL
        if self.mm_per_pixel is not None and not (_is_real(self.mm_per_pixel) and least <= self.mm_per_pixel <= most):
            raise UsageError(
                f"a pixel shows {least:g} to {most:g} mm; got {self.mm_per_pixel!r:.50}", option="mm_per_pixel"
            )
        if self.mm_per_pixel is not None:
            object.__setattr__(self, "mm_per_pixel", float(self.mm_per_pixel))  # NumPy's are no numbers for JSON
        if not _is_real(self.min_area) or not 0 <= self.min_area < math.inf:
            raise UsageError(
                f"a least area is a number of pixels, or of mm2, 0 or more; got {self.min_area!r:.50}",
                option="min_area",
            )
        if self.mm_per_pixel is None and self.min_area != int(self.min_area):
            raise UsageError(
                f"a least area is a whole number of pixels, or of mm2 where mm_per_pixel is given; got {self.min_area}",
                option="min_area",
            )
        _require_whole("the pixels between regions that are merged are a number", self.merge, 0, MAX_MERGE, "merge")
        if self.most is not None:
            _require_whole("the most regions to tell are a number", self.most, 1, MAX_REGIONS, "max_regions")

    def at_scale(self, scale: float) -> Rules:
        """The same rules where the reference's pixel takes up `scale` pixels of the frame, along a side."""
        if self.mm_per_pixel is None:
            return self
        least, most = MM_PER_PIXEL
        return replace(self, mm_per_pixel=min(max(self.mm_per_pixel / scale, least), most))

    @property
    def pixel_area(self) -> float:
        """Of a pixel, in the unit of min_area."""
        return 1.0 if self.mm_per_pixel is None else self.mm_per_pixel**2


@dataclass(frozen=True)
class Region:
    """A connected part of the map at or above the map's threshold, or several that are one by `Rules.merge`; or a weak
    one, see `weak_region`.

    Attributes:
        box: (x0, y0, x1, y1) in pixels of the frame; x1 and y1 are exclusive.
        peak: the highest value in it, 0..1.
        area: in pixels; of what was merged the sum, without the gaps.
        mean: of the map's values in it, 0..1.
        outline: its outermost pixels in turn, int32 (N, 2) of x and y; of what was merged those of the largest part.
        parts: the outlines of the other parts that were merged, larger ones first.
        weak: whether it stays below the map's threshold: the place of an anomaly that is the score's alone.
        mm_per_pixel: how much of the part a pixel of the frame shows here, in mm; None where nobody said.
        place: its centre relative to the part, (x, y) in 0..1 of the part's width and height; the part is the reference
            where frames are aligned, else the region of interest, else the frame. None where nobody said.
    """

    box: tuple[int, int, int, int]
    peak: float
    area: int
    mean: float = field(compare=False)
    outline: NDArray[np.int32] = field(repr=False, compare=False)
    parts: tuple[NDArray[np.int32], ...] = field(default=(), repr=False, compare=False)
    weak: bool = False
    mm_per_pixel: float | None = field(default=None, repr=False, compare=False)
    place: tuple[float, float] | None = None

    @property
    def outlines(self) -> tuple[NDArray[np.int32], ...]:
        """Of all its parts, the largest one's first."""
        return (self.outline, *self.parts)

    @property
    def centre(self) -> tuple[float, float]:
        """Of its box, (x, y) in pixels of the frame."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @cached_property
    def length(self) -> float:
        """Pixels between the two that are farthest apart, both included: the maximum Feret diameter (ISO 13322-1) of
        their centres, and 1. A row of 12 pixels is 12 long; what is bent is longer along its bends."""
        hull = cv2.convexHull(np.concatenate(self.outlines)).reshape(-1, 2) @ np.array((1, 1j))
        blocks = np.array_split(hull, 1 + len(hull) // 256)  # a hull has thousands of corners at most
        return 1 + max(float(np.abs(block[:, None] - hull).max()) for block in blocks)

    @property
    def area_mm2(self) -> float | None:
        return None if self.mm_per_pixel is None else self.area * self.mm_per_pixel**2

    @property
    def length_mm(self) -> float | None:
        return None if self.mm_per_pixel is None else self.length * self.mm_per_pixel

    def moved(self, x: int, y: int) -> Region:
        """The same region where the map's corner lies at (x, y) of the frame."""
        x0, y0, x1, y1 = self.box
        corner = np.array((x, y), np.int32)
        parts = tuple(outline + corner for outline in self.parts)
        return replace(self, box=(x0 + x, y0 + y, x1 + x, y1 + y), outline=self.outline + corner, parts=parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; those in mm and the place only where they are known."""
        known = {"area_mm2": self.area_mm2, "length_mm": self.length_mm, "place": self.place and list(self.place)}
        return {
            "box": list(self.box),
            "peak": self.peak,
            "area": self.area,
            "weak": self.weak,
            "length": self.length,
            "mean": self.mean,
            **{name: value for name, value in known.items() if value is not None},
        }


EVERYTHING = Rules()


def find_evidence(
    anomaly_map: NDArray[np.float32],
    inside: NDArray[np.uint8] | None,
    reached: bool,
    line: float,
    rules: Rules = EVERYTHING,
    scale: float = 1.0,
) -> tuple[tuple[Region, ...], str | None]:
    """Where an image is anomalous, and what speaks against the verdict of its score.

    Beside the map it takes 2 bytes a pixel, and of one that is noise all over up to 4.

    Args:
        anomaly_map: float32 (H, W), 0..1.
        inside: uint8 (H, W) of 0 and 1, what counts of it; None where all does.
        reached: whether the score reaches its threshold.
        line: map values from here on are regions.
        rules: which of them count.
        scale: pixels of the frame along a side of the reference's pixel, which `rules.mm_per_pixel` is of.

    Returns:
        The regions; where the score is reached and none is at the line, the weak one. And `Prediction.overruled`.
    """
    rules = rules.at_scale(scale)
    regions = find_regions(anomaly_map, line, rules, inside)
    if regions or not reached:
        return regions, None
    _, highest, _, place = cv2.minMaxLoc(anomaly_map, inside)
    if place[0] < 0:  # nothing counts
        return (), "roi"
    if highest >= np.float32(line):
        return (), "min_area"
    if highest < anomaly_map.max():  # the score sees what the mask leaves out
        return (), "roi"
    return (replace(weak_region(anomaly_map, inside), mm_per_pixel=rules.mm_per_pixel),), None


def weak_region(anomaly_map: NDArray[np.float32], inside: NDArray[np.uint8] | None = None) -> Region:
    """The connected pixels (8 neighbours) around the highest value of a map (H, W) that lie at least midway between
    its median and that value. What is not `inside` doesn't count."""
    _, peak, _, place = cv2.minMaxLoc(anomaly_map, inside)
    step = max(1, min(anomaly_map.shape) // SAMPLES)
    sample = anomaly_map[::step, ::step]
    if inside is not None:
        sample = sample[inside[::step, ::step] > 0]
    middle = float(np.median(sample)) if sample.size else peak
    around = _marked(anomaly_map, np.float32((middle + peak) / 2), inside)
    _, _, _, (x, y, width, height) = cv2.floodFill(around, None, place, 2, flags=8)
    box = slice(y, y + height), slice(x, x + width)
    np.equal(around[box], 2, out=around[box].view(bool))
    (region,) = _regions(anomaly_map[box], around[box], EVERYTHING)
    return replace(region.moved(x, y), weak=True)


def find_regions(
    anomaly_map: NDArray[np.float32],
    line: float,
    rules: Rules = EVERYTHING,
    inside: NDArray[np.uint8] | None = None,
) -> tuple[Region, ...]:
    """Connected regions (8 neighbours) of a map (H, W) at or above a line, in the order and number of the rules.

    Work grows with the regions' boxes, not with the frame: labels for every pixel of a camera's frame would take many
    times longer than everything else after the model. Only a map that is noise is labelled, strip by strip, for its
    contours take longer.

    Args:
        inside: uint8 (H, W) of 0 and 1, what counts of the map; None where all does.
    """
    marked = _marked(anomaly_map, line, inside)
    if rules.merge > 1:
        _bridge(marked, rules.merge)
    return _regions(anomaly_map, marked, rules)


def _marked(
    anomaly_map: NDArray[np.float32], line: float | np.float32, inside: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    marked = (anomaly_map >= line).view(np.uint8)
    return marked if inside is None else np.bitwise_and(marked, inside, out=marked)


def _bridge(marked: NDArray[np.uint8], gap: int) -> None:
    """Mark what lies between counted pixels with fewer than `gap` between them.

    Squares of `gap` pixels around two pixels touch where fewer than `gap` lie between these, along rows and columns.
    """
    square = np.ones((gap, gap), np.uint8)
    height, width = marked.shape
    rows = max(gap, BLOCK // width)
    for top in range(0, height, rows):
        first = max(0, top - gap)
        counted = (marked[first : top + rows + gap] == COUNTED).view(np.uint8)
        if counted.any():
            grown = cv2.dilate(counted, square).reshape(counted.shape)[top - first :][:rows]
            strip = marked[top : top + rows]
            strip[grown > strip] = BRIDGE


def _regions(anomaly_map: NDArray[np.float32], marked: NDArray[np.uint8], rules: Rules) -> tuple[Region, ...]:
    find = _by_contours if _edges(marked) <= MAX_EDGES else _by_labels
    found = find(anomaly_map, marked, rules)
    if rules.most is None:
        return tuple(sorted(found, key=lambda region: (-region.peak, region.box))[:MAX_REGIONS])
    return tuple(sorted(found, key=lambda region: (-region.area, -region.peak, region.box))[: rules.most])


def _edges(marked: NDArray[np.uint8]) -> int:
    """Neighbours along rows and columns of which one is marked and one is not."""
    height, width = marked.shape
    rows, edges = max(1, BLOCK // width), 0
    for top in range(0, height, rows):
        strip = marked[top : top + rows + 1]  # and the next one's first row
        if (marked_here := strip.max()) == BRIDGE:
            strip = (strip > 0).view(np.uint8)
        if marked_here:
            edges += int(np.count_nonzero(strip[1:] != strip[:-1]))
            edges += int(np.count_nonzero(strip[:rows, 1:] != strip[:rows, :-1]))
    return edges


def _by_contours(anomaly_map: NDArray[np.float32], marked: NDArray[np.uint8], rules: Rules) -> list[Region]:
    contours, hierarchy = cv2.findContours(marked, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
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
        filled = np.zeros((h, w), np.uint8)
        cv2.fillPoly(filled, edges, 1, offset=(-x, -y))
        if region := _region(anomaly_map, marked, filled, (x, y), rules, [outline]):
            found.append(region)
    return found


def _region(
    anomaly_map: NDArray[np.float32],
    marked: NDArray[np.uint8],
    filled: NDArray[np.uint8],
    corner: tuple[int, int],
    rules: Rules,
    outlines: Any = None,
) -> Region | None:
    """What is filled (h, w) with 1 of a map whose corner is (x, y); None where it is too small to count.

    Args:
        outlines: of OpenCV's; found where they are not given, or regions are merged.
    """
    (x, y), (h, w) = corner, filled.shape
    box = x, y, x + w, y + h
    if rules.merge > 1:
        np.bitwise_and(filled, marked[y : y + h, x : x + w], out=filled)  # BRIDGE has no bit of 1
    area = cv2.countNonZero(filled)
    if area * rules.pixel_area < rules.min_area:
        return None
    if rules.merge > 1:
        contours, hierarchy = cv2.findContours(filled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=corner)
        outer = [outline for outline, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True) if parent < 0]
        outlines = sorted(outer, key=lambda outline: (-cv2.contourArea(outline), -len(outline)))
        box_x, box_y, box_w, box_h = cv2.boundingRect(filled)
        box = x + box_x, y + box_y, x + box_x + box_w, y + box_y + box_h
    elif outlines is None:
        outlines, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=corner)
    values = anomaly_map[y : y + h, x : x + w]
    _, peak, _, _ = cv2.minMaxLoc(values, filled)
    mean = cv2.mean(values, filled)[0]
    largest, *others = (outline[:, 0].astype(np.int32) for outline in outlines)
    return Region(box, peak, area, mean, largest, tuple(others), mm_per_pixel=rules.mm_per_pixel)


def _by_labels(anomaly_map: NDArray[np.float32], marked: NDArray[np.uint8], rules: Rules) -> list[Region]:
    """Those that the rules tell first, of any number. Labels are a strip's, for the map's would be its size."""
    height, width = marked.shape
    rows = max(1, BLOCK // width)
    told = going_on = np.empty((0, 6))  # see _tallied
    above = np.zeros(width, np.int64)  # of the row above the strip: 1 + each pixel's place in going_on, or 0
    for top in range(0, height, rows):
        labels, tally = _tallied(anomaly_map, marked, top, rows)
        group = _joined(above, labels[0], len(going_on), len(tally))
        if not len(group):
            continue
        group_of_label = np.append(0, 1 + group[len(going_on) :])
        tally = _summed(np.concatenate([going_on, tally]), group)
        last, above = np.unique(np.append(0, group_of_label[labels[-1]]), return_inverse=True)
        above, last = above[1:], last[1:] - 1
        told = _first(np.concatenate([told, np.delete(tally, last, axis=0)]), rules)
        going_on = tally[last]
    found = []
    for x0, x1, y0, seed in _first(np.concatenate([told, going_on]), rules)[:, 2:].astype(int) * (-1, 1, -1, 1):
        y, x = divmod(seed, width)
        filled = (marked[y0 : y + 1, x0:x1] > 0).view(np.uint8)
        cv2.floodFill(filled, None, (x - x0, y - y0), 2, flags=8)
        np.equal(filled, 2, out=filled.view(bool))
        if region := _region(anomaly_map, marked, filled, (x0, y0), rules):
            found.append(region)
    return found


def _tallied(
    anomaly_map: NDArray[np.float32], marked: NDArray[np.uint8], top: int, rows: int
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """A strip's labels (rows, W) from 1 on, and of each area, peak, -x0, x1, -y0 and the number of its last pixel."""
    strip, width = marked[top : top + rows], marked.shape[1]
    number, found = cv2.connectedComponents(strip, connectivity=8, ltype=cv2.CV_32S)
    labels, at = np.asarray(found, np.int32), np.flatnonzero(strip)
    label, (y, x), counted = labels.ravel()[at], divmod(at, width), strip.ravel()[at] == COUNTED
    values = np.where(counted, anomaly_map[top : top + rows].ravel()[at], -np.inf)
    tally = np.full((6, number), -np.inf)
    tally[0] = np.bincount(label, counted, number)
    for row, highest in ((1, values), (2, -x), (3, x + 1)):
        np.maximum.at(tally[row], label, highest.astype(np.float64))
    tally[4, label[::-1]] = -(top + y[::-1])  # the first of its pixels is its highest
    tally[5, label] = top * width + at
    return labels, tally.T[1:]


def _joined(above: NDArray[np.int64], first: NDArray[np.int32], before: int, new: int) -> NDArray[np.int64]:
    """Which component each of those above a strip and in it is of, (before + new,) from 0 on: neighbours are of one."""
    width = len(above)
    touching = [(above[i : width - j], first[j : width - i]) for i, j in ((0, 0), (0, 1), (1, 0))]
    pairs = np.unique(np.concatenate([(up * (1 + new) + down)[(up > 0) & (down > 0)] for up, down in touching]))
    ups, downs = pairs // (1 + new) - 1, pairs % (1 + new) - 1 + before
    root = np.arange(before + new)
    while (root[ups] != root[downs]).any():
        lower = np.minimum(root[ups], root[downs])
        for nodes in (root[ups], root[downs]):
            np.minimum.at(root, nodes, lower)
        root = root[root]
    return np.unique(root, return_inverse=True)[1]


def _summed(tally: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.float64]:
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    return np.hstack(
        [op.reduceat(part[order], starts) for op, part in ((np.add, tally[:, :1]), (np.maximum, tally[:, 1:]))]
    )


def _first(tally: NDArray[np.float64], rules: Rules) -> NDArray[np.float64]:
    tally = tally[tally[:, 0] * rules.pixel_area >= rules.min_area]
    area, peak = tally[:, 0], tally[:, 1]
    if rules.most is None:
        return tally[np.argsort(-peak, kind="stable")[:MAX_REGIONS]]
    return tally[np.lexsort((-peak, -area))[: rules.most]]
