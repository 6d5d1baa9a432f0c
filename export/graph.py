"""The exported graph: whole images in, score and anomaly map out."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from fbclip.bundle import ANOMALY_MAP, BATCH_AXIS, IMAGE, SCORE, TEXT
from fbclip.image import upsampling_matrix
from fbclip.model import FBCLIP, Visual

OPSET = 18
EXTERNAL_DATA_FROM = 2**31 - 2**20  # bytes; protobuf ends at 2 GB


class DeployedModel(nn.Module):
    """The model between its constant pre- and postprocessing (spec 9.4): the same `Visual`, not a rewrite.

    Changes `visual` in place: folds the normalisation into its patch embedding, puts all feature layers in one batch.
    """

    upsampling: Tensor  # A (S, g); map = A @ patch map @ A.T is bilinear upsampling and blur at once

    def __init__(self, model: FBCLIP) -> None:
        super().__init__()
        self.visual: Visual = model.visual
        self.visual.layers_at_once = len(model.config.feature_layers)
        self.visual.tower.fold_normalisation(model.config.clip.mean, model.config.clip.std)
        self.register_buffer(
            "upsampling", torch.from_numpy(upsampling_matrix(model.config.image_size, model.config.grid))
        )

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, S, S, 3) and text (2, E) -> score (B,) and anomaly map (B, S, S), float32."""
        score, patch_map = self.visual(image.permute(0, 3, 1, 2).float(), text)
        return score, self.upsampling @ patch_map @ self.upsampling.mT


def make_half(model: DeployedModel) -> None:
    """Type the weights of the backbone's and the separation attention's products float16, in place.

    `fbclip.clip.linear` casts at each product, so norms, softmax inputs, views and scores stay float32 islands
    (spec, section 10).
    """
    half = [model.visual.tower.blocks, model.visual.separation]
    for parent in half:
        for module in parent.modules():
            if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
                module.half()
    model.visual.tower.proj.data = model.visual.tower.proj.data.half()


def write_onnx(model: DeployedModel, text: Tensor, path: Path) -> onnx.ModelProto:
    """Write the graph with a dynamic batch; returns it without its weights."""
    size = model.upsampling.shape[0]
    image = torch.zeros(2, size, size, 3, dtype=torch.uint8)  # two, or the exporter takes the batch for a constant
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's deprecations are not the user's matter
        program = torch.onnx.export(
            model.eval(),
            (image, text),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[IMAGE, TEXT],
            output_names=[SCORE, ANOMALY_MAP],
            dynamic_shapes={"image": {0: batch}, "text": {}},
        )
    assert program is not None
    size_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    program.save(path, external_data=size_bytes > EXTERNAL_DATA_FROM)
    return onnx.load(path, load_external_data=False)
