"""Graphs for one provider of ONNX Runtime, rewritten from the portable one: the same model and the same weights.

Attention becomes one fused operator of ONNX Runtime's own, which never holds all scores: on a CPU it takes a fifth less
time than product, softmax and product, on a GPU it is one launch (flash attention in half precision). TensorRT's parser
does not know it, so these graphs lie beside the portable one. Their weights do not: they are byte ranges of its file,
mapped into memory instead of parsed and copied.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto
from onnx.external_data_helper import set_external_data
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fbclip.errors import GraphError
from fbclip.export.graph import SEPARATION

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
SHARED_FROM = 1024  # bytes; smaller constants, shapes and axes among them, stay in the graph for its optimisations


def write_variant(device: str, portable: Path, path: Path) -> int:
    """Write a portable graph as ONNX Runtime runs it best, beside it; returns how many nodes it has.

    Args:
        device: "cuda", or "cpu", for which the inputs of the separation attention also go through it one after the
            other, so that their tensors stay in the caches.

    Raises:
        GraphError: no graph that `fbclip.export.graph` writes.
    """
    model = ir.from_proto(with_shared_weights(portable))
    for tensor in model.graph.initializers.values():
        if isinstance(tensor.const_value, ir.ExternalTensor):
            tensor.const_value.base_dir = portable.parent
    fuse_attention(model)
    if device == "cpu":
        separate_one_by_one(model)
    RemoveUnusedNodesPass()(model)
    ir.save(model, path)
    return len(model.graph)


def with_shared_weights(path: Path) -> onnx.ModelProto:
    """A written graph whose large weights are references to where they lie in its files, so that it holds none."""
    model = onnx.load(path, load_external_data=False)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = 0
        for weight in model.graph.initializer:
            if weight.data_location == TensorProto.EXTERNAL or not weight.raw_data:
                continue
            length = len(weight.raw_data)
            start = content.find(weight.raw_data, end)
            end = start + length
            if length >= SHARED_FROM:
                set_external_data(weight, path.name, start, length)
                weight.ClearField("raw_data")
    return model


def fuse_attention(model: ir.Model) -> None:
    """Softmax, its products, and what turns (B, N, A) into heads and back become one operator on (B, N, A).

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention

    Raises:
        GraphError: a softmax between two products that is no attention of ours.
    """
    model.graph.opset_imports[CONTRIB] = 1
    counts = Counter[str]()
    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        scores, mixed = node.inputs[0].producer(), next(iter(node.outputs[0].consumers()), None)
        if scores is None or mixed is None or (scores.op_type, mixed.op_type) != ("MatMul", "MatMul"):
            continue  # the spatial view's, over a window
        (q, by), (k, also_by), (v, _) = (_tokens(value) for value in (*scores.inputs, mixed.inputs[1]))
        heads = mixed.inputs[1].shape[1]
        out = _only_consumer(_only_consumer(mixed))
        stage = node.name.split("/")[0]
        counts[stage] += 1
        fused = ir.node(
            "MultiHeadAttention",
            [q, k, v],
            {"num_heads": heads, "scale": by * also_by},
            domain=CONTRIB,
            outputs=[ir.Value(name=f"{out.outputs[0].name}_fused", shape=out.outputs[0].shape, type=q.type)],
            name=f"{stage}/MultiHeadAttention {counts[stage]}",
        )
        model.graph.insert_before(out, fused)
        ir.convenience.replace_all_uses_with(out.outputs[0], fused.outputs[0])
    if not counts:
        raise GraphError("a graph of fbclip export has attention; this one has none that is known: export it again")


def _tokens(value: ir.Value) -> tuple[ir.Value, float]:
    """Where an input of attention comes from: tokens (B, N, A) before they are taken apart into heads, and what they are
    multiplied by on the way."""
    factor = 1.0
    while (node := value.producer()) is not None and node.op_type in ("Reshape", "Transpose", "Mul"):
        if node.op_type == "Mul":
            constant = ir.convenience.get_const_tensor(node.inputs[1])
            if constant is None or constant.size != 1:
                break
            factor *= float(constant.numpy().item())
        value = node.inputs[0]
    return value, factor


def _only_consumer(node: ir.Node) -> ir.Node:
    (consumer,) = node.outputs[0].consumers()
    return consumer


def separate_one_by_one(model: ir.Model) -> None:
    """Where all 3K inputs of the separation attention are one batch, (B·3K, N, C), take them apart and go through it with
    each, (B, N, C): a copy of its nodes for each, all with the same weights."""
    nodes = [node for node in model.graph if node.name.startswith(f"{SEPARATION}/")]
    made = {value for node in nodes for value in node.outputs}
    (batch,) = {v for node in nodes for v in node.inputs if v not in made and v.const_value is None}
    (result,) = {value for value in made if not set(value.consumers()) <= set(nodes)}
    apart = next(iter(result.consumers()))  # the scores' Reshape to (B, K, 3, N, C)
    _, layers, views, *tokens = apart.outputs[0].shape
    count = layers * views
    new = _Nodes(model.graph, nodes[0])
    together = new("Reshape", [batch, new.constant("separation_apart", [-1, count, *tokens])])[0]
    axis = new.constant("separation_axis", [1])
    results = []
    for part, view in enumerate(new("Split", [together], outputs=count, axis=1, num_outputs=count), start=1):
        copies = {batch: new("Squeeze", [view, axis])[0]}
        for node in nodes:
            inputs = [copies.get(value, value) for value in node.inputs]
            found = new(node.op_type, inputs, node.domain, f"{node.name} of view {part}", **node.attributes)
            copies[node.outputs[0]] = found[0]
        results.append(new("Unsqueeze", [copies[result], axis])[0])
    apart.replace_input_with(0, new("Concat", results, axis=1)[0])
    model.graph.remove(nodes[::-1])


class _Nodes:
    """New nodes of a graph, put before one of it.

    Args:
        graph: that gets them.
        before: the node.
    """

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self._graph, self._before, self._counts = graph, before, Counter[str]()

    def __call__(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        domain: str = "",
        name: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add one, named by the stage of the node that it is put before; returns its outputs."""
        self._counts[operator] += 1
        name = name or f"{self._before.name.split('/')[0]}/{operator} {self._counts[operator]} of views"
        node = ir.node(operator, inputs, attributes, domain=domain, name=name, num_outputs=outputs)
        self._graph.insert_before(self._before, node)
        made: Sequence[ir.Value] = node.outputs
        return made

    def constant(self, name: str, values: list[int]) -> ir.Value:
        """64-bit integers, for shapes and axes."""
        value = ir.Value(name=name, const_value=ir.tensor(values, ir.DataType.INT64, name=name))
        self._graph.register_initializer(value)
        return value
