"""The exported graph: whole images in, score and anomaly map out."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from copy import deepcopy
from pathlib import Path

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from fbclip.bundle import ANOMALY_MAP, BATCH_AXIS, IMAGE, SCORE, TEXT
from fbclip.memory import FEATURES, LOGITS, MEMORY_INPUTS, Tensors
from fbclip.model.memory import AdaptableVisual, MemoryTensors
from fbclip.model.network import FBCLIP, Visual
from fbclip.resample import bicubic_matrices, upsampling_matrix, width_first

OPSET = 18
RULES = (  # of the exporter's optimisation, those that a graph of this model has a use for
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.reshape_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.no_op_cast_rule,
    rules.cast_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
)
# stages behind the blocks
MASK, VIEWS, SEPARATION, SCORES, MEMORY = "foreground mask", "views", "separation", "scores", "memory"
BLOCK = re.compile(r"adaptable\.visual\.tower\.blocks\.(\d+)\.")  # of the tower's parameters
LARGEST_FOLDED = 2**28  # elements; no weight is as large
EXTERNAL_DATA_FROM = 2**31 - 2**20  # bytes; protobuf ends at 2 GB


class DeployedModel(nn.Module):
    """The model between its constant pre- and postprocessing (docs/method.md, section 9.4): the same `AdaptableVisual`, not a rewrite.

    Changes the model in place: folds the normalisation into its patch embedding.

    Args:
        model: used, not copied.
        frame_size: height and width of the images it takes, or None for the model's own square.
        channel_order: of those images, "rgb" or "bgr".
    """

    map_rows: Tensor  # (H, g); map = rows @ patch map @ cols.T is bilinear upsampling, blur and frame size at once
    map_cols: Tensor  # (W, g)

    def __init__(self, model: FBCLIP, frame_size: tuple[int, int] | None = None, channel_order: str = "rgb") -> None:
        super().__init__()
        config = model.config
        self.adaptable = AdaptableVisual(config, model.visual)
        self.visual.tower.fold_normalisation(config.clip.mean, config.clip.std, channel_order)
        self.frame_size = frame_size or (config.image_size, config.image_size)
        height, width = self.frame_size
        self.resize = FrameResize(config.image_size, self.frame_size)
        for name, side in (("map_rows", height), ("map_cols", width)):
            self.register_buffer(name, torch.from_numpy(upsampling_matrix(config.image_size, config.grid, side)))

    @property
    def visual(self) -> Visual:
        return self.adaptable.visual

    def forward(
        self, image: Tensor, text: Tensor, matrix: Tensor, places: Tensor, bank: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images uint8 (B, H, W, 3), text (2, E) and a memory (`MemoryTensors`) -> score (B,), anomaly map (B, H, W),
        features (B, L, F) and zero-shot logits (B, 1 + L), float32."""
        pixels = image.float().permute(0, 3, 1, 2)  # the cast first: uint8 is no type to compute with in TensorRT
        memory = MemoryTensors(matrix, places, bank, weights)
        score, patch_map, features, logits = self.adaptable(self.resize(pixels), text, memory, batched=True)
        return score, self.map_rows @ patch_map @ self.map_cols.mT, features, logits


class FrameResize(nn.Module):
    """Pillow's bicubic resize from one frame size, as constant matrices (docs/method.md, section 9.4), to the last bit."""

    rows_coarse: Tensor  # (S, H)
    rows_fine: Tensor
    cols_coarse: Tensor  # (W, S)
    cols_fine: Tensor

    def __init__(self, size: int, frame_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = frame_size
        passes = {"rows": height, "cols": width}
        order = ("cols", "rows") if width_first(size, frame_size) else ("rows", "cols")
        self.order = [name for name in order if passes[name] != size]  # as Pillow, which leaves out what is no resize
        for name in self.order:
            for part, matrix in zip(("coarse", "fine"), bicubic_matrices(size, passes[name]), strict=True):
                constant = torch.from_numpy(matrix if name == "rows" else matrix.T.copy())
                self.register_buffer(f"{name}_{part}", constant)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels 0..255, float32 (B, 3, H, W) -> (B, 3, S, S), whole numbers again."""
        for name in self.order:
            if name == "rows":
                pixels = to_grey_levels(self.rows_coarse @ pixels, self.rows_fine @ pixels)
            else:
                pixels = to_grey_levels(pixels @ self.cols_coarse, pixels @ self.cols_fine)
        return pixels


def to_grey_levels(coarse: Tensor, fine: Tensor) -> Tensor:
    """Their sum rounded half up and clipped to 0..255; in two steps, because float32 can't hold all its digits."""
    coarse = coarse + 0.5
    whole = coarse.floor()
    return (whole + (coarse - whole + fine).floor()).clamp(0, 255)


def write_onnx(model: DeployedModel, text: Tensor, path: Path) -> None:
    """Write the portable graph: a dynamic batch, standard operators, nodes named by stage ("block 3/MatMul 2")."""
    save_graph(trace(model, text), path)


def trace(model: DeployedModel, text: Tensor) -> onnx_ir.Model:
    """The model as a graph, its nodes named by stage."""
    image = torch.zeros(2, *model.frame_size, 3, dtype=torch.uint8)  # two, or the batch is taken for a constant
    memory = [torch.from_numpy(value) for value in Tensors.neutral(model.adaptable.head.shape).named().values()]
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's deprecations are not the user's matter
        program = torch.onnx.export(
            model.eval(),
            (image, text, *memory),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[IMAGE, TEXT, *MEMORY_INPUTS],
            output_names=[SCORE, ANOMALY_MAP, FEATURES, LOGITS],
            dynamic_shapes=({0: batch}, *({} for _ in (text, *memory))),
            optimize=False,
        )
    assert program is not None
    simplify(program.model)
    name_nodes(program.model.graph)
    size_after_cast(program.model.graph)
    fold_weights(program.model)
    return program.model


def simplify(model: onnx_ir.Model) -> None:
    """What the exporter's own optimisation does, but for its search for slices that make a Split: that takes longer than
    everything else together, and the model has none."""
    for _ in range(2):  # what the first round removes lets the second fold
        fold_constants(model, onnx_shape_inference=True)
        rewrite(model, deepcopy(RULES))  # a rule keeps the last graph that it saw, with its weights
        RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)
    CommonSubexpressionEliminationPass()(model)


def fold_weights(model: onnx_ir.Model) -> None:
    """Compute once what depends on weights alone: their parts, transposes, sums."""
    CommonSubexpressionEliminationPass()(model)  # a weight that several calls share is transposed in each
    fold_constants(model, input_size_limit=LARGEST_FOLDED, output_size_limit=LARGEST_FOLDED)
    RemoveUnusedNodesPass()(model)  # and the weights that were taken apart


def save_graph(model: onnx_ir.Model, path: Path) -> None:
    """Write a graph with its weights to one file, or to one beside it where protobuf can't hold them.

    Serialising it whole takes five times its size in memory. A protobuf message may as well be the concatenation of its
    pieces (protobuf.dev, encoding, "last one wins"): the model without weights, then one weight at a time.
    """
    weights = dict(model.graph.initializers)
    if sum(value.const_value.nbytes for value in weights.values() if value.const_value) > EXTERNAL_DATA_FROM:
        onnx_ir.save(model, path, external_data=f"{path.name}.data")
        return
    model.graph.initializers.clear()
    with path.open("wb") as file:
        file.write(onnx_ir.to_proto(model).SerializeToString())
        for name, value in weights.items():
            assert value.const_value is not None
            weight = onnx_ir.to_proto(onnx_ir.tensor(value.const_value.numpy(), name=name))
            file.write(onnx.ModelProto(graph=onnx.GraphProto(initializer=[weight])).SerializeToString())
    model.graph.initializers.update(weights)


def name_nodes(graph: onnx_ir.Graph) -> None:
    """Name the nodes by stage, for messages and for the parity gate's taps; drops the exporter's notes, which hold
    paths of the machine it ran on."""
    stage, counts = "input", Counter[str]()
    last = max((n for n, node in enumerate(graph) if "'adaptable.visual.separation'" in _scopes(node)), default=0)
    for n, node in enumerate(graph):
        stage = _stage(node, stage, separated=n > last)
        kind = f"{stage}/{node.op_type}"
        counts[kind] += 1
        node.name = f"{kind} {counts[kind]}"
        if stage == MASK and node.op_type == "Where":  # which ends it
            stage = VIEWS
    graph_and_parts = (
        graph,
        *graph,
        *graph.inputs,
        *graph.initializers.values(),
        *(o for n in graph for o in n.outputs),
    )
    for part in graph_and_parts:
        part.metadata_props.clear()


def _scopes(node: onnx_ir.Node) -> str:
    """The modules that a node was traced in, as the exporter notes them."""
    scopes: str = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    return scopes


def _stage(node: onnx_ir.Node, before: str, separated: bool) -> str:
    """The part of the model that a node belongs to, from the module it was traced in and the stage of the node before it.

    Args:
        separated: whether it comes behind all separation attention; where inputs go through it one after the other,
            a feature layer's mask follows the separation attention of the one before.
    """
    for value in node.inputs:  # the blocks' modules are not called as such, but their parameters keep their names
        if value is not None and value.name and (block := BLOCK.match(value.name)):
            return f"block {int(block[1]) + 1}"
    scopes = _scopes(node)
    for module, stage in (("visual.separation", SEPARATION), ("visual.spatial", VIEWS), ("head", MEMORY)):
        if f"'adaptable.{module}'" in scopes:
            return stage
    if "'adaptable.visual.tower'" in scopes:
        return before if before.startswith("block") else "patch embedding"
    if "'adaptable'" in scopes:
        if before == MEMORY:
            return SCORES
        if before == SEPARATION:
            return SCORES if separated else MASK
        return MASK if before.startswith("block") else before
    if "'resize'" in scopes:
        return "resize"
    return "map" if before == SCORES else before


def size_after_cast(graph: onnx_ir.Graph) -> None:
    """Take the batch's size from the cast image instead of the image: TensorRT's parser takes uint8 in a Cast only."""
    image = graph.inputs[0]
    cast = next(node for node in image.consumers() if node.op_type == "Cast")
    for node in list(image.consumers()):
        if node.op_type == "Shape":
            node.replace_input_with(0, cast.outputs[0])
    graph.sort()
