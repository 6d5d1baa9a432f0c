"""Sections 4 to 7 of the method by a literal transcription: the tests' oracle and the benchmarks' PyTorch baseline.

One view and one layer after the other, L×L softmax, unfolded windows. Slow and large on purpose; nothing
of the product imports it. It shares the backbone and the parameters with `fbclip.model.network`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fbclip.model.network import HEADS, TEMPERATURE, WINDOW, AttentionBranch, SeparationAttention, Visual


def foreground_mask(tokens: Tensor, previous: Tensor | None) -> Tensor:
    """Section 4 for one layer: tokens (B, N, C) -> f (B, L)."""
    c, x = tokens[:, :1], tokens[:, 1:]
    zeros = torch.zeros_like(x[:, :1])
    before, after = torch.cat([zeros, x[:, :-1]], 1), torch.cat([x[:, 1:], zeros], 1)
    a = torch.linalg.vector_norm(x - (before + x + after) / 3, dim=-1)
    b = torch.linalg.vector_norm(x - x.mean(dim=1, keepdim=True), dim=-1)
    q = 1 - F.cosine_similarity(x, c, dim=-1)
    d = torch.zeros_like(a) if previous is None else torch.linalg.vector_norm(x - previous[:, 1:], dim=-1)

    def normalised(v: Tensor) -> Tensor:
        low, high = v.min(dim=1, keepdim=True).values, v.max(dim=1, keepdim=True).values
        return (v - low) / torch.clamp(high - low, min=1e-6)

    s = 0.3 * normalised(a) + 0.3 * normalised(b) + 0.3 * normalised(q) + 0.1 * normalised(d)
    s = F.avg_pool1d(F.pad(s[:, None], (2, 2), mode="reflect"), 5, stride=1)[:, 0]
    return torch.where(s > 0.5, torch.ones_like(s), torch.full_like(s, 0.5))


def semantic_view(tokens: Tensor, f: Tensor) -> Tensor:
    """Section 5, semantic: tokens (B, N, C), f (B, L) -> (B, L, C), by two L×L softmaxes."""
    c, x = tokens[:, :1], tokens[:, 1:]
    h = 1 - f
    cosine = F.cosine_similarity(x, c, dim=-1)
    foreground = torch.softmax(((1 - cosine) * f)[:, :, None] * f[:, None, :], dim=-1) @ x
    background = torch.softmax((cosine * h)[:, :, None] * h[:, None, :], dim=-1) @ x
    return 0.6 * (f[..., None] * foreground + h[..., None] * background) + 0.4 * x


def unfold(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The 5×5 window of every patch, zeros outside: (B, L, C) -> (B, L, 25, C)."""
    batch, length, width = x.shape
    image = x.mT.reshape(batch, width, *grid)
    windows = F.unfold(image, WINDOW, padding=WINDOW // 2)  # (B, C*25, L)
    return windows.reshape(batch, width, WINDOW**2, length).permute(0, 3, 2, 1)


def spatial_view(tokens: Tensor, f: Tensor, grid: tuple[int, int]) -> Tensor:
    """Section 5, spatial: tokens (B, N, C), f (B, L) -> (B, L, C), by unfolded windows."""
    c_hat = F.normalize(tokens[:, :1], dim=-1)[:, :, None]  # (B, 1, 1, C)
    x = unfold(tokens[:, 1:], grid)
    f = unfold(f[..., None], grid)  # (B, L, 25, 1)
    h = 1 - f

    u = h * x
    u_norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    weight = torch.softmax(F.cosine_similarity(u, c_hat, dim=-1)[..., None] * u_norm, dim=2)
    background = (weight * u).sum(2) / torch.clamp(h.sum(2), min=1e-8)

    v = f * x
    distance = torch.linalg.vector_norm(v - v.mean(dim=2, keepdim=True), dim=-1, keepdim=True)
    weight = torch.softmax((1 - F.cosine_similarity(v, c_hat, dim=-1)[..., None]) * distance, dim=2)
    foreground = (weight * v).sum(2) / torch.clamp(f.sum(2), min=1e-8)
    return foreground + background


def separation_attention(module: SeparationAttention, x: Tensor) -> Tensor:
    """Section 6 for one input: (B, N, C) -> (B, N, C)."""
    gate = module.gate(x)
    return module.norm(_branch(module.foreground, gate * x) + _branch(module.background, (1 - gate) * x))  # type: ignore[no-any-return]


def _branch(branch: AttentionBranch, x: Tensor) -> Tensor:
    x = branch.norm(x)
    q, k, v = (to(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for to in (branch.to_q, branch.to_k, branch.to_v))
    attention = torch.softmax(q @ k.mT * branch.scale, dim=-1)
    return branch.to_out((attention @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def views(tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """The 3K inputs of the separation attention from tokens (B, K, N, C), layer by layer, each (B, N, C)."""
    inputs: list[Tensor] = []
    previous = None
    for layer in tokens.unbind(1):
        f = foreground_mask(layer, previous)
        c = layer[:, :1]
        inputs += [layer, torch.cat([c, semantic_view(layer, f)], 1), torch.cat([c, spatial_view(layer, f, grid)], 1)]
        previous = layer
    return inputs


def suppress(visual: Visual, outputs: list[Tensor]) -> list[Tensor]:
    """Section 7 up to the projection: 3K outputs (B, N, C) -> 3K projected tokens (B, N, E)."""
    upper = torch.cat([z[:, : z.shape[1] // 2] for z in outputs], dim=1)
    b = (0.5 * upper.mean(dim=1) + 0.5 * upper.max(dim=1).values)[:, None]
    projected = []
    for z in outputs:
        cosine = F.cosine_similarity(z, b, dim=-1)[..., None]
        projected.append((0.5 * z + 0.5 * (z - b) * (1 - cosine)) @ visual.tower.proj)
    return projected


def forward(visual: Visual, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised images (B, 3, S, S), text (2, E) -> score (B,), patch map (B, g, g)."""
    grid = (visual.spatial.rows, visual.spatial.cols)
    outputs = [separation_attention(visual.separation, x) for x in views(visual.tower(image), grid)]
    weights = torch.softmax(visual.scale_weights, dim=0)
    logits = torch.zeros(())
    for n, y in enumerate(suppress(visual, outputs)):
        logits = logits + weights[n // 3] * (F.normalize(y, dim=-1) @ text.mT) / TEMPERATURE
    probability = torch.softmax(logits, dim=-1)[..., 1]
    return probability[:, 0], probability[:, 1:].reshape(-1, *grid)
