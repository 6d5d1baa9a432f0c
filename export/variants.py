"""The graph for ONNX Runtime's CPU provider: the same model as the portable graph and the same weights, another order.

Attention is one fused operator of ONNX Runtime's own, which never holds all scores and takes a fifth less time than
product, softmax and product. TensorRT's parser does not know it, so this graph lies beside the portable one. Its
weights do not: they are byte ranges of that file, mapped into memory instead of parsed and copied. The inputs of the
separation attention go through it one after the other, so that their tensors stay in the caches.
"""

from __future__ import annotations

import mmap
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
from onnx import TensorProto
from onnx.defs import OpSchema
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, set_external_data
from torch import Tensor

from fbclip.export.graph import OPSET, DeployedModel, trace

DOMAIN, OPERATOR = "com.microsoft", "MultiHeadAttention"
Place = tuple[str, int, int]  # file, offset and length in bytes


def write_cpu_graph(model: DeployedModel, text: Tensor, path: Path, portable: Path) -> None:
    """Write the graph beside the portable one, which holds its weights."""
    program = trace(
        model.arranged(batched=False), text, {torch.ops.aten.scaled_dot_product_attention.default: fused_attention}
    )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        apart = Path(folder, path.name)
        program.save(apart, external_data=True)
        del program
        graph = onnx.load(apart, load_external_data=False)
        share_weights(graph, apart.parent, weights_in(portable))
    onnx.save(graph, path)


def fused_attention(q: Any, k: Any, v: Any, *, scale: float, **_: Any) -> Any:
    """Attention without a mask, (B, heads, N, A/heads) each, as ONNX Runtime's operator on (B, N, A).

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
    """
    op = onnxscript.values.Opset("", OPSET)
    heads, width = q.shape[1], q.shape[3]
    together = op.Constant(value_ints=[0, 0, heads * width])
    q, k, v = (op.Reshape(op.Transpose(t, perm=[0, 2, 1, 3]), together) for t in (q, k, v))
    mixed = _multi_head_attention()(q, k, v, num_heads=heads, scale=scale)
    return op.Transpose(op.Reshape(mixed, op.Constant(value_ints=[0, 0, heads, width])), perm=[0, 2, 1, 3])


def _multi_head_attention() -> onnxscript.values.Op:
    """The part of the operator's schema that is used here; onnx knows only its own operators."""
    tensor, attribute = OpSchema.FormalParameter, OpSchema.Attribute
    schema = OpSchema(
        OPERATOR,
        DOMAIN,
        1,
        inputs=[tensor(name, "T") for name in ("query", "key", "value")],
        outputs=[tensor("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[attribute("num_heads", OpSchema.AttrType.INT), attribute("scale", OpSchema.AttrType.FLOAT)],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), OPERATOR, schema)


def weights_in(path: Path) -> dict[bytes, Place]:
    """Where the weights of a written graph lie, by SHA-256 of their bytes."""
    places: dict[bytes, Place] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = 0
        for weight in onnx.load(path, load_external_data=False).graph.initializer:
            if weight.data_location == TensorProto.EXTERNAL:
                place, values = _external(weight, path.parent)
                places[sha256(values).digest()] = place
            elif weight.raw_data:
                start = content.find(weight.raw_data, end)
                end = start + len(weight.raw_data)
                places[sha256(weight.raw_data).digest()] = (path.name, start, len(weight.raw_data))
    return places


def share_weights(model: onnx.ModelProto, folder: Path, places: dict[bytes, Place]) -> None:
    """Let a model with its weights in a file of `folder` take them from where they lie already; keep the others in it."""
    for weight in model.graph.initializer:
        if weight.data_location != TensorProto.EXTERNAL:
            continue
        _, values = _external(weight, folder)
        if place := places.get(sha256(values).digest()):
            weight.raw_data = b"x"  # which the helper wants to see, and gives up for the place
            set_external_data(weight, *place)
            weight.ClearField("raw_data")
        else:
            load_external_data_for_tensor(weight, str(folder))
            weight.ClearField("external_data")
            weight.data_location = TensorProto.DEFAULT


def _external(weight: TensorProto, folder: Path) -> tuple[Place, bytes]:
    """The place of a weight beside its graph, and its bytes."""
    info = ExternalDataInfo(weight)
    with (folder / info.location).open("rb") as file:
        file.seek(info.offset or 0)
        values = file.read(info.length)
    return (info.location, info.offset or 0, len(values)), values
