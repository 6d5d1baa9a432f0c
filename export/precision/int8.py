"""8 bit: the float32 graph's large products by ONNX Runtime's quantisation tools; everything else stays as it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    MinMaxCalibrater,
    QDQQuantizer,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
)

from fbclip.bundle import DYNAMIC
from fbclip.export.graph import SCORES, SEPARATION, save_graph
from fbclip.export.precision.float32_islands import Parts, parts_by_stage

Feed = dict[str, NDArray[Any]]  # values of a graph's inputs

PRODUCTS = ["MatMul", "Gemm"]
THINNEST = 16  # least side of a weight matrix; a product with less is no large one

# What TensorRT wants: zero points of 0, weights by output channel, nothing quantised but the inputs of products
# (docs.nvidia.com, explicit quantization).
TENSORRT = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "MatMulConstBOnly": True,
    "OpTypesToExcludeOutputQuantization": PRODUCTS,
    "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
}


@dataclass(frozen=True)
class Quantization:
    """How the 8-bit graph is made.

    Attributes:
        form: "dynamic": int8 weights, and uint8 activations whose range is measured at each run; for CPUs.
            "static": QuantizeLinear and DequantizeLinear around each product, int8 on both sides, with ranges from
            `calibration`; for TensorRT and whatever else wants them fixed.
        calibration: images uint8 (H, W, 3) RGB of any size.
    """

    form: str
    calibration: Sequence[NDArray[np.uint8]] = ()


class Quantizer:
    """Writes 8-bit forms of one float32 graph, with some parts of it left float32.

    Quantised are products with constant weights in blocks, separation attention and projection. Products of two
    activations (attention, views) stay float32, and so do resize, patch embedding, mask and map.

    Args:
        graph: float32, with nodes named by stage.
        form: as `Quantization`.
        calibration: what the graph's inputs are given, for the static form.
        folder: for working files, several times the graph's size.

    Attributes:
        parts: that can be left float32.
    """

    def __init__(self, graph: Path, form: str, calibration: Sequence[Feed], folder: Path) -> None:
        self._form, self._calibration, self._folder = form, calibration, folder
        model = onnx.load(graph, load_external_data=False)
        matrices = {c.name: tuple(c.dims) for c in model.graph.initializer if len(c.dims) == 2}
        stages = parts_by_stage(sum(name.startswith("block ") for name in {_stage(n) for n in model.graph.node}))
        self._parts: dict[str, str] = {}  # by the product's name
        sizes = dict.fromkeys(stages.values(), 0)
        for node in model.graph.node:
            weights = matrices.get(node.input[1]) if node.op_type in PRODUCTS else None
            stage = _stage(node)
            if weights and min(weights) >= THINNEST and (stage in (SEPARATION, SCORES) or stage.startswith("block ")):
                self._parts[node.name] = stages[stage]
                sizes[stages[stage]] += math.prod(weights)
        self.parts = Parts(sizes, stages)
        self._graph = folder / "prepared.onnx"
        # Neither its optimisations, which rename and merge nodes, nor its inference of shapes, which are all there:
        # the step only marks the graph as one that is ready.
        quant_pre_process(
            graph,
            self._graph,
            skip_optimization=True,
            skip_onnx_shape=True,
            skip_symbolic_shape=True,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
        )

    def write(self, path: Path, islands: Collection[str] = ()) -> None:
        """Write the graph in 8 bit but for the parts named."""
        products = [name for name, part in self._parts.items() if part not in islands]
        apart = self._folder / "quantized.onnx"
        if self._form == DYNAMIC:
            # 7-bit weights: x86 without VNNI adds pairs of products in 16 bits, which 8-bit weights overflow unnoticed
            quantize_dynamic(
                self._graph, apart, PRODUCTS, per_channel=True, reduce_range=True, nodes_to_quantize=products
            )
        else:
            model = onnx.load(self._graph)
            int8 = QuantType.QInt8
            quantizer = QDQQuantizer(model, True, False, int8, int8, self._ranges, products, [], PRODUCTS, TENSORRT)
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(apart)
        quantized = onnx.load(apart)
        del quantized.metadata_props[:]
        round_for_products_only(quantized.graph, set(products))
        name_by_stage(quantized.graph)
        save_graph(onnx_ir.from_proto(quantized), path)

    @cached_property
    def _ranges(self) -> Any:
        """Smallest and largest value of each product's inputs over the calibration images."""
        augmented = str(self._folder / "augmented.onnx")
        calibrator = _Calibrater(self._graph, PRODUCTS, augmented, use_external_data_format=True)
        calibrator.products = set(self._parts)
        calibrator.augment_graph()
        calibrator.create_inference_session()
        calibrator.collect_data(_Inputs(self._calibration))
        return calibrator.compute_data()


class _Calibrater(MinMaxCalibrater):  # type: ignore[misc]
    """Measures the inputs of some products alone: each measured value is kept until the end of a run, and those of all
    products, attention's among them, are 17 GB in ViT-L/14 at 518 px."""

    products: Collection[str]

    def select_tensors_to_calibrate(self, model: onnx.ModelProto) -> tuple[set[str], Any]:
        tensors, values = super().select_tensors_to_calibrate(model)
        return tensors & {node.input[0] for node in model.graph.node if node.name in self.products}, values


class _Inputs(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, inputs: Sequence[Feed]) -> None:
        self._left = iter(inputs)

    def get_next(self) -> Feed | None:
        return next(self._left, None)


def round_for_products_only(graph: onnx.GraphProto, products: Collection[str]) -> None:
    """Give every other node the values as they were: the quantiser lets all readers of a product's input read them
    rounded, which the separation attention's gate shares with its branches."""
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    exact = {
        node.output[0]: quantized[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized
    }
    for node in graph.node:
        if node.name not in products:
            node.input[:] = [exact.get(name, name) for name in node.input]


def name_by_stage(graph: onnx.GraphProto) -> None:
    """Name the quantiser's nodes by the stage of the product they serve: "block 3/layer_norm_5_QuantizeLinear"."""
    readers = {name: node for node in reversed(graph.node) for name in node.input}
    for node in graph.node:
        served = node
        while "/" not in served.name:
            served = readers[served.output[0]]
        if served is not node:
            node.name = f"{_stage(served)}/{node.name}"


def _stage(node: onnx.NodeProto) -> str:
    return str(node.name).split("/")[0]
