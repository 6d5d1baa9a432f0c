"""Metrics of anomaly detection: AUROC, AP and F1-max of images and of pixels, AUPRO. Exact, in bounded memory.

All of them come from one walk down the thresholds, one step per distinct score, so ties are never broken by chance:

- AUROC: area under recall over false positive rate, straight between steps, which is the Mann-Whitney statistic with
  half credit for ties (Fawcett, *An introduction to ROC analysis*, 2006).
- AP: the sum of precision times gain in recall, without interpolation, as scikit-learn's `average_precision_score`.
- F1-max: the best F1 of all thresholds.
- AUPRO: area under the per-region overlap over the false positive rate of pixels, from 0 to a limit, divided by the
  limit (Bergmann et al., *MVTec AD*, IJCV 2021). A region is an 8-connected component of a mask, and its overlap the
  share of its pixels at or above the threshold; the mean goes over all regions of all images. At the limit the curve
  is interpolated. As a pixel of a region of area a raises the mean overlap by 1/a of a region, this is a weighted ROC
  curve and needs no pass per threshold.

What has no answer (images or pixels of one kind only) is None, never a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fbclip.errors import FBClipError

PRO_LIMITS = (0.3, 0.05)  # false positive rates; 0.3 is MVTec AD's
CURVE_STEPS = 500  # per axis; finer than any plot

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """ROC, precision-recall and PRO curve in one: rates 0..1 by falling threshold, each float64 (n,).

    Every point is exact; of a run of points that no plot could tell apart (1/500 on each axis) the ends are kept.
    """

    fpr: Floats
    recall: Floats
    precision: Floats
    overlap: Floats


@dataclass(frozen=True)
class Metrics:
    """All values 0..1; None where undefined.

    Attributes:
        auroc, ap, f1_max: see the module.
        f1_threshold: where F1 is best: scores from here on count as anomalous.
        aupro: by the limit of the false positive rate; empty for images.
        positives, negatives: how many images or pixels.
        error_bound: no value is further than this from the one of the unrounded scores; 0 is exact.
        curve: None where undefined.
    """

    auroc: float | None
    ap: float | None
    f1_max: float | None
    f1_threshold: float | None
    aupro: Mapping[float, float | None]
    positives: int
    negatives: int
    error_bound: float
    curve: Curve | None


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> Metrics:
    """Metrics of images (or anything else) with labels (n,), 1 anomalous or 0, and finite scores (n,)."""
    positive, values = np.asarray(labels).astype(bool).ravel(), np.asarray(scores).ravel()
    if positive.shape != values.shape or not np.isfinite(values).all():
        raise FBClipError(f"metrics need one finite score per label; got {values.shape} for {positive.shape}")
    negatives = np.sort(values[~positive])
    thresholds, counts = (a[::-1] for a in np.unique(values[positive], return_counts=True))
    walk = _Walk(len(negatives), len(values) - len(negatives))
    above, at_or_above = (len(negatives) - np.searchsorted(negatives, thresholds, side) for side in ("right", "left"))
    walk.descend(thresholds, above, at_or_above, counts)
    return walk.metrics()


class PixelMetrics:
    """Metrics of the pixels of any number of maps, one map at a time.

    Scores are counted by their float32 bit pattern, so nothing is rounded from 1/256 up. Below, where float32 has
    bit patterns without end, 16 neighbours share a counter (2^-19 of the score), and everything below 2^-32 shares
    one; what that can change at most is summed up on the way and returned as `error_bound`. Counters are touched
    only where scores fall: about 130 MB for each halving of the score, at most 1.4 GB for any number of maps.
    """

    # As integers, positive floats sort like their values; 127 is the exponent's bias, 23 its place.
    _EXACT_FROM = (127 - 8) << 23
    _FLOOR = (127 - 32) << 23
    _SHARED = (_EXACT_FROM - _FLOOR) >> 4  # counters below 1/256
    _COUNTERS = _SHARED + (9 << 23)  # rounding may lift a probability over 1
    _CHUNK = 1 << 20

    def __init__(self) -> None:
        self._negative = np.zeros(self._COUNTERS, np.uint32)  # the system provides memory page by page, when touched
        self._positive = np.zeros(self._COUNTERS, np.uint32)
        self._overlap = np.zeros(self._COUNTERS, np.float64)
        self._first, self._last = self._COUNTERS, 0
        self._pixels = self._positives = self._regions = 0

    def add(self, mask: NDArray[np.uint8], anomaly_map: NDArray[np.float32]) -> None:
        """Count a map float32 (H, W), 0..1, against its mask (H, W), not 0 where defective.

        Raises:
            FBClipError: shapes differ, a value is no probability, or 2^32 pixels are exceeded.
        """
        if mask.shape != anomaly_map.shape or anomaly_map.dtype != np.float32:
            raise FBClipError(
                f"a map is float32 of its mask's shape {mask.shape}; got {anomaly_map.dtype} {anomaly_map.shape}"
            )
        low, high = anomaly_map.min(), anomaly_map.max()
        if not (low >= 0 and high < 2):
            raise FBClipError(f"an anomaly map holds probabilities 0..1; got {low}..{high}")
        self._pixels += mask.size
        if self._pixels >= 2**32:
            raise FBClipError(f"pixel metrics count up to 2^32 pixels; got {self._pixels}: evaluate fewer at once")
        keys = self._keys(anomaly_map.ravel())
        self._first, self._last = min(self._first, int(keys.min())), max(self._last, int(keys.max()))
        defective = mask.ravel() != 0
        if not defective.any():
            np.add.at(self._negative, keys, np.uint32(1))
            return
        np.add.at(self._negative, keys[~defective], np.uint32(1))
        keys = keys[defective]
        np.add.at(self._positive, keys, np.uint32(1))
        count, labels, stats, _ = cv2.connectedComponentsWithStats((mask != 0).astype(np.uint8), connectivity=8)
        np.add.at(self._overlap, keys, 1 / stats[labels.ravel()[defective], cv2.CC_STAT_AREA])
        self._positives += len(keys)
        self._regions += count - 1  # label 0 is the background

    def metrics(self) -> Metrics:
        """Of all maps so far; more may follow."""
        walk = _Walk(self._pixels - self._positives, self._positives, self._regions)
        above = 0
        for stop in range(self._last + 1, self._first, -self._CHUNK):
            piece = slice(max(stop - self._CHUNK, self._first), stop)
            fp = above + np.cumsum(self._negative[piece][::-1], dtype=np.int64)[::-1]
            steps = np.flatnonzero(self._positive[piece])[::-1]
            keys = piece.start + steps
            walk.descend(
                self._values(keys),
                fp[steps] - self._negative[keys],
                fp[steps],
                self._positive[keys].astype(np.int64),
                self._overlap[keys],
                keys < self._SHARED,
            )
            above = int(fp[0])
        return walk.metrics()

    @classmethod
    def _keys(cls, scores: NDArray[np.float32]) -> NDArray[np.intp]:
        """Scores (n,) to their counters."""
        bits = np.ascontiguousarray(scores).view(np.int32).astype(np.intp)
        exact = bits - (cls._EXACT_FROM - cls._SHARED)
        if exact.min() >= cls._SHARED:
            return exact
        return np.where(exact >= cls._SHARED, exact, np.maximum(bits - cls._FLOOR, 0) >> 4)

    @classmethod
    def _values(cls, keys: NDArray[np.intp]) -> Floats:
        """The lowest score that each counter takes."""
        shared = np.where(keys == 0, 0, (keys << 4) + cls._FLOOR)
        bits = np.where(keys >= cls._SHARED, keys + (cls._EXACT_FROM - cls._SHARED), shared)
        return bits.astype(np.int32).view(np.float32).astype(np.float64)


class _Walk:
    """Sums up what lies at or above each threshold, from the highest down, in as many pieces as one likes.

    Only thresholds that hold positives are steps: between them recall and overlap stay, precision falls, and all that
    the metrics need to know of the negatives is how many lie above.
    """

    def __init__(self, negatives: int, positives: int, regions: int | None = None) -> None:
        self.negatives, self.positives, self.regions = negatives, positives, regions
        self.true, self.overlap = 0, 0.0
        self.auroc, self.ap, self.best, self.ideal = _Sum(), _Sum(), (0.0, 0.0), 0.0
        self.aupro = {limit: _Sum() for limit in (() if regions is None else PRO_LIMITS)}
        self.points: list[Floats] = []

    @property
    def defined(self) -> bool:
        return self.negatives > 0 and self.positives > 0

    def descend(
        self,
        thresholds: NDArray[Any],
        fp_before: Counts,
        fp: Counts,
        positive: Counts,
        overlap: Floats | None = None,
        merged: NDArray[np.bool_] | None = None,
    ) -> None:
        """Take steps in order, each array (n,).

        Args:
            thresholds: falling.
            fp_before, fp: how many negatives are above, and at or above.
            positive: how many positives are at exactly this threshold, 1 or more.
            overlap: their shares of their regions, summed.
            merged: whether several scores were counted as one here.
        """
        if not self.defined or not len(thresholds):
            return
        if merged is None:
            merged = np.zeros(len(thresholds), np.bool_)
        tp = self.true + np.cumsum(positive)
        tp_before = tp - positive
        gain, recall = positive / self.positives, tp / self.positives
        fpr_before, fpr = fp_before / self.negatives, fp / self.negatives
        self.auroc.add(*_area(fpr_before, fpr, gain, 1.0, merged))

        precision = tp / (tp + fp)
        above = tp_before + fp_before
        precision_before = np.where(above > 0, tp_before / np.maximum(above, 1), precision)
        # in the best order the positives among the merged come first, in the worst last
        spread = tp / (tp + fp_before) - tp_before / np.maximum(tp_before + fp, 1)
        self.ap.add(float(gain @ precision), float((gain * spread)[merged].sum()))
        f1 = 2 * tp / (self.positives + tp + fp)
        top = int(f1.argmax())
        if f1[top] > self.best[0]:
            self.best = float(f1[top]), float(thresholds[top])
        self.ideal = max(self.ideal, float((2 * tp / (self.positives + tp + fp_before))[merged].max(initial=0)))

        pro, rise = np.zeros_like(recall), np.zeros_like(recall)
        if overlap is not None and self.regions:
            rise = overlap / self.regions
            pro = self.overlap + np.cumsum(rise)
            for limit, area in self.aupro.items():
                area.add(*_area(fpr_before, fpr, rise, limit, merged))
        before = np.stack([fpr_before, recall - gain, precision_before, pro - rise], axis=1)
        self._keep(before, np.stack([fpr, recall, precision, pro], axis=1))
        self.true, self.overlap = int(tp[-1]), float(pro[-1])

    def _keep(self, before: Floats, after: Floats) -> None:
        """Points (n, 4) of the curves at both ends of each step, if a plot could tell them from their neighbours."""
        points = np.stack([before, after], axis=1).reshape(-1, 4)
        moved = np.abs(np.diff((points * CURVE_STEPS).astype(np.int32), axis=0)).max(axis=1) > 0
        keep = np.ones(len(points), bool)
        keep[1:-1] = moved[:-1] | moved[1:]
        self.points.append(points[keep])

    def metrics(self) -> Metrics:
        if not self.defined:
            nothing = dict.fromkeys(self.aupro)
            return Metrics(None, None, None, None, nothing, self.positives, self.negatives, 0.0, None)
        f1, threshold = self.best
        sums = (self.auroc, self.ap, *self.aupro.values())
        prevalence = self.positives / (self.positives + self.negatives)
        points = np.concatenate([*self.points, [[1.0, 1.0, prevalence, self.overlap]]])
        return Metrics(
            auroc=self.auroc.value,
            ap=self.ap.value,
            f1_max=f1,
            f1_threshold=threshold,
            aupro={limit: area.value for limit, area in self.aupro.items()},
            positives=self.positives,
            negatives=self.negatives,
            error_bound=max(self.ideal - f1, *(total.doubt for total in sums), 0.0),
            curve=Curve(*points.T),
        )


class _Sum:
    """A mean in the making, 0..1, and how much of it is in doubt."""

    def __init__(self) -> None:
        self.total = self.doubt = 0.0

    def add(self, part: float, doubt: float) -> None:
        self.total += part
        self.doubt += doubt

    @property
    def value(self) -> float:
        return min(self.total, 1.0)  # a sum of a million shares may round to a little over 1


def _area(x_before: Floats, x: Floats, rise: Floats, limit: float, merged: NDArray[np.bool_]) -> tuple[float, float]:
    """Area under a curve from 0 to a limit of x, divided by the limit; steps rise straight from x_before to x.

    Each step lifts everything to its right. Also how far the area can be from the true one, which passes through
    the rectangles of merged steps on an unknown way.
    """
    width = np.minimum(x, limit) - x_before
    left = width > 0  # of the steps that cost something, those that start before the limit
    share = np.ones_like(x)
    np.divide(width, x - x_before, out=share, where=left)  # of the step that is on this side of the limit
    lifted = np.maximum(limit - x_before, 0) - 0.5 * np.maximum(width, 0)
    doubt = float((np.maximum(width, 0) * rise)[merged].sum())
    return float((rise * share) @ lifted) / limit, doubt / limit
