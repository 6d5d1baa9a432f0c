"""Where a graph deviates: the same stages of two graphs, tapped and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from fbclip.export.graph import MASK

# Past what rounding alone does: the relative error of a stage, and the share of patches that change sides in the mask.
# Half precision alone gives a thousandth or two, 8 bit one to four hundredths.
DIVERGED = {"fp16": (0.02, 0.0), "int8": (0.1, 0.1)}


@dataclass(frozen=True)
class Stage:
    """How far one stage of a graph is from the same stage of the float32 graph.

    Attributes:
        name: as the nodes are named: "block 3", "foreground mask", "views", "separation", "scores", "map".
        error: root mean square of the difference over that of the values; of the mask the share of patches that
            changed sides. Infinite where a value is no number.
        limit: what rounding alone may do; of the mask in half precision nothing, since a patch's weight doubles or
            halves.
    """

    name: str
    error: float
    limit: float

    @property
    def diverged(self) -> bool:
        return not self.error <= self.limit


def compare_stages(precision: str, reference: Path, graph: Path, feed: Mapping[str, NDArray[Any]]) -> list[Stage]:
    """Stages that a graph of lower precision has like the float32 one, in order, on the same inputs."""
    rounding, flips = DIVERGED[precision]
    expected, found = (run_stages(path, feed) for path in (reference, graph))
    return [
        Stage(name, _error(name, value, found[name]), flips if name == MASK else rounding)
        for name, value in expected.items()
        if name in found and found[name].shape == value.shape
    ]


def first_diverging(stages: Sequence[Stage]) -> str | None:
    """The first stage past what rounding alone does; None if all are within."""
    return next((stage.name for stage in stages if stage.diverged), None)


def _error(name: str, expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    if name == MASK:
        return float((expected != found).mean())
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    error = float(np.sqrt(np.square(found - expected).sum() / max(np.square(expected).sum(), 1e-30)))
    return error if np.isfinite(error) else float("inf")


def run_stages(path: Path, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """The last float32 tensor of each stage of a graph, in ONNX Runtime on the CPU."""
    tapped = path.with_suffix(".tapped.onnx")  # beside the graph, where its external data is found
    try:
        ends = write_tapped(path, tapped)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(tapped, options, providers=["CPUExecutionProvider"])
        values = session.run(list(ends.values()), dict(feed))
    finally:
        tapped.unlink(missing_ok=True)
    return dict(zip(ends, values, strict=True))


def write_tapped(path: Path, tapped: Path) -> dict[str, str]:
    """Write a graph anew with the end of each stage as an output; returns those tensors by stage."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    ends: dict[str, str] = {}
    for node in graph.node:
        floats = [name for name in node.output if kinds.get(name) == onnx.TensorProto.FLOAT]
        if floats and "/" in node.name:
            ends[node.name.split("/")[0]] = floats[-1]
    there = {value.name for value in graph.output}
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ends.values()
        if name not in there
    )
    onnx.save(model, tapped)
    return ends
