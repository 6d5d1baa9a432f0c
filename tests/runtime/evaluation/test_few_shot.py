"""`fbclip eval --shots`: what is drawn, what it teaches, and what the tables say of several draws."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image
from rich.console import Console

import fbclip as package
from fbclip.assets import EMBEDDED
from fbclip.data.dataset import Dataset
from fbclip.data.layouts import open_dataset
from fbclip.errors import UsageError
from fbclip.runtime.adapt import Choice
from fbclip.runtime.evaluation.evaluate import VALUES, Evaluation, Spread, to_evaluate
from fbclip.runtime.evaluation.few_shot import FewShot, draw
from fbclip.runtime.predictor import Predictor
from helpers.own_data import make_own
from helpers.tiny import tiny_bundle

CLASSES = {"bolt": (3, 3), "nut": (2, 3)}
GOOD = 6


def make_line(root: Path, good: int = GOOD) -> Dataset:
    """`make_own` with good training images; the first of the bolts is in the test split, too."""
    make_own(root, CLASSES)
    rng = np.random.default_rng(1)
    for name in CLASSES:
        folder = root / name / "train/good"
        folder.mkdir(parents=True)
        for number in range(good):
            Image.fromarray(rng.integers(60, 150, (40, 40), np.uint8)).save(folder / f"{number:03}.png")
    shutil.copy(root / "bolt/train/good/000.png", root / "bolt/test/good/copy.png")
    return open_dataset(root, "mvtec")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_line(tmp_path_factory.mktemp("lines") / "line")


@pytest.fixture(scope="module")
def measured(line: Dataset) -> Evaluation:
    return package.evaluate(None, line.root, shots=3, seeds=(0, 1, 2))


def quiet() -> Console:
    return Console(quiet=True)


def test_references_are_good_training_images_and_those_of_their_seed(line: Dataset) -> None:
    of_seed = [draw(line, "nut", 3, seed, 32, quiet()).paths for seed in (0, 0, 1)]
    assert of_seed[0] == of_seed[1] != of_seed[2]
    assert {path.parent for path in of_seed[0] + of_seed[2]} == {line.root / "nut/train/good"}
    assert draw(replace(line, items=line.items[::-1]), "nut", 3, 0, 32, quiet()).paths == of_seed[0]
    assert draw(line, "nut", 4, 0, 32, quiet()).paths[:3] == of_seed[0]
    everyone = draw(line, "nut", GOOD, 0, 32, quiet()).paths
    assert sorted(everyone) == sorted((line.root / "nut/train/good").iterdir())


def test_what_cannot_be_a_reference_is_passed_over(tmp_path: Path) -> None:
    data = make_line(tmp_path / "line")
    first, second, third, *_ = draw(data, "nut", GOOD, 0, 32, quiet()).paths
    first.write_bytes(b"no image")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(second)
    shutil.copy(third, tmp_path / "line/nut/train/good/copy.png")
    data = open_dataset(tmp_path / "line", "mvtec")
    found = draw(data, "nut", GOOD - 2, 0, 32, quiet())
    assert not {first, second} & {*found.paths}
    assert len(found.digests) == GOOD - 2  # of the two that are alike only one
    with pytest.raises(UsageError, match=f"5 references .* nut of .* has {GOOD - 2}"):
        draw(data, "nut", GOOD - 1, 0, 32, quiet())


def test_a_class_is_judged_by_the_memory_of_its_references(line: Dataset, measured: Evaluation) -> None:
    (result,) = measured.results
    for seed, found in zip((0, 1, 2), result.draws, strict=True):
        assert found.seed == seed
        for judged in found.classes:
            assert judged.references == draw(line, judged.name, 3, seed, 192, quiet()).paths
            assert judged.threshold == 0.5
    nut = result.draws[1].classes[1]
    adapted = package.adapt(None, nut.references, out=line.root.parent / "nut.fbclip")
    with Predictor(adapted.bundle, memory=None) as zero_shot, Predictor(adapted.bundle) as taught:
        expected = [taught(scored.item.image).score for scored in nut.scores]
        assert [scored.score for scored in nut.scores] == pytest.approx(expected, abs=1e-5)
        assert abs(zero_shot(nut.scores[0].item.image).score - expected[0]) > 1e-3


def test_a_reference_that_is_in_the_test_too_is_left_out_of_it(line: Dataset, measured: Evaluation) -> None:
    copied = line.root / "bolt/test/good/copy.png"
    drawn_as_reference = []
    for found in measured.results[0].draws:
        bolt, nut = found.classes
        drawn_as_reference.append(line.root / "bolt/train/good/000.png" in bolt.references)
        assert ([item.image for item in bolt.left_out] == [copied]) == drawn_as_reference[-1]
        assert (copied not in [scored.item.image for scored in bolt.scores]) == drawn_as_reference[-1]
        assert nut.left_out == ()
    assert {*drawn_as_reference} == {True, False}


def test_figures_are_mean_and_deviation_over_the_draws(measured: Evaluation) -> None:
    (result,) = measured.results
    for place in (0, 1):
        of_seed = [found.classes[place].values["pixel_auroc"] for found in result.draws]
        assert len({*of_seed}) > 1
        expected = Spread(pytest.approx(np.mean(of_seed)), pytest.approx(np.std(of_seed, ddof=1)))
        assert result.spread(place)["pixel_auroc"] == expected
    means = [np.mean([c.values["pixel_auroc"] for c in found.classes]) for found in result.draws]
    assert result.spread()["pixel_auroc"].deviation == pytest.approx(np.std(means, ddof=1))
    assert result.mean["pixel_auroc"] == pytest.approx(np.mean(means))


def test_tables_files_and_report_as_installed(fbclip: Run, tmp_path: Path) -> None:
    make_line(tmp_path / "line")
    shutil.copytree(EMBEDDED, tmp_path / "part.fbclip")
    before = contents(tmp_path / "part.fbclip")
    done = fbclip("eval", "line", "--bundle", "part.fbclip", "--shots", 3, "--seed", "0,1,2", "--positions", 1)
    assert contents(tmp_path / "part.fbclip") == before
    told = "3 good training images of each class teach a memory; mean ± standard deviation of 3 draws"
    assert f"{told}; threshold 0.5 is where they end" in done.stdout
    assert re.search(r"copy\.png shows the same as a reference: it is left out of the test", done.stdout)
    assert re.search(r"nut +5 +3 +\d+\.\d", done.stdout)
    assert len(re.findall(r"±\d+\.\d", done.stdout)) == 3 * len(VALUES)
    out = tmp_path / "runs/eval/exp"
    results = json.loads((out / "results.json").read_text())
    assert results["threshold"] == 0.5
    expected = {"shots": 3, "seeds": [0, 1, 2], "mode": "positions", "orientation": "fixed", "reach": 1, "weight": 0.2}
    assert results["model"]["few_shot"] == expected
    nut = results["results"][0]["classes"]["nut"]
    of_seed = [nut["seeds"][seed]["pixel_auroc"] for seed in "012"]
    assert nut["pixel_auroc"] == pytest.approx(np.mean(of_seed))
    assert nut["deviation"]["pixel_auroc"] == pytest.approx(np.std(of_seed, ddof=1))
    assert all(len(nut["seeds"][seed]["references"]) == 3 for seed in "012")
    assert all("of 3 good parts (positions ±1)" in nut["seeds"][seed]["memory"] for seed in "012")
    with (out / "results.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["class"] == "nut"]
    assert [row["seed"] for row in table] == ["0", "1", "2", "mean", "deviation"]
    wanted = [*of_seed, nut["pixel_auroc"], nut["deviation"]["pixel_auroc"]]
    assert [float(row["pixel_auroc"]) for row in table] == pytest.approx(wanted)
    with (out / "scores.csv").open() as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"0", "1", "2"}
    cell = f"{100 * nut['pixel_auroc']:.1f} ±{100 * nut['deviation']['pixel_auroc']:.1f}"
    for name in ("results.md", "report.html"):
        assert cell in (out / name).read_text()
        assert told in (out / name).read_text()
    assert cell.replace("±", r"$\pm$ ") in (out / "results.tex").read_text()
    assert "charts and pictures are of seed 0" in (out / "report.html").read_text()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_bundle_is_measured_with_its_own_memory_and_says_so(fbclip: Run, line: Dataset, tmp_path: Path) -> None:
    good = line.root / "nut/train/good"
    memory = package.adapt(None, good, out=tmp_path / "nut.fbclip").memory
    assert memory
    data = shutil.copytree(line.root, tmp_path / "line")
    done = fbclip("eval", data, "--bundle", "nut.fbclip", "--classes", "nut")
    told = f"memory {memory.name} of {GOOD} good parts"
    assert done.stdout.count(told) == 2  # where the threshold comes from, and over the table
    results = json.loads((tmp_path / "runs/eval/exp/results.json").read_text())
    assert results["model"]["memory"].startswith(told)
    assert results["threshold"] == 0.5
    assert told in (tmp_path / "runs/eval/exp/report.html").read_text()
    drawn_anew = package.evaluate(tmp_path / "nut.fbclip", data, shots=3, classes=["nut"])
    scores = [
        scored.score for scored in package.evaluate(None, data, shots=3, classes=["nut"]).results[0].classes[0].scores
    ]
    assert [scored.score for scored in drawn_anew.results[0].classes[0].scores] == scores  # its own doesn't count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 1], "--seed goes with --shots; got none"),
        (["--positions", 1, "--weight", 1], "--positions, --weight go with --shots; got none"),
        (["--shots", GOOD + 1], "line has 6: take fewer, or evaluate other classes"),
        (["--shots", 1], "references are 2 to 64; one is enough only where positions count; got 1"),
        (["--shots", 65, "--positions", 0], "references are 1 to 64; got 65"),
        (["--shots", 2, "--seed", "0,0"], "seeds are different whole numbers from 0"),
        (["--shots", 2, "--seed", "-1"], "seeds are whole numbers from 0, like 0 or 0,1,2,3,4; got '-1'"),
        (["--shots", 2, "--mode", "magic"], "a mode is auto, whiten, nearest, positions; got 'magic'"),
        (["--shots", 2, "--checkpoint", "nano"], "--shots teaches a bundle; got a checkpoint"),
        (["--shots", 2, "--bundle", "tiny.fbclip"], "tiny.fbclip has no inputs for a memory"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    fbclip: Run, tmp_path: Path, options: list[object], message: str
) -> None:
    make_line(tmp_path / "line")
    tiny_bundle(tmp_path)
    error = fbclip("eval", "line", *options, code=2).stderr
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_single_draw_has_no_deviation(line: Dataset) -> None:
    with pytest.raises(UsageError, match="go with shots"):
        package.evaluate(None, line.root, seeds=(1,))
    found = package.evaluate(None, line.root, shots=2, classes=["nut"], threshold=0.9).results[0]
    assert found.spread()["image_auroc"].deviation is None
    assert found.classes[0].threshold == 0.9
    assert (
        to_evaluate(line, ("nut",), FewShot(2, (0,), Choice())).select("test").items
        == to_evaluate(line, ("nut",)).items
    )
