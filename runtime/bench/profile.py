"""A graph's operations counted by stage of the method, and where ONNX Runtime spends its time on it.

Both come from ONNX Runtime's profile of the graph, which states the shapes of every node as executed, so that no
package beyond the runtime is needed. Matrix products and convolutions are counted, two operations for each
multiplication with its addition; element-wise work is not: it is about a hundredth of it, and bound by memory.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT, Bundle
from fbclip.memory import Memory, Tensors
from fbclip.resample import resize
from fbclip.runtime.bench.results import OperatorTime, Profile, StageTime

Shape = tuple[int, ...]

STAGES = ("pre and post", "backbone", "views", "attention", "suppression and scoring", "memory")
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
    "memory": "memory",
}


@dataclass(frozen=True)
class Executed:
    """A node of a graph as ONNX Runtime ran it.

    Attributes:
        name, operator: as the optimised graph has them.
        stage: of the method, one of `STAGES`.
        inputs, outputs: shapes.
        seconds: one execution.
        provider: of ONNX Runtime's, that ran it.
    """

    name: str
    operator: str
    stage: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    seconds: float
    provider: str

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


class Counting:
    """A bundle's operations for one image, by stage, as a worker's object: it is done once it is made."""

    def __init__(self, bundle: str, frames: str) -> None:
        loaded = Bundle.load(bundle)
        manifest = loaded.manifest
        image = resize(np.load(frames, allow_pickle=False)[0], manifest.input_size)[None]
        graph = loaded.graph(manifest.precisions[0])
        self.operations = count_operations(graph, {IMAGE: image, **beside_images(loaded, None)})

    def ready(self) -> dict[str, int]:
        return self.operations


def beside_images(bundle: Bundle, memory: Memory | None) -> dict[str, NDArray[np.float32]]:
    """What a bundle's graphs take beside images, by name: text, and a memory where they have inputs for one."""
    shape = bundle.manifest.memory_shape
    tensors = memory.tensors if memory else Tensors.neutral(shape) if shape else None
    return {TEXT: bundle.text, **(tensors.named() if tensors else {})}


def count_operations(graph: Path, inputs: dict[str, NDArray[Any]]) -> dict[str, int]:
    """Operations by stage for the image uint8 (1, H, W, 3) of its inputs: the graph as exported, run once on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # nothing fused or folded
    counts = dict.fromkeys(STAGES, 0)
    for node in profile(graph, options, ["CPUExecutionProvider"], inputs, runs=1):
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
            session.run([SCORE, ANOMALY_MAP], inputs)
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
        seconds, provider = event["dur"] * 1e-6, values.get("provider", "unknown")
        found.append(Executed(name, values["op_name"], stage, inputs, outputs, seconds, provider))
    return found


def summarise(nodes: Sequence[Executed], runs: int, counts: Mapping[str, int], batch: int) -> Profile:
    """Milliseconds per run by stage, the operators of each, the costliest first, and the nodes by provider.

    Args:
        nodes: of `profile`.
        runs: that they are of.
        counts: operations by stage for one image.
        batch: images per run.
    """
    stages: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    operators: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in nodes:
        stages[node.stage] += node.seconds
        operators[node.stage, node.operator].append(node.seconds)
    total = sum(stages.values()) or 1.0

    def stage_time(stage: str, seconds: float) -> StageTime:
        gflops = counts[stage] * batch * runs / seconds / 1e9 if seconds else 0.0
        return StageTime(stage, seconds / runs * 1e3, seconds / total, gflops)

    def operator_time(stage: str, operator: str, seconds: list[float]) -> OperatorTime:
        spent = sum(seconds)
        return OperatorTime(stage, operator, round(len(seconds) / runs), spent / runs * 1e3, spent / total)

    ranked = sorted(operators.items(), key=lambda item: sum(item[1]), reverse=True)
    return Profile(
        runs,
        tuple(stage_time(stage, seconds) for stage, seconds in stages.items()),
        tuple(operator_time(*where, seconds) for where, seconds in ranked),
        {provider: round(count / runs) for provider, count in Counter(node.provider for node in nodes).items()},
    )
