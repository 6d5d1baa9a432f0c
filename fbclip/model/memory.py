"""What good parts taught, inside the graph: distances of an image's patches to a memory, fused with the zero-shot
logits (docs/method.md, section 11).

The memory is a set of tensors of fixed shape for any number of references (`fbclip.memory.Tensors`), inputs beside the text
features. Shapes: B images, L = g*g patches, G groups of feature layers, W numbers of a group, F = G*W.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbclip.memory import FAR, NEAREST_ZERO, REACH, Shape, Weight
from fbclip.model.config import Config
from fbclip.model.network import Visual


class MemoryTensors(NamedTuple):
    """`fbclip.memory.Tensors` in torch, float32."""

    matrix: Tensor  # (G, W, W)
    places: Tensor  # (L, F)
    bank: Tensor  # (W,)
    weights: Tensor  # (len(Weight),)


class Adapted(NamedTuple):
    """What a forward pass with a memory gives: score (B,), patch_map (B, g, g) in 0..1, features (B, L, F), and the
    zero-shot logits (B, N), class token first."""

    score: Tensor
    patch_map: Tensor
    features: Tensor
    logits: Tensor


class AdaptableVisual(nn.Module):
    """`Visual` with a memory behind it; with the neutral memory its results are those of `Visual`, bit for bit.

    Args:
        config: whose `memory_layers` give the features.
        visual: used, not copied.
    """

    def __init__(self, config: Config, visual: Visual) -> None:
        super().__init__()
        self.visual, self.layers = visual, config.memory_layers
        self.head = MemoryHead(config.memory_shape)

    def forward(self, image: Tensor, text: Tensor, memory: MemoryTensors, batched: bool = False) -> Adapted:
        """Normalised images (B, 3, S, S), text features (2, E) and a memory -> Adapted."""
        tower = self.visual.tower
        every = sorted({*tower.feature_layers, *self.layers})
        tokens = dict(zip(every, tower(image, every), strict=True))
        feature_layers = torch.stack([tokens[n] for n in tower.feature_layers], dim=1)
        logits = self.visual.token_logits(feature_layers, text, batched)
        fused, features = self.head([tokens[n] for n in self.layers], logits, memory)
        return Adapted(*self.visual.probabilities(fused), features, logits)


class MemoryHead(nn.Module):
    """Features of the tokens, their distances to a memory, and the logits fused with them.

    Args:
        shape: of the features.
    """

    # how far rows and columns around a place are from it in patches, (rows, 1, around * cols) and (cols, around * cols)
    rows_away: Tensor
    cols_away: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        side = self.shape.grid
        index, around = torch.arange(side), torch.arange(-REACH, REACH + 1)
        inside = ((index[:, None] + around).clamp(0, side - 1) - index[:, None]) == around
        # a place itself is compared without rounding's error elsewhere; with a reach of 0 nothing is left to do here
        rows = torch.where(inside, around.abs().clamp_min(1).float(), FAR)  # (rows, around)
        cols = (index[:, None] - index).abs().float()
        self.register_buffer("rows_away", rows.repeat_interleave(side, dim=1)[:, None], persistent=False)
        self.register_buffer("cols_away", cols.repeat(1, len(around)), persistent=False)

    def forward(self, tokens: list[Tensor], logits: Tensor, memory: MemoryTensors) -> tuple[Tensor, Tensor]:
        """Tokens of layers (B, N, C) each, zero-shot logits (B, N) and a memory -> logits (B, N), features (B, L, F)."""
        features = self.features(tokens)
        return self.fused(logits, self.squared_distance(features, memory), memory.weights), features

    def features(self, tokens: list[Tensor]) -> Tensor:
        """Tokens of layers (B, N, C) each -> what a patch is known by (B, L, F): theirs at length 1, side by side."""
        x: Tensor = torch.cat(tokens, dim=-1)[:, 1:].unflatten(-1, (len(tokens), -1))
        length = (x * x).sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
        return torch.div(x, length).flatten(2)

    def squared_distance(self, features: Tensor, memory: MemoryTensors) -> Tensor:
        """Features (B, L, F) -> how far each patch is from what the memory expects there (B, L)."""
        groups = features.chunk(self.shape.groups, dim=-1) if self.shape.groups > 1 else (features,)
        parts = [part @ matrix for part, matrix in zip(groups, memory.matrix.unbind(0), strict=True)]
        z = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        off = z - memory.places
        own = (off * off).sum(dim=-1)  # a runtime takes half the time of a square
        around = self.nearest_around(z, memory.places, memory.weights[Weight.REACH])
        nearest = 2 * (memory.bank / 2 - reduce(torch.add, parts)).amin(dim=-1)
        return torch.minimum(torch.minimum(own, around) + memory.weights[Weight.PLACES_FAR], nearest)

    def nearest_around(self, z: Tensor, places: Tensor, reach: Tensor) -> Tensor:
        """Squared distance of each patch to the nearest of the memory's within `reach` of its place: (B, L, F) -> (B, L)."""
        side = self.shape.grid
        z, p = z.unflatten(1, (side, side)), places.unflatten(0, (side, side))
        # a row of patches against each of the rows around it, as in the spatial view
        keys, pp = F.pad(p, (0, 0, 0, 0, REACH, REACH)), F.pad((p * p).sum(dim=-1), (0, 0, REACH, REACH))
        rows = [slice(k, k + side) for k in range(2 * REACH + 1)]
        products = torch.cat([z @ keys[k].mT for k in rows], dim=-1)  # (B, rows, cols, around * cols)
        pp = torch.cat([pp[k] for k in rows], dim=-1)[:, None]
        too_far = [FAR * (away > reach).float() for away in (self.rows_away, self.cols_away)]
        nearest = ((pp / 2 + too_far[0]) + too_far[1] - products).amin(dim=-1)
        return (2 * nearest + (z * z).sum(dim=-1)).clamp_min(0).flatten(1)

    def fused(self, logits: Tensor, squared: Tensor, weights: Tensor) -> Tensor:
        """Zero-shot logits (B, N) and squared distances (B, L) -> logits (B, N)."""
        w = [weights[n] for n in range(len(Weight))]
        patches = w[Weight.MAP_ZERO_SHOT] * logits[:, 1:] + (
            w[Weight.MAP_MEMORY] * squared.clamp_min(NEAREST_ZERO).log() + w[Weight.MAP_OFFSET]
        )
        top = patches.topk(self.shape.top, dim=-1).values.mean(dim=-1)
        score = w[Weight.SCORE_CLASS] * logits[:, 0] + (w[Weight.SCORE_TOP] * top + w[Weight.SCORE_OFFSET])
        return torch.cat([score[:, None], patches], dim=1)
