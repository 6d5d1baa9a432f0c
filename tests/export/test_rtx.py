"""TensorRT-RTX: NVIDIA's real builder makes engines of every graph without a GPU; stand-ins show what a GPU would."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import RTX, Run, standins
from rich.console import Console

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.engines import Engine, EngineOptions, RtxEngine, RtxPlatform
from fbclip.errors import BundleError, DeviceError
from fbclip.export.engine import build_engine, parse
from fbclip.files import sha256
from fbclip.runtime.backends import make_backend
from fbclip.runtime.backends.cuda import Library
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend
from fbclip.runtime.backends.tensorrt import RtxBackend
from helpers import golden
from helpers.memories import made_up

CAPABILITIES = ["8.0", "8.6", "8.9", "12.0", "12.1"]
IMAGES = np.random.default_rng(0).integers(0, 255, (3, 192, 192, 3), np.uint8)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(EMBEDDED, tmp_path / "b.fbclip"))


@pytest.fixture
def real() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, on a GPU that it supports."""
    monkeypatch.setenv("STANDIN_GPU", "NVIDIA GeForce RTX 4090")
    monkeypatch.setenv("STANDIN_CAPABILITY", "8.9")
    with standins(RTX, monkeypatch):
        yield


def build(bundle: Bundle, precision: str = "fp32", batch: tuple[int, int, int] = (1, 1, 3)) -> Path:
    return build_engine(bundle, precision, EngineOptions(batch), Console(quiet=True), rtx=True)


def require_built(bundle: Bundle, precision: str, real: Any) -> None:
    """NVIDIA's parser sees the graph's own tensors, and the plan that its builder makes of them names each."""
    graph = onnx.load(bundle.graph(precision), load_external_data=False).graph
    _, network, _parser = parse(Library(rtx=True), bundle.graph(precision))
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    expected = [
        (v.name, [d.dim_value or -1 for d in v.type.tensor_type.shape.dim]) for v in (*graph.input, *graph.output)
    ]
    assert [(t.name, list(t.shape)) for t in tensors] == expected
    assert [t.dtype for t in tensors] == [real.uint8, *[real.float32] * (len(tensors) - 1)]
    plan = build(bundle, precision, (1, 2, 4))
    engine = RtxEngine.load(plan.with_suffix(".json"))
    assert engine.platform == RtxPlatform(real.__version__, tuple(CAPABILITIES))
    assert (engine.precision, engine.options) == (precision, EngineOptions((1, 2, 4)))
    assert engine.graph_sha256 == bundle.graph_sha256(precision)
    assert engine.plan_sha256 == sha256(plan)
    content = plan.read_bytes()
    weights = sum(f.stat().st_size for f in bundle.path.glob("model.int8.onnx*"))  # the least that any graph has
    assert len(content) > weights
    assert all(name.encode() in content for name, _ in expected)
    assert [f.name for f in bundle.inside("engines/rtx").rglob("*.timing")] == []  # one would need a GPU


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_is_built(real: Any, golden_bundle: Path, tmp_path: Path, precision: str) -> None:
    require_built(Bundle.load(shutil.copytree(golden_bundle, tmp_path / "b.fbclip")), precision, real)


def test_a_graph_with_a_memory_is_built(real: Any, fbclip: Run, bundle: Bundle) -> None:
    done = fbclip("export", "--rtx", "--bundle", bundle.path, "--batch", "1,1,4")
    assert "building" in done.stdout
    assert "use it with --device tensorrt-rtx" in done.stdout
    (sidecar,) = bundle.engines.rglob("*.json")
    values = json.loads(sidecar.read_text())
    assert (values["tensorrt_rtx"], values["batch"]) == (real.__version__, [1, 1, 4])
    assert values["compute_capabilities"] == CAPABILITIES
    plan = sidecar.with_suffix(".plan").read_bytes()
    assert bundle.manifest.memory_shape
    for name in ("memory_matrix", "memory_bank", "memory_places", "memory_weights", "features", "logits"):
        assert name.encode() in plan


def test_frames_of_a_camera_are_built(real: Any, fbclip: Run, golden_files: Path, tmp_path: Path) -> None:
    """From the checkpoint to the engine by one command; the resize is in the graph."""
    from conftest import export_arguments

    fbclip(*export_arguments(golden_files), "--resolution", "210x170", "--rtx", "--out", "frames.fbclip")
    bundle = Bundle.load(tmp_path / "frames.fbclip")
    engine = RtxEngine.load(next(bundle.engines.rglob("*.json")))
    assert (engine.precision, engine.options) == ("fp32", EngineOptions())
    _, network, _parser = parse(Library(rtx=True), bundle.graph("fp32"))
    assert list(network.get_input(0).shape) == [-1, 170, 210, 3]


def test_what_the_real_builder_refuses_is_one_line(real: Any, fbclip: Run, bundle: Bundle) -> None:
    path = bundle.graph("fp32")
    graph = onnx.load(path)
    softmax = next(node for node in graph.graph.node if node.op_type == "Softmax")
    softmax.op_type = "Det"
    onnx.save(graph, path)
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = sha256(path)
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    error = fbclip("export", "--rtx", "--bundle", bundle.path, code=1).stderr
    assert "TensorRT-RTX can't read model.onnx: " in error
    assert f"(layer {softmax.name}, Det)" in error
    assert error.count("\n") == 1
    assert not bundle.engines.exists()


def test_ctrl_c_stops_the_real_builder_and_leaves_what_was_there(real: Any, bundle: Bundle) -> None:
    build(bundle)
    before = {file.name: file.read_bytes() for file in bundle.engines.rglob("*.*")}
    command = [Path(sys.executable).with_name("fbclip"), "export", "--rtx", "--bundle", bundle.path, "--batch", "1,2,4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as building:
        assert building.stdout and building.stderr
        assert "building" in building.stdout.readline()
        assert "memory" in building.stdout.readline()  # the next thing is the build, which takes seconds
        building.send_signal(signal.SIGINT)
        assert building.wait(60) == 128 + signal.SIGINT
        assert "interrupted" in building.stderr.read()
    assert {file.name: file.read_bytes() for file in bundle.engines.rglob("*.*")} == before


def test_the_record_is_of_the_real_library(real: Any) -> None:
    record = json.loads((golden.DATA / "tensorrt" / f"api-{RTX}.json").read_text())
    if real.__version__ != RTX:
        pytest.skip(f"recorded was {RTX}, here is {real.__version__}")
    for name, members in record["enums"].items():
        assert list(getattr(real, name).__members__) == members
    for name, members in record["classes"].items():
        assert all(hasattr(getattr(real, name), member) for member in members)


def test_an_engine_scores_like_the_cpu(rtx: None, bundle: Bundle) -> None:
    build(bundle)
    cpu = OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text, "cpu", bundle.manifest.memory_shape)
    backend, precision = make_backend(bundle, "tensorrt-rtx", batch=3)
    with backend:
        assert (backend.device, precision) == ("tensorrt-rtx", "fp32")
        for memory in (None, made_up(bundle.manifest.memory_shape)):  # type: ignore[arg-type]
            for one in (cpu, backend):
                one.set_memory(memory)
            scores, maps = cpu.run(IMAGES)
            for number, (score, anomaly_map) in enumerate(backend.run_each(IMAGES[n : n + 1] for n in (0, 1, 2, 0, 1))):
                assert score == pytest.approx(scores[number % 3], abs=1e-6)
                assert np.abs(anomaly_map - maps[number % 3]).max() <= 1e-6
        for found, wanted in zip(backend.describe(IMAGES), cpu.describe(IMAGES), strict=True):
            assert np.abs(found - wanted).max() <= 1e-5
        assert backend.launches == "CUDA graph"


def start(bundle: Bundle, *batches: int) -> list[tuple[int, ...]]:
    """Run batches of these sizes in a new backend; returns the shapes that kernels were compiled for."""
    import tensorrt_rtx

    tensorrt_rtx.compiled.clear()
    with RtxBackend(bundle, "fp32") as backend:
        for batch in batches:
            backend.run(IMAGES[:batch])
    return list(tensorrt_rtx.compiled)


def kernels_of(bundle: Bundle) -> Path:
    (found,) = bundle.engines.rglob("*.kernels")
    return found


def test_kernels_are_compiled_once(rtx: None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build(bundle)
    one, two = (1, 192, 192, 3), (2, 192, 192, 3)
    assert start(bundle, 1, 1, 1) == [one]
    kept = kernels_of(bundle)
    assert kept.name == f"nvidia-geforce-rtx-4090-{RTX}-{sha256(plan)[:16]}.kernels"
    assert start(bundle, 1) == []
    assert start(bundle, 1, 2) == [two]
    before = kept.stat()
    assert start(bundle, 2, 1) == []
    assert kept.stat().st_mtime_ns == before.st_mtime_ns  # nothing new, nothing written
    monkeypatch.setenv("STANDIN_GPU", "NVIDIA GeForce RTX 4060")
    assert start(bundle, 1) == [one]
    assert len(list(bundle.engines.rglob("*.kernels"))) == 2


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "of another driver", "a folder"])
def test_damaged_kernels_are_made_anew(rtx: None, bundle: Bundle, damage: str) -> None:
    from hashlib import sha256 as digest

    build(bundle)
    start(bundle, 1)
    kept = kernels_of(bundle)
    content = kept.read_bytes()
    foreign = b"kernels of another driver"
    kept.write_bytes(
        {
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "short": content[:40],
            "of another driver": digest(foreign).digest() + foreign,
        }.get(damage, b"")
    )
    if damage == "a folder":
        kept.unlink()
        kept.mkdir()
    assert start(bundle, 1) == [(1, 192, 192, 3)]
    if damage != "a folder":
        assert kept.read_bytes() == content
        assert start(bundle, 1) == []


def test_kernels_stay_in_the_bundle(rtx: None, bundle: Bundle, tmp_path: Path) -> None:
    build(bundle)
    start(bundle, 1)
    kept = kernels_of(bundle)
    elsewhere = kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(elsewhere)
    with pytest.raises(BundleError, match="stay inside it"):
        start(bundle, 1)


def test_a_bundle_that_can_only_be_read(
    rtx: None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fbclip.runtime.backends import tensorrt as module

    build(bundle)

    def refuse(path: Path) -> None:
        raise BundleError(f"can't write {path}: Read-only file system")

    monkeypatch.setattr(module, "replacing", refuse)
    assert start(bundle, 1) == [(1, 192, 192, 3)]
    assert "compiles its kernels again: can't write" in caplog.text
    assert not list(bundle.engines.rglob("*.kernels"))


@pytest.mark.parametrize("capability", ["7.5", "8.7", "9.0", "10.0"])
def test_a_gpu_that_it_does_not_support_is_refused_first(
    rtx: None, fbclip: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    import tensorrt_rtx

    build(bundle)
    monkeypatch.setenv("STANDIN_GPU", "NVIDIA H200")
    monkeypatch.setenv("STANDIN_CAPABILITY", capability)
    message = f"compute capability 8.0, 8.6, 8.9, 12.0, 12.1; NVIDIA H200 has {capability}: choose the device cuda or"
    with pytest.raises(DeviceError, match=message):
        make_backend(bundle, "tensorrt-rtx", "fp32")
    assert tensorrt_rtx.deserialised == []
    error = fbclip("infer", "--bundle", bundle.path, "--device", "tensorrt-rtx", code=2).stderr
    assert message in error
    assert error.count("\n") == 1


def test_an_engine_that_does_not_fit_is_refused_before_it_is_read(rtx: None, bundle: Bundle) -> None:
    import tensorrt_rtx

    cure = f"fbclip export --rtx --bundle {bundle.path} --precision fp32"
    with pytest.raises(DeviceError, match=f"has no fp32 TensorRT-RTX engine; build it here with {cure}"):
        make_backend(bundle, "tensorrt-rtx", "fp32")
    plan = build(bundle)
    sidecar = plan.with_suffix(".json")
    engine = RtxEngine.load(sidecar)
    older, fewer = replace(engine.platform, tensorrt_rtx="1.6.0"), RtxPlatform(RTX, ("12.0",))
    for changed, message in (
        (replace(engine, platform=older), f"was built for .*TensorRT-RTX 1.6.0; here is .*{RTX}: run {cure}"),
        (replace(engine, platform=fewer), f"was built for compute capability 12.0, .*here is .*8.9.*: run {cure}"),
        (replace(engine, graph_sha256="0" * 64), f"was built from another graph .*: run {cure}"),
        (replace(engine, plan_sha256="0" * 64), f"is missing or damaged: run {cure}"),
        (replace(engine, options=EngineOptions((2, 2, 4))), f"takes 2 to 4 .*: run {cure} --batch 1,2,4"),
    ):
        sidecar.write_text(changed.to_json())
        with pytest.raises((DeviceError, BundleError), match=message):
            make_backend(bundle, "tensorrt-rtx", "fp32")
    for text in (
        "{}",
        engine.to_json().replace('"8.9"', '"new"'),
        engine.to_json().replace("tensorrt_rtx", "tensorrt"),
    ):
        sidecar.write_text(text)
        with pytest.raises(BundleError, match=r"is no sidecar of a plan: .*fbclip export --rtx$"):
            make_backend(bundle, "tensorrt-rtx", "fp32")
    assert tensorrt_rtx.deserialised == []


def test_engines_of_both_kinds_live_in_one_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_CAPABILITY", "8.9")
    with monkeypatch.context() as patch, standins("11.4.0", patch):
        plan = build_engine(bundle, "fp32", EngineOptions(), Console(quiet=True))
    with monkeypatch.context() as patch, standins(RTX, patch):
        rtx_plan = build(bundle)
        with make_backend(bundle, "tensorrt-rtx")[0] as backend:
            assert backend.plan == rtx_plan  # type: ignore[attr-defined]
        rtx_plan.with_suffix(".json").write_text("{}")
    with monkeypatch.context() as patch, standins("11.4.0", patch):
        with make_backend(bundle, "tensorrt")[0] as backend:
            assert backend.plan == plan  # type: ignore[attr-defined]
        engine = Engine.load(plan.with_suffix(".json"))
    assert engine.mismatch(RtxPlatform(RTX, ("8.9",)), engine.graph_sha256)


def test_without_the_library_or_pycuda(bundle: Bundle, tmp_path: Path) -> None:
    program = """
import sys
sys.modules[sys.argv[2]] = None
from fbclip.cli import app
app(sys.argv[3:], standalone_mode=False)
"""

    def run(absent: str, *arguments: str) -> str:
        command = [sys.executable, "-c", program, "-", absent, *arguments, "--bundle", str(bundle.path)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stderr

    assert "pip install tensorrt-rtx-cu13" in run("tensorrt_rtx", "export", "--rtx")
    assert "pip install tensorrt-rtx-cu13" in run("tensorrt_rtx", "infer", "--device", "tensorrt-rtx")
    pytest.importorskip("tensorrt_rtx")
    assert "pip install 'fbclip[rtx]'" in run("pycuda", "infer", "--device", "tensorrt-rtx")
