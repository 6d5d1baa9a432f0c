from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

import fbclip
from fbclip.assets import EMBEDDED
from fbclip.errors import BundleError, FBClipError, UsageError
from fbclip.learning import Seen, add_up, judge, learn, one_view
from fbclip.memory import ANY, FIXED, FLIPS, NEAREST, POSITIONS, WHITEN, About, Memory, Recipe, hashes
from fbclip.resample import resize, upsampling_matrix
from fbclip.runtime.adapt import VIEWS, _views
from fbclip.runtime.bench.runner import Runner, Spec
from fbclip.runtime.doctor.examine import check_bundle
from fbclip.runtime.host import Machine
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.roi import Roi
from fbclip.runtime.serving.access import Access
from fbclip.runtime.serving.app import Site
from fbclip.runtime.serving.feed import Feed
from fbclip.runtime.serving.schemas import StatusBody
from fbclip.runtime.serving.uploads import InTurn, UploadLimits
from helpers.disks import largest_file
from helpers.good_parts import write_good
from helpers.tiny import tiny_bundle

Pixels = NDArray[np.uint8]
LEARNED = 4  # good parts of the memory that most tests share


def with_a_hole(path: Path, to: Path, at: int = 40) -> Path:
    """A part with a defect."""
    surface = np.asarray(Image.open(path)).copy()
    surface[at : at + 14, at : at + 18] = 5
    Image.fromarray(surface).save(to)
    return to


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good/ with nine parts, and bad/ with three."""
    folder = tmp_path_factory.mktemp("parts")
    good = write_good(folder / "good", 9)
    (folder / "bad").mkdir()
    for number, path in enumerate(good[-3:]):
        with_a_hole(path, folder / "bad" / f"{number}.png", 20 + 15 * number)
    return folder


@pytest.fixture(scope="module")
def good(parts: Path) -> list[Path]:
    return sorted((parts / "good").iterdir())


@pytest.fixture(scope="module")
def adapted(parts: Path, good: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that the first good parts taught."""
    path = tmp_path_factory.mktemp("adapted") / "part.fbclip"
    done = fbclip.adapt(None, good[:LEARNED], out=path)
    assert done.memory and done.memory.name in repr(done)
    assert (done.bundle.path, done.odd, done.skipped) == (path, (), 0)
    return path


@pytest.fixture(scope="module")
def predictor(adapted: Path) -> Predictor:
    return Predictor(adapted)


@pytest.fixture
def copy(adapted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted, tmp_path / "part.fbclip"))


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def scores(predictor: Predictor, images: list[Path]) -> list[float]:
    return [prediction.score for prediction in predictor([str(image) for image in images])]


def test_good_parts_teach_the_embedded_model_the_line(
    fbclip: Run, parts: Path, good: list[Path], tmp_path: Path
) -> None:
    done = fbclip("adapt", parts / "good", "--shots", 4, "--orientation", "fixed")
    assert "4 of 9 images are taken, spread over them" in done.stdout
    assert re.search(r"memory [0-9a-f]{12} of 4 good parts \(whiten\).*4 learned in", done.stdout)
    assert len(re.findall(r"^  0\.\d{3}  ", done.stdout, re.MULTILINE)) == 4
    assert "copied the embedded bundle to fbclip-nano.fbclip" in done.stdout
    bundle = tmp_path / "fbclip-nano.fbclip"
    with Image.open(bundle / "memory.jpg") as picture:
        assert picture.width > picture.height > 200
    name = re.findall(r"memory ([0-9a-f]{12})", done.stdout)[0]

    shown = fbclip("infer", *good[1:4], parts / "bad", "--bundle", bundle, "--json", "-", "--csv", "a.csv")
    results = lines(shown.stdout)
    assert {result["memory"] for result in results} == {name}
    assert all(line.rstrip().endswith(f",{name}") for line in (tmp_path / "a.csv").read_text().splitlines()[1:])
    by_kind = [[r["score"] for r in results if kind in str(r["source"])] for kind in ("/good/", "/bad/")]
    assert max(by_kind[0]) < min(by_kind[1])  # type: ignore[type-var]
    assert f"memory {name} of 4 good parts" in shown.stderr

    off = lines(fbclip("infer", parts / "bad", "--bundle", bundle, "--memory", "off", "--json", "-").stdout)
    zero_shot = lines(fbclip("infer", parts / "bad", "--bundle", EMBEDDED, "--json", "-").stdout)
    assert [(r["score"], r["memory"]) for r in off] == [(r["score"], None) for r in zero_shot]
    other = lines(fbclip("infer", parts / "bad", "--memory", bundle / "memory.npz", "--json", "-").stdout)
    assert [r["score"] for r in other] == by_kind[1]


def test_to_forget_is_zero_shot_again(copy: Path, good: list[Path]) -> None:
    with Predictor() as untaught, Predictor(copy) as taught:
        assert scores(untaught, good[:2]) != scores(taught, good[:2])
        done = fbclip.adapt(copy, forget=True)
        assert done.memory is None and not list(copy.glob("memory.*"))
        with Predictor(copy) as forgot:
            for mine, its in zip(forgot(list(map(str, good[:2]))), untaught(list(map(str, good[:2]))), strict=True):
                assert (mine.score, mine.memory) == (its.score, None)
                assert np.array_equal(mine.anomaly_map, its.anomaly_map)
    with pytest.raises(UsageError, match="has no memory to forget"):
        fbclip.adapt(copy, forget=True)


RECIPES = [
    *(Recipe(WHITEN, orientation, 0, 0.2) for orientation in (FIXED, FLIPS, ANY)),
    Recipe(NEAREST, FLIPS, 0, 0.2),
    *(Recipe(POSITIONS, FIXED, reach, 0.2) for reach in (0, 1, 2)),
]


@pytest.fixture(scope="module")
def views(predictor: Predictor, good: list[Path]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Features (8, L, F) of three good parts in all views, and the logits of the first."""
    found = []
    for path in good[:3]:
        seen = [predictor.backend.describe(view) for view in _views(predictor.prepare(rgb(path)).batch, VIEWS[ANY])]
        found.append((np.concatenate([each.features for each in seen]), seen[0].logits[0]))
    return found


def rgb(path: Path) -> Pixels:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_graph_judges_as_numpy_does(
    predictor: Predictor, parts: Path, good: list[Path], views: list[tuple[Pixels, Pixels]], recipe: Recipe
) -> None:
    manifest = predictor.bundle.manifest
    shape = manifest.memory_shape
    assert shape
    seen = [
        Seen(
            path.name,
            "0" * 64,
            one_view(features[0], logits),
            add_up(recipe, shape, features[: VIEWS[recipe.orientation]]),
        )
        for path, (features, logits) in zip(good, views, strict=False)
    ]
    learned = learn(recipe, shape, manifest.image_size, seen)
    lines_of = (learned.map_line, learned.score_line, learned.references, "0" * 64, "fp32", "cpu", None)
    about = About(recipe.mode, recipe.orientation, recipe.reach, recipe.weight, *lines_of, hashes(learned.sums))
    memory = Memory(about, learned.sums, shape)
    rise = upsampling_matrix(manifest.image_size, manifest.grid)
    try:
        for path in (good[5], parts / "bad" / "0.png"):
            batch = predictor.prepare(rgb(path)).batch
            features, logits = predictor.backend.describe(batch)
            (judged,) = judge(recipe, shape, manifest.image_size, memory.tensors, features, logits)
            predictor.backend.set_memory(memory.tensors)
            score, maps = predictor.backend.run(batch)
            assert score[0] == pytest.approx(expit(judged.score - learned.score_line), abs=1e-4)
            patches = expit(judged.patches - learned.map_line).reshape(manifest.grid, manifest.grid)
            np.testing.assert_allclose(maps[0], rise @ patches @ rise.T, atol=1e-4)
            at_its_line = expit(judged.patches - judged.peak).reshape(manifest.grid, manifest.grid)
            assert (rise @ at_its_line @ rise.T).max() == pytest.approx(0.5, abs=0.01)
    finally:
        predictor.set_memory()


def expit(logit: object) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.asarray(logit, np.float64))))


def test_to_add_goes_on_without_the_old_images(copy: Path, good: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave mode, orientation, positions and weight out"):
        fbclip.adapt(copy, good[5:], add=True, mode="nearest")
    done = fbclip.adapt(copy, good[3:5], add=True)  # of which the first is known already
    assert done.memory
    names = [Path(each.name).name for each in done.memory.about.references]
    assert names == [path.name for path in good[:5]]
    whole = fbclip.adapt(None, good[:5], out=tmp_path / "whole.fbclip").memory
    assert whole
    assert whole.sums["count"] == done.memory.sums["count"]
    for name in ("total", "products"):
        np.testing.assert_allclose(done.memory.sums[name], whole.sums[name], rtol=1e-6, atol=1e-3)
    with pytest.raises(UsageError, match="learned from 1 good images or more; got 0"):
        fbclip.adapt(copy, good[:2], add=True)
    with pytest.raises(UsageError, match="has no memory to add to"):
        fbclip.adapt(EMBEDDED, good[:2], add=True, out=tmp_path / "new.fbclip")
    assert not (tmp_path / "new.fbclip").exists()


def test_a_copy_leaves_the_first_bundle_alone(copy: Path, good: list[Path], tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    done = fbclip.adapt(copy, good[:3], orientation="fixed", out=tmp_path / "other.fbclip")
    assert done.bundle.path == tmp_path / "other.fbclip"
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before
    assert (done.bundle.path / "memory.npz").read_bytes() != before["memory.npz"]


def test_one_image_is_enough_where_positions_count(good: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "board.fbclip"
    with pytest.raises(UsageError, match="learned from 2 good images or more; got 1"):
        fbclip.adapt(None, good[0], out=path)
    assert not path.exists()
    done = fbclip.adapt(None, good[0], positions=1, out=path)
    assert done.memory and done.memory.about.mode == "positions" and done.memory.explain().endswith("(positions ±1)")
    with Predictor(path) as predictor:
        frame = rgb(good[0])
        hole = frame.copy()
        hole[40:60, 40:60] = 5
        assert not predictor(frame).is_anomalous
        assert predictor(hole).score > predictor(frame).score


def test_the_defect_among_good_parts_is_named(parts: Path, good: list[Path], tmp_path: Path, fbclip: Run) -> None:
    done = fbclip("adapt", *good[:8], parts / "bad/0.png", "--orientation", "fixed")
    (told,) = [line for line in done.stdout.splitlines() if "stands out" in line]
    assert "bad/0.png" in told and "adapt again without it" in told


def test_images_that_are_left_out(good: list[Path], tmp_path: Path, fbclip: Run) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in good[:2]:
        shutil.copy(path, mixed)
    shutil.copy(good[0], mixed / "again.png")
    (mixed / "torn.png").write_bytes(good[0].read_bytes()[:60])
    Image.new("RGB", (96, 96)).save(mixed / "black.png")
    done = fbclip("adapt", "mixed", "--orientation", "fixed", code=2)
    assert "2 learned in" in done.stdout and "1 known already, 2 unusable left out" in done.stdout
    assert "left out: mixed/black.png" in done.stdout and "skipped: " in done.stdout
    assert "4 good parts or more know better" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^fbclip: there are no images of good parts: fbclip adapt GOOD\.\.\.$"),
        (["--bundle", "part.fbclip"], "beside the bundle there are no images of good parts"),
        (["nowhere"], "nowhere"),
        (["good", "--shots", "65"], "--shots: a number of good parts is 1 to 64; got 65"),
        (["good", "--mode", "best"], "--mode: a mode is auto, whiten, nearest, positions; got 'best'"),
        (["good", "--orientation", "up"], "--orientation: an orientation is fixed, flips, any"),
        (["good", "--positions", "3"], "--positions: "),
        (["good", "--positions", "1", "--orientation", "any"], "--positions: .* the orientation is fixed"),
        (["good", "--positions", "1", "--mode", "nearest"], "--positions: "),
        (["good", "--weight", "nan"], "--weight: a weight is 0 to 1000"),
        (["good", "--forget"], "--forget: to forget takes no good parts"),
        (["good", "--out", "part"], r"--out: a bundle is a folder NAME\.fbclip"),
        (["good", "part.fbclip"], "part.fbclip is a bundle, not good parts"),
        (["--forget"], "has no memory to forget"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(
    fbclip: Run, tmp_path: Path, good: list[Path], arguments: list[str], message: str
) -> None:
    (tmp_path / "good").mkdir()
    for path in good[:2]:
        shutil.copy(path, tmp_path / "good")
    shutil.copytree(EMBEDDED, tmp_path / "part.fbclip")
    done = fbclip("adapt", *arguments, code=2)
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr.strip()), done.stderr
    assert "fbclip-nano.fbclip.new" not in done.stderr and not (tmp_path / "fbclip-nano.fbclip").exists()


def test_the_bundle_to_forget_in_may_come_first(fbclip: Run, copy: Path) -> None:
    assert "forgotten" in fbclip("adapt", copy, "--forget").stdout


def test_an_older_bundle_says_how_it_becomes_adaptable(good: list[Path], tmp_path: Path, fbclip: Run) -> None:
    old = tiny_bundle(tmp_path)
    done = fbclip("adapt", *good[:2], "--bundle", old, code=2)
    assert "has no inputs for a memory: export its checkpoint again" in done.stderr
    fbclip("infer", good[0], "--bundle", old)
    shutil.copy(good[0], old / "memory.npz")
    assert "has no inputs for a memory" in fbclip("infer", good[0], "--bundle", old, code=2).stderr


def test_a_memory_of_another_model_is_refused(copy: Path, good: list[Path], fbclip: Run) -> None:
    learned = Predictor(copy).memory
    assert learned
    about = replace(learned.about, model_sha256="0" * 64)
    replace(learned, about=about).save(copy / "memory.npz")
    done = fbclip("infer", good[0], "--bundle", copy, code=2)
    assert "is of another model than" in done.stderr and len(done.stderr.splitlines()) == 1
    (check,) = [check for check in check_bundle(Machine(), copy) if check.name == "good parts"]
    assert check.status == "broken" and "is of another model" in check.found
    assert check.cure.startswith(f"fbclip adapt GOOD... --bundle {copy}")
    fbclip("infer", good[0], "--bundle", copy, "--memory", "off")
    (copy / "memory.npz").write_bytes(b"no memory")
    assert "run fbclip adapt again" in fbclip("infer", good[0], "--bundle", copy, code=2).stderr
    fbclip("adapt", "--forget", "--bundle", copy)  # a damaged one can be removed


def test_the_region_is_the_same_or_refused(adapted: Path, good: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was learned for whole frames"):
        Predictor(adapted, roi=(0, 0, 48, 48))
    path = tmp_path / "corner.fbclip"
    fbclip.adapt(None, good[:3], orientation="fixed", roi=(0, 0, 48, 48), out=path)
    with pytest.raises(UsageError, match="was learned for the region"):
        Predictor(path)
    with Predictor(path, roi=Roi.parse("0,0,48,48")) as predictor:
        assert predictor(str(good[0])).memory


def test_a_calibration_of_other_scores_goes(copy: Path, good: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("calibration.json", "calibration.png"):
        (copy / name).write_text("of other scores")
    fbclip.adapt(copy, good[:3], orientation="fixed", console=Console(width=200))
    assert "the calibration was of other scores and is gone" in capsys.readouterr().out
    assert not list(copy.glob("calibration.*"))


def test_products_are_exchanged_in_milliseconds(predictor: Predictor, good: list[Path], tmp_path: Path) -> None:
    one = predictor.memory
    two = fbclip.adapt(None, good[5:7], orientation="fixed", out=tmp_path / "two.fbclip").memory
    assert one and two
    images = good[7:]
    of_one = scores(predictor, images)
    predictor.set_memory(two)
    of_two = scores(predictor, images)
    start = time.perf_counter()
    predictor.set_memory(one)
    print(f"exchanged in {(time.perf_counter() - start) * 1e3:.1f} ms")
    assert scores(predictor, images) == of_one != of_two
    predictor.set_memory(None)
    assert predictor(str(good[0])).memory is None
    predictor.set_memory(tmp_path / "two.fbclip" / "memory.npz")
    assert scores(predictor, images) == of_two
    with pytest.raises(BundleError):
        predictor.set_memory(tmp_path / "nothing.npz")
    assert scores(predictor, images) == of_two
    predictor.set_memory()
    assert predictor.memory and predictor.memory.name == one.name


def test_the_trial_says_what_it_tried(fbclip: Run, good: list[Path]) -> None:
    done = fbclip("adapt", *good[:2], "--mode", "auto")
    tried = re.findall(r"tried (.*): tells drawn defects from good patches with an AUROC of (\d\.\d{3})", done.stdout)
    assert len(tried) == 3
    best = max(tried, key=lambda each: float(each[1]))[0]
    assert re.search(rf"memory [0-9a-f]{{12}} of .*: {re.escape(best)}; 2 learned", done.stdout)


def test_a_full_disk_leaves_what_was_there(copy: Path, good: list[Path], tmp_path: Path) -> None:
    (copy / "calibration.json").write_text("kept")
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    new = tmp_path / "new.fbclip"

    def in_place() -> None:
        fbclip.adapt(copy, good[:2], orientation="fixed")

    def in_a_copy() -> None:
        fbclip.adapt(copy, good[:2], orientation="fixed", out=new)

    work: Callable[[], None]
    for work in (in_place, in_a_copy):
        with largest_file(100_000), pytest.raises(FBClipError):
            work()
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


def test_frames_teach_as_files_do(good: list[Path], tmp_path: Path) -> None:
    frames = [resize(rgb(path), 192) for path in good[:2]]
    with pytest.raises(UsageError, match="frames are uint8"):
        fbclip.adapt(None, [frames[0].astype(np.float32)], out=tmp_path / "a.fbclip")
    done = fbclip.adapt(None, frames, orientation="fixed", out=tmp_path / "a.fbclip")
    assert done.memory and [each.name for each in done.memory.about.references] == ["frame 1", "frame 2"]


def test_every_report_knows_the_memory(predictor: Predictor, adapted: Path, good: list[Path], tmp_path: Path) -> None:
    memory = predictor.memory
    assert memory
    site = Site(predictor, Access("127.0.0.1", 8000, None), Feed(), None, UploadLimits())
    status = StatusBody.model_validate(site.status())
    assert status.model.memory and status.model.memory.model_dump() == {
        "name": memory.name,
        "good_parts": LEARNED,
        "mode": "whiten",
    }
    for path, told in ((adapted, memory.name), (EMBEDDED, "adaptable"), (tiny_bundle(tmp_path), "not adaptable")):
        (check,) = [check for check in check_bundle(Machine(), path) if check.name == "good parts"]
        assert told in check.found
        assert check.status == ("info" if "not" in told else "ok")
    np.save(tmp_path / "frames.npy", predictor.prepare(rgb(good[0])).batch)
    measured = []
    for file in (str(adapted / "memory.npz"), None):
        spec = Spec("cpu", "fp32", 1, str(EMBEDDED), str(tmp_path / "frames.npy"), str(tmp_path / "a.npz"), file)
        measured.append(float(Runner(asdict(spec)).outputs[0][0][0]))
    with Predictor() as untaught:
        assert measured == [predictor(str(good[0])).score, untaught(str(good[0])).score]


def test_what_takes_turns_passes_a_memory_on(predictor: Predictor, good: list[Path]) -> None:
    batch = predictor.prepare(rgb(good[0])).batch
    turns = InTurn(predictor.backend)
    with_memory = turns.run(batch)[0]
    turns.set_memory(None)
    without = turns.run(batch)[0]
    predictor.set_memory()
    assert with_memory != without
    assert turns.run(batch)[0] == with_memory


def test_a_memory_kept_in_python_is_of_this_model_or_refused(predictor: Predictor) -> None:
    memory = predictor.memory
    assert memory
    other = replace(memory, about=replace(memory.about, model_sha256="1" * 64))
    with pytest.raises(BundleError, match="of another model"):
        predictor.set_memory(other)
    with pytest.raises(UsageError, match="a memory is a Memory, a file"):
        predictor.set_memory(np.zeros(3))  # type: ignore[arg-type]
    assert predictor.memory is memory


def test_what_is_added_was_seen_as_the_memory_was(copy: Path, good: list[Path]) -> None:
    before = (copy / "memory.npz").read_bytes()
    with pytest.raises(UsageError, match="learned for whole frames"):
        fbclip.adapt(copy, good[LEARNED : LEARNED + 1], add=True, roi=(0, 0, 60, 60))
    assert (copy / "memory.npz").read_bytes() == before


def test_a_swap_that_fails_keeps_the_line_of_what_scores(copy: Path, good: list[Path]) -> None:
    predictor = Predictor(copy, memory=None)
    predictor.set_threshold(0.6)
    predictor.close()
    with pytest.raises(FBClipError, match="closed"):
        predictor.set_memory("auto")
    assert (predictor.memory, predictor.threshold, predictor.map_threshold) == (None, 0.6, None)


def test_what_could_not_be_read_again_is_not_written(copy: Path, good: list[Path]) -> None:
    before = (copy / "memory.npz").read_bytes()
    with pytest.raises(UsageError, match="within 1000"):
        fbclip.adapt(copy, good[:2], weight=1000)
    assert (copy / "memory.npz").read_bytes() == before


@pytest.mark.parametrize("wrong", [{"weight": "x"}, {"weight": True}, {"positions": True}])
def test_a_number_of_another_type_is_refused(good: list[Path], wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="got"):
        fbclip.adapt(None, good[:2], **wrong)  # type: ignore[arg-type]
