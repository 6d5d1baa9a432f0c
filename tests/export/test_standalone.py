from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Run
from rich.console import Console

import fbclip
from fbclip.bundle import Bundle
from fbclip.errors import BundleError, DeviceError, ParityError, UsageError
from fbclip.export import standalone
from fbclip.export.standalone import FLOAT_NCHW, UINT8_NHWC, Card, as_input, write_standalone
from fbclip.files import sha256
from fbclip.folders import list_images
from fbclip.images import read_image
from fbclip.resample import resize
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend
from fbclip.runtime.calibrate import calibrate
from fbclip.runtime.predictor import Predictor
from helpers.good_parts import write_good

SAMPLES = list_images([])
SIDE = 192


def scores_and_maps(folder: Path, images: Any) -> Any:
    """What the graph in a folder gives for images uint8 (N, H, W, 3), in the form that its card says."""
    card = Card.load(folder / "model.json")
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["score", "anomaly_map"], {"image": as_input(images, card.input)})


def frames(side: int = SIDE) -> Any:
    return np.stack([resize(read_image(path), side) for path in SAMPLES])


def test_the_command_needs_no_torch(fbclip: Run, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    before = os.environ.get("PYTHONPATH", "")
    arguments = ["export", "--bundle", Bundle.load().path, "--standalone", "plain", "--name", "line3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{before}")
        fbclip(*arguments)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["model.json", "model.onnx"]
    assert Card.load(tmp_path / "plain" / "model.json").name == "line3"
    assert "plain is there already" in fbclip(*arguments, code=2).stderr
    error = fbclip(
        "export", "--bundle", Bundle.load().path, "--input", "float-nchw", "--triton", "models", code=2
    ).stderr
    assert "--input is of the graph for other programs: pass --standalone" in error
    assert not (tmp_path / "models").exists()


def test_both_forms_give_the_bundles_numbers(tmp_path: Path) -> None:
    """The same bits of both forms; the bundle's graph computes with its text features what these graphs know in advance."""
    pixels = write_standalone(Bundle.load(), tmp_path / "pixels")
    planes = write_standalone(Bundle.load(), tmp_path / "planes", FLOAT_NCHW)
    images = frames()
    found = scores_and_maps(pixels, images)
    for each, other in zip(found, scores_and_maps(planes, images), strict=True):
        assert (each == other).all()
    with Predictor() as predict:
        for each, wanted in zip(found, predict.backend.run(images), strict=True):
            assert np.abs(each - wanted).max() < 1e-5
    (taken,) = ort.InferenceSession(planes / "model.onnx").get_inputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("image", "tensor(float)", [3, SIDE, SIDE])


def test_the_card_is_in_the_graph_too(tmp_path: Path) -> None:
    folder = write_standalone(Bundle.load(), tmp_path / "plain", UINT8_NHWC, "fp32", "line3")
    card = Card.load(folder / "model.json")
    assert (card.width, card.height, card.threshold, card.input) == (
        SIDE,
        SIDE,
        Bundle.load().manifest.threshold,
        "uint8-nhwc",
    )
    assert (card.memory, card.roi, card.model_sha256) == (None, None, Bundle.load().model_sha256("fp32"))
    assert dict(card.files) == {"model.onnx": sha256(folder / "model.onnx")}
    known = ort.InferenceSession(folder / "model.onnx").get_modelmeta().custom_metadata_map
    told = json.loads((folder / "model.json").read_text())
    for name in ("files", "memory", "roi"):
        del told[name]
    assert known == {f"fbclip.{name}": str(value) for name, value in told.items()}


def test_a_memory_and_a_calibration(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 4)
    bundle = fbclip.adapt(None, good, out=tmp_path / "line.fbclip").bundle
    memory = bundle.memory()
    assert memory
    folder = write_standalone(bundle, tmp_path / "taught")
    card = Card.load(folder / "model.json")
    assert (card.memory, card.threshold, card.map_threshold) == (memory.sha256, 0.5, 0.5)
    assert "where the memory's good parts end" in card.threshold_from
    with Predictor(bundle) as predict:
        expected = predict.backend.run(frames())
        calibration, *_ = calibrate(predict, good, 0.2, [], Console(quiet=True))
    for each, wanted in zip(scores_and_maps(folder, frames()), expected, strict=True):
        assert np.abs(each - wanted).max() < 1e-5
    replace(calibration, roi="10,10,90,90").save(bundle)
    card = Card.load(write_standalone(bundle, tmp_path / "calibrated") / "model.json")
    assert (card.threshold, card.map_threshold) == (calibration.threshold, calibration.map_threshold)
    assert card.roi == "10,10,90,90"
    assert "send that part of a frame only" in card.threshold_from
    replace(calibration, tiles="1x2").save(bundle)
    with pytest.raises(UsageError, match=r"the calibration of .* is of frames in tiles"):
        write_standalone(bundle, tmp_path / "tiled")
    bundle.memory_file.unlink()
    with pytest.raises(BundleError, match="is of another memory"):
        write_standalone(bundle, tmp_path / "stale")
    assert not {"tiled", "stale"} & {path.name for path in tmp_path.iterdir()}


def test_the_contract_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/reference/contract.md says of the bundle's own graph, done with numpy and ONNX Runtime alone."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "contract.md").read_text()
    bundle = fbclip.adapt(None, write_good(tmp_path / "good", 4), out=tmp_path / "line3.fbclip").bundle
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    hashes = "".join(manifest["files"][name] for name in ("model.onnx", "text.npy"))
    assert hashlib.sha256(hashes.encode()).hexdigest() == bundle.model_sha256("fp32")
    session = ort.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    groups, width, patches = manifest["memory"]["groups"], manifest["memory"]["width"], manifest["grid"] ** 2
    neutral = {
        "text": np.load(bundle.path / "text.npy"),
        "memory_matrix": np.zeros((groups, width, width), np.float32),
        "memory_places": np.zeros((patches, groups * width), np.float32),
        "memory_bank": np.full(width, 1e30, np.float32),
        "memory_weights": np.array([1, 0, 0, 1, 0, 0, 0, 0], np.float32),
    }
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "contract.md", "exec"), {})
    taught = dict(np.load("line3-tensors.npz"))
    assert taught.keys() == neutral.keys()
    for memory, held in ((None, neutral), (bundle.memory(), taught)):
        with OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text, "cpu", bundle.manifest.memory_shape) as backend:
            backend.set_memory(memory.tensors if memory else None)
            expected = backend.run(frames())
        found = session.run(["score", "anomaly_map"], {"image": frames(), **held})
        for each, wanted in zip(found, expected, strict=True):
            assert np.abs(each - wanted).max() < 1e-6


def test_what_gives_other_numbers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written graph gets another bundle's text features."""
    other = Bundle.load()
    honest = standalone.write_graph
    swapped = replace(other, text=np.ascontiguousarray(other.text[::-1]))
    monkeypatch.setattr(standalone, "write_graph", lambda _, *rest: honest(swapped, *rest))
    with pytest.raises(ParityError, match="stays within 1e-05 of the bundle's own; it deviates by"):
        write_standalone(Bundle.load(), tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_fits_deepstream_and_the_graph(golden_bundle: Path, tmp_path: Path) -> None:
    for precision, builds in (("fp32", True), ("fp16", False), ("int8", False)):
        folder = write_standalone(Bundle.load(golden_bundle), tmp_path / precision, FLOAT_NCHW, precision)
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(folder / "config_infer.txt")
        (section,) = parser.sections()
        keys = parser[section]
        graph = onnx.load(folder / "model.onnx").graph
        (image,) = graph.input
        sides = [dim.dim_value for dim in image.type.tensor_type.shape.dim[1:]]
        assert section == "property"
        assert keys["infer-dims"] == ";".join(map(str, sides))
        assert keys["output-blob-names"].split(";") == [output.name for output in graph.output]
        assert (keys["network-type"], keys["output-tensor-meta"], keys["network-input-order"]) == ("100", "1", "0")
        assert (float(keys["net-scale-factor"]), keys["offsets"]) == (1, "0;0;0")
        assert (keys["model-color-format"], keys["maintain-aspect-ratio"]) == ("0", "0")
        # types are kept by trtexec --stronglyTyped alone: nvinfer is given no graph of lower precision to build
        assert ("onnx-file" in keys) == ("network-mode" in keys) == builds
        assert "labelfile-path" not in keys


def test_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="takes 8 bit with fixed ranges"):
        write_standalone(Bundle.load(), tmp_path / "no", FLOAT_NCHW, "int8")
    with pytest.raises(BundleError, match="has no fp16 graph"):
        write_standalone(Bundle.load(), tmp_path / "no", UINT8_NHWC, "fp16")
    with pytest.raises(UsageError, match="a name is up to 100 letters"):
        write_standalone(Bundle.load(), tmp_path / "no", name="../escape")
    with pytest.raises(UsageError, match="can't write /dev/null/no"):
        write_standalone(Bundle.load(), Path("/dev/null/no"))
    manifest = Path(shutil.copytree(Bundle.load().path, tmp_path / "bgr.fbclip"), "manifest.json")
    manifest.write_text(manifest.read_text().replace('"rgb"', '"bgr"'))
    folder = write_standalone(Bundle.load(manifest.parent), tmp_path / "bgr", FLOAT_NCHW)
    assert "model-color-format=1" in (folder / "config_infer.txt").read_text()
    assert not (tmp_path / "no").exists()
