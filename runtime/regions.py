"""Where an anomaly map is anomalous: connected regions, and what they say of the score's verdict."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

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
