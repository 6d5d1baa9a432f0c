"""Half precision: which products are float16, in the graph, and in the torch model while float32 islands are looked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from fbclip.export.graph import SEPARATION, save_graph
from fbclip.export.precision.float32_islands import Parts, parts_by_stage
from fbclip.model.network import Visual


class HalfWeights:
    """The weights of the backbone's and the separation attention's products, to be typed float16 part by part.

    `fbclip.model.towers.linear` casts to the type of its weights and back, so norms, softmax inputs of the views, views and
    scores stay float32 islands whatever is typed here (docs/method.md, section 10).

    Attributes:
        parts: that can be left float32.
    """

    def __init__(self, visual: Visual) -> None:
        blocks = list(visual.tower.blocks)
        stages = parts_by_stage(len(blocks))
        self._parameters: dict[str, list[nn.Parameter]] = {part: [] for part in stages.values()}
        for number, block in enumerate(blocks, start=1):
            self._parameters[stages[f"block {number}"]] += _products(block)
        self._parameters[SEPARATION] += _products(visual.separation)
        self._parameters["projection"] += [visual.tower.proj]
        self._float32 = {part: [p.data for p in parameters] for part, parameters in self._parameters.items()}
        sizes = {part: sum(p.numel() for p in parameters) for part, parameters in self._parameters.items()}
        self.parts = Parts(sizes, stages)

    def apply(self, islands: Collection[str] = ()) -> None:
        """Type everything float16 but the parts named."""
        for part, parameters in self._parameters.items():
            for parameter, value in zip(parameters, self._float32[part], strict=True):
                parameter.data = value if part in islands else value.half()


def _products(module: nn.Module) -> list[nn.Parameter]:
    layers = (m for m in module.modules() if isinstance(m, (nn.Linear, nn.MultiheadAttention)))
    return [p for layer in layers for p in layer.parameters(recurse=False)]


def write_half(portable: Path, path: Path, stages: Collection[str]) -> None:
    """Write a float32 graph once more, the products of some stages in float16.

    Between the products of a stage what lies on the way is float16 too: biases, attention, activation. Norms, the
    residual stream and everything else stay float32, with casts in between.

    Args:
        stages: as the nodes are named: "block 3", "separation", "scores".
    """
    model = ir.load(portable)
    half = set(half_nodes(model.graph, stages))
    casts = _Casts(model.graph)
    for node in list(model.graph):
        if node in half:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == DataType.FLOAT and value.producer() not in half:
                    node.replace_input_with(index, casts.narrowed(value, node))
            for value in node.outputs:
                if value.dtype == DataType.FLOAT:
                    value.dtype = DataType.FLOAT16
        else:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == DataType.FLOAT16 and node.op_type != "Shape":
                    node.replace_input_with(index, casts.widened(value, node))
    RemoveUnusedNodesPass()(model)
    save_graph(model, path)


def half_nodes(graph: ir.Graph, stages: Collection[str]) -> Iterator[ir.Node]:
    """Products with weights, their biases, and what lies between the products of one stage but for its norms."""
    for stage in stages:
        nodes = [node for node in graph if node.name.startswith(f"{stage}/") and node.op_type != "LayerNormalization"]
        products = {node for node in nodes if node.op_type == "MatMul" and node.inputs[1].is_initializer()}
        biases = {
            user
            for node in products
            for user in node.outputs[0].consumers()
            if user.op_type == "Add" and user.inputs[1].is_initializer()
        }
        behind, before = set(products), set(products)
        for node in nodes:
            if any(value is not None and value.producer() in behind for value in node.inputs):
                behind.add(node)
        for node in reversed(nodes):
            if any(user in before for value in node.outputs for user in value.consumers()):
                before.add(node)
        yield from products | biases | behind & before


class _Casts:
    """Values of a graph in the other precision, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._made, self._counts = graph, dict[ir.Value, ir.Value](), Counter[str]()

    def narrowed(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """A float32 value in float16; of a constant it is one again."""
        if value not in self._made and value.const_value is not None:
            name = f"{value.name}_fp16"
            with np.errstate(over="ignore"):  # what is too large is infinite, and the proof sees it
                tensor = ir.tensor(value.const_value.numpy().astype(np.float16), name=name)
            self._made[value] = ir.Value(
                name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(self._made[value])
        return self._cast(value, reader, DataType.FLOAT16)

    def widened(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """A float16 value in float32."""
        return self._cast(value, reader, DataType.FLOAT)

    def _cast(self, value: ir.Value, reader: ir.Node, dtype: DataType) -> ir.Value:
        if value not in self._made:
            stage = reader.name.split("/")[0]
            self._counts[stage] += 1
            out = ir.Value(name=f"{value.name}_{dtype.short_name()}", shape=value.shape, type=ir.TensorType(dtype))
            node = ir.node("Cast", [value], {"to": dtype}, outputs=[out], name=f"{stage}/Cast {self._counts[stage]}")
            self._graph.insert_before(reader, node)
            self._made[value] = out
        return self._made[value]
