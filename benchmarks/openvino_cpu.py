"""OpenVINO against ONNX Runtime on the CPU: python benchmarks/openvino_cpu.py BUNDLE... [--rounds 30] [--json F].

In an environment that has openvino besides (pip install openvino; it is no dependency of fbclip). Float32, batch 1, from a
uint8 frame to score and map: ONNX Runtime as fbclip runs it, on the CPU's own graph, and OpenVINO on the portable one,
whose operators it knows. Both in one process, in turns: medians of the wall clock and of the process's CPU time, and the
median of each round's ratio. Then processes with one of the two alone, in turns: each one's median time and peak of memory.
`python benchmarks/openvino_cpu.py --make FILE` writes a bundle of ViT-B/16 at 224 px with generated weights first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT, Bundle
from fbclip.memory import Tensors
from fbclip.runtime.host import allowed_cores

Results = tuple[NDArray[np.float32], NDArray[np.float32]]
Run = Callable[[NDArray[np.uint8]], Results]
NAMES = ("onnxruntime", "openvino")
WARM_UP = 3  # runs before the clock starts
PROCESSES = 3  # of each alone


def make(path: Path) -> None:
    """ViT-B/16 at 224 px; its weights are by the rule of the recorded numbers, since time doesn't ask for better ones."""
    from vit_large import generated_model  # type: ignore[import-not-found]

    from fbclip.export.bundle import Deployment, export_bundle
    from fbclip.export.parity import Proof
    from fbclip.model.clip import clip_config
    from fbclip.model.config import default_config

    config = default_config(clip_config("ViT-B-16", "openai"))
    frame = np.random.default_rng(0).integers(0, 256, (config.image_size, config.image_size, 3), np.uint8)
    export_bundle(generated_model(config), path, Proof([frame], ("noise",)), Deployment("vit-base"))


def runner(name: str, bundle: Bundle) -> Run:
    """A bundle's float32 graph in one of `NAMES`, without a memory of good parts."""
    if name == "onnxruntime":
        from fbclip.runtime.backends import make_backend

        return make_backend(bundle, "cpu", "fp32")[0].run
    import openvino

    core = openvino.Core()
    # its own defaults are bfloat16 where the CPU has it, and throughput
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": allowed_cores(),
    }
    request = core.compile_model(core.read_model(bundle.graph("fp32")), "CPU", options).create_infer_request()
    shape = bundle.manifest.memory_shape
    held: dict[str, Any] = {TEXT: bundle.text, **(Tensors.neutral(shape).named() if shape else {})}
    for tensor, value in held.items():
        request.set_tensor(tensor, openvino.Tensor(np.ascontiguousarray(value)))

    def run(images: NDArray[np.uint8]) -> Results:
        request.set_tensor(IMAGE, openvino.Tensor(images, shared_memory=True))
        request.infer()
        return request.get_tensor(SCORE).data.copy(), request.get_tensor(ANOMALY_MAP).data.copy()

    return run


def compare(bundle: Bundle, rounds: int) -> dict[str, Any]:
    """Figures of both, in turns: the one that begins changes from round to round."""
    frame = np.random.default_rng(1).integers(0, 256, (1, *bundle.manifest.input_size, 3), np.uint8)
    runs = {name: runner(name, bundle) for name in NAMES}
    results = {name: [run(frame) for _ in range(WARM_UP)][-1] for name, run in runs.items()}
    wall: dict[str, list[float]] = {name: [] for name in NAMES}
    cpu: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds):
        for name in NAMES[:: 1 if number % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            runs[name](frame)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    (score, anomaly_map), (other_score, other_map) = (results[name] for name in NAMES)
    ratios = [theirs / ours for ours, theirs in zip(*wall.values(), strict=True)]
    return {
        "ms": {name: round(1e3 * statistics.median(each), 2) for name, each in wall.items()},
        "CPU ms": {name: round(1e3 * statistics.median(each), 2) for name, each in cpu.items()},
        "OpenVINO's time in ONNX Runtime's": round(statistics.median(ratios), 3),
        "quartiles of the ratio": [round(each, 3) for each in statistics.quantiles(ratios, n=4)],
        "difference of score": float(np.abs(score - other_score).max()),
        "difference of map": float(np.abs(anomaly_map - other_map).max()),
    }


def alone(name: str, path: Path, rounds: int) -> None:
    """The median time in ms of this process, and its peak of memory in MB, printed as JSON."""
    bundle = Bundle.load(path)
    run, seconds = runner(name, bundle), []
    frame = np.random.default_rng(1).integers(0, 256, (1, *bundle.manifest.input_size, 3), np.uint8)
    for _ in range(WARM_UP + rounds):
        start = time.perf_counter()
        run(frame)
        seconds.append(time.perf_counter() - start)
    # the kernel's own, since that of getrusage begins with the parent's
    (high,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"ms": round(1e3 * statistics.median(seconds[WARM_UP:]), 2), "MB": int(high) // 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--alone", choices=NAMES)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make)
    if arguments.alone:
        alone(arguments.alone, arguments.bundles[0], arguments.rounds)
        return
    figures: dict[str, Any] = {}
    for path in arguments.bundles:
        bundle = Bundle.load(path)
        figures[bundle.name] = {"load before": os.getloadavg()[0], **compare(bundle, arguments.rounds)}
        command = [sys.executable, __file__, str(path), "--rounds", str(arguments.rounds), "--alone"]
        found: dict[str, list[Any]] = {name: [] for name in NAMES}
        for name in NAMES * PROCESSES:
            found[name].append(json.loads(subprocess.run([*command, name], check=True, capture_output=True).stdout))
        figures[bundle.name]["processes of one alone"] = found
        print(bundle.name, json.dumps(figures[bundle.name], indent=1))
    if arguments.json:  # threads: 0 is one a core
        import onnxruntime
        import openvino

        versions = {
            "openvino": openvino.__version__,
            "onnxruntime": onnxruntime.__version__,
            "threads": allowed_cores(),
        }
        arguments.json.write_text(json.dumps({**versions, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
