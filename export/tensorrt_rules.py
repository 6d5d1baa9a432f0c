"""The proof that a written graph is one that TensorRT takes, made without TensorRT; and NVIDIA's own parser reads it where
TensorRT-RTX is installed, which needs no GPU.

What it takes is `onnx_operators.json`: NVIDIA's table of its ONNX parser, release 10.1, unchanged. TensorRT wants
more than the table says: uint8 only at the input and cast at once, 64-bit integers only for sizes and indices, no
float64, no empty tensors, and here no size left open but the batch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper

from fbclip.errors import GraphError
from fbclip.runtime.host import ProcessFailed
from fbclip.runtime.workers import Worker

logger = logging.getLogger("fbclip")

OPERATORS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("onnx_operators.json").read_text())
MOST_SORTED = 3840  # K of TopK is below, by the table
LARGE = 1024  # elements; larger constants are weights, which no rule looks into
BATCHES = (1, 3)  # that shapes are worked out for

# The table's names of types. It has a misprint, INF64, for ConstantOfShape.
TYPES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}


class Graph:
    """A graph with the types and shapes of all its tensors, worked out anew by ONNX's own strict inference.

    Attributes:
        nodes: in order.
        types: element type of every tensor.
        constants: values known when a plan is built: initializers and Constant nodes.
        zeros: of the 8-bit ones, those that hold nothing but 0.

    Raises:
        GraphError: types or shapes that contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = onnx.load(path, load_external_data=False)
        self.nodes = list(model.graph.node)
        self.inputs, self.outputs = list(model.graph.input), list(model.graph.output)
        self.constants = {c.name for c in model.graph.initializer}
        self.zeros = {
            c.name
            for c in model.graph.initializer
            if c.data_type == TensorProto.INT8 and not numpy_helper.to_array(c, str(path.parent)).any()
        }
        self.constants |= {name for node in self.nodes if node.op_type == "Constant" for name in node.output}
        self.opset = next(o.version for o in model.opset_import if o.domain == "")
        self.light = without_weights(model)
        try:
            onnx.checker.check_model(str(path), full_check=True)
            self.types = {name: kind for name, (kind, _) in self.inferred(None).items()}
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise GraphError(f"an exported graph is valid ONNX; {path.name} is not: {error}") from error

    def inferred(self, batch: int | None) -> dict[str, tuple[int, tuple[int | None, ...]]]:
        """Element type and shape of every tensor; None where a size is open."""
        model = onnx.ModelProto()
        model.CopyFrom(self.light)
        if batch is not None:
            for value in (model.graph.input[0], *model.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = batch
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        found = {}
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            tensor = value.type.tensor_type
            dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
            found[value.name] = (tensor.elem_type, dims)
        for constant in model.graph.initializer:
            found[constant.name] = (constant.data_type, tuple(constant.dims))
        return found

    def parameters(self, node: onnx.NodeProto) -> Iterator[tuple[str, str, bool]]:
        """Tensors of a node with the name of their type in the operator's schema, and whether it is an output."""
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        for names, formal, out in ((node.input, schema.inputs, False), (node.output, schema.outputs, True)):
            for index, name in enumerate(names):
                if name:
                    yield name, formal[min(index, len(formal) - 1)].type_str, out


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model made light for inference: large constants become inputs of the same type and shape, and what the
    exporter said of shapes is forgotten. Changes it in place."""
    graph = model.graph
    small = [constant for constant in graph.initializer if math.prod(constant.dims) <= LARGE]
    graph.input.extend(
        onnx.helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims)
        for constant in graph.initializer
        if math.prod(constant.dims) > LARGE
    )
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(small)
    return model


def check_graph(path: Path, for_tensorrt: bool = True, image_type: int = TensorProto.UINT8) -> int:
    """Prove a written graph; returns how many nodes it has.

    Args:
        for_tensorrt: operators and their types are held against NVIDIA's table, and TensorRT-RTX reads the graph where
            it is installed; a graph for CPUs alone need not be.
        image_type: of the image, uint8 or float32.

    Raises:
        GraphError: names the first node and the rule it breaks, or the layer and what TensorRT-RTX says.
    """
    graph = Graph(path)
    check_inputs(graph, image_type)
    for node in graph.nodes if for_tensorrt else ():
        for rule in (check_operator, check_types, check_integers):
            if broken := rule(graph, node):
                raise GraphError(
                    f"{broken}; {path.name} breaks this in {node.name!r} ({node.op_type}): install the tested versions "
                    f"of torch and onnxscript (constraints.txt)"
                )
    check_shapes(graph)
    if for_tensorrt:
        read_with_real_parser(path)
    return len(graph.nodes)


def read_with_real_parser(path: Path) -> None:
    """Have NVIDIA's own parser read a graph, where TensorRT-RTX is installed, in a process that takes its memory along.

    Raises:
        GraphError: it refuses; names the layer and the reason.
    """
    if find_spec("tensorrt_rtx") is None:
        return
    try:
        with Worker("fbclip.export.engine:Reading", str(path)) as worker:
            answer = worker.ready
    except ProcessFailed as error:
        raise GraphError(f"NVIDIA's parser could not read {path.name}: {error}") from error
    if answer["broken"]:
        logger.warning("NVIDIA's parser is not asked of %s: %s", path.name, answer["broken"])
    if answer["refused"]:
        raise GraphError(answer["refused"])


def check_inputs(graph: Graph, image_type: int) -> None:
    """uint8 is there for the image alone, whose first and only node is a Cast; text, score and map are float32."""
    image, *others = graph.inputs
    readers = [node for node in graph.nodes if image.name in node.input]
    first = "Cast" if image_type == TensorProto.UINT8 else "Transpose"
    if graph.types[image.name] != image_type or [node.op_type for node in readers] != [first]:
        names = ", ".join(node.op_type for node in readers)
        raise GraphError(f"the image is uint8 and goes into one Cast; in {graph.path.name} it goes into {names}")
    for value in (*others, *graph.outputs):
        if graph.types[value.name] != TensorProto.FLOAT:
            raise GraphError(f"inputs and outputs but the image are float32; {value.name} of {graph.path.name} is not")


def check_operator(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The operator is in the table, and its restriction, if it has one, is kept."""
    row = OPERATORS.get(node.op_type)
    if row is None or not row["supported"] or node.domain not in ("", "ai.onnx"):
        return "graphs hold only operators that TensorRT's parser takes"
    if row["restrictions"] and not (node.op_type in RESTRICTIONS and RESTRICTIONS[node.op_type](graph, node)):
        return f"TensorRT's parser restricts {node.op_type}: {row['restrictions']}"
    return None


def _constant_axes(index: int) -> Callable[[Graph, onnx.NodeProto], bool]:
    return lambda graph, node: len(node.input) <= index or not node.input[index] or node.input[index] in graph.constants


def _symmetric(graph: Graph, node: onnx.NodeProto) -> bool:
    """A zero point that is there, since it names the 8-bit type, and is 0; a scale that is known in advance."""
    return len(node.input) == 3 and node.input[2] in graph.zeros and node.input[1] in graph.constants


def _few_sorted(graph: Graph, node: onnx.NodeProto) -> bool:
    """As many as are known in advance and TensorRT can sort, in order."""
    counts = [numpy_helper.to_array(c) for c in graph.light.graph.initializer if c.name == node.input[1]]
    in_order = all(attribute.i == 1 for attribute in node.attribute if attribute.name == "sorted")
    return in_order and all(count.item() < MOST_SORTED for count in counts) and len(counts) == 1


# Restrictions of the table that can be checked here; an operator whose restriction can't be is refused.
RESTRICTIONS: dict[str, Callable[[Graph, onnx.NodeProto], bool]] = {
    "Constant": lambda graph, node: [a.name for a in node.attribute] == ["value"],
    "LayerNormalization": lambda graph, node: len(node.output) == 1,
    "DequantizeLinear": _symmetric,
    "Pad": _constant_axes(3),
    "QuantizeLinear": _symmetric,
    "Slice": _constant_axes(3),
    "Squeeze": _constant_axes(1),
    "TopK": _few_sorted,
    "Unsqueeze": _constant_axes(1),
    **{name: _constant_axes(1) for name in OPERATORS if name.startswith("Reduce")},
}


def check_types(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The tensors that an operator computes with have types of its row in the table.

    Its other tensors (shapes, axes, indices, conditions and truth values) have their types by ONNX itself.
    """
    allowed = OPERATORS[node.op_type]["types"].replace("INF64", "INT64").split(", ")
    taken = {type_str for _, type_str, out in graph.parameters(node) if not out}
    for name, type_str, out in graph.parameters(node):
        kind = graph.types[name]
        if kind not in TYPES:
            return (
                f"tensors are float16, float32, bool, int8, int64 or uint8; {name} is {TensorProto.DataType.Name(kind)}"
            )
        if kind == TensorProto.UINT8 and node.op_type != "Cast":
            return "uint8 is for the input and its Cast only"
        computed = type_str in ("T", "T1", "V") and (not out or type_str in taken or node.op_type == "Constant")
        if (computed or node.op_type == "Cast") and TYPES[kind] not in allowed:
            return f"TensorRT's {node.op_type} takes {', '.join(allowed)}; {name} is {TYPES[kind]}"
    return None


def check_integers(graph: Graph, node: onnx.NodeProto) -> str | None:
    """64-bit integers are sizes and indices: made from Shape, TopK and constants, and never from or into data."""
    if node.op_type in ("Shape", "Constant", "TopK"):
        return None
    integers = {name: graph.types[name] == TensorProto.INT64 for name in (*node.input, *node.output) if name}
    computed = [name for name, type_str, out in graph.parameters(node) if not out and type_str in ("T", "T1", "V")]
    if any(integers[name] for name in node.output) and not all(integers[name] for name in node.input if name):
        return "64-bit integers are sizes and indices, made from Shape and constants alone"
    if any(integers[name] for name in computed) and not all(integers[name] for name in node.output):
        return "64-bit integers are sizes and indices, and never turn into data"
    return None


def check_shapes(graph: Graph) -> None:
    """With the batch known, every size is known and none is 0."""
    for batch in BATCHES:
        for name, (_, dims) in graph.inferred(batch).items():
            if None in dims or 0 in dims:
                what = "is empty" if 0 in dims else "has open sizes besides the batch"
                raise GraphError(f"tensors are never empty and of known size for a known batch; {name} {what}: {dims}")
