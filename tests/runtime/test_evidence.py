"""A verdict has a place, and what speaks against a score is said."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from fbclip import Predictor
from fbclip.assets import SAMPLES
from fbclip.bundle import Bundle
from fbclip.images import read_image
from fbclip.runtime.calibrate import calibrate
from fbclip.runtime.calibration import WARM
from fbclip.runtime.live.pipeline import Pipeline
from fbclip.runtime.live.run import status_text
from fbclip.runtime.regions import Rules, find_evidence
from fbclip.runtime.roi import Roi
from helpers.delivered import drawn_verdict, has_outlines
from helpers.good_parts import write_good
from helpers.live import PATIENT, Frames, Memory

SCRATCH = SAMPLES / "brushed-steel-scratch.jpg"
LINE = 0.95  # of the map: higher than any sample's


def with_line(line: float = LINE, **options: object) -> Predictor:
    """As a calibration leaves it whose good parts had high values on their maps."""
    predict = Predictor(**options)  # type: ignore[arg-type]
    predict.map_threshold = line
    return predict


@st.composite
def maps(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    inside = None
    if draw(st.booleans()):
        inside = rng.integers(0, 2, (height, width)).astype(np.uint8)
        inside[rng.integers(height), rng.integers(width)] = 1
    return (rng.integers(0, 6, (height, width)) / 5).astype(np.float32), inside


@given(maps(), st.booleans(), st.sampled_from([0.0, 0.2, 0.6, 1.0, 1.1]), st.integers(0, 5))
def test_evidence_by_its_words(
    drawn: tuple[NDArray[np.float32], NDArray[np.uint8] | None], reached: bool, line: float, min_area: int
) -> None:
    anomaly_map, inside = drawn
    regions, overruled = find_evidence(anomaly_map, inside, reached, line, Rules(min_area))
    counts = np.ones(anomaly_map.shape, bool) if inside is None else inside != 0
    at_line = counts & (anomaly_map >= np.float32(line))
    if reached:
        assert bool(regions) != bool(overruled)
    else:
        assert overruled is None and not any(region.weak for region in regions)
    assert (overruled == "roi") == (reached and not at_line.any() and anomaly_map[counts].max() < anomaly_map.max())
    if overruled == "min_area":
        assert at_line.any() and min_area > 1
    for region in regions:
        x0, y0, x1, y1 = region.box
        assert counts[y0:y1, x0:x1].any()
        assert region.weak == (not at_line.any())
    if regions and regions[0].weak:
        (weak,) = regions
        peak, middle = anomaly_map[counts].max(), np.median(anomaly_map[counts])
        above = (counts & (anomaly_map >= np.float32((float(middle) + float(peak)) / 2))).astype(np.uint8)
        _, labels = cv2.connectedComponents(above, connectivity=8)
        areas = {int((labels == labels[y, x]).sum()) for y, x in np.argwhere(counts & (anomaly_map == peak))}
        assert weak.area in areas and weak.peak == peak


def test_a_defect_without_a_region_at_the_line_has_a_weak_one() -> None:
    plain, calibrated = Predictor()(SCRATCH), with_line()(SCRATCH)
    (weak,) = calibrated.regions
    assert weak.weak and calibrated.is_anomalous and calibrated.overruled is None
    y, x = np.unravel_index(plain.anomaly_map.argmax(), plain.anomaly_map.shape)
    x0, y0, x1, y1 = weak.box
    assert x0 <= x < x1 and y0 <= y < y1
    assert weak.area < plain.anomaly_map.size / 10  # the scratch, not the plate
    assert calibrated.to_dict()["regions"][0]["weak"] is True
    assert [region["weak"] for region in plain.to_dict()["regions"]] == [False] * len(plain.regions)
    assert not with_line()(SAMPLES / "brushed-steel-good.jpg").regions


def test_a_weak_region_is_dashed() -> None:
    dashed = with_line()(SCRATCH)
    closed = replace(dashed, regions=tuple(replace(region, weak=False) for region in dashed.regions))

    def red(picture: NDArray[np.uint8]) -> int:
        r, g, b = picture[60:].astype(int).transpose(2, 0, 1)
        return int(((r > 180) & (g < 90) & (b < 90)).sum())

    assert has_outlines(dashed.overlay()) and drawn_verdict(dashed.overlay()) == "defect"
    assert 0.3 < red(dashed.overlay()) / red(closed.overlay()) < 0.8


def test_a_least_area_takes_away_regions_alone() -> None:
    everything = Predictor()(SCRATCH)
    largest = max(region.area for region in everything.regions)
    too_small = Predictor(min_area=largest + 1)(SCRATCH)
    assert (too_small.verdict, too_small.overruled, too_small.regions) == ("good", "min_area", ())
    assert Predictor(min_area=largest)(SCRATCH).overruled is None
    by_score = with_line(min_area=30)(SCRATCH)  # the map says nothing at its line, large or small
    assert (by_score.verdict, by_score.overruled) == ("defect", None)
    assert by_score.regions[0].weak
    by_hand = Predictor(threshold=0.9, min_area=30)(SCRATCH)  # of the map too, where nothing is calibrated
    assert by_hand.score >= 0.9 > by_hand.anomaly_map.max()
    assert by_hand.verdict == "defect" and by_hand.regions[0].weak


def test_beside_a_mask_the_peak_decides(tmp_path: Path) -> None:
    everything = Predictor()(SCRATCH)
    near = cv2.dilate((everything.anomaly_map >= 0.3).astype(np.uint8), np.ones((9, 9), np.uint8))
    for name, mask in (("on", near), ("beside", 1 - near)):
        mask[[0, -1]], mask[:, [0, -1]] = 1, 1  # so that the box is the whole frame
        Image.fromarray(mask * np.uint8(255)).save(tmp_path / f"{name}.png")
    on = with_line(roi=Roi.parse(str(tmp_path / "on.png")))(SCRATCH)
    assert on.verdict == "defect" and on.regions[0].weak
    beside = with_line(roi=Roi.parse(str(tmp_path / "beside.png")))(SCRATCH)
    assert (beside.verdict, beside.overruled, beside.regions) == ("good", "roi", ())


def test_nothing_outside_a_region_of_interest_is_marked(tmp_path: Path) -> None:
    """Not even where every value is: by a threshold of 0."""
    mask = np.zeros(read_image(SCRATCH).shape[:2], np.uint8)
    mask[200:300, 300:500], mask[240:260, 400:420] = 255, 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for roi in (Roi.parse("300,200,500,300"), Roi.parse(str(tmp_path / "mask.png"))):
        (region,) = Predictor(threshold=0.0, roi=roi)(SCRATCH).regions
        assert region.box == (300, 200, 500, 300)
        assert region.area == (20_000 if roi.inside is None else 19_600)
        assert (region.outline.min(axis=0) == (300, 200)).all()


def test_a_run_counts_what_overruled_the_score() -> None:
    image, sink = read_image(SCRATCH), Memory()
    summary = Pipeline(Frames([image] * 2), Predictor(min_area=10**6), [sink], limits=PATIENT).run()
    assert (summary.status.anomalous, summary.status.overruled) == (0, 2)
    assert [result.to_dict()["overruled"] for result in sink.results] == ["min_area"] * 2
    assert "overruled 2" in status_text(summary.status).plain


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that its calibration leaves with a line on the map that no sample reaches."""
    path = tmp_path_factory.mktemp("line") / "part.fbclip"
    shutil.copytree(Bundle.load().path, path)
    good = write_good(path.parent / "good", 9)
    made, _, _ = calibrate(Predictor(path), good, 0.1, [], Console(quiet=True))
    replace(
        made, map_threshold=LINE, map_scale=(made.map_scale[0], made.map_scale[0] + (LINE - made.map_scale[0]) / WARM)
    ).save(Bundle.load(path))
    return path


def test_the_command_says_both(fbclip: Run, calibrated: Path, tmp_path: Path) -> None:
    """With a calibration, --min-area made every defect good without a word."""
    options = ["infer", SCRATCH, "--bundle", calibrated, "--threshold", 0.5, "--no-save"]
    done = fbclip(*options, "--min-area", 30, "--json", "r.jsonl", "--csv", "r.csv")
    assert "1 images: 1 with defects, 0 good" in done.stdout
    assert "1 weak" in done.stdout
    record = json.loads((tmp_path / "r.jsonl").read_text())
    assert record["is_anomalous"] and [region["weak"] for region in record["regions"]] == [True]
    (row,) = csv.DictReader((tmp_path / "r.csv").open())
    assert (row["verdict"], row["weak"], row["reason"], row["regions"]) == ("defect", "True", "", "1")
    done = fbclip("infer", SCRATCH, "--min-area", 10**6, "--no-save", "--csv", "s.csv")
    assert "good (min_area)" in done.stdout
    assert "good against their score, which reaches the threshold: 1; all regions are smaller than the least area" in (
        done.stdout
    )
    (row,) = csv.DictReader((tmp_path / "s.csv").open())
    assert (row["verdict"], row["reason"]) == ("good", "min_area")
