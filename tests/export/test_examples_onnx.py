"""examples/onnx: three programs without fbclip give a Predictor's verdicts.

Python's and C++'s run the same graph in the same ONNX Runtime, and agree to the last bit. JavaScript's ONNX Runtime is
another release, and a Predictor runs the CPU's own form of the graph: both within 1e-5.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import export_arguments
from onnx import numpy_helper
from PIL import Image

import fbclip
from fbclip.bundle import Bundle
from fbclip.export.standalone import FLOAT_NCHW, write_standalone
from fbclip.folders import list_images
from fbclip.images import read_image
from fbclip.resample import resize
from fbclip.runtime.predictor import Predictor
from helpers import other_languages
from helpers.good_parts import write_good

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "onnx"
FRAME = (120, 200)  # height and width of a camera's frames, resized in the graph
Program = Callable[..., subprocess.CompletedProcess[str]]


def program(*command: object) -> Program:
    def run(model: Path, picture: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, command), str(model), str(picture)], text=True, capture_output=True, timeout=120
        )

    return run


@pytest.fixture(scope="module")
def python() -> Program:
    return program(sys.executable, EXAMPLES / "score.py")


@pytest.fixture(scope="module")
def javascript() -> Program:
    folder = other_languages.node_modules()
    return program("node", shutil.copy(EXAMPLES / "score.mjs", folder))


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Program:
    if shutil.which("g++") is None:
        pytest.skip("no compiler here: apt-get install g++")
    folder = tmp_path_factory.mktemp("cpp")
    libraries = other_languages.libraries(folder / "libraries")
    places = ["-I", other_languages.headers(), "-L", libraries, "-lonnxruntime", f"-Wl,-rpath,{libraries}"]
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        EXAMPLES / "score.cpp",
        "-o",
        folder / "score",
        *places,
    ]
    subprocess.run(list(map(str, command)), check=True)
    compiled = program(folder / "score")
    return lambda model, picture: compiled(model / "model.onnx", picture)


@pytest.fixture(scope="module", params=["python", "cpp", "javascript"])
def each(request: pytest.FixtureRequest) -> Program:
    found: Program = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module", params=["embedded", "memory", "frames"])
def bundle(request: pytest.FixtureRequest, golden_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "memory":
        return fbclip.adapt(None, write_good(folder / "good", 4), out=folder / "line.fbclip").bundle
    if request.param == "frames":
        size = ["--resolution", f"{FRAME[1]}x{FRAME[0]}", "--channel-order", "bgr", "--out", folder / "frames.fbclip"]
        command = [Path(sys.executable).with_name("fbclip"), *export_arguments(golden_files), *size]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
        return Bundle.load(folder / "frames.fbclip")
    return Bundle.load()


@pytest.fixture(scope="module")
def pictures(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    images = [
        resize(read_image(path), bundle.manifest.input_size).copy() for path in list_images([])[:2]
    ]  # good, defect
    images[0][0, 0] = ord("\n")  # a blank of the header, if it is read as one
    for number, image in enumerate([*images, np.zeros_like(images[0])]):
        Image.fromarray(image).save(folder / f"{number}.ppm")
    return sorted(folder.iterdir())


def answers(run: Program, model: Path, pictures: list[Path]) -> list[tuple[str, np.float32, np.float32]]:
    found = []
    for picture in pictures:
        done = run(model, picture)
        assert done.returncode == 0, done.stderr
        verdict, score, highest = done.stdout.split()
        found.append((verdict, np.float32(score), np.float32(highest)))
    return found


def test_verdicts_and_scores_are_a_predictors(
    python: Program, cpp: Program, javascript: Program, bundle: Bundle, pictures: list[Path], tmp_path: Path
) -> None:
    model = write_standalone(bundle, tmp_path / "model")
    with Predictor(bundle, device="cpu", precision="fp32") as predict:
        expected = [predict(path) for path in pictures]
    found = answers(python, model, pictures)
    assert answers(cpp, model, pictures) == found, "the same bits"
    for told in (found, answers(javascript, model, pictures)):
        assert [verdict for verdict, *_ in told] == [prediction.verdict for prediction in expected]
        for (_, score, highest), prediction in zip(told, expected, strict=True):
            assert score == pytest.approx(prediction.score, abs=1e-5)
            assert highest == pytest.approx(prediction.model_map.max(), abs=1e-5)
    assert found[-1][0] == "unusable"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model whose scores are no numbers."""
    model = write_standalone(Bundle.load(), tmp_path_factory.mktemp("broken") / "model")
    graph: Any = onnx.load(model / "model.onnx")
    (weights,) = (each for each in graph.graph.initializer if each.name == "memory_weights")
    weights.CopyFrom(numpy_helper.from_array(np.full(8, np.nan, np.float32), "memory_weights"))
    onnx.save(graph, model / "model.onnx")
    yield model


def test_what_is_not_known_to_be_good_is_not_called_so(each: Program, broken: Path, tmp_path: Path) -> None:
    picture = tmp_path / "part.ppm"
    Image.fromarray(resize(read_image(list_images([])[0]), 192)).save(picture)
    planes = write_standalone(Bundle.load(), tmp_path / "planes", FLOAT_NCHW)
    small = tmp_path / "small.ppm"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(small)
    cut = tmp_path / "cut.ppm"
    cut.write_bytes(picture.read_bytes()[:-1])
    model = write_standalone(Bundle.load(), tmp_path / "model")
    for folder, image in ((broken, picture), (planes, picture), (model, small), (model, cut)):
        done = each(folder, image)
        assert done.returncode != 0
        assert "good" not in done.stdout
    assert "no probability" in each(broken, picture).stderr
    assert each(model, picture).stdout.startswith("good ")
