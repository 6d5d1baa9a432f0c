"""Regions as an operator is told of them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from fbclip import Prediction, Predictor
from fbclip.assets import SAMPLES
from fbclip.errors import UsageError
from fbclip.runtime import regions
from fbclip.runtime.canvas import HEAT, SURFACE
from fbclip.runtime.regions import Region, Rules, find_evidence, find_regions
from helpers.predicted import predicted


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
        region = by_box[box, area, float(peak)]
        assert region.mean == mean and region.length == length


def broken_scratch(pieces: int = 5, size_hw: tuple[int, int] = (60, 200)) -> NDArray[np.float32]:
    """A scratch in pieces of 12 x 2 pixels with 8 between them, which get weaker; far from it a spot of 10 x 10."""
    anomaly_map = np.full(size_hw, 0.1, np.float32)
    for piece in range(pieces):
        anomaly_map[20:22, 20 * piece : 20 * piece + 12] = 0.9 - piece / 16
    anomaly_map[40:50, 150:160] = 0.6
    return anomaly_map


def test_what_is_near_is_one() -> None:
    apart = find_regions(broken_scratch(), 0.5, Rules(merge=8))
    assert [region.area for region in apart] == [24] * 5 + [100]
    scratch, spot = find_regions(broken_scratch(), 0.5, Rules(merge=9))
    assert (scratch.box, scratch.area, len(scratch.parts)) == ((0, 20, 92, 22), 5 * 24, 4)
    assert scratch.peak == apart[0].peak
    assert scratch.mean == pytest.approx(np.mean([region.mean for region in apart[:5]]))
    assert scratch.length == pytest.approx(1 + np.hypot(91, 1))
    assert (spot.area, spot.parts) == (100, ())
    assert spot.length == pytest.approx(1 + 9 * np.sqrt(2))


def test_a_least_area_is_asked_of_what_was_merged() -> None:
    (spot,) = find_regions(broken_scratch(), 0.5, Rules(min_area=100))
    assert spot.area == 100
    (scratch,) = find_regions(broken_scratch(), 0.5, Rules(min_area=101, merge=9))
    assert scratch.area == 120
    assert find_evidence(broken_scratch(), None, True, 0.5, Rules(min_area=121, merge=9)) == ((), "min_area")


@pytest.mark.parametrize("edges", [-1, regions.MAX_EDGES])
def test_the_largest_are_told_first(edges: int) -> None:
    with patch.object(regions, "MAX_EDGES", edges):
        found = find_regions(broken_scratch(), 0.5, Rules(most=3))
        assert [region.area for region in found] == [100, 24, 24]
        assert found[1].peak > found[2].peak == pytest.approx(0.9 - 1 / 16)
        scratch, spot = find_regions(broken_scratch(), 0.5, Rules(merge=9, most=1000))
    assert (scratch.area, spot.area) == (120, 100)


def test_millimetres_are_of_the_part() -> None:
    rules = Rules(min_area=1.0, mm_per_pixel=0.1)
    (spot,) = find_regions(broken_scratch(), 0.5, rules)  # exactly 1 mm2; pieces have 0.24
    assert (spot.area_mm2, spot.length_mm) == (pytest.approx(1), pytest.approx(spot.length / 10))
    (spot,), _ = find_evidence(broken_scratch(), None, True, 0.5, Rules(0.25, 0.1), scale=2)
    assert spot.area_mm2 == pytest.approx(0.25)  # the part is shown twice as large as in the reference
    assert find_evidence(broken_scratch(), None, True, 0.5, rules, scale=2) == ((), "min_area")
    (weak,), _ = find_evidence(broken_scratch(), None, True, 0.99, rules, scale=2)
    assert weak.weak and weak.length_mm == pytest.approx(weak.length / 20)


def test_a_record_has_what_is_known() -> None:
    (region, *_) = find_regions(broken_scratch(), 0.5)
    plain = region.to_dict()
    assert plain["box"] == [0, 20, 12, 22] and plain["area"] == 24 and plain["weak"] is False
    assert plain["length"] == pytest.approx(1 + np.hypot(11, 1)) and plain["mean"] == pytest.approx(0.9)
    assert list(plain) == ["box", "peak", "area", "weak", "length", "mean"]
    (region, *_) = find_regions(broken_scratch(), 0.5, Rules(mm_per_pixel=0.5))
    assert [*plain, "area_mm2", "length_mm"] == list(region.to_dict())
    assert region.to_dict()["area_mm2"] == 6


@pytest.mark.parametrize(
    ("wrong", "option"),
    [({"min_area": value}, "min_area") for value in (-1, True, float("nan"), float("inf"), 0.5, "3", None)]
    + [({"mm_per_pixel": value}, "mm_per_pixel") for value in (0, -1.0, 1e-10, 1e7, float("nan"), True, "1")]
    + [({"merge": value}, "merge") for value in (-1, 1.5, True, 201, None)]
    + [({"most": value}, "most") for value in (0, -1, 2.0, True, 1001)],
)
def test_rules_that_are_none(wrong: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError, match=f"got {next(iter(wrong.values()))}|got '") as raised:
        Rules(**wrong)
    assert raised.value.option == option


def test_nothing_inside_is_no_evidence() -> None:
    """A part that lies beside the frame."""
    nothing = np.zeros((60, 200), np.uint8)
    for line in (0.0, 0.5, 0.99):
        assert find_evidence(broken_scratch(), nothing, True, line) == ((), "roi")


PROGRAM = """
import resource, sys
import numpy as np
from fbclip.runtime import regions
from fbclip.runtime.regions import Rules, find_evidence
kind = sys.argv[1]
H, W = 4000, 8000
find_evidence(np.eye(99, dtype=np.float32), None, True, 0.5)
anomaly_map, inside = np.full((H, W), 0.1, np.float32), np.ones((H, W), np.uint8)
for y in range(0, H, 200):
    anomaly_map[y : y + 9, 50:700:40] = 0.7
    anomaly_map[y : y + 2, 7000:7900] = 0.9
regions.MAX_EDGES = -1 if kind == "labels" else regions.MAX_EDGES
line, rules = {"weak": (0.95, Rules()), "all": (0.05, Rules()), "merged": (0.5, Rules(merge=40))}.get(kind, (0.5, Rules()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found, _ = find_evidence(anomaly_map, inside, True, line, rules)
print(len(found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / anomaly_map.size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss has another unit")
@pytest.mark.parametrize(("kind", "count"), [("plain", 360), ("merged", 40), ("weak", 1), ("all", 1), ("labels", 360)])
def test_a_large_map_takes_few_bytes_a_pixel(kind: str, count: int) -> None:
    """A copy of the map would be 4, labels of it another 4."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind], check=True, capture_output=True, text=True)
    found, bytes_a_pixel = done.stdout.split()
    assert int(found) == count
    assert float(bytes_a_pixel) < 2.5


# --- pictures -------------------------------------------------------------------------------------------------------


def nested() -> Prediction:
    """A ring, a spot in its hole and a spot beside it, which are one."""
    anomaly_map = np.zeros((60, 80), np.float32)
    cv2.circle(anomaly_map, (30, 30), 15, 0.8, 2)
    anomaly_map[29:32, 29:32], anomaly_map[20:40, 50:53] = 0.7, 0.9
    found = find_regions(anomaly_map, 0.5, Rules(merge=12))
    return predicted(0.9, anomaly_map, regions=found, map_threshold=0.5)


def test_the_mask_of_what_was_merged() -> None:
    prediction = nested()
    (region,) = prediction.regions
    assert len(region.parts) == 2 and region.outline[:, 0].max() < 50  # of the ring first
    assert (prediction.mask == (prediction.anomaly_map >= 0.5)).all()
    assert prediction.mask.sum() == region.area
    moved = region.moved(3, 4)
    assert all(
        (after == before + np.array((3, 4))).all()
        for before, after in zip(region.outlines, moved.outlines, strict=True)
    )


def test_supervision_of_what_was_merged() -> None:
    pytest.importorskip("supervision")
    detections = nested().to_supervision(masks=True)
    assert detections.xyxy.tolist() == nested().boxes.tolist() and len(detections) == 1
    assert (detections.mask[0] == nested().mask).all()


def large(spots: list[tuple[int, int]], size_hw: tuple[int, int] = (1800, 2400), **values: Any) -> Prediction:
    """Spots of 12 x 12 pixels at (x, y) in a large grey frame."""
    anomaly_map = np.full(size_hw, 0.1, np.float32)
    for number, (x, y) in enumerate(spots):
        anomaly_map[y : y + 12, x : x + 12] = 0.9 - number / 100
    image = np.full((*size_hw, 3), 120, np.uint8)
    return predicted(0.9, anomaly_map, image, regions=find_regions(anomaly_map, 0.5), **values)


def differs(prediction: Prediction, **options: Any) -> NDArray[np.bool_]:
    """Where a picture is another than without these options, (H, W) of the frame."""
    one, other = prediction.overlay(**options), prediction.overlay(zoom=False)
    assert one.shape == other.shape
    return np.asarray((one != other).any(axis=2)[-len(prediction.image) :])


def test_a_small_region_of_a_large_frame_is_enlarged() -> None:
    shown = large([(2000, 700)]).overlay()[-1800:]
    panel = shown[100:450, -400:-20].astype(int)  # heat, in the nearest corner
    warm = (panel[..., 0] > panel[..., 2] + 40).mean()
    assert warm > 0.02 > 12 * 12 / 450**2  # the spot is much larger there
    assert not differs(large([])).any()
    assert not differs(large([(700, 900)], (900, 1600))).any(), "an ordinary frame's picture is as it was"
    big = large([])
    big.anomaly_map[600:700, 600:700] = 0.9
    whole = predicted(0.9, big.anomaly_map, big.image, regions=find_regions(big.anomaly_map, 0.5))
    assert not differs(whole).any()
    assert differs(whole, zoom=True).any()


def test_what_is_enlarged_hides_no_region() -> None:
    near = [(150, 150), (2200, 150), (150, 1600)]
    changed = differs(large([(1200, 900), *near]))
    assert changed[1400:, 1600:].any()  # the one corner that is free
    assert not any(changed[y : y + 12, x : x + 12].any() for x, y in near)
    everywhere = large([(1200, 900), *near, (2200, 1600)])
    assert not differs(everywhere).any()
    assert differs(everywhere, zoom=True).any()


def test_pictures_of_samples_are_as_they_were() -> None:
    """By the words of the release before: heat by its tables over the whole frame, a bar above, nothing else."""
    for path in sorted(SAMPLES.glob("*-good.jpg")):
        prediction = Predictor(threshold=1.0)(path)
        level = (prediction.anomaly_map * 255).clip(0, 255).astype(np.uint8)
        surface = cv2.multiply(prediction.image, cv2.applyColorMap(level, SURFACE), scale=1 / 255)
        expected = cv2.add(surface, cv2.applyColorMap(level, HEAT))
        assert (prediction.overlay()[-len(level) :] == expected).all()
    for path in sorted(SAMPLES.glob("*.jpg")):
        prediction = Predictor()(path)
        assert (prediction.overlay() == prediction.overlay(zoom=False)).all()


def test_the_part_and_the_tiles_are_drawn() -> None:
    corners = np.array(((200, 300), (2000, 200), (2100, 1500), (250, 1600)), np.float64)
    changed = differs(large([], part=None), zoom=False)
    assert not changed.any()
    with_part, without = large([], part=corners), large([])
    drawn = (with_part.overlay() != without.overlay()).any(axis=2)[-1800:]
    for first, last in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        for share in (0.0, 0.3, 0.7):
            x, y = (first + share * (last - first)).round().astype(int)
            assert drawn[y, x]
    assert drawn.mean() < 0.03  # lines, not areas
    tiled = large([], tiles=((0, 0, 1300, 1000), (1100, 0, 2400, 1000)))
    lines = differs(tiled, tiles=True)
    assert lines[500, [0, 1299, 1100, 2399]].all() and lines[999, ::100].all()
    assert lines.mean() < 0.02 and not differs(tiled).any()


def test_a_frame_without_the_part_says_so() -> None:
    absent, good = (
        predicted(0.1, np.zeros((400, 400), np.float32), absent=True),
        predicted(0.1, np.zeros((400, 400), np.float32)),
    )
    bar = absent.overlay()[:-400]
    assert tuple(bar[3, 3]) == (87, 96, 106)
    ends = [
        (picture[:-400] > 200).all(axis=2).any(axis=0).nonzero()[0].max()
        for picture in (absent.overlay(), good.overlay())
    ]
    assert ends[0] > ends[1] + 50  # "the part is not in the frame", not a score


def test_a_region_is_a_value() -> None:
    one, other = (find_regions(broken_scratch(), 0.5)[0] for _ in range(2))
    assert one == other and isinstance(one, Region) and len({one, other}) == 1
    assert one.centre == (6, 21)
