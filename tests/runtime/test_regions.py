"""Regions as an operator is told of them."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from fbclip.runtime import regions
from fbclip.runtime.regions import Rules, find_regions


def literally(anomaly_map: NDArray[np.float32], line: float, rules: Rules) -> list[tuple[object, ...]]:
    """Pixel by pixel: box, area, peak, mean and length of the regions, in no order."""
    pixels = np.argwhere(anomaly_map >= line)
    if not len(pixels):
        return []
    near = cdist(pixels, pixels, "chebyshev") <= max(1, rules.merge)
    reached = near
    while not (reached == (further := reached @ near > 0)).all():
        reached = further
    found = []
    for members in np.unique(reached, axis=0):
        ys, xs = pixels[members].T
        values = anomaly_map[ys, xs]
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        length = 1 + cdist(pixels[members], pixels[members]).max()
        if len(ys) >= rules.min_area:
            found.append((box, len(ys), values.max(), pytest.approx(values.mean(), abs=1e-6), pytest.approx(length)))
    return found


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.integers(0, 10_000),
    st.sampled_from([0.2, 0.6, 0.8, 0.9, 1.0]),
    st.integers(0, 6),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([1, 5, 14, 40, 1 << 20]),
)
@pytest.mark.slow
def test_regions_by_their_words(
    size_hw: tuple[int, int], seed: int, line: float, min_area: int, merge: int, is_noise: bool, block: int
) -> None:
    """Both ways to find them, and strips of any height."""
    rng = np.random.default_rng(seed)
    anomaly_map = (rng.integers(0, 11, size_hw) / 10 * (rng.random(size_hw) < rng.random())).astype(np.float32)
    rules = Rules(min_area, merge=merge)
    edges = -1 if is_noise else regions.MAX_EDGES
    with patch.object(regions, "MAX_EDGES", edges), patch.object(regions, "BLOCK", block):
        found = find_regions(anomaly_map, line, rules)
    expected = literally(anomaly_map, line, rules)
    assert len(found) == len(expected)
    by_box = {(region.box, region.area, region.peak): region for region in found}
    for box, area, peak, mean, length in expected:
        region = by_box[box, area, float(peak)]  # type: ignore[call-overload,arg-type]
        assert region.mean == mean and region.length == length
