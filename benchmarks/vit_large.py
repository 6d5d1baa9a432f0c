"""ViT-L/14 at 518 px with generated weights, float32 on the CPU: time, memory and export.

python benchmarks/vit_large.py export       # runs/vit-large.fbclip: seconds, peak memory, parity
python benchmarks/vit_large.py half         # the same with the float16 graph
python benchmarks/vit_large.py quantize     # both 8-bit forms of the exported graph: seconds, sizes, nodes, deviation
python benchmarks/vit_large.py int8         # interleaved rounds in ONNX Runtime: float32 and both 8-bit forms
python benchmarks/vit_large.py time [N]     # N interleaved rounds: literal reference, model, ONNX Runtime (if exported), and the
                                            # rate of plain matrix products by torch, numpy and ONNX Runtime
python benchmarks/vit_large.py memory RUN   # peak of loading and one forward pass: reference, model, onnxruntime or portable
python benchmarks/vit_large.py profile [portable]  # ONNX Runtime's time by stage and operator, for the CPU's or the portable graph
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from open_clip import CLIP

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from fbclip.bundle import DYNAMIC, IMAGE, STATIC, TEXT, Bundle
from fbclip.export.bundle import Deployment, export_bundle
from fbclip.export.graph import OPSET
from fbclip.export.parity import Proof
from fbclip.export.precision.int8 import Quantizer
from fbclip.export.report import Steps
from fbclip.export.stages import compare_stages
from fbclip.export.tensorrt_rules import check_graph
from fbclip.memory import Tensors
from fbclip.model import reference
from fbclip.model.clip import ClipConfig, build_clip, clip_config
from fbclip.model.config import Config, default_config
from fbclip.model.network import FBCLIP, HEAD_WIDTH, HEADS
from fbclip.resample import upsampling_matrix
from fbclip.runtime.backends.onnx import UNWANTED_FUSIONS, OnnxRuntimeBackend
from helpers import golden

PRODUCT = (1370, 1024, 4096)  # of the rate: the first of a block's two largest
ROUNDS = 5
WARM_UP, REPEATS = 10, 15  # products of one measurement
BUNDLE = Path("runs/vit-large.fbclip")
QUANTIZED = {form: BUNDLE.with_suffix(f".{form}.onnx") for form in (DYNAMIC, STATIC)}
Run = Callable[[], tuple[NDArray[Any], NDArray[Any]]]


def large_model() -> FBCLIP:
    """ViT-L-14-336 with weights by the rule of the recorded numbers."""
    return generated_model(default_config(clip_config("ViT-L-14-336", "openai")))


def generated_clip(config: ClipConfig) -> CLIP:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build_clip(config, None).state_dict().items()}
    return build_clip(config, {name: golden.weight(name, shape) for name, shape in shapes.items()})


def generated_model(config: Config, clip: CLIP | None = None) -> FBCLIP:
    """Any model with weights by the rule of the recorded numbers; of several models of one CLIP, make that once."""
    clip = clip or generated_clip(config.clip)
    model = FBCLIP(config, clip)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("text.", "visual.tower.")):
                parameter.copy_(golden.weight(name, tuple(parameter.shape)))
    return model.eval()


def frame() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (1, 518, 518, 3), np.uint8)


def run_torch(which: str) -> Run:
    """From a uint8 frame to score and map; the text tower is gone, as it is on a device."""
    model = large_model()
    with torch.no_grad():
        text = model.encode_text()
    visual, mean, std = model.visual, model.config.clip.mean, model.config.clip.std
    upsampling = upsampling_matrix(model.config.image_size, model.config.grid)

    @torch.inference_mode()
    def run() -> tuple[NDArray[Any], NDArray[Any]]:
        pixels = (frame() / np.float32(255) - np.float32(mean)) / np.float32(std)
        image = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
        score, patch_map = visual(image, text) if which == "model" else reference.forward(visual, image, text)
        return score.numpy(), upsampling @ patch_map.numpy() @ upsampling.T

    return run


def graph_of(bundle: Bundle, which: str) -> Path:
    return bundle.graph("fp32") if which == "portable" else bundle.graph_for("cpu", "fp32")


def feed_of(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """The inputs of a graph: a frame, and no memory of good parts."""
    assert bundle.manifest.memory_shape
    return {IMAGE: frame(), TEXT: bundle.text, **Tensors.neutral(bundle.manifest.memory_shape).named()}


def make(which: str) -> Run:
    if which in ("reference", "model"):
        return run_torch(which)
    bundle = Bundle.load(BUNDLE)
    backend = OnnxRuntimeBackend(graph_of(bundle, which), bundle.text, memory=bundle.manifest.memory_shape)
    return lambda: backend.run(frame())


def operations(config: Config | None = None) -> float:
    """Necessary for one image: two per multiplication and addition of every product that the method can't do without."""
    config = config or default_config(clip_config("ViT-L-14-336"))
    n, c, layers = config.grid**2 + 1, config.clip.vision["width"], config.clip.layers
    inner, outputs = HEADS * HEAD_WIDTH, 3 * len(config.feature_layers)
    joint, patch = config.clip.model["embed_dim"], 3 * config.clip.patch_size**2
    block = 2 * n * c * (4 + 2 * config.clip.vision.get("mlp_ratio", 4)) * c + 4 * n * n * c
    branch = 2 * n * c * 4 * inner + 4 * n * n * inner
    separation = 2 * n * c * c / 2 + 2 * branch
    return layers * block + outputs * (separation + 2 * n * c * joint) + 2 * (n - 1) * patch * c


def products() -> dict[str, Callable[[], object]]:
    """The same matrix product by each library, into memory that is there already."""
    m, k, n = PRODUCT
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    out = np.empty((m, n), np.float32)
    tensors = [torch.from_numpy(x) for x in (a, b, out)]
    node = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape) for name, x in (("a", a), ("c", out))
    ]
    graph = onnx.helper.make_graph([node], "product", ends[:1], ends[1:], [onnx.numpy_helper.from_array(b, "b")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("a", a)
    binding.bind_ortvalue_output("c", ort.OrtValue.ortvalue_from_numpy(out))
    return {
        "torch": lambda: torch.mm(tensors[0], tensors[1], out=tensors[2]),
        "numpy": lambda: np.matmul(a, b, out=out),
        "onnxruntime": lambda: session.run_with_iobinding(binding),
    }


def rate_of(product: Callable[[], object]) -> float:
    """GFLOP/s of a product, the median of some; the first ones run beside other libraries' threads, still spinning."""
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * math.prod(PRODUCT) / statistics.median(seconds[WARM_UP:]) / 1e9


def compare_times(rounds: int) -> dict[str, Any]:
    names = ["reference", "model", *(["onnxruntime"] if BUNDLE.exists() else [])]
    multiply = products()
    rates: dict[str, list[float]] = {name: [] for name in multiply}

    def measure_rates() -> None:
        for name, product in multiply.items():
            rates[name].append(rate_of(product))

    seconds, results = interleave({name: make(name) for name in names}, rounds, measure_rates)
    fastest = [max(of_round) for of_round in zip(*rates.values(), strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    score, anomaly_map = results["model"]
    return {
        **timings(seconds),
        "gflop": round(operations() / 1e9, 1),
        "product_gflop_s": {name: round(statistics.median(values)) for name, values in rates.items()},
        "all_product_gflop_s": {name: [round(v) for v in values] for name, values in rates.items()},
        "share_of_the_fastest_product": {  # of the same round, as the machine's speed moves; the median
            name: round(statistics.median(operations() / 1e9 / t / r for t, r in zip(values, fastest, strict=True)), 3)
            for name, values in seconds.items()
        },
        "faster_than_reference": {name: round(medians["reference"] / value, 2) for name, value in medians.items()},
        "largest_difference_from_model": {
            name: float(max(np.abs(s - score).max(), np.abs(m - anomaly_map).max())) for name, (s, m) in results.items()
        },
    }


def compare_int8() -> dict[str, Any]:
    bundle = Bundle.load(BUNDLE)
    graphs = {"float32": bundle.graph_for("cpu", "fp32"), **QUANTIZED}  # what a CPU runs of either
    backends = {
        name: OnnxRuntimeBackend(graph, bundle.text, memory=bundle.manifest.memory_shape)
        for name, graph in graphs.items()
    }
    seconds, results = interleave({name: lambda b=b: b.run(frame()) for name, b in backends.items()}, ROUNDS)
    float32 = statistics.median(seconds["float32"])
    score, anomaly_map = results["float32"]
    return {
        **timings(seconds),
        "faster_than_float32_by": {name: round(float32 / statistics.median(s), 3) for name, s in seconds.items()},
        "score_drift": {name: float(np.abs(s - score).max()) for name, (s, _) in results.items()},
        "map_drift": {name: float(np.abs(m - anomaly_map).max()) for name, (_, m) in results.items()},
    }


def quantize() -> dict[str, Any]:
    """Both 8-bit forms of the exported float32 graph, written beside its bundle."""
    bundle = Bundle.load(BUNDLE)
    figures = {}
    for form, path in QUANTIZED.items():
        with tempfile.TemporaryDirectory(dir=BUNDLE.parent) as folder:
            start = time.perf_counter()
            Quantizer(bundle.graph("fp32"), form, [feed_of(bundle)], Path(folder)).write(path)
            seconds = time.perf_counter() - start
        stages = compare_stages("int8", bundle.graph("fp32"), path, bundle.text, frame())
        figures[form] = {
            "seconds": round(seconds, 1),
            "megabytes": round(path.stat().st_size / 1e6),
            "nodes": check_graph(path, for_tensorrt=form == STATIC),
            "stages": {stage.name: round(stage.error, 5) for stage in stages},
        }
    return {**figures, "peak_mb": memory_mb("VmHWM")}


def interleave(
    runs: Mapping[str, Run], rounds: int, after_round: Callable[[], None] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each run in rounds of all, and what they gave in a first round that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {name: run() for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        after_round()
    return seconds, results


def timings(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    return {
        "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "all": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
    }


def measure_memory(which: str) -> dict[str, Any]:
    imported = memory_mb("VmRSS")
    run = make(which)
    loading, before = memory_mb("VmHWM"), memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (man 5 proc)
    run()
    peak = memory_mb("VmHWM")
    return {
        "run": which,
        "imported_mb": imported,
        "peak_of_loading_mb": loading,
        "before_mb": before,
        "peak_mb": peak,
        "forward_mb": peak - before,
    }


def profile(which: str) -> dict[str, Any]:
    """Milliseconds of the third run, by stage and operator; the blocks together."""
    bundle = Bundle.load(BUNDLE)
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix, options.log_severity_level = True, "/tmp/fbclip-profile", 3
    unwanted = UNWANTED_FUSIONS if which == "onnxruntime" else []
    session = ort.InferenceSession(
        graph_of(bundle, which), options, providers=["CPUExecutionProvider"], disabled_optimizers=unwanted
    )
    for _ in range(3):
        session.run(None, feed_of(bundle))
    path = Path(session.end_profiling())
    kernels = [e for e in json.loads(path.read_text()) if e["name"].endswith("_kernel_time")]
    path.unlink()
    last = kernels[len(kernels) // 3 * 2 :]
    stages: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for event in last:
        stage = re.sub(r"^block \d+", "blocks", event["name"].split("/")[0]) if "/" in event["name"] else "fused"
        stages[stage] += event["dur"] / 1e3
        operators[f"{stage}/{event['args']['op_name']}"] += event["dur"] / 1e3
    return {
        "graph": graph_of(bundle, which).name,
        "nodes": len(last),
        "total_ms": round(sum(stages.values())),
        "stages_ms": {name: round(value, 1) for name, value in stages.most_common()},
        "operators_ms": {name: round(value, 1) for name, value in operators.most_common(20)},
    }


def measure_export(half: bool) -> dict[str, Any]:
    model = large_model()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    proof, deployment = Proof([frame()[0]], ("noise",)), Deployment("vit-large", half=half)
    _, parities = export_bundle(model, BUNDLE, proof, deployment, Steps(lambda line: print(line, file=sys.stderr)))
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": memory_mb("VmHWM"),
        "parity": {p.precision: p.to_dict() for p in parities},
    }


def memory_mb(field: str) -> int:
    """A line of /proc/self/status in MB."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) // 1024


def main(task: str, which: str = "") -> None:
    tasks = {
        "export": lambda: measure_export(False),
        "half": lambda: measure_export(True),
        "quantize": quantize,
        "int8": compare_int8,
        "time": lambda: compare_times(int(which or ROUNDS)),
        "memory": lambda: measure_memory(which),
        "profile": lambda: profile(which or "onnxruntime"),
    }
    print(json.dumps(tasks[task](), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
