from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from PIL import Image

import fbclip
from fbclip.bundle import Bundle
from fbclip.errors import DeviceError, ImageError, UsageError
from fbclip.images import read_image
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.regions import find_regions
from helpers.predicted import predicted

SAMPLES = Path(fbclip.__file__).parent / "assets" / "samples"
SCRATCHED = SAMPLES / "brushed-steel-scratch.jpg"


@pytest.mark.slow
def test_the_runtime_needs_neither_torch_nor_open_clip() -> None:
    """Every module but those that train, export and hold the model is imported where torch can't be."""
    program = """
import importlib, pkgutil, sys
for name in ("torch", "torchvision", "open_clip", "onnx", "onnxscript", "safetensors"):
    sys.modules[name] = None
import fbclip
names = [found.name for found in pkgutil.walk_packages(fbclip.__path__, "fbclip.")]
with_torch = ("fbclip.model", "fbclip.training", "fbclip.export.")
free = [name for name in names if not name.startswith(with_torch) or name == "fbclip.export.engine"]
assert len(free) > 60, free
for name in free:
    importlib.import_module(name)
prediction = fbclip.Predictor()(sys.argv[1])
print(prediction.score, prediction.overlay().shape)
"""
    subprocess.run([sys.executable, "-c", program, SCRATCHED], check=True)


@pytest.mark.slow
def test_onnx_runtime_keeps_nothing_to_send_home(tmp_path: Path) -> None:
    """From 1.32 on it has a database in the user's cache unless it is told not to."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")}
    program = "import sys, fbclip; fbclip.Predictor()(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, SCRATCHED], check=True, env=environment)
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]


def test_help_imports_nothing_heavy() -> None:
    program = "import sys, fbclip.cli; print([n for n in ('numpy', 'cv2', 'onnxruntime', 'torch') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_scratch_lights_up() -> None:
    prediction = fbclip.Predictor()(SCRATCHED)
    x, y = 400, 280  # on the scratch
    near = prediction.anomaly_map[y - 15 : y + 15, x - 15 : x + 15].max()
    assert near > np.quantile(prediction.anomaly_map, 0.97)
    assert prediction.score > fbclip.Predictor()(SAMPLES / "brushed-steel-good.jpg").score


def test_ways_to_pass_an_image() -> None:
    predict = fbclip.Predictor()
    frame = np.asarray(Image.open(SCRATCHED))
    scores = {
        predict(SCRATCHED).score,
        predict(str(SCRATCHED)).score,
        predict(Image.open(SCRATCHED)).score,
        predict(frame).score,
        predict(np.ascontiguousarray(frame[..., ::-1]), channel_order="bgr").score,
    }
    assert len(scores) == 1
    prediction = predict(frame)
    assert prediction.anomaly_map.shape == frame.shape[:2]
    assert set(prediction.timings_ms) == {"read", "preprocess", "model", "postprocess"}
    with pytest.raises(ImageError, match="uint8"):
        predict(frame.astype(np.float32))  # type: ignore[arg-type]


def test_nothing_falls_back_silently() -> None:
    with pytest.raises(DeviceError, match="CUDAExecutionProvider"):
        fbclip.Predictor(device="cuda")
    with pytest.raises(UsageError, match="fbclip export --fp16"):
        fbclip.Predictor(precision="fp16")
    with pytest.raises(UsageError, match="between 0 and 1"):
        fbclip.Predictor(threshold=1.5)


def test_regions() -> None:
    anomaly_map = np.zeros((20, 30), np.float32)
    anomaly_map[2:5, 3:9] = 0.6
    anomaly_map[10:12, 20:21] = 0.9
    first, second = find_regions(anomaly_map, 0.5)
    assert (first.box, first.area) == ((20, 10, 21, 12), 2)
    assert first.peak == pytest.approx(0.9)
    assert (second.box, second.area) == ((3, 2, 9, 5), 18)


def test_a_picture_is_shrunk_to_the_longest_side_asked_for() -> None:
    anomaly_map = np.zeros((1080, 1920), np.float32)
    anomaly_map[400:600, 900:1200] = 0.8
    image = np.full((1080, 1920, 3), 90, np.uint8)
    prediction = predicted(0.7, anomaly_map, image, regions=find_regions(anomaly_map, 0.5))
    whole, small = prediction.overlay(), prediction.overlay(960)
    assert (whole.shape[1], small.shape[1]) == (1920, 960)
    assert (prediction.overlay(1920) == whole).all()
    for picture, factor in ((whole, 1.0), (small, 0.5)):
        bar = len(picture) - round(1080 * factor)
        edge = picture[bar + round(500 * factor)].astype(int)  # a row through the middle of the region
        marked = np.flatnonzero((edge[:, 0] > 180) & (edge[:, 1] < 90))  # red lines on both sides
        assert abs(marked.min() - 900 * factor) <= 4
        assert abs(marked.max() - 1199 * factor) <= 4


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 400), (30, 20), (1080, 1920), (3000, 12)])
def test_overlays_are_legible_at_any_size(size_hw: tuple[int, int]) -> None:
    image = np.full((*size_hw, 3), 128, np.uint8)
    anomaly_map = np.full(size_hw, 0.2, np.float32)
    overlay = predicted(0.7, anomaly_map, image, regions=find_regions(anomaly_map, 0.1)).overlay()
    height, width = overlay.shape[:2]
    assert width >= 320
    assert height > 320
    bar = overlay[: height - max(320, size_hw[0])]
    assert (bar > 200).all(axis=2).sum() > 200  # white letters on the bar


def write_odd_images(folder: Path) -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
    grey = colour.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    colour.save(folder / "turned.jpg", exif=exif)
    for suffix in ("png", "bmp", "tiff", "webp"):
        colour.save(folder / f"colour.{suffix}")
    grey.save(folder / "grey.png")
    Image.fromarray((np.asarray(grey).astype(np.uint16)) * 257).save(folder / "deep.png")
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.resize((1, 50)).save(folder / "thin.png")
    return {"grey": grey}


def test_odd_images_are_read_alike(tmp_path: Path) -> None:
    grey = write_odd_images(tmp_path)["grey"]
    assert read_image(tmp_path / "turned.jpg").shape == (60, 40, 3)
    assert read_image(tmp_path / "thin.png").shape == (50, 1, 3)
    assert (read_image(tmp_path / "deep.png") == read_image(tmp_path / "grey.png")).all()
    assert (read_image(tmp_path / "grey.png")[..., 0] == np.asarray(grey)).all()
    assert (read_image(tmp_path / "alpha.png") == read_image(tmp_path / "colour.png")).all()


def test_a_folder_with_broken_files(fbclip: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_odd_images(folder)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "colour.png").read_bytes()[:2000])
    Image.new("1", (20000, 15000)).save(folder / "bomb.png")
    done = fbclip("infer", "in", "--json", "out/r.jsonl", "--csv", "r.csv", "--save-map", code=2)
    for name in ("empty.png is empty", "text.jpg is no image", "cut.png can't be read", "at most 178,956,970 pixels"):
        assert name in done.stdout
    records = [json.loads(line) for line in (tmp_path / "out/r.jsonl").read_text().splitlines()]
    assert len(records) == 9
    for record in records:
        verdict = ["score", "threshold", "is_anomalous", "verdict", "overruled", "unusable", "memory", "regions"]
        frame = ["kind", "source", "index", "time"]
        assert list(record) == [*frame, *verdict, "alarm", "overlay", "map", "timings_ms"]
        assert (tmp_path / record["overlay"]).is_file()
        assert record["is_anomalous"] == (record["score"] >= record["threshold"])
        assert np.load(tmp_path / record["map"]).shape == read_image(tmp_path / record["source"]).shape[:2]
    with (tmp_path / "r.csv").open() as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [record["score"] for record in records]
    assert len(list((tmp_path / "runs/infer/exp").glob("*.jpg"))) == 9


def test_samples_json_on_stdout_and_numbered_runs(fbclip: Run, tmp_path: Path) -> None:
    done = fbclip("infer", "--json", "-", "--no-save")
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 4
    assert not (tmp_path / "runs").exists()
    fbclip("infer", SCRATCHED)
    fbclip("infer", SCRATCHED)
    fbclip("infer", SCRATCHED, "--exist-ok")
    assert sorted(p.name for p in (tmp_path / "runs/infer").iterdir()) == ["exp", "exp2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", "nowhere.png"], "there is no nowhere.png"),
        (["infer", "--threshold", "high"], "--threshold: a threshold is auto, or a probability"),
        (["infer", "--device", "gpu"], "--device: a device is auto, cpu, cuda, tensorrt"),
        (["infer", "--device", "ort-tensorrt"], "needs ONNX Runtime's TensorrtExecutionProvider"),
        (["infer", "--bundle", "nowhere.fbclip"], "fbclip export"),
        (["export", "--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["export", "--feature-layers", "1;2"], "--feature-layers: feature layers are numbers"),
        (["train", "--clip", "ViT-L-15"], "a frozen CLIP needs weights"),
    ],
)
def test_wrong_usage_is_one_line(fbclip: Run, arguments: list[str], message: str) -> None:
    error = fbclip(*arguments, code=2).stderr
    assert message in error
    assert error.count("\n") == 1


def copy_embedded(folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(Bundle.load().path, folder / "copy.fbclip"))


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    path = copy_embedded(tmp_path)
    graph = path / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    bundle = Bundle.load(path)  # graphs are checked when they are used
    with pytest.raises(UsageError, match="is damaged"):
        bundle.graph("fp32")
    (path / "text.npy").write_bytes(b"x")
    with pytest.raises(UsageError, match="is damaged"):
        Bundle.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "upgrade"),
        ({"format": 0}, "export again"),
        ({"stranger": 1}, "stranger"),
    ],
)
def test_manifests_of_other_formats(tmp_path: Path, change: dict[str, int], message: str) -> None:
    path = copy_embedded(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UsageError, match=message):
        Bundle.load(path)


def test_files_may_not_leave_the_bundle(tmp_path: Path) -> None:
    path = copy_embedded(tmp_path)
    (path / "text.npy").rename(tmp_path / "text.npy")
    (path / "text.npy").symlink_to(tmp_path / "text.npy")
    with pytest.raises(UsageError, match="stay inside"):
        Bundle.load(path)


@pytest.mark.realdata
def test_real_photographs(fbclip: Run, real_images: Path) -> None:
    images = sorted((real_images / "test" / "blowhole").glob("*"))[:3]
    done = fbclip("infer", *images)
    assert "3 images" in done.stdout


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, to be kept to one of them")
def test_threads_stay_on_the_cores_that_the_process_is_given() -> None:
    program = (
        "import os, pathlib\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import numpy as np\n"
        "from fbclip import Predictor\n"
        "from fbclip.runtime.bench.roofline import Rates\n"
        "predictor, rates = Predictor(), Rates()\n"
        "predictor(np.zeros((50, 60, 3), np.uint8))\n"
        "print({frozenset(os.sched_getaffinity(int(t.name))) for t in pathlib.Path('/proc/self/task').iterdir()})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == str({frozenset({min(os.sched_getaffinity(0))})})


@pytest.mark.parametrize("threshold", [2, True, "0.5", float("nan")])
def test_a_threshold_that_is_no_probability_makes_nothing_good(threshold: Any) -> None:
    predict = Predictor()
    before = predict.threshold
    with pytest.raises(UsageError, match="probability between 0 and 1"):
        predict.set_threshold(threshold)
    assert predict.threshold == before


@pytest.mark.parametrize("min_area", [-5, 1.5, float("nan"), True])
def test_a_least_area_is_a_number_of_pixels(min_area: Any) -> None:
    with pytest.raises(UsageError, match="number of pixels"):
        Predictor(min_area=min_area)


@pytest.mark.parametrize("image", [None, b"part.png", [[1]]])
def test_what_is_no_image_is_named(image: Any) -> None:
    with pytest.raises(
        ImageError, match="is a path, a Pillow image or an array, and several are a list of these; got "
    ):
        Predictor()(image)
