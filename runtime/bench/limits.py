"""What bounds a model on a machine: its operations counted by stage, and the machine's matrix-product and memory rates.

Counts come from ONNX Runtime's profile of the graph as exported, which states the shapes of every node as executed, so
that no package beyond the runtime is needed. Matrix products and convolutions are counted, two operations for each
multiplication with its addition; element-wise work is not: it is about a hundredth of it, and bound by memory.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.bundle import IMAGE, TEXT
from fbclip.runtime.backends import allowed_cores, cores

Shape = tuple[int, ...]

STAGES = ("pre and post", "backbone", "views", "attention", "suppression and scoring")
# Nodes are named "block 3/MatMul 2" (export/graph.py); the part before the slash without its number, to a stage.
STAGE_OF = {
    "input": "pre and post",
    "resize": "pre and post",
    "map": "pre and post",
    "patch embedding": "backbone",
    "block": "backbone",
    "foreground mask": "views",
    "views": "views",
    "separation": "attention",
    "scores": "suppression and scoring",
}

SIDE = 1536  # of the square matrices whose product is timed: 7 billion operations, beyond the second cache
COPIED_BYTES = 1 << 27  # beyond the last cache of most machines
REPEATS = 3  # per turn, the best of which counts
# An ONNX model of one MatMul of float32 (n, n) matrices a and b to c, opset 18. ONNX Runtime's products are often the
# quickest of a machine, and its Python package has no other way to call them.
MATMUL = bytes.fromhex(
    "08083a5b0a110a01610a01621201632206" + b"MatMul".hex() + "1201675a150a016112100a0e0801120a0a0312016e0a0312016e"
    "5a150a016212100a0e0801120a0a0312016e0a0312016e62150a016312100a0e0801120a0a0312016e0a0312016e42040a001012"
)


@dataclass(frozen=True)
class Executed:
    """A node of a graph as ONNX Runtime ran it.

    Attributes:
        name, operator: as the optimised graph has them.
        stage: of the method, one of `STAGES`.
        inputs, outputs: shapes.
        seconds: one execution.
    """

    name: str
    operator: str
    stage: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    seconds: float

    @property
    def operations(self) -> int:
        """Floating-point operations of matrix products and convolutions; 0 for the rest."""
        if not self.outputs:
            return 0
        results = 2 * math.prod(self.outputs[0])
        if self.operator in ("MatMul", "MatMulInteger"):
            return results * self.inputs[0][-1]
        if self.operator == "Gemm":  # whichever of its factors is transposed
            return results * math.prod(self.inputs[0]) // self.outputs[0][0]
        if self.operator in ("Conv", "ConvInteger"):  # weights (out, in / groups, height, width)
            return results * math.prod(self.inputs[1][1:])
        return 0


def count_operations(graph: Path, text: NDArray[np.float32], image: NDArray[np.uint8]) -> dict[str, int]:
    """Operations by stage for one image uint8 (1, H, W, 3): the graph as exported, run once on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # nothing fused or folded
    counts = dict.fromkeys(STAGES, 0)
    for node in profile(graph, options, ["CPUExecutionProvider"], {IMAGE: image, TEXT: text}, runs=1):
        counts[node.stage] += node.operations
    return counts


def profile(
    graph: Path,
    options: Any,
    providers: Sequence[Any],
    inputs: dict[str, NDArray[Any]],
    runs: int,
    unwanted: Sequence[str] = (),
) -> list[Executed]:
    """Run a graph in ONNX Runtime `runs` times after once to warm up; every execution of every node, in order."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = ort.InferenceSession(graph, options, providers=providers, disabled_optimizers=unwanted)
        for _ in range(runs + (runs > 1)):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    nodes = read_profile(events)
    return nodes[len(nodes) // (runs + 1) :] if runs > 1 else nodes


def read_profile(events: Sequence[dict[str, Any]]) -> list[Executed]:
    """The nodes of a profile. One that an optimisation made and named anew belongs to the stage of the node before."""
    found: list[Executed] = []
    stage = STAGES[0]
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name, values = event["name"].removesuffix("_kernel_time"), event["args"]
        stage = STAGE_OF.get(name.partition("/")[0].rstrip("0123456789 "), stage)
        inputs, outputs = (
            tuple(tuple(shape) for value in values[f"{kind}_type_shape"] for shape in value.values())
            for kind in ("input", "output")
        )
        found.append(Executed(name, values["op_name"], stage, inputs, outputs, event["dur"] * 1e-6))
    return found


def summarise(nodes: Sequence[Executed], runs: int, counts: dict[str, int], batch: int) -> dict[str, Any]:
    """Milliseconds per run by stage, and the costliest operators of each, from the profile of `runs` runs.

    Args:
        nodes: of `profile`.
        runs: that they are of.
        counts: operations by stage for one image.
        batch: images per run.
    """
    stages: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    operators: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for node in nodes:
        stages[node.stage] += node.seconds
        entry = operators[node.stage, node.operator]
        entry[0] += node.seconds
        entry[1] += 1
    total = sum(stages.values()) or 1.0
    ranked = sorted(operators.items(), key=lambda item: item[1][0], reverse=True)
    return {
        "runs": runs,
        "stages": [
            {
                "stage": stage,
                "ms": seconds / runs * 1e3,
                "share": seconds / total,
                "gflops": counts[stage] * batch * runs / seconds / 1e9 if seconds else 0.0,
            }
            for stage, seconds in stages.items()
        ],
        "operators": [
            {
                "stage": stage,
                "operator": operator,
                "nodes": round(count / runs),
                "ms": seconds / runs * 1e3,
                "share": seconds / total,
            }
            for (stage, operator), (seconds, count) in ranked
        ],
    }


class Rates:
    """The machine's rates, to be measured again in every round of a benchmark.

    Args:
        use_torch: measure torch's products too, and those of a GPU that torch can use.
    """

    def __init__(self, use_torch: bool) -> None:
        import onnxruntime as ort

        a = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
        out = np.empty_like(a)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = allowed_cores()
        session = ort.InferenceSession(MATMUL, options, providers=["CPUExecutionProvider"])
        self.products: dict[str, Callable[[], object]] = {
            "cpu fp32 onnxruntime": lambda: session.run(None, {"a": a, "b": a}),
            "cpu fp32 numpy": lambda: np.matmul(a, a, out=out),
        }
        if use_torch:
            self.products |= _torch_products(a)
        self.source = np.ones(COPIED_BYTES // 4, np.float32)
        self.target = np.zeros_like(self.source)
        threads = cores()
        self.pool = ThreadPoolExecutor(threads)
        bounds = np.linspace(0, len(self.source), threads + 1).astype(int)
        self.parts = [slice(start, end) for start, end in pairwise(bounds)]

    def measure(self) -> dict[str, float]:
        """Operations per second of each library's float32 product, and bytes per second read and written in a copy."""
        rates = {name: 2 * SIDE**3 / _best(product) for name, product in self.products.items()}
        return {**rates, "cpu copy": 2 * COPIED_BYTES / _best(self._copy)}

    def _copy(self) -> None:
        """In as many threads as there are cores: one alone seldom fills the memory's bus."""
        list(self.pool.map(lambda part: np.copyto(self.target[part], self.source[part]), self.parts))


def _torch_products(a: NDArray[np.float32]) -> dict[str, Callable[[], object]]:
    import torch

    def product(matrix: torch.Tensor) -> Callable[[], object]:
        out = torch.empty_like(matrix)

        def run() -> None:
            torch.matmul(matrix, matrix, out=out)
            if matrix.is_cuda:
                torch.cuda.synchronize()

        return run

    matrix = torch.from_numpy(a)
    products = {"cpu fp32 torch": product(matrix)}
    if torch.cuda.is_available():
        products["cuda fp32 torch"] = product(matrix.cuda())
        products["cuda fp16 torch"] = product(matrix.cuda().half())
    return products


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rate(rates: dict[str, float], device: str, precision: str) -> float | None:
    """The quickest library's operations per second on "cpu" or "cuda"; None where none was measured."""
    found = [rate for name, rate in rates.items() if name.startswith(f"{device} {precision} ")]
    return max(found, default=None)


def least_seconds(operations: float, rate: float, transferred: float, memory_rate: float | None) -> float:
    """The roofline (Williams, Waterman, Patterson 2009): no run can be quicker than its products at the machine's rate,
    nor than reading weights and frames and writing maps once."""
    return max(operations / rate, transferred / memory_rate if memory_rate else 0.0)
