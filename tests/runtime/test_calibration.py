from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from threading import Barrier
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from scipy.stats import beta, binomtest

from fbclip.assets import EMBEDDED
from fbclip.bundle import GRAPHS, Bundle
from fbclip.errors import BundleError, UsageError
from fbclip.runtime.calibrate import Scores, calibrate, report, weight_of_neighbours, write
from fbclip.runtime.calibration import (
    Calibration,
    beta_quantile,
    binomial_interval,
    conformal_threshold,
    lowest_rate,
    rate_interval,
)
from fbclip.runtime.histogram import write_histogram
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.regions import find_regions
from fbclip.runtime.target import Target
from fbclip.tasks import adapt
from fbclip.tasks import calibrate as calibrate_bundle
from helpers.good_parts import write_good
from helpers.predicted import predicted
from helpers.waiting import PATIENCE_S

FEW = st.sampled_from([np.float32(v) for v in (0, 0.1, 0.5, 0.7, 1)])  # many ties
ANY = st.floats(0, 1, width=32)
RATES = st.fractions(Fraction(1, 100), Fraction(49, 100), max_denominator=100).map(lambda f: float(round(f, 4)))


def alarms_over_all_orders(values: list[float], rate: float) -> int:
    """How many of n + 1 values raise an alarm when each in turn is the new one; exchangeable ones come in any order."""
    return sum(
        new >= conformal_threshold([*values[:i], *values[i + 1 :]], rate) for i, new in enumerate(map(float, values))
    )


@given(values=st.lists(FEW | ANY, min_size=2, max_size=60), rate=RATES)
def test_a_new_good_part_raises_an_alarm_with_the_rate_at_most(values: list[float], rate: float) -> None:
    if Fraction(str(rate)) * len(values) < 1:  # too few
        with pytest.raises(UsageError, match="needs at least"):
            conformal_threshold(values[1:], rate)
    else:
        assert Fraction(alarms_over_all_orders(values, rate), len(values)) <= Fraction(str(rate))


@given(values=st.lists(ANY, min_size=2, max_size=60, unique=True), rate=RATES)
def test_without_ties_no_alarm_is_given_away(values: list[float], rate: float) -> None:
    if allowed := int(Fraction(str(rate)) * len(values)):
        assert alarms_over_all_orders(values, rate) == allowed


@pytest.mark.parametrize(("rate", "fewest"), [(0.1, 9), (0.05, 19), (0.01, 99), (0.03, 33), (0.001, 999)])
def test_how_many_images_a_rate_needs(rate: float, fewest: int) -> None:
    scores = [i / 1000 for i in range(fewest)]
    assert conformal_threshold(scores, rate) > scores[-1]
    with pytest.raises(UsageError, match=f"needs at least {fewest} good images; got {fewest - 1}"):
        conformal_threshold(scores[1:], rate)


@pytest.mark.parametrize("rate", [0, 1, 0.5, -0.1, float("nan")])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(UsageError, match="a false-alarm rate is above 0"):
        conformal_threshold([0.5] * 100, rate)


def test_a_map_value_that_ties_is_not_marked() -> None:
    peak = np.float32(0.1)  # no float64 between it and the next float32 survives a comparison with a map
    threshold = conformal_threshold([float(peak)] * 9, 0.1)
    assert not find_regions(np.full((4, 4), peak), threshold)
    assert find_regions(np.full((4, 4), np.nextafter(peak, np.float32(1))), threshold)


@given(a=st.integers(1, 2000), b=st.integers(1, 2000), q=st.sampled_from([0.001, 0.025, 0.5, 0.975]))
def test_beta_quantiles_are_scipys(a: int, b: int, q: float) -> None:
    assert beta_quantile(q, a, b) == pytest.approx(beta.ppf(q, a, b), rel=1e-9)


@given(count=st.integers(1, 500), data=st.data())
def test_binomial_intervals_are_scipys(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    exact = binomtest(hits, count).proportion_ci(0.95, method="exact")
    assert binomial_interval(hits, count) == pytest.approx((exact.low, exact.high), rel=1e-9)


@pytest.mark.parametrize(("count", "rate"), [(99, 0.01), (150, 0.1), (400, 0.05)])
def test_the_interval_holds_the_rate_of_95_calibrations_in_100(count: int, rate: float) -> None:
    rng = np.random.default_rng(0)
    low, high = rate_interval(count, rate)
    rates = [1 - conformal_threshold(rng.random(count).tolist(), rate) for _ in range(4000)]  # of uniform scores
    assert np.mean([low <= r <= high for r in rates]) == pytest.approx(0.95, abs=0.015)
    assert np.mean(rates) <= rate + 4 * np.std(rates) / len(rates) ** 0.5


def test_images_that_follow_each_other() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    assert weight_of_neighbours(noise.tolist()) is None
    assert weight_of_neighbours([0.5] * 50) is None
    smooth = [0.0]
    for step in noise:  # a first-order autoregression of 0.8: 400 * 0.2 / 1.8 = 44
        smooth.append(0.8 * smooth[-1] + step)
    alike = weight_of_neighbours(smooth)
    assert alike is not None
    assert alike[0] == pytest.approx(0.8, abs=0.1)
    assert 25 < alike[1] < 70


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Calibration, list[Path]]:
    """A copy of the embedded bundle, calibrated for 10 % on 19 pictures of a surface."""
    folder = tmp_path_factory.mktemp("calibrated")
    paths = write_good(folder / "good", 19)
    bundle = Bundle.load(shutil.copytree(Bundle.load().path, folder / "part.fbclip"))
    calibration, _, _ = calibrate(Predictor(bundle), paths, 0.1, [], Console(quiet=True))
    calibration.save(bundle)
    return bundle, calibration, paths


def test_what_is_saved_is_loaded(calibrated: tuple[Bundle, Calibration, list[Path]]) -> None:
    bundle, calibration, _ = calibrated
    assert Calibration.load(bundle) == calibration
    assert calibration.scores == tuple(sorted(calibration.scores))
    assert calibration.count == 19


def test_one_of_19_good_parts_is_above_and_no_other_is_painted_red(
    calibrated: tuple[Bundle, Calibration, list[Path]],
) -> None:
    bundle, calibration, paths = calibrated
    predictor = Predictor(bundle)
    predictions = [predictor(path) for path in paths]
    assert sum(p.is_anomalous for p in predictions) == 1  # m - 1, where m = floor(0.1 * 20)
    assert sum(bool(p.regions) for p in predictions) == 1
    assert predictor.map_threshold == calibration.map_threshold
    for p in predictions:
        assert p.threshold == calibration.threshold
        surface, peak = np.full((320, 320, 3), 128, np.uint8), np.full((320, 320), p.anomaly_map.max(), np.float32)
        grey = replace(p, image=surface, anomaly_map=peak, regions=())
        red, green, _ = grey.overlay()[-160, 160].astype(int)
        assert (red > green + 15) == bool(p.regions)


def test_the_scale_is_the_calibrations_not_the_images() -> None:
    def heat(anomaly_map: NDArray[np.float32]) -> NDArray[np.uint8]:
        image = np.full((320, 320, 3), 128, np.uint8)
        return predicted(0.1, anomaly_map, image, map_scale=(0.3, 0.97)).overlay()

    faint, clear = (np.full((320, 320), value, np.float32) for value in (0.3, 0.95))
    low, high = (heat(m)[-160, 160].astype(int) for m in (faint, clear))
    assert abs(low - 128).max() < 25  # the surface as it is
    assert high[0] > 1.5 * high[1]  # red
    half = faint.copy()
    half[:, :160] = 0.95
    assert (heat(half)[-160, 300] == low).all()


def test_an_explicit_threshold_leaves_the_maps_calibrated(calibrated: tuple[Bundle, Calibration, list[Path]]) -> None:
    bundle, calibration, paths = calibrated
    predictor = Predictor(bundle, threshold=0.0)
    assert predictor(paths[0]).is_anomalous
    assert predictor.map_threshold == calibration.map_threshold
    plain = Predictor(bundle, calibrated=False)
    assert (plain.threshold, plain.map_threshold, plain.map_scale) == (bundle.manifest.threshold, None, (0.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "0" * 64}, "is of another model"),
        ({"precision": "fp16"}, "is of another model"),
        ({"stranger": 1}, "is no calibration"),
        (None, "is no calibration"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(
    calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path, change: dict[str, object] | None, message: str
) -> None:
    bundle = Bundle.load(shutil.copytree(calibrated[0].path, tmp_path / "other.fbclip"))
    text = bundle.calibration.read_text()
    bundle.calibration.write_text(text[:99] if change is None else json.dumps({**json.loads(text), **change}))
    with pytest.raises(BundleError, match=f"{message}.*run fbclip calibrate again"):
        Predictor(bundle)
    Predictor(bundle, calibrated=False)  # which is how fbclip calibrate cures it


TAMPERED: list[tuple[str, Any]] = [
    ("threshold", 1.0),
    ("threshold", "0.6"),
    ("threshold", None),
    ("threshold", True),
    ("false_alarm_rate", 7),
    ("false_alarm_rate", "x"),
    ("false_alarm_rate", 0.2),
    ("false_alarm_rate", 1e-300),
    ("false_alarm_rate", 0.01),
    ("interval", [0.0, 0.01]),
    ("interval", [0.0]),
    ("count", -5),
    ("count", 20),
    ("count", 10**15),
    ("scores", ["a"]),
    ("scores", None),
    ("scores", []),
    ("scores", [0.1] * 19),
    ("map_threshold", "x"),
    ("map_threshold", None),
    ("map_threshold", 5.0),
    ("map_threshold", 0.0),
    ("map_scale", []),
    ("map_scale", [0.3, 0.3]),
    ("map_scale", [0.9, 0.1]),
    ("map_scale", [-1, 1]),
    ("images_sha256", "0" * 63),
    ("images_sha256", 5),
    ("precision", "fp64"),
    ("device", ["cpu"]),
    ("device", "cpu\n"),
    ("roi", 5),
    ("defects", 3),
    ("defects", -1),
    ("defects", 10**12),
    ("miss_rate", 0.5),
    ("miss_interval", [0.1, 0.2]),
    ("usual", 5),
    ("usual", {}),
    ("usual", {"darkest": 9, "brightest": 200, "blown": 0.2, "green": 0.2, "sharpness": "1"}),
    ("usual", {"darkest": 9, "brightest": 200, "blown": 2, "green": 0.2, "sharpness": 1}),
    ("usual", {"darkest": 9, "brightest": 8, "blown": 0.2, "green": 0.2, "sharpness": 1}),
]


@pytest.mark.parametrize(("field", "value"), TAMPERED)
def test_a_calibration_that_was_altered_is_refused(
    calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path, field: str, value: Any
) -> None:
    """What follows from the scores is computed again; what doesn't has its type and range."""
    bundle = Bundle.load(shutil.copytree(calibrated[0].path, tmp_path / "other.fbclip"))
    bundle.calibration.write_text(json.dumps({**json.loads(bundle.calibration.read_text()), field: value}))
    with pytest.raises(
        BundleError, match=r"calibration\.json is no calibration: .*; run fbclip calibrate again"
    ) as error:
        Predictor(bundle)
    assert "\n" not in str(error.value)


def test_misses_that_do_not_follow_from_the_defects(
    calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path
) -> None:
    bundle = Bundle.load(shutil.copytree(calibrated[0].path, tmp_path / "other.fbclip"))
    right = replace(calibrated[1], defects=40, miss_rate=0.25, miss_interval=binomial_interval(10, 40))
    right.save(bundle)
    assert Calibration.load(bundle) == right
    for wrong in (
        replace(right, miss_rate=0.26),
        replace(right, miss_rate=None),
        replace(right, miss_interval=(0.0, 0.1)),
        replace(right, miss_interval=None),
    ):
        wrong.save(bundle)
        with pytest.raises(BundleError, match="is no calibration: miss_"):
            Calibration.load(bundle)


def test_texts_that_are_no_calibration(calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(calibrated[0].path, tmp_path / "other.fbclip"))
    good = bundle.calibration.read_text()
    for text in (
        "",
        "\xff",
        "[]",
        "[" * 200_000,
        good.replace('"count": 19', '"count": 19, "count": 19'),
        good.replace('"map_threshold":', '"map_threshold": NaN, "x":'),
        good.replace('"precision"', '"stranger": 1, "precision"'),
        " " * 2**24 + good,
    ):
        bundle.calibration.write_text(text, encoding="latin-1")
        with pytest.raises(BundleError, match=r"is no calibration: [^\n]*$"):
            Predictor(bundle)


@pytest.mark.parametrize("place", ["folder", "dangling", "pipe", "loop"])
def test_a_calibration_that_is_no_file_is_not_none(
    calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path, place: str
) -> None:
    """The bundle's default threshold would promise nothing."""
    bundle = Bundle.load(shutil.copytree(calibrated[0].path, tmp_path / "other.fbclip"))
    path = bundle.path / "calibration.json"
    path.unlink()
    match place:
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to(bundle.path / "nowhere")
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
    with pytest.raises(BundleError, match=r"calibration\.json"):
        Predictor(bundle)


@given(data=st.data())
def test_mutated_calibrations_are_read_or_refused_in_one_line(
    calibrated: tuple[Bundle, Calibration, list[Path]], data: st.DataObject
) -> None:
    bundle, calibration, _ = calibrated
    text = bundle.calibration.read_bytes()
    changed = bytearray(text)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed)))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3) | st.just(b"1e9"))
    try:
        bundle.calibration.write_bytes(changed)
        found = Calibration.load(bundle)
    except BundleError as error:
        assert "\n" not in str(error)
    else:
        assert found is not None
        assert found.threshold == calibration.threshold  # which follows from the scores
    finally:
        bundle.calibration.write_bytes(text)


def test_a_calibration_may_not_leave_the_bundle(
    calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path
) -> None:
    bundle = Bundle.load(shutil.copytree(calibrated[0].path, tmp_path / "other.fbclip"))
    bundle.calibration.rename(tmp_path / "calibration.json")
    (bundle.path / "calibration.json").symlink_to(tmp_path / "calibration.json")
    with pytest.raises(BundleError, match="stay inside"):
        Predictor(bundle)


def test_another_precision_is_named(calibrated: tuple[Bundle, Calibration, list[Path]]) -> None:
    bundle, calibration, _ = calibrated
    manifest = bundle.manifest
    both = replace(
        bundle,
        manifest=replace(
            manifest,
            precisions=("fp32", "fp16"),
            files={**manifest.files, GRAPHS["fp16"]: "1" * 64},
            parity={"fp32": {"score_max": 1e-7}, "fp16": {"score_max": 4e-4}},
        ),
    )
    assert Calibration.load(both) == calibration
    assert "is calibrated from 19 good images: at most 10 % false alarms on average" in calibration.explain(
        both, "fp32"
    )
    line = calibration.explain(both, "fp16")
    assert "scored in fp32, and fp16 may differ by 4e-04" in line
    assert "calibrate in fp16" in line
    assert "\n" not in line


def test_the_order_of_the_images_does_not_matter_and_frames_do_as_well(
    calibrated: tuple[Bundle, Calibration, list[Path]],
) -> None:
    bundle, calibration, paths = calibrated
    frames = (np.asarray(Image.open(path).convert("RGB")) for path in reversed(paths))
    again, good, _ = calibrate(Predictor(bundle, calibrated=False), frames, 0.1, [], Console(quiet=True))
    assert again == calibration
    assert good.copies == 0


def test_without_a_rate_it_is_the_lowest_that_the_images_allow(
    calibrated: tuple[Bundle, Calibration, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, _, paths = calibrated
    found, _, _ = calibrate(Predictor(bundle, calibrated=False), iter(paths), None, [], Console(width=200))
    assert found.false_alarm_rate == 0.05  # 1 of 20
    assert found.threshold > found.scores[-1]
    assert (
        "19 images allow a false-alarm rate of 0.05 at best, which is taken; 0.01 needs 99" in capsys.readouterr().out
    )
    found.save(bundle)
    assert Calibration.load(bundle) == found
    calibrated[1].save(bundle)
    with pytest.raises(UsageError, match=r"19 images allow 0\.05 at best: choose 0\.05"):
        calibrate(Predictor(bundle, calibrated=False), iter(paths), 0.01, [], Console(quiet=True))
    with pytest.raises(UsageError, match="takes two good images or more, and thirty to be of use; got 1"):
        calibrate(Predictor(bundle, calibrated=False), paths[:1], None, [], Console(quiet=True))


@pytest.mark.parametrize(
    ("count", "rate", "said"), [(30, 0.0323, 0.033), (99, 0.01, 0.01), (9, 0.1, 0.1), (2, 0.334, 0.34)]
)
def test_the_lowest_rate_is_allowed_and_the_next_lower_is_not(count: int, rate: float, said: float) -> None:
    assert (lowest_rate(count), lowest_rate(count, 2)) == (rate, said)
    assert conformal_threshold([i / count for i in range(count)], rate) > (count - 1) / count
    with pytest.raises(UsageError, match=f"{count} images allow {rate} at best: choose {said}"):
        conformal_threshold([0.5] * count, 0.99 / (count + 1))


def test_too_few_images_are_known_before_any_is_scored(calibrated: tuple[Bundle, Calibration, list[Path]]) -> None:
    missing = [Path(f"{i}.png") for i in range(98)]
    with pytest.raises(UsageError, match="needs at least 99 good images; got 98"):
        calibrate(Predictor(calibrated[0]), missing, 0.01, [], Console(quiet=True))


def test_the_report_says_what_weakens_the_promise(calibrated: tuple[Bundle, Calibration, list[Path]]) -> None:
    said: list[str] = []
    drifting = Scores(scores=np.linspace(0.3, 0.6, 60).tolist(), copies=3, skipped=1)
    found = replace(calibrated[1], defects=40, miss_rate=0.25, miss_interval=binomial_interval(10, 40))
    report(found, drifting, Scores(), said.append)
    text = "\n".join(said)
    assert "3 copied, 1 unreadable left out" in text
    assert "consecutive images are alike (autocorrelation 0.95)" in text
    assert "10 of 40 defects are missed: the miss rate is 13 to 41 %" in text


def test_the_report_says_when_a_model_can_not_inspect_a_part(
    calibrated: tuple[Bundle, Calibration, list[Path]],
) -> None:
    above, below = calibrated[1].threshold + 0.1, calibrated[1].threshold - 0.1
    found = replace(calibrated[1], defects=40, miss_rate=0.875, miss_interval=binomial_interval(35, 40))
    bad = Scores(scores=[above] * 5 + [below] * 35, peaks=[calibrated[1].map_threshold] + [0.0] * 39)
    said: list[str] = []
    report(found, Scores(scores=[0.1] * 19), bad, said.append)
    assert "35 of 40 defects are missed: the miss rate is 73 to 96 % (95 % confidence)" in said
    assert any(line.startswith("4 of 5 found defects have no region at the map's line") for line in said)
    assert any(line.startswith("this model can't inspect this part") for line in said)
    few: list[str] = []
    report(replace(found, miss_rate=0.0), Scores(scores=[0.1] * 19), Scores([above] * 40, [1.0] * 40), few.append)
    assert not [line for line in few if "can't inspect" in line or "no region" in line]


@pytest.mark.parametrize("scores", [(0.5,) * 19, (0.0, 1.0), tuple(np.linspace(0.1, 0.9, 999))])
@pytest.mark.parametrize("defects", [[], [0.95, 0.99]])
def test_the_picture_shows_the_threshold(
    calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path, scores: tuple[float, ...], defects: list[float]
) -> None:
    path = tmp_path / "calibration.png"
    write_histogram(replace(calibrated[1], scores=scores, count=len(scores), threshold=0.6), defects, path)
    picture = np.asarray(Image.open(path)).astype(int)
    plot = picture[130:560, 90:1160]
    assert ((plot < 60).all(axis=2).sum(axis=0) > 400).sum() in (2, 3, 4)  # one dark line from top to bottom
    blue, red = ((plot[..., c] - plot[..., 2 - c] > 60).sum() for c in (2, 0))
    assert blue > 500
    assert (red > 500) == bool(defects)


def test_from_pictures_of_good_parts_to_verdicts(fbclip: Run, tmp_path: Path) -> None:
    paths = write_good(tmp_path / "good", 12)
    shutil.copy(paths[0], tmp_path / "good" / "copy.png")
    (tmp_path / "good" / "broken.png").write_text("no image")
    default = Bundle.load().manifest.threshold
    assert f"threshold {default} is the model's own; no calibration" in fbclip("infer", "--no-save").stdout
    done = fbclip("calibrate", "good", "--false-alarm-rate", 0.1, "--defects", paths[3], code=2)  # one is broken
    assert "copied the embedded bundle to fbclip-nano.fbclip" in done.stdout
    assert "broken.png is no image" in done.stdout
    assert "12 good images (1 copied, 1 unreadable left out)" in done.stdout
    assert "1 of 1 defects are missed" in done.stdout
    bundle = tmp_path / "fbclip-nano.fbclip"
    assert Image.open(bundle / "calibration.png").size == (1200, 640)
    done = fbclip("infer", *paths, "--bundle", bundle, "--no-save", "--json", "r.jsonl")
    assert "is calibrated from 12 good images: at most 10 % false alarms on average" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert not any(record["is_anomalous"] or record["regions"] for record in records)  # m - 1 = 0
    assert "copied" not in fbclip("calibrate", bundle, *paths, "--false-alarm-rate", 0.2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.fbclip", "good"], "a bundle is a folder with a manifest.json"),
        ([Bundle.load().path], "beside the bundle there are no images of good parts"),
        ([Bundle.load().path, "nowhere"], "there is no nowhere"),
    ],
)
def test_wrong_usage_of_calibrate_is_one_line(fbclip: Run, arguments: list[object], message: str) -> None:
    error = fbclip("calibrate", *arguments, code=2).stderr
    assert message in error
    assert error.count("\n") == 1


def test_a_strange_bundle_of_the_embedded_name_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(Bundle.load().path, tmp_path / "fbclip-nano.fbclip")) / "manifest.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "threshold": 0.3}))
    with pytest.raises(UsageError, match="isn't the embedded bundle"):
        Target.choose("calibrate", ["good"], None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["good", "--false-alarm-rate", 0.01],
            r"^fbclip: --false-alarm-rate: .* got 12: give more \(12 images allow 0\.077 at best: ",
        ),
        (["good", "nowhere"], "there is no nowhere"),
        (["good", "--defects", "nowhere"], "'nowhere' matches none"),
        (["good", "--roi", "0,0,5000,5000"], "takes two good images or more"),
        (["good", "--name", "a/b"], "--name: a name is up to 100 letters"),
    ],
)
def test_a_calibration_that_fails_leaves_nothing(
    fbclip: Run, tmp_path: Path, arguments: list[object], message: str
) -> None:
    write_good(tmp_path / "good", 12)
    assert re.search(message, fbclip("calibrate", *arguments, code=2).stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_copies_have_names_of_their_own(fbclip: Run, tmp_path: Path) -> None:
    write_good(tmp_path / "good", 4)
    done = fbclip("calibrate", "good", "--name", "line3")
    assert "4 images allow a false-alarm rate of 0.2 at best" in done.stdout
    assert "copied the embedded bundle to line3.fbclip" in done.stdout
    copy = Bundle.load(tmp_path / "line3.fbclip")
    assert (copy.name, copy.manifest.name) == ("line3", "fbclip-nano")
    assert "line3.fbclip here is calibrated: add --bundle line3.fbclip" in fbclip("infer", "--no-save").stdout
    assert (
        "copied line3.fbclip to line4.fbclip" in fbclip("calibrate", "line3.fbclip", "good", "--name", "line4").stdout
    )
    assert "choose with --bundle: line3.fbclip, line4.fbclip" in fbclip("infer", "--no-save").stdout
    assert sorted(path.name for path in tmp_path.glob("*.fbclip")) == ["line3.fbclip", "line4.fbclip"]


def test_two_calibrations_at_once(fbclip: Run, tmp_path: Path) -> None:
    """Neither finds half of the other's copy; the later one's calibration stays."""
    write_good(tmp_path / "good", 4)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(fbclip, "calibrate", "good", "--false-alarm-rate", 0.2) for _ in range(2)]
    assert all("wrote fbclip-nano.fbclip" in run.result().stdout for run in runs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fbclip-nano.fbclip", "good"]
    Predictor(tmp_path / "fbclip-nano.fbclip")


def test_the_one_who_is_slower_calibrates_the_copy_of_the_other(
    calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have made their copies before any of them has the name."""
    path, ready, said = tmp_path / "fbclip-nano.fbclip", Barrier(3), list[str]()
    monkeypatch.chdir(tmp_path)
    target = Target.choose("calibrate", ["good"], None, None)

    def together(bundle: Bundle) -> None:
        write(calibrated[1], [], said.append, bundle)
        if bundle.path.name != path.name:
            ready.wait(PATIENCE_S)

    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(target.write, together, said.append) for _ in range(3)]
    assert [run.result() for run in runs] == [None] * 3
    assert said[0] == f"copied the embedded bundle to {path.name}"
    assert all(line.startswith("replaces the calibration from 19 good images") for line in said[1:])
    assert Calibration.load(Bundle.load(path)) == calibrated[1]
    assert [left.name for left in tmp_path.iterdir()] == ["fbclip-nano.fbclip"]


@pytest.mark.parametrize("name", ["calibration.json", "calibration.png"])
def test_a_calibration_is_not_written_through_links(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(Bundle.load().path, tmp_path / "part.fbclip"))
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="stay inside it"):
        Target.choose("calibrate", [str(folder), "good"], None, None)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleError, match="is no file: remove it"):
        Target.choose("calibrate", [str(folder), "good"], None, None)


def test_where_nothing_can_be_written_is_found_out_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc/self")
    with pytest.raises(UsageError, match="can't write"):
        Target.choose("calibrate", ["good"], None, None)


def test_frames_of_a_video_and_cameras_that_never_end(fbclip: Run, tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "good.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 96))
    for path in write_good(tmp_path / "good", 24):
        writer.write(cv2.imread(str(path)))
    writer.release()
    done = fbclip("calibrate", "good.avi", "--every", 2, "--max-frames", 10, "--false-alarm-rate", 0.1)
    assert "10 good images: scores" in done.stdout
    assert "/dev/video97 never ends" in fbclip("calibrate", "/dev/video97", code=2).stderr


def test_a_bundle_among_the_good_images_is_refused(tmp_path: Path) -> None:
    """Its pictures, of an earlier calibration and of its proof, are no good parts."""
    good = tmp_path / "good"
    good.mkdir()
    path = Path(shutil.copytree(EMBEDDED, tmp_path / "part.fbclip"))
    with pytest.raises(UsageError, match=r"part\.fbclip is a bundle, not good parts"):
        Target.choose("calibrate", [str(good), str(path)], None, None)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A bundle that eight of twenty-seven good parts taught, and all of them."""
    folder = tmp_path_factory.mktemp("taught")
    images = write_good(folder / "good", 27)
    return adapt(None, images[:8], out=folder / "line.fbclip").bundle.path, images


def test_a_promise_needs_parts_that_the_memory_has_not_seen(taught: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path, images = taught
    bundle = Path(shutil.copytree(path, tmp_path / "line.fbclip"))
    console = Console(record=True, width=300)
    made = calibrate_bundle(bundle, images, false_alarm_rate=0.05, console=console)
    assert (made.calibration.method, made.calibration.count, made.good.learned) == ("split", 19, 8)
    assert "8 in the memory, which a promise needs other parts for left out" in console.export_text()
    alone = calibrate_bundle(Path(shutil.copytree(path, tmp_path / "alone.fbclip")), images[8:], false_alarm_rate=0.05)
    assert alone.calibration == made.calibration
    predictor = Predictor(bundle)
    assert predictor.calibration == made.calibration
    assert predictor.threshold == made.calibration.threshold


def test_the_memorys_own_references_promise_less(taught: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path, images = taught
    bundle = Path(shutil.copytree(path, tmp_path / "line.fbclip"))
    console = Console(record=True, width=300)
    made = calibrate_bundle(bundle, images[:8], console=console).calibration
    about = Predictor(bundle).memory.about  # type: ignore[union-attr]
    left_out = sorted(1 / (1 + np.exp(about.score_line - each.score)) for each in about.references)
    assert (made.method, made.count, made.false_alarm_rate) == ("jackknife", 8, 0.112)
    assert made.scores == pytest.approx(left_out, abs=1e-6)
    assert made.threshold == pytest.approx(left_out[-1], abs=1e-6)
    assert "at most 22.4 % where one part more or less hardly changes the memory" in console.export_text()
    assert "leaving out one of its own references" in Predictor(bundle).explain_threshold()


def test_a_calibration_of_another_memory_is_not_used(taught: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path, images = taught
    bundle = Path(shutil.copytree(path, tmp_path / "line.fbclip"))
    made = calibrate_bundle(bundle, images[8:], false_alarm_rate=0.05).calibration
    off = Predictor(bundle, memory="off")
    assert (off.calibration, off.threshold) == (None, Bundle.load().manifest.threshold)
    assert "the calibration is of another memory" in off.explain_threshold()
    off.set_memory()
    assert off.threshold == made.threshold
    # learning more drops it, which is said
    console = Console(record=True, width=300)
    adapt(bundle, images[8:10], add=True, console=console)
    assert "the calibration was of other scores and is gone" in console.export_text()
    assert not (bundle / "calibration.json").exists()
    more = Predictor(bundle)
    assert (more.calibration, more.threshold) == (None, 0.5)


def test_calibrations_of_older_releases_are_of_no_memory(
    calibrated: tuple[Bundle, Calibration, list[Path]], tmp_path: Path
) -> None:
    bundle, calibration, _ = calibrated
    copy = Bundle.load(shutil.copytree(bundle.path, tmp_path / "old.fbclip"))
    calibration.save(copy)
    values = json.loads(copy.calibration.read_text())
    assert (values.pop("memory"), values.pop("method")) == (None, "split")
    copy.calibration.write_text(json.dumps(values))
    assert Calibration.load(copy) == calibration
