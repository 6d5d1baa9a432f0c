"""Graphs that TensorRT would not take, each with one fault, beside one that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fbclip.errors import GraphError
from fbclip.export import tensorrt_rules
from fbclip.export.tensorrt_rules import check_graph

FLOAT, HALF, UINT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8
CONSTANTS = {
    "one": np.float32(1),
    "weights": np.ones((3, 3), np.float16),
    "axis": np.array([1]),
    "two": np.array([2]),
    "flat": np.array([0, -1]),
    "nothing": np.zeros((0,), np.float32),
    "wide": np.float64(1),
    "zero": np.int8(0),
    "half_way": np.int8(1),
    "byte": np.uint8(0),
    "nil": np.float32(0),
}


def node(op: str, inputs: Sequence[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=f"here/{op} {output}", **attributes)


HEAD = [node("Cast", ["image"], "pixels", to=FLOAT)]
TAIL = [node("ReduceMean", ["x", "flat_axes"], "score", keepdims=0), node("Mul", ["x", "one"], "anomaly_map")]


def quantized(zero_point: str, scale: str = "one") -> list[NodeProto]:
    return [
        node("QuantizeLinear", ["pixels", scale, zero_point], "q"),
        node("DequantizeLinear", ["q", scale, zero_point], "x"),
    ]


def write(
    path: Path, nodes: list[NodeProto], image_type: int = UINT8, image_shape: Sequence[object] = ("n", 4, 3)
) -> Path:
    constants = [numpy_helper.from_array(np.asarray(v), name) for name, v in CONSTANTS.items()]
    constants.append(numpy_helper.from_array(np.array([1, 2]), "flat_axes"))
    used = {name for n in nodes for name in n.input}
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("image", image_type, image_shape),
            helper.make_tensor_value_info("text", FLOAT, (2, 5)),
        ],
        [
            helper.make_tensor_value_info("score", FLOAT, ("n",)),
            helper.make_tensor_value_info("anomaly_map", FLOAT, ("n", 4, 3)),
        ],
        [c for c in constants if c.name in used],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_a_sound_graph(tmp_path: Path) -> None:
    middle = [
        node("Cast", ["pixels"], "half", to=HALF),
        node("MatMul", ["half", "weights"], "product"),
        node("Cast", ["product"], "back", to=FLOAT),
        node("Shape", ["back"], "shape"),
        node("Reshape", ["back", "shape"], "x"),
    ]
    assert check_graph(write(tmp_path / "g.onnx", HEAD + middle + TAIL)) == 8


FAULTS = {
    "bytes that go elsewhere": ([node("Identity", ["image"], "i"), node("Cast", ["i"], "x", to=FLOAT)], "one Cast"),
    "float64": (
        [node("Cast", ["pixels"], "d", to=TensorProto.DOUBLE), node("Cast", ["d"], "x", to=FLOAT)],
        "d is DOUBLE",
    ),
    "a float64 constant": (
        [node("Cast", ["wide"], "w", to=FLOAT), node("Mul", ["pixels", "w"], "x")],
        "wide is DOUBLE",
    ),
    "mixed types": (
        [node("Cast", ["pixels"], "half", to=HALF), node("Mul", ["half", "one"], "x")],
        "valid ONNX",
    ),
    "an operator that is not supported": (
        [node("Bernoulli", ["pixels"], "x")],
        "only operators that TensorRT's parser",
    ),
    "a restriction that is not checked": ([node("Hardmax", ["pixels"], "x")], "restricts Hardmax"),
    "a type that is not in the row": (
        [
            node("Cast", ["pixels"], "i", to=TensorProto.INT32),
            node("Clip", ["i"], "c"),
            node("Cast", ["c"], "x", to=FLOAT),
        ],
        "TensorRT's Clip takes FP32, FP16, BF16; i is INT32",
    ),
    "a product of bytes": (
        [node("Cast", ["pixels"], "b", to=UINT8), node("Identity", ["b"], "c"), node("Cast", ["c"], "x", to=FLOAT)],
        "uint8 is for the input",
    ),
    "64-bit integers from data": (
        [node("Cast", ["pixels"], "i", to=TensorProto.INT64), node("Cast", ["i"], "x", to=FLOAT)],
        "made from Shape and constants alone",
    ),
    "sizes that turn into data": (
        [node("Shape", ["pixels"], "s"), node("Cast", ["s"], "f", to=FLOAT), node("Mul", ["pixels", "f"], "x")],
        "never turn into data",
    ),
    "axes that are computed": (
        [
            node("Shape", ["pixels"], "s", start=2, end=3),
            node("Div", ["s", "s"], "a"),
            node("ReduceMax", ["pixels", "a"], "m", keepdims=1),
            node("Sub", ["pixels", "m"], "x"),
        ],
        "`axes` must be an initializer",
    ),
    "a zero point that is none": (quantized("half_way"), "`y_zero_point` must be 0"),
    "a zero point left out": (quantized(""), "`y_zero_point` must be 0"),
    "bytes for 8 bit": (quantized("byte"), "`y_zero_point` must be 0"),
    "a scale that is computed": (
        [node("ReduceMax", ["pixels"], "m", keepdims=0), *quantized("zero", "m")],
        "restricts QuantizeLinear",
    ),
    "an empty tensor": (
        [node("ReduceSum", ["nothing"], "z", keepdims=0), node("Add", ["pixels", "z"], "x")],
        "nothing is empty",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    middle, message = FAULTS[fault]
    with pytest.raises(GraphError, match=message):
        check_graph(write(tmp_path / "g.onnx", HEAD + middle + TAIL))


def test_8_bit_with_fixed_ranges(tmp_path: Path) -> None:
    assert check_graph(write(tmp_path / "g.onnx", HEAD + quantized("zero") + TAIL)) == 5


def test_what_nvidias_own_parser_refuses(tmp_path: Path) -> None:
    """A scale of 0 is one that the table has nothing against."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(GraphError, match=r"can't read g.onnx: .*Scale.*positive.*layer here/QuantizeLinear q"):
        check_graph(write(tmp_path / "g.onnx", HEAD + quantized("zero", "nil") + TAIL))
    assert check_graph(tmp_path / "g.onnx", for_tensorrt=False) == 5


def test_where_nvidias_parser_is_not_installed_the_table_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_rules, "find_spec", lambda name: None)
    assert check_graph(write(tmp_path / "g.onnx", HEAD + quantized("zero", "nil") + TAIL)) == 5


def test_the_node_is_named(tmp_path: Path) -> None:
    middle, _ = FAULTS["float64"]
    with pytest.raises(GraphError, match="'here/Cast d'"):
        check_graph(write(tmp_path / "g.onnx", HEAD + middle + TAIL))


def test_images_are_bytes_of_one_size(tmp_path: Path) -> None:
    through = [node("Identity", ["pixels"], "x")]
    assert check_graph(write(tmp_path / "g.onnx", HEAD + through + TAIL)) == 4
    with pytest.raises(GraphError, match="the image is uint8"):
        check_graph(write(tmp_path / "float.onnx", [node("Cast", ["image"], "x", to=FLOAT), *TAIL], FLOAT))
    with pytest.raises(GraphError, match="open sizes besides the batch"):
        check_graph(write(tmp_path / "open.onnx", HEAD + through + TAIL, image_shape=("n", "height", 3)))
