"""The metrics against scikit-learn, against a literal AUPRO, and against the reference program's recorded values."""

from __future__ import annotations

from dataclasses import astuple
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from fbclip.errors import FBClipError
from fbclip.metrics import PRO_LIMITS, Metrics, PixelMetrics, image_metrics
from helpers import golden

TIED = np.array([0, 1e-12, 2**-33, 0.002, 0.25, 0.5, np.nextafter(np.float32(0.5), 1), 1], np.float32)
fast = settings(deadline=None, max_examples=40)


def regions(mask: NDArray[np.uint8]) -> list[set[tuple[int, int]]]:
    """Components of 8 neighbours, by flooding."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = left & {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
            left -= near
            edge += near
        found.append(region)
    return found


def literal_aupro(masks: NDArray[np.uint8], maps: NDArray[np.float32], limit: Fraction) -> Fraction:
    """By its definition: every threshold, every region, in exact fractions."""
    labelled = [(n, region) for n, mask in enumerate(masks) for region in regions(mask)]
    points = [(Fraction(0), Fraction(0))]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        hit = maps >= threshold
        overlaps = [Fraction(sum(bool(hit[n][place]) for place in region), len(region)) for n, region in labelled]
        fpr = Fraction(int((hit & (masks == 0)).sum()), int((masks == 0).sum()))
        points.append((fpr, sum(overlaps, Fraction(0)) / len(overlaps)))
    area = Fraction(0)
    for (x0, y0), (x1, y1) in pairwise(points):
        end = min(x1, limit)
        if end > x0:
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def of_pixels(masks: NDArray[np.uint8], maps: NDArray[np.float32]) -> Metrics:
    pixels = PixelMetrics()
    for mask, anomaly_map in zip(masks, maps, strict=True):
        pixels.add(mask, anomaly_map)
    return pixels.metrics()


def pictures(seed: int, tied: bool) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Masks with at least one defective and one good pixel, maps with many ties or none."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 4)), int(rng.integers(2, 8)), int(rng.integers(2, 8)))
    masks = (rng.random(shape) < rng.choice([0.1, 0.3, 0.6])).astype(np.uint8)
    masks[0, 0, :2] = 0, 1
    levels = TIED if tied else rng.random(64).astype(np.float32)
    return masks, rng.choice(levels, shape)


@fast
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(TIED.tolist())), min_size=2, max_size=60))
def test_images_against_scikit_learn(rows: list[tuple[bool, float]]) -> None:
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    found = image_metrics(labels, scores)
    if labels.all() or not labels.any():
        assert (found.auroc, found.ap, found.f1_max, found.f1_threshold, found.curve) == (None,) * 5
        return
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert found.f1_max == pytest.approx(f1.max(), abs=1e-9)
    hit = scores >= found.f1_threshold
    assert 2 * (hit & labels).sum() / (hit.sum() + labels.sum()) == pytest.approx(found.f1_max)


@pytest.mark.slow
@fast
@given(st.integers(0, 10_000), st.booleans())
def test_pixels_against_the_definition(seed: int, tied: bool) -> None:
    masks, maps = pictures(seed, tied)
    found = of_pixels(masks, maps)
    slack = found.error_bound + 1e-12
    assert abs(found.auroc - roc_auc_score(masks.ravel(), maps.ravel())) <= slack
    assert abs(found.ap - average_precision_score(masks.ravel(), maps.ravel())) <= slack
    for limit in PRO_LIMITS:
        exact = literal_aupro(masks, maps, Fraction(limit))
        assert abs(found.aupro[limit] - exact) <= slack
        assert 0 <= found.aupro[limit] <= 1


@fast
@given(st.integers(0, 10_000))
def test_every_float_from_one_256th_up_is_told_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    start = rng.choice(np.array([2**-8, 0.01, 0.3, 0.5, 0.9999], np.float32))
    near = (start.view(np.int32) + np.arange(64, dtype=np.int32)).view(np.float32)
    masks = rng.integers(0, 2, (2, 8, 8), np.uint8)
    masks[0, 0, :2] = 0, 1
    maps = rng.permutation(np.concatenate([near, near])).reshape(masks.shape)
    found = of_pixels(masks, maps)
    assert found.error_bound == 0
    assert found.auroc == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert found.f1_threshold in near


@fast
@given(st.integers(0, 10_000))
def test_what_shares_a_counter_stays_within_the_stated_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 2, (1, 12, 12), np.uint8)
    masks[0, 0, :2] = 0, 1
    near = np.float32(0.001).view(np.int32) + rng.integers(0, 64, masks.shape, np.int32)
    maps = near.view(np.float32)
    found = of_pixels(masks, maps)
    errors = [
        found.auroc - roc_auc_score(masks.ravel(), maps.ravel()),
        found.ap - average_precision_score(masks.ravel(), maps.ravel()),
        found.f1_max - image_metrics(masks, maps).f1_max,
        *(found.aupro[limit] - literal_aupro(masks, maps, Fraction(limit)) for limit in PRO_LIMITS),
    ]
    assert 0 < found.error_bound <= 1
    assert max(map(abs, errors)) <= found.error_bound + 1e-12


@pytest.mark.slow
def test_the_bound_is_small_where_scores_spread() -> None:
    rng = np.random.default_rng(0)
    masks = (rng.random((4, 256, 256)) < 0.1).astype(np.uint8)
    maps = np.exp(-12 * rng.random(masks.shape)).astype(np.float32)  # half of them below 1/256
    found = of_pixels(masks, maps)
    assert 0 < found.error_bound < 1e-5  # few pixels; it falls with their number
    assert found.auroc == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-6)


def test_values_recorded_from_the_reference_program() -> None:
    recorded = golden.arrays()
    images = image_metrics(recorded["metric_labels"], recorded["metric_scores"])
    pixels = of_pixels(recorded["metric_masks"], recorded["metric_maps"])
    auroc, ap, pixel_auroc, aupro = recorded["metric_values"]
    assert (images.auroc, images.ap, pixels.auroc) == pytest.approx((auroc, ap, pixel_auroc), abs=1e-9)
    assert pixels.aupro[0.3] == pytest.approx(aupro, abs=2e-3)  # 200 thresholds there


def test_a_small_region_counts_as_much_as_a_large_one() -> None:
    masks = np.zeros((1, 10, 10), np.uint8)
    masks[0, 0, 0] = 1
    masks[0, 4:, 4:] = 1
    maps = np.full(masks.shape, 0.1, np.float32)
    maps[0, 4:, 4:] = 0.9  # the large one is found, the small one lies with the background
    found = of_pixels(masks, maps)
    assert found.aupro[0.3] == pytest.approx(0.5 + 0.5 * 0.15)
    assert found.auroc > 0.95


def test_a_perfect_map_is_exactly_one() -> None:
    masks = np.zeros((40, 30, 30), np.uint8)
    masks[:, 3:10, 5:12] = 1
    masks[:, 20, ::2] = 1
    found = of_pixels(masks, masks * np.float32(0.4) + np.float32(0.3))
    values = (found.auroc, found.ap, found.f1_max, *found.aupro.values())
    assert max(values) <= 1
    assert values == pytest.approx((1,) * 5, abs=1e-12)


def test_one_class_is_undefined() -> None:
    nothing = of_pixels(np.zeros((2, 4, 4), np.uint8), np.full((2, 4, 4), 0.3, np.float32))
    everything = of_pixels(np.ones((2, 4, 4), np.uint8), np.full((2, 4, 4), 0.3, np.float32))
    for found in (nothing, everything, PixelMetrics().metrics()):
        assert (found.auroc, found.ap, found.f1_max, found.curve) == (None,) * 4
        assert dict(found.aupro) == dict.fromkeys(PRO_LIMITS)
    assert image_metrics([], []).auroc is None


def test_curves_end_at_one_and_are_thin(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    masks = (rng.random((3, 300, 300)) < 0.2).astype(np.uint8)
    maps = np.minimum(rng.random(masks.shape, np.float32) + 0.1 * masks, 1).astype(np.float32)
    whole = of_pixels(masks, maps)
    monkeypatch.setattr(PixelMetrics, "_CHUNK", 9_999)  # more pieces, the same walk
    pieces = of_pixels(masks, maps)
    assert np.allclose(astuple(whole)[:4], astuple(pieces)[:4], atol=1e-12)
    assert whole.aupro == pytest.approx(pieces.aupro)
    curve = whole.curve
    assert len(curve.fpr) < 5000
    assert (curve.fpr[-1], curve.recall[-1]) == (1, 1)
    assert curve.overlap[-1] == pytest.approx(1)
    assert all((np.diff(rate) >= -1e-12).all() for rate in (curve.fpr, curve.recall, curve.overlap))
    assert np.trapezoid(curve.recall, curve.fpr) == pytest.approx(whole.auroc, abs=1e-3)


@pytest.mark.parametrize("value", [np.nan, -0.1, 2.5, np.inf])
def test_maps_hold_probabilities(value: float) -> None:
    with pytest.raises(FBClipError, match=r"probabilities 0\.\.1"):
        PixelMetrics().add(np.zeros((1, 2), np.uint8), np.array([[0.5, value]], np.float32))


def test_shapes_must_fit() -> None:
    with pytest.raises(FBClipError, match="shape"):
        PixelMetrics().add(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.float32))
    with pytest.raises(FBClipError, match="one finite score"):
        image_metrics([0, 1], [0.1, np.nan])
