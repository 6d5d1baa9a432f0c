from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import RELEASES, Run, standins
from rich.console import Console
from rich.filesize import decimal

from fbclip import Predictor
from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.engines import Engine, EngineOptions, Platform
from fbclip.errors import BundleError, DeviceError, FBClipError, UsageError
from fbclip.export import engine as builder
from fbclip.export.engine import build_engine
from fbclip.files import sha256
from fbclip.runtime.backends import make_backend
from fbclip.runtime.host import Machine
from helpers import golden
from helpers.made_up_memory import write_memory

SAMPLE = EMBEDDED.parent / "samples" / "brushed-steel-scratch.jpg"
ORIN = Platform("Orin", "8.7", "10.3.0")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(EMBEDDED, tmp_path / "b.fbclip"))


def build(bundle: Bundle, precision: str = "auto", **options: object) -> Path:
    return build_engine(bundle, precision, EngineOptions(**options), Console(quiet=True))  # type: ignore[arg-type]


def infer(fbclip: Run, *arguments: object) -> dict[str, Any]:
    """The record of one image."""
    return json.loads(fbclip("infer", *arguments, "--no-save", "--json", "-").stdout)  # type: ignore[no-any-return]


def test_an_engine_scores_like_the_cpu(tensorrt: str, fbclip: Run, bundle: Bundle) -> None:
    done = fbclip("export", "--engine", "--bundle", bundle.path, "--batch", "1,1,2")
    assert "memory: at least" in done.stdout
    (plan,) = bundle.engines.glob("*.plan")
    sidecar = json.loads(plan.with_suffix(".json").read_text())
    assert plan.stem.endswith(f"-trt{sidecar['tensorrt']}-fp32")
    assert sidecar["graph_sha256"] == sha256(bundle.graph("fp32"))
    assert sidecar["plan_sha256"] == sha256(plan)
    assert sidecar["batch"] == [1, 1, 2]
    assert sorted(f.suffix for f in bundle.engines.iterdir()) == [".json", ".plan", ".timing"]
    on_gpu, on_cpu = (infer(fbclip, SAMPLE, "--bundle", bundle.path, "--device", d) for d in ("tensorrt", "cpu"))
    assert abs(on_gpu["score"] - on_cpu["score"]) <= (1e-6 if tensorrt in RELEASES else 1e-4)
    assert list(on_gpu) == list(on_cpu)
    told = fbclip("infer", SAMPLE, "--bundle", bundle.path, "--device", "tensorrt", "--no-save").stdout
    assert re.search(r"^launches: (CUDA graph|enqueue \()", told, re.M)


@pytest.mark.parametrize(("precision", "budget"), [("fp16", 2e-3), ("int8", 2e-2)])
def test_lower_precision_from_the_checkpoint_to_the_score(
    fbclip: Run,
    golden_files: Path,
    golden_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    precision: str,
    budget: float,
) -> None:
    bundle = Bundle.load(shutil.copytree(golden_bundle, tmp_path / "b.fbclip"))
    image = golden_files / "raw.png"
    on_cpu = Predictor(bundle, device="cpu", precision=precision)(image).score
    assert abs(on_cpu - golden.arrays()["raw_image_score"]) <= budget
    for release in RELEASES:
        with monkeypatch.context() as patch, standins(release, patch):
            plan = bundle.engines / f"stand-in-orin-nvgpu-trt{release}-{precision}.plan"
            if not plan.is_file():  # the export built the first one
                assert build(bundle, precision) == plan
            arguments = ("--bundle", bundle.path, "--device", "tensorrt", "--precision", precision)
            assert abs(infer(fbclip, image, *arguments)["score"] - on_cpu) <= 1e-6


def test_a_device_builds_and_runs_without_torch_onnx_and_onnx_runtime(standin: str, bundle: Bundle) -> None:
    program = """
import sys
import tensorrt  # the stand-in needs ONNX Runtime itself
for name in ("torch", "torchvision", "open_clip", "onnx", "onnxscript", "safetensors", "onnxruntime"):
    sys.modules[name] = None
from fbclip.cli import app
path, image = sys.argv[1:]
app(["export", "--engine", "--bundle", path], standalone_mode=False)
app(["infer", image, "--bundle", path, "--device", "tensorrt", "--no-save"], standalone_mode=False)
try:
    app(["export", "--engine"], standalone_mode=False)
except ValueError as error:
    assert "needs torch: pass --bundle" in str(error)
else:
    raise AssertionError("exported without torch")
"""
    subprocess.run([sys.executable, "-c", program, bundle.path, SAMPLE], check=True)


def test_what_the_builder_is_told(standin: str, bundle: Bundle) -> None:
    plan = build(
        bundle,
        batch=(1, 2, 4),
        workspace_mib=64,
        optimization_level=2,
        hardware_compatible=True,
        version_compatible=True,
    )
    header = json.loads(plan.read_bytes().partition(b"\n")[0])
    size = [192, 192, 3]
    assert header["profile"] == {"image": [[1, *size], [2, *size], [4, *size]]}
    assert header["flags"] == ["VERSION_COMPATIBLE"]  # and no TF32
    assert (header["hardware"], header["level"], header["limits"]) == ("AMPERE_PLUS", 2, {"WORKSPACE": 64 * 2**20})
    assert Engine.load(plan.with_suffix(".json")).options == EngineOptions((1, 2, 4), 64, 2, True, True)


def test_timings_are_used_again_unless_they_are_of_another_device(standin: str, bundle: Bundle) -> None:
    plan = build(bundle)
    (cache,) = bundle.engines.glob("*.timing")
    timings = cache.read_bytes()
    assert builds_with(plan) == 0
    build(bundle)
    assert builds_with(plan) == len(timings)
    cache.write_bytes(b"of another driver")
    build(bundle)
    assert builds_with(plan) == 0
    assert cache.read_bytes() == timings


def builds_with(plan: Path) -> int:
    """The bytes of timings that a plan of the stand-in was built with."""
    return int(json.loads(plan.read_bytes().partition(b"\n")[0])["timings"])


def test_ctrl_c_stops_the_build_and_leaves_what_was_there(
    standin: str, fbclip: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle)
    before = {file.name: file.read_bytes() for file in bundle.engines.iterdir()}
    monkeypatch.setenv("STANDIN_INTERRUPT", "1")
    fbclip("export", "--engine", "--bundle", bundle.path, "--batch", "1,2,3", code=128 + signal.SIGINT)
    assert {file.name: file.read_bytes() for file in bundle.engines.iterdir()} == before


def test_what_tensorrt_says_is_one_line_with_the_layer(
    standin: str, fbclip: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_UNBUILDABLE", "blocks.3.attention")
    done = fbclip("export", "--engine", "--bundle", bundle.path, code=1)
    assert "could not build model.onnx" in done.stderr
    assert "blocks.3.attention" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not bundle.engines.exists()


def test_an_operator_that_the_parser_does_not_take(standin: str, bundle: Bundle) -> None:
    path = bundle.graph("fp32")
    graph = onnx.load(path)
    next(node for node in graph.graph.node if node.op_type == "Softmax").op_type = "DFT"
    onnx.save(graph, path)
    files = {**bundle.manifest.files, "model.onnx": sha256(path)}
    damaged = replace(bundle, manifest=replace(bundle.manifest, files=files))
    with pytest.raises(FBClipError, match=r"can't read model.onnx: .*layer .*, DFT\)"):
        build(damaged)


def test_a_build_that_can_not_fit_is_refused_before_it_starts(
    standin: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = bundle.graph("fp32").stat().st_size
    monkeypatch.setattr(builder, "MACHINE", Machine(tmp_path))
    write_memory(tmp_path, 16_000_000, 8_000_000)
    monkeypatch.setenv("STANDIN_FREE_MIB", "100")
    with pytest.raises(
        DeviceError, match=f"{decimal(weights + 100 * builder.MIB)} of 104.9 MB free on the GPU.*smaller workspace"
    ):
        build(bundle, workspace_mib=100)
    write_memory(tmp_path, 16_000_000, 8000)
    with pytest.raises(DeviceError, match=f"{decimal(2 * weights)} of 8.2 MB on the host"):
        build(bundle)
    write_memory(tmp_path, 4_194_304, 12_000)  # as much as the GPU has: it is the same
    with pytest.raises(DeviceError, match=f"{decimal(3 * weights)} of the 12.3 MB that are free for CPU and GPU"):
        build(bundle)
    assert not bundle.engines.exists()
    (tmp_path / "proc/meminfo").unlink()  # not Linux: only the GPU is known
    assert build(bundle).is_file()
    with pytest.raises(DeviceError, match="free on the GPU: stop other programs"):
        build(bundle, workspace_mib=100)


def test_no_gpu(standin: str, fbclip: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_GPU", "")
    assert "no CUDA-capable device" in fbclip("export", "--engine", "--bundle", bundle.path, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "--bundle", EMBEDDED, "--batch", "4,2,1"], "--batch: a batch is MIN,OPT,MAX"),
        (["--engine", "--bundle", EMBEDDED, "--batch", "1,2"], "--batch: a batch is MIN,OPT,MAX"),
        (
            ["--engine", "--bundle", EMBEDDED, "--fp16"],
            "--bundle goes with --engine, --rtx, --triton or --standalone alone",
        ),
        (["--bundle", EMBEDDED], "--bundle goes with --engine, --rtx, --triton or --standalone alone"),
        (["--rtx", "--bundle", EMBEDDED, "--triton", "models"], "Triton runs no TensorRT-RTX engine"),
        (["--rtx", "--bundle", EMBEDDED, "--workspace", "64"], "--rtx takes --batch alone"),
        (["--rtx", "--optimization-level", "2"], "--rtx takes --batch alone"),
        (["--batch", "1,2,4"], "need --engine"),
        (["--engine", "--bundle", EMBEDDED, "--precision", "fp16"], "has no fp16 graph"),
        (["--engine", "--bundle", EMBEDDED, "--precision", "int4"], "--precision: a precision is auto"),
    ],
)
def test_wrong_usage_is_one_line(fbclip: Run, arguments: list[object], message: str) -> None:
    error = fbclip("export", *arguments, code=2).stderr
    assert message in error
    assert error.count("\n") == 1


def other_gpu(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("STANDIN_GPU", "NVIDIA A10")
    return "was built for Stand-in Orin .*this is NVIDIA A10"


def other_capability(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("STANDIN_CAPABILITY", "7.2")
    return r"compute capability 8\.7\), .*this is .*compute capability 7\.2"


def other_release(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    change(plan, tensorrt="8.6.1")
    return r"was built with TensorRT 8\.6\.1; here is"


def other_graph(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    change(plan, graph_sha256="0" * 64)
    return "was built from another graph"


def other_batch(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    change(plan, batch=[2, 4, 8])
    return "takes 2 to 8 images at once, not 1: run .* --batch 1,4,8"


def other_precision(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    change(plan, precision="fp16")
    return r"has no fp32 TensorRT engine \(it has fp16\)"


def no_engine(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    plan.with_suffix(".json").unlink()
    return "has no fp32 TensorRT engine; build it here"


def damaged_plan(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    plan.write_bytes(plan.read_bytes()[:-1])
    return "is missing or damaged"


def damaged_sidecar(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    plan.with_suffix(".json").write_text("{}")
    return "is no sidecar of a plan"


def plan_elsewhere(bundle: Bundle, plan: Path, patch: pytest.MonkeyPatch) -> str:
    elsewhere = bundle.path.parent / "elsewhere.plan"
    plan.rename(elsewhere)
    plan.symlink_to(elsewhere)
    return "paths in a bundle stay inside it"


def change(plan: Path, **values: object) -> None:
    sidecar = plan.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **values}))


@pytest.mark.parametrize(
    "misfit",
    [
        other_gpu,
        other_capability,
        other_release,
        other_graph,
        other_batch,
        other_precision,
        no_engine,
        damaged_plan,
        damaged_sidecar,
        plan_elsewhere,
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_it_is_read(
    standin: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, misfit: object
) -> None:
    plan = build(bundle)
    message = misfit(bundle, plan, monkeypatch)  # type: ignore[operator]
    import tensorrt

    with pytest.raises((DeviceError, BundleError), match=message) as refusal:
        make_backend(bundle, "tensorrt", "fp32")
    assert tensorrt.deserialised == []
    if misfit is not plan_elsewhere:
        assert "fbclip export --engine" in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "here", "fits"),
    [
        (EngineOptions(), ORIN, True),
        (EngineOptions(), replace(ORIN, gpu="Thor"), False),
        (EngineOptions(), replace(ORIN, tensorrt="10.3.1"), False),
        (EngineOptions(hardware_compatible=True), replace(ORIN, gpu="A10", compute_capability="8.6"), True),
        (EngineOptions(hardware_compatible=True), replace(ORIN, gpu="B200", compute_capability="10.0"), True),
        (EngineOptions(hardware_compatible=True), replace(ORIN, gpu="T4", compute_capability="7.5"), False),
        (EngineOptions(hardware_compatible=True), replace(ORIN, tensorrt="10.4.0"), False),
        (EngineOptions(version_compatible=True), replace(ORIN, tensorrt="10.16.1"), True),
        (EngineOptions(version_compatible=True), replace(ORIN, tensorrt="10.2.9"), False),
        (EngineOptions(version_compatible=True), replace(ORIN, tensorrt="11.4.0"), False),
        (EngineOptions(version_compatible=True), replace(ORIN, gpu="Thor"), False),
    ],
)
def test_where_a_plan_runs(options: EngineOptions, here: Platform, fits: bool) -> None:
    engine = Engine(ORIN, "fp16", options, "graph", "plan")
    assert (engine.mismatch(here, "graph") is None) == fits


def test_a_plan_for_later_releases_runs_on_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, standins("10.3.0", patch):
        build(bundle, version_compatible=True)
    image = np.zeros((1, 192, 192, 3), np.uint8)
    with monkeypatch.context() as patch, standins("10.16.1", patch):
        backend, _ = make_backend(bundle, "tensorrt")
        on_cpu = make_backend(bundle, "cpu")[0].run(image)[0]  # another graph of the same model
        assert backend.run(image)[0] == pytest.approx(on_cpu, abs=1e-5)
        del backend


SIDECAR = Engine(ORIN, "fp16", EngineOptions((1, 2, 4), 64, 2), "0" * 64, "1" * 64)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": [1, 2]},
        {"batch": [4, 2, 1]},
        {"batch": [0, 1, 1]},
        {"batch": ["1", 1, 1]},
        {"batch": [1, 1, 10**30]},
        {"precision": "fp64"},
        {"graph_sha256": "x"},
        {"plan_sha256": None},
        {"tensorrt": "ten"},
        {"tensorrt": "9" * 5000},
        {"compute_capability": 8.7},
        {"gpu": "two\nlines"},
        {"gpu": ""},
        {"workspace_mib": "64"},
        {"workspace_mib": -1},
        {"optimization_level": 9},
        {"hardware_compatible": 1},
        {"stranger": 1},
    ],
)
def test_impossible_sidecars(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "x.json"
    path.write_text(SIDECAR.to_json())
    assert Engine.load(path) == SIDECAR
    path.write_text(json.dumps({**json.loads(SIDECAR.to_json()), **change}))
    with pytest.raises(BundleError, match=r"is no sidecar of a plan: [^\n]* fbclip export --engine$"):
        Engine.load(path)


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 200_000, b"[1]", b"null", b'{"gpu": NaN}', b" " * 2**17, None])
def test_texts_that_are_no_sidecar(tmp_path: Path, text: bytes | None) -> None:
    path = tmp_path / "x.json"
    if text is None:
        os.mkfifo(path)
    else:
        path.write_bytes(text)
    with pytest.raises(BundleError, match="is no sidecar of a plan"):
        Engine.load(path)


def test_engines_stay_in_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle.path / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="stay inside it"):
        bundle.engine("fp32", ORIN)


@pytest.mark.parametrize("suffix", [".plan", ".json", ".timing"])
def test_engines_are_not_written_through_links(standin: str, bundle: Bundle, tmp_path: Path, suffix: str) -> None:
    build(bundle)
    (written,) = bundle.engines.glob(f"*{suffix}")
    elsewhere = written.rename(tmp_path / "elsewhere")
    before = elsewhere.read_bytes()
    written.symlink_to(elsewhere)
    with pytest.raises(BundleError, match="stay inside it"):
        build(bundle)
    assert elsewhere.read_bytes() == before


def test_a_bundle_that_can_not_be_written_to(bundle: Bundle) -> None:
    bundle.engines.write_text("a file, where a folder should be")
    with pytest.raises(UsageError, match="copy the bundle first"):
        build(bundle)
