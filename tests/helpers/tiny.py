"""A bundle whose model takes a fraction of a millisecond: the map is the image's brightness, the score its mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.files import sha256


def tiny_bundle(folder: Path, gain: float = 1.0) -> Path:
    """The embedded bundle with another graph, in `folder/tiny.fbclip`; brightness is multiplied by `gain`."""
    path = Path(shutil.copytree(EMBEDDED, folder / "tiny.fbclip"))
    for variant in ("model.cpu.onnx", "model.cuda.onnx"):
        (path / variant).unlink()
    embedded = Bundle.load()
    side, width = embedded.manifest.image_size, embedded.text.shape[1]
    inputs = [
        make_tensor_value_info("image", TensorProto.UINT8, ["N", side, side, 3]),
        make_tensor_value_info("text", TensorProto.FLOAT, [2, width]),
    ]
    outputs = [
        make_tensor_value_info("score", TensorProto.FLOAT, ["N"]),
        make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["N", side, side]),
    ]
    constants = [
        make_tensor("factor", TensorProto.FLOAT, [], [gain / 255]),
        make_tensor("nothing", TensorProto.FLOAT, [], [0.0]),
        make_tensor("colours", TensorProto.INT64, [1], [3]),
        make_tensor("pixels", TensorProto.INT64, [2], [1, 2]),
    ]
    nodes = [
        make_node("Cast", ["image"], ["values"], to=TensorProto.FLOAT),
        make_node("ReduceMean", ["values", "colours"], ["grey"], keepdims=0),
        make_node("Mul", ["grey", "factor"], ["bright"]),
        make_node("ReduceMean", ["text"], ["mean"], keepdims=0),
        make_node("Mul", ["mean", "nothing"], ["zero"]),
        make_node("Add", ["bright", "zero"], ["anomaly_map"]),
        make_node("ReduceMean", ["anomaly_map", "pixels"], ["score"], keepdims=0),
    ]
    graph = make_graph(nodes, "tiny", inputs, outputs, constants)
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=8), path / "model.onnx")
    manifest = json.loads((path / "manifest.json").read_text())
    for variant in ("model.cpu.onnx", "model.cuda.onnx"):
        del manifest["files"][variant]
    manifest["memory"] = None
    manifest["files"]["model.onnx"] = sha256(path / "model.onnx")
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path
