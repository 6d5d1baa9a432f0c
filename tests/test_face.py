"""What `import fbclip` gives: its names, the ways to call a Predictor, what a Prediction can do, page and examples."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import fbclip
from fbclip.assets import SAMPLES
from fbclip.bundle import Bundle
from fbclip.errors import DeviceError, ImageError, UsageError
from fbclip.images import read_image
from fbclip.runtime.live.sources import CaptureOptions, open_source
from fbclip.runtime.regions import Rules, find_evidence
from helpers.good_parts import write_good
from helpers.own_data import make_own
from helpers.predicted import predicted
from helpers.tiny import tiny_bundle
from helpers.video import write_video
from helpers.waiting import eventually

ROOT = Path(__file__).parent.parent
IMAGES = sorted(SAMPLES.iterdir())
FACE = {
    *("Predictor", "Prediction", "Region", "Roi", "Tiles", "Align", "Bundle", "open_source"),
    *("adapt", "calibrate", "evaluate", "export", "load_checkpoint"),
    *("FBClipError", "UsageError", "BundleError", "CheckpointError", "DeviceError", "ImageError", "GraphError"),
    *("ParityError", "__version__"),
}


def run_python(program: str, *arguments: object, **environment: str) -> str:
    """Standard output of a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- names ----------------------------------------------------------------------------------------------------------


def test_dir_is_the_face_and_all_of_it_is_there() -> None:
    assert set(dir(fbclip)) == FACE
    for name in FACE - {"__version__"}:
        assert callable(getattr(fbclip, name)), name
        assert inspect.getdoc(getattr(fbclip, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'adaptation'"):
        fbclip.adaptation  # noqa: B018


def test_import_is_instant_and_star_brings_everything() -> None:
    told = run_python(
        "import sys, fbclip; before = {'numpy', 'cv2', 'onnxruntime', 'torch', 'typing'} & set(sys.modules)\n"
        "from fbclip import *; print(before, sorted(set(dir(fbclip)) - set(globals())), 'torch' in sys.modules)"
    )
    assert told.split() == ["set()", "[]", "False"]


def test_help_begins_with_an_example() -> None:
    told = run_python("import fbclip; help(fbclip)")
    assert "with Predictor() as predict:" in told[:1000]
    assert "class Predictor" in told and "calibrate(" in told


@pytest.mark.parametrize("first", ["import fbclip.export.engine", "from fbclip import export", "import fbclip"])
def test_export_is_the_room_and_the_function(first: str) -> None:
    """Whoever imported a module of the room before."""
    program = (
        f"{first}\nimport inspect, fbclip, fbclip.export.engine as engine\n"
        "print(fbclip.export.engine is engine, *inspect.signature(fbclip.export).parameters)\n"
        "try: fbclip.export('nowhere.pth')\nexcept fbclip.UsageError as error: print(error)"
    )
    signature, message = run_python(program).splitlines()
    assert signature.startswith("True checkpoint out fp16")
    assert "no checkpoint at nowhere.pth" in message


@pytest.mark.parametrize("call", ["export(out='x.fbclip')", "load_checkpoint()"])
def test_without_torch_one_line_says_so(call: str) -> None:
    program = (
        "import importlib.util as util\nfound = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
        f"import fbclip\ntry: fbclip.{call}\nexcept fbclip.UsageError as error: print(error)"
    )
    (line,) = run_python(program).splitlines()
    assert line.startswith("checkpoints need torch,") and "pip install 'fbclip[train]'" in line


def test_load_checkpoint_is_the_model() -> None:
    assert type(fbclip.load_checkpoint()).__name__ == "FBCLIP"


# --- Predictor ------------------------------------------------------------------------------------------------------


def scores(predictions: list[fbclip.Prediction]) -> list[float]:
    return [prediction.score for prediction in predictions]


def test_several_images_are_a_list_in_their_order(tmp_path: Path) -> None:
    predict = fbclip.Predictor(tiny_bundle(tmp_path))
    expected = [predict(path).score for path in IMAGES]
    frames = [np.asarray(Image.open(path).convert("RGB").resize((80, 60))) for path in IMAGES]
    resized = [predict(frame).score for frame in frames]
    for batch in (1, 3, 9):
        some = fbclip.Predictor(tiny_bundle(tmp_path / str(batch)), batch=batch)
        found = some(IMAGES)
        assert scores(found) == pytest.approx(expected, abs=1e-6)
        assert [prediction.name for prediction in found] == list(map(str, IMAGES))
        assert scores(some(tuple(map(str, IMAGES)))) == pytest.approx(expected, abs=1e-6)
        assert scores(some(SAMPLES)) == pytest.approx(expected, abs=1e-6)
        assert scores(some(f"{SAMPLES}/*.jpg")) == pytest.approx(expected, abs=1e-6)
        assert scores(some([Image.open(path) for path in IMAGES])) == pytest.approx(expected, abs=1e-6)
        assert scores(some(np.stack(frames))) == pytest.approx(resized, abs=1e-6)
        assert scores(some(np.stack(frames)[..., ::-1], channel_order="bgr")) == pytest.approx(resized, abs=1e-6)
        assert some([]) == [] and len(some(IMAGES[:1])) == 1
    assert predict(np.stack(frames))[0].name == ""


def test_times_of_a_batch_are_each_images_share(tmp_path: Path) -> None:
    for prediction in fbclip.Predictor(tiny_bundle(tmp_path), batch=3)(IMAGES):
        assert set(prediction.timings_ms) == {"read", "preprocess", "model", "postprocess"}
        assert all(value >= 0 for value in prediction.timings_ms.values())


def test_an_image_of_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    predict = fbclip.Predictor(tiny_bundle(tmp_path))
    with pytest.raises(ImageError, match=r"text\.jpg is no image"):
        predict([IMAGES[0], tmp_path / "text.jpg"])
    with pytest.raises(UsageError, match="matches none"):
        predict(f"{tmp_path}/*.tiff")
    (tmp_path / "in").mkdir()
    shutil.copy(IMAGES[0], tmp_path / "in")
    (tmp_path / "in" / "part.heic").touch()
    with pytest.warns(UserWarning, match=r"left out: \.heic"):
        assert len(predict(tmp_path / "in")) == 1


@pytest.mark.parametrize(
    ("image", "cure"),
    [
        (np.zeros((9, 9, 3), np.float32), r"got float32 .*255 \* image"),
        (np.zeros((9, 9, 4), np.uint8), r"image\[\.\.\., :3\]"),
        (np.zeros((3, 9, 9), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((2, 9, 9, 3), np.float32), "got float32"),
        (iter(()), "several are a list"),
    ],
)
def test_what_is_no_frame_is_refused_with_the_cure(tmp_path: Path, image: Any, cure: str) -> None:
    with pytest.raises(ImageError, match=cure):
        fbclip.Predictor(tiny_bundle(tmp_path))(image)


def test_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="positional"):
        fbclip.Predictor(None, "cpu")  # type: ignore[misc]
    for batch in (0, True, 1.5):
        with pytest.raises(UsageError, match="a batch is a number of images, 1 or more"):
            fbclip.Predictor(batch=batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "roi", [(300, 100, 520, 400), [300, 100, 520, 400], np.array([300, 100, 520, 400]), "300,100,520,400"]
)
def test_a_region_in_every_form(tmp_path: Path, roi: Any) -> None:
    predict = fbclip.Predictor(tiny_bundle(tmp_path), roi=roi)
    assert predict.roi == fbclip.Roi.parse("300,100,520,400") == fbclip.Roi.parse(predict.roi)


@pytest.mark.parametrize("roi", [(1, 2, 3), (0, 0, 1.5, 2), (5, 0, 5, 9), (-1, 0, 5, 9), (0, 0, True, 2), 7, "1,2"])
def test_what_is_no_region(roi: Any) -> None:
    with pytest.raises(UsageError, match="a region is") as refused:
        fbclip.Roi.parse(roi)
    assert refused.value.option == "roi" and "--" not in str(refused.value)


def test_repr_says_what_it_is(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path)
    told = repr(fbclip.Predictor(path, threshold=0.25))
    assert told == f"Predictor('{path}', device='cpu', precision='fp32', threshold=0.25)"


def test_with_closes_it(tmp_path: Path) -> None:
    with fbclip.Predictor(tiny_bundle(tmp_path)) as predict:
        assert predict(IMAGES[0]).score >= 0
    predict.close()
    for call in (lambda: predict(IMAGES[0]), lambda: predict(IMAGES), lambda: next(predict.stream(SAMPLES))):
        with pytest.raises(DeviceError, match="is closed: make a new one"):
            call()


def test_the_threshold_is_set_by_a_method(tmp_path: Path) -> None:
    predict = fbclip.Predictor(tiny_bundle(tmp_path), threshold=1.0)
    assert predict(IMAGES[0]).label == "good"
    predict.set_threshold(0)
    assert predict.threshold == 0
    assert predict(IMAGES[0]).label == "defect"
    with pytest.raises(UsageError, match="between 0 and 1"):
        predict.set_threshold(1.5)
    assert predict.threshold == 0


def test_a_stream_votes_and_ends(tmp_path: Path) -> None:
    write_video(tmp_path / "belt.avi", ["good"] * 4)
    predict = fbclip.Predictor(tiny_bundle(tmp_path), threshold=0.0)
    records = list(predict.stream(tmp_path / "belt.avi", vote="2/3"))
    assert [record.alarm for record in records] == [False, True, True, True]
    assert [record.alarm_began for record in records] == [False, True, False, False]
    assert list(records[0].timings_ms) == ["read", "wait", "preprocess", "model", "postprocess"]


def test_a_stream_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "line"
    folder.mkdir()
    for number, path in enumerate(IMAGES):
        shutil.copy(path, folder / f"{number}.jpg")
    (folder / "9.jpg").write_text("no image")
    predict = fbclip.Predictor(tiny_bundle(tmp_path), threshold=0.0)
    with caplog.at_level(logging.WARNING, "fbclip"):
        records = list(predict.stream(folder))
    assert scores([record.prediction for record in records]) == [predict(path).score for path in IMAGES]
    assert [record.prediction.name for record in records] == [str(folder / f"{number}.jpg") for number in range(4)]
    assert "9.jpg is no image" in caplog.text
    with pytest.raises(UsageError, match="a vote is over time"):
        predict.stream(folder, vote="2/3")


def test_a_stream_closes_its_source_where_the_loop_is_left(tmp_path: Path) -> None:
    source = open_source(str(SAMPLES), CaptureOptions(every=2))
    for _result in fbclip.Predictor(tiny_bundle(tmp_path)).stream(source):
        break
    del _result
    assert list(source) == []


def test_a_stream_leaves_out_what_does_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "line"
    folder.mkdir()
    Image.new("RGB", (9, 9), "teal").save(folder / "0.png")
    shutil.copy(IMAGES[0], folder / "1.jpg")
    predict = fbclip.Predictor(tiny_bundle(tmp_path), roi=(0, 0, 40, 40))
    (result,) = predict.stream(folder)
    assert result.frame.name.endswith("1.jpg")
    assert "0.png: the region 0,0,40,40 reaches beyond the frame" in caplog.text


def test_a_wrong_stream_is_told_at_once(tmp_path: Path) -> None:
    predict = fbclip.Predictor(tiny_bundle(tmp_path))
    with pytest.raises(UsageError, match="there is no nowhere"):
        predict.stream("nowhere")
    with pytest.raises(UsageError, match="K/N"):
        predict.stream(SAMPLES, vote="most")


# --- Prediction -----------------------------------------------------------------------------------------------------


def made(line: float = 0.5, min_area: int = 0, score: float = 0.9) -> fbclip.Prediction:
    """Two regions, one with a hole in which a small one lies."""
    anomaly_map = np.zeros((40, 60), np.float32)
    anomaly_map[5:20, 5:20] = 0.7
    anomaly_map[8:17, 8:17] = 0.1
    anomaly_map[12, 12] = 0.95
    anomaly_map[30:33, 40:50] = 0.8
    regions, _ = find_evidence(anomaly_map, None, True, line, Rules(min_area))
    image = np.full((40, 60, 3), 90, np.uint8)
    return predicted(score, anomaly_map, image, regions=regions, map_threshold=line, name="part.png")


def test_it_is_made_by_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        fbclip.Prediction(0.5, 0.5)  # type: ignore[call-arg,misc]


def test_boxes_and_label() -> None:
    prediction = made()
    assert prediction.label == prediction.verdict == "defect"
    assert prediction.boxes.tolist() == [[12, 12, 13, 13], [40, 30, 50, 33], [5, 5, 20, 20]]
    nothing = predicted(0.1, np.zeros((4, 4), np.float32))
    assert nothing.label == "good" and nothing.boxes.shape == (0, 4) and not nothing.mask.any()


def test_the_mask_is_of_the_regions() -> None:
    assert (made().mask == (made().anomaly_map >= 0.5)).all()
    large = made(min_area=2)
    assert large.mask.sum() == sum(region.area for region in large.regions)
    assert not large.mask[12, 12], "what is too small to count lies in another region's hole"
    (weak,) = made(line=0.99).regions
    assert weak.weak and not made(line=0.99).mask.any()


def test_the_mask_of_a_real_one(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    for roi in (None, (20, 30, 300, 200)):
        for prediction in fbclip.Predictor(bundle, threshold=0.3, roi=roi)(IMAGES):
            kept = [region for region in prediction.regions if not region.weak]
            assert prediction.mask.sum() == sum(region.area for region in kept)


@pytest.mark.parametrize("name", ["overlay.png", "overlay.JPG", "overlay.webp", "overlay.bmp"])
def test_it_is_saved_by_its_ending(tmp_path: Path, name: str) -> None:
    prediction = made()
    prediction.save(tmp_path / name)
    kept = read_image(tmp_path / name).astype(int)
    assert np.abs(kept - prediction.overlay()).mean() < (1e-9 if name.endswith(("png", "bmp")) else 12)
    for wrong in ("overlay", "overlay.txt", "overlay.pdff"):
        with pytest.raises(UsageError, match=r"ends in \.jpg"):
            prediction.save(tmp_path / wrong)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file"):
        prediction.save(tmp_path / "file" / name)


def test_a_notebook_shows_it() -> None:
    prediction = made()
    decoded = cv2.imdecode(np.frombuffer(prediction._repr_png_(), np.uint8), cv2.IMREAD_COLOR)
    assert (decoded[..., ::-1] == prediction.overlay()).all()


def test_show_needs_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"there is none here: save\(\) it"):
        made().show()


@pytest.mark.skipif(sys.platform != "linux", reason="viewers are other programs elsewhere")
def test_show_opens_the_viewer(tmp_path: Path) -> None:
    viewer = tmp_path / "xdg-open"
    viewer.write_text(
        f'#!/bin/sh\nPATH=/usr/bin:/bin cp "$1" {tmp_path}/shown.tmp\nPATH=/usr/bin:/bin mv {tmp_path}/shown.tmp {tmp_path}/shown.png\n'
    )
    viewer.chmod(0o755)
    program = "import sys, fbclip; fbclip.Predictor()(sys.argv[1]).show()"
    run_python(program, IMAGES[0], PATH=str(tmp_path), DISPLAY=":9")
    assert eventually((tmp_path / "shown.png").exists)
    assert read_image(tmp_path / "shown.png").shape == fbclip.Predictor()(IMAGES[0]).overlay().shape


def test_to_supervision() -> None:
    pytest.importorskip("supervision")
    prediction = made()
    detections = prediction.to_supervision(masks=True)
    assert (detections.xyxy == prediction.boxes).all()
    assert detections.confidence.tolist() == [region.peak for region in prediction.regions]
    assert [int(mask.sum()) for mask in detections.mask] == [region.area for region in prediction.regions]
    assert not detections.data["weak"].any()
    assert made(line=0.99).to_supervision().data["weak"].all()
    assert len(predicted(0.1, np.zeros((4, 4), np.float32)).to_supervision()) == 0


def test_without_supervision_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UsageError, match=r"pip install 'fbclip\[supervision\]'"):
        made().to_supervision()


# --- functions ------------------------------------------------------------------------------------------------------


def test_calibrate_is_what_the_command_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = tiny_bundle(tmp_path)
    paths = write_good(tmp_path / "good", 20)
    found = fbclip.calibrate(bundle, tmp_path / "good", false_alarm_rate=0.1, defects=[IMAGES[1], IMAGES[2]])
    assert capfd.readouterr() == ("", "")
    assert found.bundle.path == bundle and found.calibration.count == 20
    assert len(found.defects.scores) == 2 and found.good.skipped == 0
    assert fbclip.Predictor(bundle).threshold == found.calibration.threshold
    frames = [read_image(path) for path in paths]
    assert fbclip.calibrate(bundle, frames, false_alarm_rate=0.1).calibration.scores == found.calibration.scores
    with pytest.raises(UsageError, match="needs at least 99 good images"):
        fbclip.calibrate(bundle, [*paths], false_alarm_rate=0.01)
    with pytest.raises(UsageError, match="got both"):
        fbclip.calibrate(bundle, [paths[0], frames[0]])  # type: ignore[list-item]
    with pytest.raises(fbclip.BundleError):
        fbclip.calibrate(tmp_path / "good", paths)


def test_calibrate_a_copy_of_the_embedded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_good(tmp_path / "good", 12)
    found = fbclip.calibrate(None, "good", name="line3", roi=(0, 0, 60, 60))
    assert found.bundle.path == Path("line3.fbclip")
    assert fbclip.Predictor("line3.fbclip", roi="0,0,60,60").threshold == found.calibration.threshold
    assert not (Bundle.load().path / "calibration.json").exists()


def test_evaluate_is_what_the_command_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_own(tmp_path / "own", {"nut": (3, 3), "bolt": (2, 2)})
    evaluation = fbclip.evaluate(tiny_bundle(tmp_path), tmp_path / "own", classes=["nut"], batch=2)
    assert capfd.readouterr() == ("", "")
    (result,) = evaluation.results
    assert [one.name for one in result.classes] == ["nut"]
    assert len(result.classes[0].scores) == 6
    assert 0 <= result.mean["image_auroc"] <= 1  # type: ignore[operator]
    with pytest.raises(UsageError, match="bolt, nut"):
        fbclip.evaluate(None, tmp_path / "own", classes=["screw"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"int8": True, "int8_static": True}, "one 8-bit graph"),
        ({"calibration_images": IMAGES}, "int8_static"),
        ({"channel_order": "gbr"}, "rgb or bgr"),
        ({"threshold": 2}, "between 0 and 1"),
    ],
)
def test_wrong_exports_are_told_at_once(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Right ones are the command's, which calls the same function (tests/export), and the example's."""
    with pytest.raises(UsageError, match=message):
        fbclip.export(out=tmp_path / "other.fbclip", **wrong)


# --- page and examples ----------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what page and examples name: part.png, good/, defects/, data/."""
    write_good(tmp_path / "good", 20)
    (tmp_path / "defects").mkdir()
    for path in IMAGES[1:]:
        shutil.copy(path, tmp_path / "defects")
    Image.open(IMAGES[1]).save(tmp_path / "part.png")
    make_own(tmp_path / "data", {"nut": (3, 3)})
    write_video(tmp_path / "belt.avi", ["good"] * 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


@pytest.mark.slow
def test_the_page_runs(parts: Path) -> None:
    """Its blocks in their order, but for those that say `no test`: cameras, and packages that aren't here."""
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 10
    names: dict[str, Any] = {}
    for marks, block in blocks:
        compiled = compile(block, "docs/python.md", "exec")
        if "no test" not in marks and all(map(find_spec, re.findall(r"needs (\w+)", marks))):
            exec(compiled, names)


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(parts: Path, example: Path) -> None:
    arguments: list[object] = ["belt.avi"] if example.stem == "camera" else []
    done = subprocess.run([sys.executable, example, *arguments], cwd=parts, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
