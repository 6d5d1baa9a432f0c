from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Run
from google.protobuf import text_format
from rich.console import Console
from tritonclient.grpc import model_config_pb2

import fbclip
from fbclip.bundle import Bundle, Manifest, save
from fbclip.errors import BundleError, UsageError
from fbclip.export.standalone import Card
from fbclip.export.triton import write_model
from fbclip.files import sha256
from fbclip.folders import list_images
from fbclip.images import read_image
from fbclip.resample import resize
from fbclip.runtime.calibrate import calibrate
from fbclip.runtime.predictor import Predictor
from helpers.good_parts import write_good
from helpers.tiny import tiny_bundle
from helpers.waiting import PATIENCE_S

SAMPLES = list_images([])
SIDE = 192


def parsed_config(folder: Path) -> Any:
    """The configuration as Triton parses it: unknown fields and wrong values raise."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def session_of(folder: Path, version: int = 1) -> ort.InferenceSession:
    return ort.InferenceSession(folder / str(version) / "model.onnx", providers=["CPUExecutionProvider"])


def frames() -> Any:
    return np.stack([resize(read_image(path), SIDE) for path in SAMPLES])


def test_the_command_needs_no_torch(fbclip: Run, tmp_path: Path) -> None:
    """A sitecustomize blocks torch in the installed command."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    before = os.environ.get("PYTHONPATH", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{before}")
        done = fbclip("export", "--bundle", Bundle.load().path, "--triton", "models")
    assert "fbclip-nano" in done.stdout
    model = tmp_path / "models" / "fbclip-nano"
    assert sorted(f.relative_to(model).as_posix() for f in model.rglob("*") if f.is_file()) == [
        "1/model.json",
        "1/model.onnx",
        "README.md",
        "config.pbtxt",
    ]
    fbclip("export", "--bundle", Bundle.load().path, "--triton", "models")
    assert sorted(f.name for f in model.iterdir()) == ["1", "2", "README.md", "config.pbtxt"]
    assert sorted(f.name for f in (tmp_path / "models").iterdir()) == ["fbclip-nano"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "b.fbclip"], "--bundle goes with"),
        (["--bundle", "b.fbclip", "--triton", "models", "--fp16"], "--bundle goes with"),
        (["--bundle", "nowhere.fbclip", "--triton", "models"], "has none: make one with fbclip calibrate"),
        (["--precision", "fp16"], "--triton"),
        (
            ["--bundle", Bundle.load().path, "--triton", "/dev/null/models"],
            "can't write /dev/null/models/fbclip-nano: Not a directory; choose another place",
        ),
        (["--bundle", Bundle.load().path, "--triton", "models", "--name", "../escape"], "a name is up to 100 letters"),
        (
            ["--bundle", Bundle.load().path, "--engine", "--name", "line3"],
            "--name with --bundle is the name of a Triton or standalone model",
        ),
        (["--name", "a/b"], "a name is up to 100 letters"),
        (["--threshold", "nan"], "--threshold: a threshold is a probability"),
        (["--out", "/dev/null/b.fbclip"], "can't write /dev/null"),
    ],
)
def test_wrong_usage(fbclip: Run, arguments: list[object], message: str) -> None:
    assert message in fbclip("export", *arguments, code=2).stderr


def test_the_configuration_fits_triton_and_the_graph(tmp_path: Path) -> None:
    folder = write_model(Bundle.load(), tmp_path)
    config = parsed_config(folder)
    session = session_of(folder)
    assert config.name == folder.name == "fbclip-nano"
    assert config.platform == "onnxruntime_onnx"
    assert [i.name for i in session.get_inputs()] == [i.name for i in config.input] == ["image"]
    assert session.get_inputs()[0].shape[1:] == list(config.input[0].dims) == [SIDE, SIDE, 3]
    assert model_config_pb2.DataType.Name(config.input[0].data_type) == "TYPE_UINT8"
    assert [o.name for o in session.get_outputs()] == [o.name for o in config.output] == ["score", "anomaly_map"]
    score, anomaly_map = config.output
    assert (list(score.dims), score.HasField("reshape"), list(score.reshape.shape)) == ([1], True, [])
    assert list(anomaly_map.dims) == [SIDE, SIDE]
    assert {o.data_type for o in config.output} == {model_config_pb2.TYPE_FP32}
    assert config.HasField("dynamic_batching")
    (group,) = config.instance_group
    assert model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) == "KIND_AUTO"
    assert [w.batch_size for w in config.model_warmup] == [1, config.max_batch_size]
    for warm_up in config.model_warmup:
        assert list(warm_up.inputs) == ["image"]
        assert list(warm_up.inputs["image"].dims) == [SIDE, SIDE, 3]
    scores, maps = session.run(None, {"image": np.zeros((config.max_batch_size, SIDE, SIDE, 3), np.uint8)})
    assert scores.shape == (config.max_batch_size,)
    assert maps.shape == (config.max_batch_size, SIDE, SIDE)


def test_the_baked_graph_scores_as_the_bundle(tmp_path: Path) -> None:
    folder = write_model(Bundle.load(), tmp_path)
    scores, maps = session_of(folder).run(["score", "anomaly_map"], {"image": frames()})
    predict = fbclip.Predictor()
    predictions = [predict(path) for path in SAMPLES]
    assert np.abs(scores - [p.score for p in predictions]).max() < 1e-5
    assert np.abs(maps - np.stack([p.model_map for p in predictions])).max() < 1e-5


def test_a_memory_is_in_the_graph(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 4)
    bundle = fbclip.adapt(None, good, out=tmp_path / "line.fbclip").bundle
    folder = write_model(bundle, tmp_path / "models")
    session = session_of(folder)
    assert [i.name for i in session.get_inputs()] == ["image"]
    assert [o.name for o in session.get_outputs()] == ["score", "anomaly_map"]
    with Predictor(bundle) as predict:
        expected = predict.backend.run(frames())
    zero_shot = write_model(Bundle.load(), tmp_path / "others")
    apart = session_of(zero_shot).run(["score", "anomaly_map"], {"image": frames()})
    found = session.run(["score", "anomaly_map"], {"image": frames()})
    for name, each, wanted, without in zip(("score", "map"), found, expected, apart, strict=True):
        assert np.abs(each - wanted).max() < 1e-5, name
        assert np.abs(without - wanted).max() > 0.1, name
    text = (folder / "README.md").read_text()
    assert f"memory {predict.memory.name} of 4 good parts (whiten) are in the graph" in text  # type: ignore[union-attr]
    assert "Threshold 0.5 is where the memory's good parts end" in text
    assert 'string_value: "0.5"' in (folder / "config.pbtxt").read_text()
    calibrated = fbclip.calibrate(bundle.path, good[:3] + write_good(tmp_path / "more", 9)[4:])
    assert (
        f"{calibrated.calibration.threshold!r}"
        in (write_model(bundle, tmp_path / "calibrated") / "config.pbtxt").read_text()
    )
    (bundle.path / "memory.npz").unlink()
    with pytest.raises(BundleError, match="is of another memory"):
        write_model(bundle, tmp_path / "stale")
    assert write_model(Bundle.load(tiny_bundle(tmp_path)), tmp_path / "older").is_dir()


def test_weights_beside_the_graph_stay_beside_it(tmp_path: Path) -> None:
    """As in bundles over 2 GB."""
    embedded = Bundle.load()

    def write_files(folder: Path) -> Manifest:
        model = onnx.load(embedded.graph("fp32"))
        onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
        return embedded.manifest

    folder = write_model(save(tmp_path / "large.fbclip", embedded.text, write_files), tmp_path / "models")
    assert (folder / "1" / "model.onnx.data").stat().st_size > 1_000_000
    scores, _ = session_of(folder).run(None, {"image": frames()[:1]})
    assert scores[0] == pytest.approx(fbclip.Predictor()(SAMPLES[0]).score, abs=1e-5)


def test_a_plan_is_built_from_the_baked_graph(tmp_path: Path) -> None:
    def build(graph: Path, plan: Path) -> None:
        assert [i.name for i in onnx.load(graph, load_external_data=False).graph.input] == ["image"]
        plan.write_text("a plan")

    folder = write_model(Bundle.load(), tmp_path, build=build, max_batch=4)
    assert sorted(f.name for f in (folder / "1").iterdir()) == ["model.json", "model.plan"]
    config = parsed_config(folder)
    assert config.platform == "tensorrt_plan"
    assert (folder / "1" / "model.plan").read_text() == "a plan"
    assert dict(Card.load(folder / "1" / "model.json").files) == {"model.plan": sha256(folder / "1" / "model.plan")}
    assert config.max_batch_size == 4
    assert [w.batch_size for w in config.model_warmup] == [1, 4]
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert "trtexec" not in (folder / "README.md").read_text()


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(graph: Path, plan: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(Bundle.load(), tmp_path, build=build)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "name"),
    [("my model.fbclip", "my-model"), ('quote"d', "quote-d"), ("Straße 3.fbclip", "Straße-3"), ("...", "fbclip")],
)
def test_a_model_has_its_bundles_own_name(tmp_path: Path, folder: str, name: str) -> None:
    copy = Bundle.load(shutil.copytree(Bundle.load().path, tmp_path / folder))
    written = write_model(copy, tmp_path / "models")
    assert written == tmp_path / "models" / name
    assert parsed_config(written).name == name
    other = write_model(copy, tmp_path / "models", name="line3")
    assert parsed_config(other).name == other.name == "line3"
    with pytest.raises(UsageError, match="fp16"):
        write_model(copy, tmp_path / "others", "fp16")
    with pytest.raises(UsageError, match="a name is up to 100 letters"):
        write_model(copy, tmp_path / "models", name="../../escape")


def test_the_threshold_is_the_calibrations(tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(Bundle.load().path, tmp_path / "part.fbclip"))
    calibration, _, _ = calibrate(Predictor(bundle), SAMPLES, 0.2, [], Console(quiet=True))
    assert (folder := write_model(bundle, tmp_path / "before")).is_dir()
    assert parsed_config(folder).parameters["threshold"].string_value == str(bundle.manifest.threshold)
    assert "it is not calibrated" in (folder / "README.md").read_text()
    replace(calibration, roi="10,10,90,90").save(bundle)
    folder = write_model(bundle, tmp_path / "after")
    parameters = parsed_config(folder).parameters
    assert float(parameters["threshold"].string_value) == calibration.threshold
    assert float(parameters["map_threshold"].string_value) == calibration.map_threshold
    readme = (folder / "README.md").read_text()
    assert f"anomalous from {calibration.threshold:g} on" in readme
    assert "is calibrated from 4 good images: at most 20 % false alarms on average" in readme
    assert "--roi 10,10,90,90: send that part" in readme
    assert f"score < {calibration.threshold!r}" in readme
    assert str(bundle.manifest.threshold) not in readme


def test_a_graph_without_the_text_features_as_an_input(tmp_path: Path) -> None:
    embedded = Bundle.load()
    onnx.save(onnx.load(write_model(embedded, tmp_path / "models") / "1" / "model.onnx"), tmp_path / "model.onnx")

    def write_files(folder: Path) -> Manifest:
        shutil.copy(tmp_path / "model.onnx", folder)
        return embedded.manifest

    baked = save(tmp_path / "baked.fbclip", embedded.text, write_files)
    with pytest.raises(BundleError, match="is no graph of a bundle"):
        write_model(baked, tmp_path / "models")


def test_another_export_adds_a_version(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good", 4)
    bundle = Bundle.load(shutil.copytree(Bundle.load().path, tmp_path / "line.fbclip"))
    folder = write_model(bundle, tmp_path / "models")
    first = {path.name: path.read_bytes() for path in (folder / "1").iterdir()}
    (expected,) = session_of(folder).run(["score"], {"image": frames()})
    edited = (folder / "config.pbtxt").read_text().replace("count: 1", "count: 2")
    (folder / "config.pbtxt").write_text(edited)
    taught = fbclip.adapt(bundle.path, good).bundle
    assert write_model(taught, tmp_path / "models") == folder
    assert {path.name: path.read_bytes() for path in (folder / "1").iterdir()} == first
    assert (session_of(folder).run(["score"], {"image": frames()})[0] == expected).all()
    with Predictor(taught) as predict:
        wanted, _ = predict.backend.run(frames())
    (found,) = session_of(folder, 2).run(["score"], {"image": frames()})
    assert np.abs(found - wanted).max() < 1e-5
    assert np.abs(found - expected).max() > 0.1
    config = parsed_config(folder)
    assert config.version_policy.latest.num_versions == 2
    assert config.instance_group[0].count == 2, "what was edited stays"
    thresholds = {name: float(value.string_value) for name, value in config.parameters.items()}
    assert thresholds == {
        f"{kind}threshold{suffix}": value
        for kind in ("", "map_")
        for suffix, value in (("", 0.5), ("_1", Bundle.load().manifest.threshold), ("_2", 0.5))
    }
    assert 'model_version="2"' in (folder / "README.md").read_text()
    assert Card.load(folder / "2" / "model.json").memory == taught.memory().sha256  # type: ignore[union-attr]


def test_versions_take_the_same_images_in_the_same_form(tmp_path: Path) -> None:
    folder = write_model(Bundle.load(), tmp_path, name="line")

    def build(graph: Path, plan: Path) -> None:
        plan.write_text("a plan")

    before = sorted(folder.rglob("*"))
    with pytest.raises(UsageError, match=r"version 1 of .* is a graph of rgb images of 192x192"):
        write_model(Bundle.load(), tmp_path, name="line", build=build)
    manifest = Path(shutil.copytree(Bundle.load().path, tmp_path / "bgr.fbclip"), "manifest.json")
    manifest.write_text(manifest.read_text().replace('"rgb"', '"bgr"'))
    with pytest.raises(UsageError, match="this one a graph of bgr images of 192x192"):
        write_model(Bundle.load(manifest.parent), tmp_path, name="line")
    assert sorted(folder.rglob("*")) == before
    plans = write_model(Bundle.load(), tmp_path, name="plans", build=build, max_batch=4)
    with pytest.raises(UsageError, match="says 4, and this one is for 8"):
        write_model(Bundle.load(), tmp_path, name="plans", build=build, max_batch=8)
    write_model(Bundle.load(), tmp_path, name="plans", build=build, max_batch=4)
    assert (plans / "2" / "model.plan").is_file()
    (folder / "config.pbtxt").write_text('name: "line"')
    with pytest.raises(UsageError, match="is added to the configuration that fbclip wrote"):
        write_model(Bundle.load(), tmp_path, name="line")
    (folder / "1" / "model.json").unlink()  # as older releases wrote it
    with pytest.raises(UsageError, match=r"beside versions with a model\.json"):
        write_model(Bundle.load(), tmp_path, name="line")
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="is a folder of versions"):
        write_model(Bundle.load(), tmp_path, name="other")


@contextmanager
def stand_in_server(folder: Path) -> Iterator[str]:
    """A server that speaks Triton's HTTP protocol with binary tensors and runs a model of a repository."""
    config, session = parsed_config(folder), session_of(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == f"/v2/models/{config.name}/versions/1/infer"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            split = int(self.headers["Inference-Header-Content-Length"])
            (tensor,) = json.loads(body[:split])["inputs"]
            assert (tensor["name"], tensor["datatype"]) == ("image", "UINT8")
            assert tensor["shape"][1:] == list(config.input[0].dims)
            image = np.frombuffer(body[split:], np.uint8).reshape(tensor["shape"])
            arrays = dict(zip(["score", "anomaly_map"], session.run(None, {"image": image}), strict=True))
            outputs = []
            for output in config.output:
                arrays[output.name] = arrays[output.name].reshape(len(image), *output.dims)
                values = arrays[output.name]
                shape, size = list(values.shape), {"binary_data_size": values.nbytes}
                outputs.append({"name": output.name, "datatype": "FP32", "shape": shape, "parameters": size})
            header = json.dumps({"model_name": config.name, "model_version": "1", "outputs": outputs}).encode()
            answer = header + b"".join(arrays[output.name].tobytes() for output in config.output)
            self.send_response(200)
            self.send_header("Inference-Header-Content-Length", str(len(header)))
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_client_of_the_readme(tmp_path: Path) -> None:
    folder = write_model(Bundle.load(), tmp_path)
    text = (folder / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with stand_in_server(folder) as address:
        command = [sys.executable, "-c", program, SAMPLES[0], address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5 * PATIENCE_S)  # imports much
    assert done.returncode == 0, done.stderr
    score, highest = (float(n) for n in re.findall(r"\d+\.\d+", done.stdout))
    prediction = fbclip.Predictor()(SAMPLES[0])
    assert score == pytest.approx(prediction.score, abs=1e-5)
    assert done.stdout.startswith("defect" if prediction.is_anomalous else "good")
    assert highest == pytest.approx(prediction.model_map.max(), abs=1e-5)
