from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import fbclip
from fbclip.bundle import Bundle
from fbclip.errors import ImageError, UsageError
from fbclip.runtime import regions
from fbclip.runtime.regions import Region, Rules, find_regions
from fbclip.runtime.roi import Roi
from helpers.delivered import drawn_verdict, has_outlines

SAMPLES = Path(fbclip.__file__).parent / "assets" / "samples"
SCRATCHED = np.asarray(Image.open(SAMPLES / "brushed-steel-scratch.jpg"))
HEIGHT, WIDTH = SCRATCHED.shape[:2]


def labelled_regions(anomaly_map: NDArray[np.float32], threshold: float, min_area: int) -> set[Region]:
    """The literal way: a label for every pixel."""
    count, labels = cv2.connectedComponents((anomaly_map >= threshold).astype(np.uint8), connectivity=8)
    found = set()
    for label in range(1, count):
        ys, xs = np.nonzero(labels == label)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        if len(ys) >= min_area:
            peak, mean = float(anomaly_map[ys, xs].max()), float(anomaly_map[ys, xs].mean())
            found.add(Region(box, peak, len(ys), mean, np.empty((0, 2), np.int32)))
    return found


@settings(deadline=None)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0]),
    st.integers(0, 6),
    st.booleans(),
)
@pytest.mark.slow
def test_regions_are_the_labelled_ones(
    height: int, width: int, seed: int, threshold: float, min_area: int, is_noise: bool
) -> None:
    levels = np.random.default_rng(seed).integers(0, 6, (height, width))
    anomaly_map = (levels / 5).astype(np.float32)  # holes, islands in holes, single pixels, lines
    with patch.object(regions, "MAX_EDGES", -1 if is_noise else regions.MAX_EDGES):  # both ways
        found = find_regions(anomaly_map, threshold, Rules(min_area))
    assert len(found) == len(set(found))
    assert set(found) == labelled_regions(anomaly_map, threshold, min_area)
    assert [region.peak for region in found] == sorted((region.peak for region in found), reverse=True)
    for region in found:
        xs, ys = region.outline.T
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == region.box
        assert (anomaly_map[ys, xs] >= threshold).all()


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 0.99])
def test_of_a_map_that_is_noise_the_highest_regions_are_found(threshold: float) -> None:
    anomaly_map = np.random.default_rng(0).random((1080, 1920), np.float32)
    labels, number = ndimage.label(anomaly_map >= threshold, np.ones((3, 3)))
    peaks = np.sort(ndimage.maximum(anomaly_map, labels, np.arange(1, number + 1)))[::-1]
    found = find_regions(anomaly_map, threshold)
    assert [region.peak for region in found] == pytest.approx(peaks[: regions.MAX_REGIONS])
    for region in found[:20]:
        x0, y0, x1, y1 = region.box
        assert anomaly_map[y0:y1, x0:x1].max() >= region.peak


def test_a_rectangle_is_the_frame_cut_to_it() -> None:
    box = (300, 100, 520, 400)
    x0, y0, x1, y1 = box
    inside = fbclip.Predictor(roi=Roi.parse("300,100,520,400"))(SCRATCHED)
    cut = fbclip.Predictor()(np.ascontiguousarray(SCRATCHED[y0:y1, x0:x1]))
    assert inside.score == cut.score
    assert inside.anomaly_map.shape == (HEIGHT, WIDTH)
    assert (inside.anomaly_map[y0:y1, x0:x1] == cut.anomaly_map).all()
    outside = inside.anomaly_map.copy()
    outside[y0:y1, x0:x1] = 0
    assert not outside.any()
    moved = {(r.box[0] + x0, r.box[1] + y0, r.box[2] + x0, r.box[3] + y0) for r in cut.regions}
    assert {r.box for r in inside.regions} == moved
    assert moved


def test_what_lies_outside_a_mask_raises_no_alarm(tmp_path: Path) -> None:
    everything = fbclip.Predictor()(SCRATCHED)
    assert everything.is_anomalous
    mask = np.where(everything.anomaly_map >= everything.threshold - 0.1, 0, 255).astype(np.uint8)
    mask[[0, -1]], mask[:, [0, -1]] = 255, 255  # so that the box is the whole frame
    Image.fromarray(mask).save(tmp_path / "beside.png")
    beside = fbclip.Predictor(roi=Roi.parse(str(tmp_path / "beside.png")))(SCRATCHED)
    assert beside.score == everything.score >= beside.threshold
    assert not beside.is_anomalous
    assert not beside.anomaly_map[mask == 0].any()
    assert drawn_verdict(everything.overlay()) == "defect"
    assert drawn_verdict(beside.overlay()) == "good"


def test_a_least_area() -> None:
    everything = fbclip.Predictor()(SCRATCHED)
    largest = max(region.area for region in everything.regions)
    just = fbclip.Predictor(min_area=largest)(SCRATCHED)
    assert just.is_anomalous
    assert [region.area for region in just.regions] == [largest]
    above = fbclip.Predictor(min_area=largest + 1)(SCRATCHED)
    assert not above.is_anomalous
    assert above.to_dict()["is_anomalous"] is False
    assert above.score == everything.score
    assert (drawn_verdict(just.overlay()), has_outlines(just.overlay())) == ("defect", True)
    assert (drawn_verdict(above.overlay()), has_outlines(above.overlay())) == ("good", False)


def test_regions_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="reaches beyond the frame"):
        Roi.parse(f"0,0,{WIDTH + 1},{HEIGHT}").crop(SCRATCHED)
    Image.fromarray(np.full((7, 9), 255, np.uint8)).save(tmp_path / "mask.png")
    mask = Roi.parse(str(tmp_path / "mask.png"))
    assert mask.inside is None  # a rectangle in the end
    with pytest.raises(ImageError, match="9x7"):
        mask.crop(SCRATCHED)
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(UsageError, match="black all over"):
        Roi.parse(str(tmp_path / "black.png"))


def test_a_calibration_is_for_its_region(fbclip: Run, tmp_path: Path) -> None:
    shutil.copytree(Bundle.load().path, tmp_path / "copy.fbclip")
    fbclip("calibrate", "copy.fbclip", SAMPLES, "--false-alarm-rate", 0.2, "--roi", "0, 0,200,200")
    error = fbclip("infer", "--bundle", "copy.fbclip", code=2).stderr
    assert "was calibrated for the region 0,0,200,200" in error
    assert "calibrate for whole frames, or pass a threshold" in error
    fbclip("infer", "--bundle", "copy.fbclip", "--roi", "0,0,200,200")
    fbclip("infer", "--bundle", "copy.fbclip", "--threshold", 0.5)


@pytest.mark.parametrize("text", ["5,5,5,9", "1,2,3", "nowhere.png", "9,1,2,3"])
def test_wrong_regions_are_one_line(fbclip: Run, text: str) -> None:
    error = fbclip("infer", "--roi", text, code=2).stderr
    assert "--roi: a region is x0,y0,x1,y1" in error
    assert error.count("\n") == 1
