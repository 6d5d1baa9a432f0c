"""What each graph of a bundle holds, as far as a machine without a GPU can tell: nodes, launches, bytes, types.

python benchmarks/graphs.py [BUNDLE...] [--json FILE]     # the included bundle if none is named

"run" counts the nodes that ONNX Runtime executes once it has optimised the graph, on the CPU: each is a launch or more on a
GPU, where other fusions apply. "half" is the share of the products' operations that is
float16, without fused attention.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from fbclip.bundle import GRAPHS, IMAGE, VARIANTS, Bundle
from fbclip.runtime.backends.onnx import UNWANTED_FUSIONS
from fbclip.runtime.bench.profile import beside_images, profile


def describe(bundle: Bundle, path: Path) -> dict[str, Any]:
    """One graph: its nodes, those that are run, its own bytes, fused attentions, and types."""
    graph = onnx.load(path, load_external_data=False).graph
    height, width = bundle.manifest.input_size
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    inputs = {IMAGE: image, **beside_images(bundle, None)}
    run = profile(path, options, ["CPUExecutionProvider"], inputs, runs=1, unwanted=UNWANTED_FUSIONS)
    operators = Counter(node.op_type for node in graph.node)
    return {
        "nodes": len(graph.node),
        "run": len(run),
        "attention_fused": operators["MultiHeadAttention"],
        "half": round(half_share(graph), 3),
        "bytes": path.stat().st_size,
        "weights_elsewhere": sum(bool(weight.external_data) for weight in graph.initializer),
    }


def half_share(graph: onnx.GraphProto) -> float:
    """Of the products' multiplications for one image, those whose results are float16."""
    values = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    counts = Counter[bool]()
    for node in graph.node:
        if node.op_type == "MatMul" and all(name in values for name in (node.input[0], node.output[0])):
            depth = values[node.input[0]].shape.dim[-1].dim_value
            out = values[node.output[0]]
            sizes = [dim.dim_value or 1 for dim in out.shape.dim]  # an open size is the batch
            counts[out.elem_type == onnx.TensorProto.FLOAT16] += int(np.prod(sizes)) * depth
    return counts[True] / max(counts.total(), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    table = Table("bundle", "graph", "nodes", "run", "fused", "half", "kB", box=None)
    for bundle in [Bundle.load(path) for path in arguments.bundles] or [Bundle.load()]:
        files = [GRAPHS[p] for p in bundle.manifest.precisions] + [
            v for v in VARIANTS.values() if v in bundle.manifest.files
        ]
        for name in files:
            row = found.setdefault(bundle.name, {})[name] = describe(bundle, bundle.path / name)
            kilobytes = f"{row['bytes'] / 1e3:.0f}"
            table.add_row(
                bundle.name, name, *(str(row[k]) for k in ("nodes", "run", "attention_fused", "half")), kilobytes
            )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
