"""`fbclip bench` as installed on the embedded model; counts by hand, verdicts on recorded runs, made-up machines."""

from __future__ import annotations

import csv
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.errors import DeviceError, UsageError
from fbclip.files import sha256
from fbclip.model.backend import bundle_backend
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend
from fbclip.runtime.bench.compare import compare, parse_share, ratio_interval, read_report
from fbclip.runtime.bench.contenders import Contender
from fbclip.runtime.bench.meters import Meters, Tegrastats, board_watts, processor
from fbclip.runtime.bench.profile import STAGES, count_operations, read_profile
from fbclip.runtime.bench.results import BenchReport, Warmup
from fbclip.runtime.bench.roofline import COPIED_SIDE, DeviceOperator, device_rates, least_seconds, one_node
from fbclip.runtime.bench.run import Options, regularly, runs_of_round, sample_frames, turn_order
from fbclip.runtime.bench.runner import Spec, is_stable
from fbclip.runtime.host import Machine, ProcessFailed
from fbclip.runtime.workers import Worker
from helpers.tiny import tiny_bundle
from helpers.waiting import PATIENCE_S

RESULT = {  # what scripts and --compare read of a result
    "backend": str,
    "precision": str,
    "batch": int,
    "device": str,
    "rounds_ms": list,
    "median_ms": float,
    "p90_ms": float,
    "p99_ms": float,
    "images_per_s": float,
    "cold_start_s": float,
    "warmup": dict,
    "cores_used": float,
    "peak_host_mb": float,
    "joules_per_image": dict,
    "gflops": float,
    "limit_ms": float,
    "share_of_limit": float,
    "drift": dict,
}


def test_side_by_side_then_compared(fbclip: Run, tmp_path: Path) -> None:
    arguments = ["--backends", "torch-reference,onnxruntime", "--runs", "3", "--frame-size", "90x120", "--profile"]
    before = json.loads(fbclip("bench", *arguments, "--json", "-").stdout)
    assert before["schema"] == "fbclip-bench/1"
    assert before["frames"]["size"] == [90, 120]
    assert before["order"] == [[0, 1], [1, 0], [0, 1]]
    reference, deployed = before["results"]
    assert (reference["backend"], deployed["backend"]) == ("torch-reference", "onnxruntime")
    for result in before["results"]:
        assert {name: type(result[name]) for name in RESULT} == RESULT
        runs = np.concatenate(result["rounds_ms"])
        assert len(runs) == before["runs"] == 3
        assert result["median_ms"] == pytest.approx(np.median(runs), abs=1e-3)
        assert result["images_per_s"] == pytest.approx(1e3 / runs.mean(), rel=1e-3)
    assert before["drift_from"] == {"backend": "torch-reference", "precision": "fp32", "batch": 1}
    assert reference["drift"]["map_max"] == 0 < deployed["drift"]["map_max"] < 1e-4
    assert reference["peak_host_mb"] > deployed["peak_host_mb"] > 50
    stages = deployed["profile"]["stages"]
    assert [stage["stage"] for stage in stages] == list(STAGES)
    assert sum(stage["share"] for stage in stages) == pytest.approx(1)
    assert all(stage["ms"] > 0 for stage in stages)
    assert deployed["profile"]["nodes"].keys() == {"CPUExecutionProvider"}
    assert (
        sum(o["nodes"] for o in deployed["profile"]["operators"])
        == deployed["profile"]["nodes"]["CPUExecutionProvider"]
    )
    assert reference["profile"] is None

    folder = tmp_path / "runs/bench/exp"
    assert json.loads((folder / "bench.json").read_text()) == before
    rows = list(csv.DictReader((folder / "bench.csv").open()))
    assert [float(row["median_ms"]) for row in rows] == [result["median_ms"] for result in before["results"]]
    page = (folder / "bench.html").read_text()
    assert page.count("<svg") == 1
    assert 'src="http' not in page and 'href="http' not in page
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")

    old, new = folder / "bench.json", tmp_path / "slower.json"
    assert "same" in fbclip("bench", "--compare", old, old, "--fail-over", "5%").stdout
    deployed["rounds_ms"] = [[30.0], [31.0], [32.0]]  # of a quiet machine: three noisy rounds prove nothing
    old.write_text(json.dumps(before))
    deployed["rounds_ms"] = [[3 * ms for ms in one] for one in deployed["rounds_ms"]]
    new.write_text(json.dumps(before))
    assert "3.000" in fbclip("bench", "--compare", old, new, "--fail-over", "5%", code=1).stdout
    assert "faster" in fbclip("bench", "--compare", new, old, "--fail-over", "0").stdout


@pytest.mark.usefixtures("one_thread")
def test_torch_compile_runs_the_same_model() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 192, 192, 3), np.uint8)
    eager, compiled = (bundle_backend(Bundle.load(), kind, None, None, None) for kind in ("torch", "torch-compile"))
    with torch.compiler.set_stance("force_eager"):  # compiling itself takes half a minute
        for one, other in zip(eager.run(frames), compiled.run(frames), strict=True):
            np.testing.assert_array_equal(one, other)
    assert compiled.forward is not eager.forward
    assert type(compiled.forward) is not type(eager.forward)


def test_half_precision_alone_is_compared_with_the_float32_of_its_bundle(fbclip: Run, tmp_path: Path) -> None:
    """Where nothing else was measured, and no torch. The map is the image's brightness, in "half precision" 1 % less."""
    path, other = tiny_bundle(tmp_path), tiny_bundle(tmp_path / "other", gain=0.99)
    shutil.copy(other / "model.onnx", path / "model.fp16.onnx")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["precisions"].append("fp16")
    manifest["files"]["model.fp16.onnx"] = sha256(path / "model.fp16.onnx")
    (path / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--bundle", path, "--backends", "onnxruntime", "--precision", "fp16", "--runs", "3"]
    assert "difference from onnxruntime fp32" in fbclip("bench", *arguments, "--json", "out.json").stdout
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["drift_from"] == {"backend": "onnxruntime", "precision": "fp32", "batch": 1}
    (result,) = values["results"]
    brightest = sample_frames(Bundle.load(), None).mean(-1).max() / 255
    assert result["drift"]["map_max"] == pytest.approx(0.01 * brightest, rel=1e-3)
    assert result["drift"]["frames"] == 4


def test_wrong_usage(fbclip: Run, tmp_path: Path) -> None:
    text = tmp_path / "no.json"
    text.write_text('{"schema": "fbclip-bench/0"}')
    copy = tmp_path / "copy.fbclip"
    shutil.copytree(EMBEDDED, copy)
    np.save(copy / "text.npy", -Bundle.load().text)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["text.npy"] = sha256(copy / "text.npy")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for arguments, message in (
        (["--backends", "onnxruntime-cuda"], "CUDAExecutionProvider"),
        (["--precision", "fp16"], "fp32 in this bundle"),
        (["--bundle", copy, "--backends", "torch"], "which checkpoint is it"),
        (["--compare", text, text], "reads fbclip-bench/1"),
    ):
        assert message in fbclip("bench", *arguments, code=2).stderr
    with pytest.raises(UsageError, match="got tf"):
        Options(backends=("onnxruntime", "tf"))
    with pytest.raises(UsageError, match=r"bench\.json of two runs"):
        read_report(tmp_path)


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="has none") as failed:
        Worker("fbclip.runtime.bench.profile:Counting", str(tmp_path), "")
    assert failed.value.usage
    with pytest.raises(ProcessFailed, match="nothing"):
        Worker("fbclip.runtime.bench.profile:nothing")
    with pytest.raises(ProcessFailed, match=r"did not answer within 0\.1 s"):
        Worker("time:sleep", 60, patience=0.1)
    with pytest.raises(ProcessFailed, match="crashed with signal 6"):
        Worker("os:abort")


@given(st.integers(1, 8), st.integers(1, 30))
def test_everybody_runs_once_a_round_and_follows_everybody(count: int, runs: int) -> None:
    rounds = min(10, runs)
    assert sum(runs_of_round(runs, rounds, number) for number in range(rounds)) == runs
    orders = [turn_order(count, number) for number in range(count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert sorted(order[0] for order in orders) == list(range(count))


def node(name: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(name.split("/")[1].split()[0], inputs, [output], name=name, **attributes)


def test_operations_counted_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "kernel": rng.random((6, 1, 2, 2)),  # 6 filters of one of 3 groups
        "matrix": rng.random((16, 5)),
        "other": rng.random((7, 5)),
        "text_matrix": rng.random((2, 3)),
    }
    shape = {"flat": np.array([6, 16]), "single": np.array([1])}
    graph = helper.make_graph(
        [
            node("input/Cast 1", ["image"], "pixels", to=TensorProto.FLOAT),
            node("input/Transpose 1", ["pixels"], "planes", perm=[0, 3, 1, 2]),
            node("patch embedding/Conv 1", ["planes", "kernel"], "patches", strides=[2, 2], group=3),
            node("block 2/Reshape 1", ["patches", "flat"], "rows"),
            node("separation/MatMul 1", ["rows", "matrix"], "mixed"),
            node("scores/Gemm 1", ["mixed", "other"], "scored", transB=1),
            node("scores/Relu 1", ["scored"], "anomaly_map"),
            node("scores/MatMul 2", ["text_matrix", "text"], "score"),
        ],
        "graph",
        [
            helper.make_tensor_value_info("image", TensorProto.UINT8, (1, 8, 8, 3)),
            helper.make_tensor_value_info("text", TensorProto.FLOAT, (3, 4)),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("score", "anomaly_map")],
        [
            *(numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items()),
            *(numpy_helper.from_array(v, name) for name, v in shape.items() if name == "flat"),
        ],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    counts = count_operations(path, {"image": np.zeros((1, 8, 8, 3), np.uint8), "text": np.ones((3, 4), np.float32)})
    assert counts == {
        "pre and post": 0,
        "backbone": 2 * (6 * 4 * 4) * (1 * 2 * 2),
        "views": 0,
        "attention": 2 * (6 * 5) * 16,
        "suppression and scoring": 2 * (6 * 7) * 5 + 2 * (2 * 4) * 3,
        "memory": 0,
    }


def test_the_stage_of_a_node_without_one_is_that_before() -> None:
    arguments = {"op_name": "MatMul", "input_type_shape": [{"float": [2, 3]}], "output_type_shape": [{"float": [2, 4]}]}
    names = ("block 12/MatMul 1", "Gather_token_3", "separation/MatMul 1", "SkipLayerNormalization", "map/MatMul 1")
    events = [{"cat": "Node", "name": f"{n}_kernel_time", "dur": 2, "args": arguments} for n in names]
    events.insert(1, {"cat": "Session", "name": "session_initialization", "dur": 9, "args": {}})
    nodes = read_profile(events)
    assert [n.stage for n in nodes] == ["backbone", "backbone", "attention", "attention", "pre and post"]
    assert nodes[0].operations == 2 * 2 * 4 * 3
    assert nodes[0].seconds == pytest.approx(2e-6)


def test_the_timed_product_is_one() -> None:
    a, b = (np.random.default_rng(seed).random((5, 5), np.float32) for seed in (0, 1))
    for operator, expected in (("MatMul", a @ b), ("Add", a + b)):
        session = ort.InferenceSession(one_node(operator), providers=["CPUExecutionProvider"])
        onnx.checker.check_model(onnx.load_from_string(one_node(operator)))
        assert np.allclose(session.run(None, {"a": a, "b": b})[0], expected)


def test_operators_on_matrices_that_stay_on_the_device() -> None:
    """As a GPU's rates are measured; on the CPU, which has no need of it."""
    for dtype in (np.float32, np.float16):
        product = DeviceOperator("MatMul", dtype, 8, "cpu")
        product.resize(16)
        product()
        (found,) = product.binding.copy_outputs_to_cpu()
        a = np.random.default_rng(0).random((16, 16), np.float32).astype(dtype)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, a @ a, rtol=1e-2)
    with pytest.raises(DeviceError, match="does not run on cpu"):
        DeviceOperator("NoOperator", np.float32, 8, "cpu")
    assert 3 * 4 * COPIED_SIDE**2 < 2**29  # of a small device's memory
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        assert device_rates("cuda") == {}


@pytest.mark.gpu
def test_rates_of_a_gpu() -> None:
    if not (rates := device_rates("cuda")):
        pytest.skip("ONNX Runtime has no GPU here")
    assert set(rates) == {"cuda fp32 onnxruntime", "cuda fp16 onnxruntime", "cuda copy"}
    assert all(measure() > 1e9 for measure in rates.values())


def test_a_long_step_is_told_again_and_again() -> None:
    told = threading.Semaphore(0)
    with regularly(told.release, every_s=0.01):
        assert all(told.acquire(timeout=PATIENCE_S) for _ in range(3))


def test_the_roofline_has_two_sides() -> None:
    assert least_seconds(100.0, 50.0, 10.0, 100.0) == 2
    assert least_seconds(100.0, 50.0, 1000.0, 100.0) == 10
    assert least_seconds(100.0, 50.0, 1000.0, None) == 2


def test_warm_is_when_three_runs_agree() -> None:
    assert is_stable([9.0, 1.0, 1.02, 1.04])
    assert not is_stable([1.0, 1.02, 1.1])
    assert not is_stable([1.0, 1.0])


def test_device_times_by_the_clock() -> None:
    bundle = Bundle.load()
    side = bundle.manifest.image_size
    image = np.zeros((1, side, side, 3), np.uint8)
    with OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text, "cpu", bundle.manifest.memory_shape) as backend:
        assert backend.device_times(image) is None
        times = [backend._clocked(image) for _ in range(20)]
    compute, download = (min(one[name] for one in times) for name in ("compute", "download"))  # undisturbed ones
    assert compute > 10 * download > 0


def recorded_rounds(seed: int, milliseconds: float, spread: float = 0.03) -> list[list[float]]:
    """Ten rounds of five runs; a round is slow or quick as a whole, and each run a little."""
    rng = np.random.default_rng(seed)
    return [(milliseconds * rng.lognormal(0, spread) * rng.lognormal(0, spread / 3, 5)).tolist() for _ in range(10)]


def test_what_is_noise_and_what_is_not() -> None:
    """Same medians: the interval holds 1 about as often as it promises. A fifth slower: always seen, and rarely missed
    by the interval."""
    same, slower = (
        [ratio_interval(recorded_rounds(2 * s, 30), recorded_rounds(2 * s + 1, ms)) for s in range(40)]
        for ms in (30, 36)
    )
    assert sum(low <= 1 <= high for low, high in same) >= 34
    assert all(low > 1 for low, _ in slower)
    assert sum(low <= 1.2 <= high for low, high in slower) >= 34


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 10), st.integers(0, 100))
def test_an_interval_scales_with_the_times(factor: float, seed: int) -> None:
    before, after = recorded_rounds(seed, 20), recorded_rounds(seed + 1, 25)
    low, high = ratio_interval(before, after)
    scaled = ratio_interval(before, [[factor * ms for ms in one] for one in after])
    assert scaled == pytest.approx((factor * low, factor * high))
    median_ratio = np.median(np.concatenate(after)) / np.median(np.concatenate(before))
    assert low <= median_ratio <= high


RECORDED = Path(__file__).parents[3] / "benchmarks/results"


def report(**changes: Any) -> BenchReport:
    """A recorded benchmark with other values here and there, as JSON has them."""
    recorded = json.loads((RECORDED / "bench_nano.json").read_text())["reports"]
    values = next(iter(recorded.values()))
    result = {**values["results"][0], "backend": "onnxruntime", "rounds_ms": recorded_rounds(0, 30)}
    values = {
        **values,
        "frames": {"size": [9, 9], "count": 4, "source": "sample images"},
        "bundle": {**values["bundle"], "graphs": {"fp32": "a"}},
        "rates": {"cpu fp32 numpy": 1e11, "cpu copy": 1e10},
        "results": [result],
    }
    return BenchReport.from_dict({**values, **changes})


def test_recorded_benchmarks_are_read_whole() -> None:
    for path in sorted(RECORDED.glob("bench_*.json")):
        for values in json.loads(path.read_text())["reports"].values():
            report = BenchReport.from_dict({**values, "of a later version": 1})
            values["bundle"].setdefault("memory", None)  # older reports are of bundles without one
            for result in values["results"]:
                result |= {"launches": None, "too_coarse": None}
                if result["profile"]:
                    result["profile"]["nodes"] = None
            assert json.loads(json.dumps(report.to_dict())) == values
    del values["frames"]["size"]
    with pytest.raises(ValueError, match="frames lacks size"):
        BenchReport.from_dict(values)


def test_other_circumstances_are_told_and_other_work_is_refused() -> None:
    graphs = {**report().to_dict()["bundle"], "graphs": {"fp32": "b"}}
    slower = report(rates={"cpu fp32 numpy": 0.8e11, "cpu copy": 1e10}, bundle=graphs)
    assert compare(report(), slower).notes == (
        "the graphs are not the same",
        "the machine itself multiplied matrices 0.80 times as quickly as before",
    )
    with pytest.raises(UsageError, match="frames are the same"):
        compare(report(), report(frames={"size": [9, 10], "count": 4, "source": "sample images"}))
    vanished = compare(report(), report(results=[]))
    assert vanished.gone == ("onnxruntime fp32 batch 1",)
    assert vanished.fails(1.0)
    few = {**report().to_dict()["results"][0], "rounds_ms": [[30.0], [31.0]]}
    with pytest.raises(UsageError, match="3 rounds"):
        compare(report(), report(results=[few]))


def test_shares() -> None:
    assert parse_share("5%") == parse_share("5") == 0.05
    for text in ("five", "-1%", "nan"):
        with pytest.raises(UsageError, match="percentage"):
            parse_share(text)


def test_instruments_of_a_made_up_machine(tmp_path: Path) -> None:
    files = {
        "sys/class/powercap/intel-rapl:0/name": "package-0\n",
        "sys/class/powercap/intel-rapl:0/energy_uj": "2500000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "3000000\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2000000\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
        "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4\n",
        "proc/stat": "cpu  100 20 30 4000 50 0 0 200 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    meters = Meters(Machine(tmp_path))
    assert meters.joules() == {"RAPL package-0": pytest.approx(2.5)}
    assert meters.clocks_mhz() == {"cpu": 2500}
    assert meters.throttle_count() == 7
    assert meters.machine.busy_seconds() == pytest.approx((1.5, 2.0))
    nothing = Meters(Machine(tmp_path / "nowhere"))
    assert (nothing.joules(), nothing.clocks_mhz(), nothing.throttle_count(), nothing.machine.busy_seconds()) == (
        {},
        {},
        None,
        None,
    )
    cpuinfo = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n"
    assert processor(cpuinfo) == "AMD EPYC (family 26, model 2)"
    assert processor("Serial : 0") == ""


class Simulated:
    """A subject of 10 W whose runs take 5 ms, beside a meter that tells a new value every 0.1 s, or never."""

    ready: ClassVar[dict[str, Any]] = {"device": "cpu", "reads": 1}
    pid, start_seconds = 0, 1.0

    def __init__(self, root: Path, watts: float) -> None:
        self.file, self.watts, self.seconds = root / "sys/class/powercap/intel-rapl:0/energy_uj", watts, 0.0
        self.file.parent.mkdir(parents=True)
        (self.file.parent / "name").write_text("package-0")
        self.file.write_text("0")

    def ask(self, method: str, runs: int = 0) -> dict[str, Any]:
        if method == "finish":
            return {"peak_host_mb": 1.0, "device_ms": None, "launches": None}
        self.seconds += 0.005 * (runs + 1)
        self.file.write_text(str(round(1e6 * self.watts * int(self.seconds / 0.1) * 0.1)))
        return {"seconds": [0.005] * runs, "wall_s": 0.005 * (runs + 1), "cpu_s": 0.0, "runs": runs + 1}


@pytest.mark.parametrize("watts", [10.0, 0.0])
def test_short_turns_and_a_coarse_meter(tmp_path: Path, watts: float) -> None:
    simulated: Any = Simulated(tmp_path, watts)
    contender = Contender("onnxruntime", Spec("cpu", "fp32", 2, "", "", ""), simulated, Warmup(3, True, 0.005))
    meters = Meters(Machine(tmp_path))
    for _ in range(3):
        contender.turn(5, meters)
    contender.finish(meters)
    result = contender.result({"cpu fp32 numpy": 1e9}, 10, None)
    if watts:
        assert result.joules_per_image == {"RAPL package-0": pytest.approx(watts * 0.005 / 2, rel=0.05)}
        assert result.too_coarse is None
    else:
        assert result.joules_per_image == {}
        assert result.too_coarse == ("RAPL package-0",)


def test_power_of_jetsons(tmp_path: Path) -> None:
    nano = "RAM 2448/7620MB (lfb 2x4MB) SWAP 0/3810MB CPU [2%@729] GR3D_FREQ 0% VDD_IN 4940mW/4900mW VDD_CPU_GPU_CV 560mW/5mW"
    agx = "RAM 1/30536MB VDD_GPU_SOC 2401mW/2401mW VDD_CPU_CV 401mW/401mW VIN_SYS_5V0 3024mW/3024mW"
    older = "RAM 1/2MB POM_5V_IN 2500/2400 POM_5V_GPU 80/80"
    assert [board_watts(line) for line in (nano, agx, older)] == pytest.approx([4.94, 5.826, 2.5])
    command, gate = tmp_path / "tegrastats", tmp_path / "gate"
    os.mkfifo(gate)
    speak = f"echo '{nano}'"
    command.write_text(f"#!/bin/sh\ntrap '' TERM\n{speak}\nread line < {gate}\n{speak}\n")  # ends when it has spoken
    command.chmod(0o755)
    began = time.perf_counter()
    meter = Tegrastats(str(tmp_path))
    between = time.perf_counter()
    with gate.open("w") as opened:  # once it is read
        least = time.perf_counter() - between
        opened.write("go on\n")
    meter.close()
    assert 0 < least * 4.94 <= meter.joules <= (time.perf_counter() - began) * 4.94
    command.write_text("#!/bin/sh\n")
    with pytest.raises(OSError, match="says nothing"):
        Tegrastats(str(tmp_path))
