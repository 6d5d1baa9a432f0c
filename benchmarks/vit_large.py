"""ViT-L/14 at 518 px with generated weights, float32 on the CPU: time, memory and export.

python benchmarks/vit_large.py export       # runs/vit-large.fbclip: seconds, peak memory, parity
python benchmarks/vit_large.py half         # the same with the float16 graph
python benchmarks/vit_large.py quantize     # both 8-bit forms of the exported graph: seconds, sizes, nodes, drift
python benchmarks/vit_large.py int8         # interleaved rounds in ONNX Runtime: float32 and both 8-bit forms
python benchmarks/vit_large.py time         # interleaved rounds: literal reference, model, ONNX Runtime (if exported)
python benchmarks/vit_large.py memory RUN   # peak of one forward pass: reference, model or onnxruntime
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import golden

from fbclip import reference
from fbclip.bundle import DYNAMIC, IMAGE, STATIC, TEXT, Bundle
from fbclip.clip import build_clip, clip_config
from fbclip.export.bundle import Deployment, export_bundle
from fbclip.export.check import check_graph
from fbclip.export.parity import Proof
from fbclip.export.quantize import Quantizer
from fbclip.export.stages import compare_stages
from fbclip.image import upsampling_matrix
from fbclip.model import FBCLIP, Config, default_config
from fbclip.runtime.backends import OnnxRuntimeBackend

ROUNDS = 5
BUNDLE = Path("runs/vit-large.fbclip")
QUANTIZED = {form: BUNDLE.with_suffix(f".{form}.onnx") for form in (DYNAMIC, STATIC)}
Run = Callable[[], tuple[NDArray[Any], NDArray[Any]]]


def large_model() -> FBCLIP:
    """ViT-L-14-336 with weights by the rule of the recorded numbers."""
    return generated_model(default_config(clip_config("ViT-L-14-336", "openai")))


def generated_model(config: Config) -> FBCLIP:
    """Any model with weights by the rule of the recorded numbers."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build_clip(config.clip, None).state_dict().items()}
    clip = build_clip(config.clip, {name: golden.weight(name, shape) for name, shape in shapes.items()})
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


def run_onnxruntime() -> Run:
    bundle = Bundle.load(BUNDLE)
    backend = OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text)
    return lambda: backend.run(frame())


def make(which: str) -> Run:
    return run_onnxruntime() if which == "onnxruntime" else run_torch(which)


def compare_times() -> dict[str, Any]:
    names = ["reference", "model", *(["onnxruntime"] if BUNDLE.exists() else [])]
    runs = {name: make(name) for name in names}
    seconds, results = interleave(runs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    score, anomaly_map = results["model"]
    return {
        **timings(seconds),
        "model_is_faster_by": {name: round(value / medians["model"], 3) for name, value in medians.items()},
        "largest_difference_from_model": {
            name: float(max(np.abs(s - score).max(), np.abs(m - anomaly_map).max())) for name, (s, m) in results.items()
        },
    }


def compare_int8() -> dict[str, Any]:
    bundle = Bundle.load(BUNDLE)
    graphs = {"float32": bundle.graph("fp32"), **QUANTIZED}
    backends = {name: OnnxRuntimeBackend(graph, bundle.text) for name, graph in graphs.items()}
    seconds, results = interleave({name: lambda b=b: b.run(frame()) for name, b in backends.items()})
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
            feed = {IMAGE: frame(), TEXT: bundle.text}
            Quantizer(bundle.graph("fp32"), form, [feed], Path(folder)).write(path)
            seconds = time.perf_counter() - start
        stages = compare_stages("int8", bundle.graph("fp32"), path, bundle.text, frame())
        figures[form] = {
            "seconds": round(seconds, 1),
            "megabytes": round(path.stat().st_size / 1e6),
            "nodes": check_graph(path, for_tensorrt=form == STATIC),
            "stages": {stage.name: round(stage.error, 5) for stage in stages},
        }
    return {**figures, "peak_mb": memory_mb("VmHWM")}


def interleave(runs: Mapping[str, Run]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each run in rounds of all, and what they gave in a first round that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {name: run() for name, run in runs.items()}  # a first round, not timed
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def timings(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    return {
        "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "all": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
    }


def measure_memory(which: str) -> dict[str, Any]:
    run = make(which)
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (man 5 proc)
    run()
    peak = memory_mb("VmHWM")
    return {"run": which, "before_mb": before, "peak_mb": peak, "forward_mb": peak - before}


def measure_export(half: bool) -> dict[str, Any]:
    model = large_model()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    proof, deployment = Proof([frame()[0]], ("noise",)), Deployment("vit-large", half=half)
    _, parities = export_bundle(model, BUNDLE, proof, deployment, lambda line: print(line, file=sys.stderr))
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


def main(task: str, which: str = "model") -> None:
    tasks = {
        "export": lambda: measure_export(False),
        "half": lambda: measure_export(True),
        "quantize": quantize,
        "int8": compare_int8,
        "time": compare_times,
        "memory": lambda: measure_memory(which),
    }
    print(json.dumps(tasks[task](), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
