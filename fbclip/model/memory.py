"""What good parts taught, inside the graph: distances of an image's patches to a memory, fused with the zero-shot
logits (docs/method.md, section 11).

The memory is a set of tensors of fixed shape for any number of references (`fbclip.memory.Tensors`), inputs beside the text
features. Shapes: B images, L = g*g patches, G groups of feature layers, W numbers of a group, F = G*W.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbclip.memory import FAR, REACH, TOP_SHARE, Shape, Weight
from fbclip.model.config import Config
from fbclip.model.network import ScoreAndMap, Visual


class MemoryTensors(NamedTuple):
    """`fbclip.memory.Tensors` in torch, float32."""

    matrix: Tensor  # (G, W, W)
    places: Tensor  # (L, F)
    bank: Tensor  # (W,)
    weights: Tensor  # (len(Weight),)


class Adapted(NamedTuple):
    """What a forward pass with a memory gives: score (B,), patch_map (B, g, g) in 0..1, features (B, L, F)."""

    score: Tensor
    patch_map: Tensor
    features: Tensor


class AdaptableVisual(nn.Module):
    """`Visual` with a memory behind it; with the neutral memory its results are those of `Visual`, bit for bit.

    Args:
        config: whose `memory_layers` give the features.
        visual: used, not copied.
    """

    distance: Tensor  # (rows, cols, rows around, cols), in patches; more than any reach outside the grid

    def __init__(self, config: Config, visual: Visual) -> None:
        super().__init__()
        self.visual, self.layers = visual, config.memory_layers
        self.shape: Shape = config.memory_shape
        side = self.shape.grid
        self.top = math.ceil(TOP_SHARE * side * side)
        index = torch.arange(side)
        row = index[:, None] + torch.arange(-REACH, REACH + 1)  # (rows, rows around)
        far = (row - index[:, None]).abs().float().masked_fill((row < 0) | (row >= side), FAR)
        across = (index[:, None] - index).abs().float()
        self.register_buffer("distance", torch.maximum(far[:, None, :, None], across[:, None]), persistent=False)

    def forward(self, image: Tensor, text: Tensor, memory: MemoryTensors, batched: bool = False) -> Adapted:
        """Normalised images (B, 3, S, S), text features (2, E) and a memory -> Adapted."""
        tower = self.visual.tower
        every = tuple(sorted({*tower.feature_layers, *self.layers}))
        tokens = tower(image, every)
        feature_layers, memory_layers = (
            tokens[:, [every.index(n) for n in layers]] if layers != every else tokens
            for layers in (tower.feature_layers, self.layers)
        )
        logits = self.visual.token_logits(feature_layers, text, batched)
        features = self.features(memory_layers)
        result = self.fused(logits, self.squared_distance(features, memory), memory.weights)
        return Adapted(*result, features)

    def features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, N, C) -> what a patch is known by (B, L, F): those of each layer at length 1, side by side."""
        patches = F.normalize(tokens[:, :, 1:], dim=-1)
        return torch.cat(patches.unbind(1), dim=-1)

    def squared_distance(self, features: Tensor, memory: MemoryTensors) -> Tensor:
        """Features (B, L, F) -> how far each patch is from what the memory expects there (B, L)."""
        groups = features.chunk(self.shape.groups, dim=-1)
        parts = [part @ matrix for part, matrix in zip(groups, memory.matrix.unbind(0), strict=True)]
        z = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        own = (z - memory.places).square().sum(dim=-1)
        around = self.nearest_around(z, memory.places, memory.weights[Weight.REACH])
        nearest = (memory.bank - 2 * torch.stack(parts).sum(dim=0)).amin(dim=-1)
        return torch.minimum(torch.minimum(own, around) + memory.weights[Weight.PLACES_FAR], nearest)

    def nearest_around(self, z: Tensor, places: Tensor, reach: Tensor) -> Tensor:
        """Squared distance of each patch to the nearest of the memory's within `reach` of its place: (B, L, F) -> (B, L)."""
        side = self.shape.grid
        z, p = z.unflatten(1, (side, side)), places.unflatten(0, (side, side))
        keys = F.pad(p, (0, 0, 0, 0, REACH, REACH))  # (rows + 2 REACH, cols, F)
        # a row of patches against each of the rows around it, as in the spatial view
        products = [z @ keys[k : k + side].mT for k in range(2 * REACH + 1)]
        pp = F.pad(p.square().sum(dim=-1), (0, 0, REACH, REACH))
        pp = torch.stack([pp[k : k + side] for k in range(2 * REACH + 1)], dim=1)[
            :, None
        ]  # (rows, 1, rows around, cols)
        away = pp - 2 * torch.stack(products, dim=3)  # (B, rows, cols, rows around, cols)
        away = away.masked_fill(self.distance > reach, FAR).flatten(3).amin(dim=-1)
        return (away + z.square().sum(dim=-1)).clamp_min(0).flatten(1)

    def fused(self, logits: Tensor, squared: Tensor, weights: Tensor) -> ScoreAndMap:
        """Zero-shot logits (B, N) and squared distances (B, L) -> ScoreAndMap."""
        w = [weights[n] for n in range(len(Weight))]
        patches = w[Weight.MAP_ZERO_SHOT] * logits[:, 1:] + (
            w[Weight.MAP_MEMORY] * squared.clamp_min(1e-6).log() + w[Weight.MAP_OFFSET]
        )
        top = patches.topk(self.top, dim=-1).values.mean(dim=-1)
        score = w[Weight.SCORE_CLASS] * logits[:, 0] + (w[Weight.SCORE_TOP] * top + w[Weight.SCORE_OFFSET])
        return self.visual.probabilities(torch.cat([score[:, None], patches], dim=1))
