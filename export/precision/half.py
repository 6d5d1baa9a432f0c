"""The half-precision graph: which products are float16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fbclip.export.graph import save_graph
from fbclip.export.precision.float32_islands import Parts, parts_by_stage


class Halver:
    """Writes half-precision forms of one float32 graph, with some parts of it left float32.

    Between the products of a stage what lies on the way is float16 too: attention, activation. Norms, the residual stream
    and everything else stay float32, with casts in between (docs/method.md, section 10).

    Args:
        graph: float32, with nodes named by stage.

    Attributes:
        parts: that can be left float32.
    """

    def __init__(self, graph: Path) -> None:
        self._graph = graph
        model = ir.load(graph).graph
        names = {node.name.split("/")[0] for node in model}
        stages = parts_by_stage(sum(name.startswith("block ") for name in names))
        sizes = dict.fromkeys(stages.values(), 0)
        for stage, part in stages.items():
            sizes[part] += sum(product.inputs[1].const_value.size for product in products(model, stage))
        self.parts = Parts(sizes, stages)

    def write(self, path: Path, islands: Collection[str] = ()) -> None:
        """Write the graph in half precision but for the parts named."""
        model = ir.load(self._graph)
        stages = [stage for stage, part in self.parts.stages.items() if part not in islands]
        half = {node for stage in stages for node in half_nodes(model.graph, stage)}
        casts = _Casts(model.graph)
        for node in list(model.graph):
            for index, value in enumerate(node.inputs):
                if value is None or node.op_type == "Shape":  # which asks for no values
                    continue
                if node in half and value.dtype == DataType.FLOAT and value.producer() not in half:
                    node.replace_input_with(index, casts.narrowed(value, node))
                elif node not in half and value.dtype == DataType.FLOAT16:
                    node.replace_input_with(index, casts.widened(value, node))
            for value in node.outputs:
                if node in half and value.dtype == DataType.FLOAT:
                    value.dtype = DataType.FLOAT16
        RemoveUnusedNodesPass()(model)
        save_graph(model, path)


def products(graph: ir.Graph, stage: str) -> list[ir.Node]:
    """Products of a stage with weights."""
    nodes = (node for node in graph if node.op_type == "MatMul" and node.name.startswith(f"{stage}/"))
    return [node for node in nodes if node.inputs[1].is_initializer()]


def half_nodes(graph: ir.Graph, stage: str) -> set[ir.Node]:
    """Of a stage its products with weights, their biases, and what lies between them but for norms."""
    nodes = [node for node in graph if node.name.startswith(f"{stage}/") and node.op_type != "LayerNormalization"]
    found = set(products(graph, stage))
    behind, before = set(found), set(found)
    for node in nodes:
        if any(value is not None and value.producer() in behind for value in node.inputs):
            behind.add(node)
    for node in reversed(nodes):
        if any(user in before for value in node.outputs for user in value.consumers()):
            before.add(node)
    readers = {user for node in found for user in node.outputs[0].consumers()}
    biases = {node for node in readers if node.op_type == "Add" and node.inputs[1].is_initializer()}
    return found | biases | behind & before


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
