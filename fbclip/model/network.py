"""FB-CLIP: prompts and text fusion, three views, separation attention, suppression, scoring.

Section numbers refer to `docs/method.md`. Shapes: B images, K feature layers, N = 1 + L tokens
(class token first, then L = g*g patches in raster order), C vision width, D text width, E joint width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import NamedTuple, cast

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbclip.model.config import CONTEXT_TOKENS, MAX_FEATURE_LAYERS, Config
from fbclip.model.towers import TextTower, VisionTower, attention, linear

TEMPERATURE = 0.07
WINDOW = 5  # side of the spatial view's window, in patches
HEADS, HEAD_WIDTH = 8, 64  # of the separation attention


class PromptFusion(nn.Module):
    """Two prompts with learned contexts, and the three strategies fused into their features (section 3)."""

    def __init__(self, config: Config, text: TextTower) -> None:
        super().__init__()
        width = text.positional_embedding.shape[1]
        joint = text.projection.shape[1]
        self.ctx_pos = nn.Parameter(torch.randn(1, 1, CONTEXT_TOKENS, width) * 0.02)  # the normal prompt's
        self.ctx_neg = nn.Parameter(torch.randn(1, 1, CONTEXT_TOKENS, width) * 0.02)  # the abnormal prompt's
        self.token_selector = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, joint))
        self.set_prompts(config.prompts, text)

    def set_prompts(self, prompts: tuple[str, str], text: TextTower) -> None:
        """Tokenise the two sentences anew, int64 (2, T): another noun needs no retraining."""
        self.register_buffer("tokens", text.tokenize(list(prompts)), persistent=False)
        self.tokens: Tensor

    def embeddings(self, text: TextTower) -> Tensor:
        """Prompt embeddings (2, T, D), the X tokens replaced by the learned contexts."""
        context = torch.cat([self.ctx_pos, self.ctx_neg]).squeeze(1)  # (2, 12, D)
        embedded = text.token_embedding(self.tokens)
        return torch.cat([embedded[:, :1], context, embedded[:, 1 + CONTEXT_TOKENS :]], dim=1)

    def strategies(self, hidden: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (2, T, D) -> end-of-text, mean and attention features, each (2, E)."""
        end = self.tokens.argmax(dim=-1)  # the end-of-text token has the highest id
        eot = hidden[torch.arange(hidden.shape[0], device=hidden.device), end] @ projection
        mean = hidden.mean(dim=1) @ projection
        weights = self.token_selector(hidden).softmax(dim=1)  # (2, T, 1)
        return eot, mean, self.mlp((weights * hidden).sum(dim=1))

    def forward(self, text: TextTower) -> Tensor:
        """Unit features (2, E): normal, abnormal."""
        eot, mean, att = self.strategies(text(self.embeddings(text)), text.projection)
        return F.normalize(mean + 0.5 * att + 0.5 * eot, dim=-1)


def min_max(v: Tensor) -> Tensor:
    low, high = v.amin(dim=-1, keepdim=True), v.amax(dim=-1, keepdim=True)
    return (v - low) / (high - low).clamp_min(1e-6)


@torch.no_grad()
def foreground_mask(tokens: Tensor, previous: Tensor, q: Tensor) -> Tensor:
    """Which patches are in front (section 4). A hard threshold: no gradient.

    Args:
        tokens: (..., N, C).
        previous: those of the feature layer before; of the first one itself, from which it is 0 away.
        q: `distance_to_class`, (..., L).

    Returns:
        f (..., L), 1 in front and 0.5 behind.
    """
    x = tokens[..., 1:, :]
    padded = F.pad(x, (0, 0, 1, 1))
    a = (x - (padded[..., :-2, :] + x + padded[..., 2:, :]) / 3).norm(dim=-1)
    length = x.shape[-2]
    mean = x.new_full((1, length), 1 / length) @ x  # ONNX Runtime's sum along tokens takes over ten times as long
    b = (x - mean).norm(dim=-1)
    d = (x - previous[..., 1:, :]).norm(dim=-1)
    s = 0.3 * min_max(a) + 0.3 * min_max(b) + 0.3 * min_max(q) + 0.1 * min_max(d)
    s = torch.cat([s[..., 2:3], s[..., 1:2], s, s[..., -2:-1], s[..., -3:-2]], dim=-1)  # reflected at both ends
    smooth = torch.stack([s[..., k : k + length] for k in range(5)]).mean(dim=0)
    return torch.where(smooth > 0.5, 1.0, 0.5)


def distance_to_class(tokens: Tensor) -> Tensor:
    """q = 1 - cosine of each patch with the class token: (..., N, C) -> (..., L)."""
    along = (tokens @ F.normalize(tokens[..., :1, :], dim=-1).mT).squeeze(-1)
    cosine: Tensor = along / tokens.norm(dim=-1).clamp_min(1e-12)  # one division a token, none of its channels
    return 1 - cosine[..., 1:]


def layers_before(count: int) -> Tensor:
    """The feature layer before each of some, int64 (count,); the first has itself."""
    return torch.tensor([0, *range(count - 1)])


def semantic_view(tokens: Tensor, f: Tensor, q: Tensor) -> Tensor:
    """Tokens (B, N, C), f and q (B, L) -> the patches' semantic view (B, L, C), in O(L·C) (sections 5 and 9.1).

    Row i's softmax logits take two values only, one for the patches in front and one for those behind:
    two weights per row on two sums.
    """
    x = tokens[:, 1:]
    h = 1 - f
    front = (f > 0.75).to(x.dtype)
    groups = torch.stack([front, 1 - front], dim=1)  # (B, 2, L)
    sums, counts = groups @ x, groups.sum(dim=-1)[:, None]  # (B, 2, C), (B, 1, 2)

    def weights(logits: Tensor) -> Tensor:
        e = (logits - logits.amax(dim=-1, keepdim=True)).exp()  # (B, L, 2)
        return e / (e * counts).sum(dim=-1, keepdim=True)

    foreground = weights(torch.stack([q * f, q * f * 0.5], dim=-1))
    background = weights(torch.stack([torch.zeros_like(q), (1 - q) * h * 0.5], dim=-1))
    both = f[..., None] * foreground + h[..., None] * background  # (B, L, 2)
    return 0.6 * (both @ sums) + 0.4 * x


class SpatialView(nn.Module):
    """Attention over the 5×5 window of each patch (sections 5 and 9.2), without unfolding channels.

    Every softmax logit is a scalar per patch and window position, and the scalars come from matrix products:
    a row of patches against each of the five rows around it, the columns outside the window masked. Both
    branches merge into one set of weights, applied by five products more. Positions outside the grid have
    x = 0, f = 0 and h = 1; all those of one patch share a logit, so they are one extra column of the softmax.
    """

    masked: Tensor  # (rows, cols, 5, cols) bool, True outside the window or the grid
    outside: Tensor  # (rows, cols, 1) count of the window's positions outside the grid
    log_outside: Tensor  # its logarithm, hugely negative for 0
    row_band: Tensor  # (rows, rows) 1 inside the window
    col_band: Tensor  # (cols, cols)

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.cols = grid
        row_band, col_band = (_band(n) for n in grid)
        inside = row_band.sum(1)[:, None] * col_band.sum(1)
        outside = (WINDOW**2 - inside)[..., None]
        self.register_buffer("row_band", row_band, persistent=False)
        self.register_buffer("col_band", col_band, persistent=False)
        self.register_buffer("outside", outside, persistent=False)
        # -1e9 instead of -inf: exp gives 0 all the same, and no runtime sees an infinity
        self.register_buffer(
            "log_outside", torch.where(outside > 0, outside.clamp_min(1).log(), -1e9), persistent=False
        )
        key_row = torch.arange(self.rows)[:, None] + torch.arange(WINDOW) - WINDOW // 2  # (rows, 5)
        row_inside = ((key_row >= 0) & (key_row < self.rows))[:, None, :, None]
        self.register_buffer("masked", ~(row_inside & (col_band > 0)[:, None]), persistent=False)

    def forward(self, tokens: Tensor, f: Tensor, q: Tensor) -> Tensor:
        """Tokens (B, N, C), f and q (B, L) -> the patches' spatial view (B, L, C)."""
        rows, cols = self.rows, self.cols
        c = F.normalize(tokens[:, :1], dim=-1)
        x = tokens[:, 1:]
        along = (x @ c.mT).squeeze(-1).unflatten(1, (rows, cols))  # x·ĉ, (B, rows, cols)
        x, f, q = (t.unflatten(1, (rows, cols)) for t in (x, f, q))
        h = 1 - f
        m = self.box_sum(f[..., None] * x) / WINDOW**2  # (B, rows, cols, C)
        keys = F.pad(x, (0, 0, 0, 0, 2, 2))  # (B, rows+4, cols, C)

        inner = self.over_window_rows(m, keys)  # m_i·x_j, (B, rows, cols, 5, cols)
        f_j, q_j, xx_j = self.around(f), self.around(q), self.around(x.square().sum(dim=-1))
        norm2 = m.square().sum(dim=-1)[..., None, None]  # ‖m_i‖²
        # ‖v_j - m_i‖² expanded; the clamp keeps the root's gradient finite where rounding makes it 0
        distance = (f_j.square() * xx_j - 2 * f_j * inner + norm2).clamp_min(1e-12).sqrt()
        outer = norm2[..., 0].clamp_min(1e-12).sqrt()  # ‖0 - m_i‖, the logit outside the grid
        foreground = self.window_softmax(q_j * distance, outer)
        background = self.window_softmax(self.around(h * along).expand_as(distance), torch.zeros_like(outer))

        f_sum = self.box_sum(f[..., None])[..., None].clamp_min(1e-8)  # (B, rows, cols, 1, 1)
        h_sum = (self.box_sum(h[..., None]) + self.outside)[..., None].clamp_min(1e-8)
        weights = foreground * f_j / f_sum + background * self.around(h) / h_sum  # (B, rows, cols, 5, cols)
        view = sum(weights[..., k, :] @ keys[:, k : k + rows] for k in range(WINDOW))
        return cast(Tensor, view).flatten(1, 2)

    def over_window_rows(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, rows, cols, C) times each of five rows of (B, rows+4, cols, C) -> (B, rows, cols, 5, cols)."""
        # sliced, then transposed: a runtime's product transposes on the way, a slice would copy
        products = [queries @ keys[:, k : k + self.rows].mT for k in range(WINDOW)]
        return torch.stack(products, dim=3)

    def around(self, scalars: Tensor) -> Tensor:
        """(B, rows, cols) -> the five rows around each row, to broadcast over its patches: (B, rows, 1, 5, cols)."""
        padded = F.pad(scalars, (0, 0, 2, 2))
        return torch.stack([padded[:, k : k + self.rows] for k in range(WINDOW)], dim=2)[:, :, None]

    def box_sum(self, x: Tensor) -> Tensor:
        """Sum over the window, zeros outside the grid: (B, rows, cols, C) -> the same."""
        x = self.col_band @ x
        return cast(Tensor, (self.row_band @ x.flatten(2)).unflatten(2, (self.cols, -1)))

    def window_softmax(self, logits: Tensor, outside_logit: Tensor) -> Tensor:
        """Softmax over the window's 25 positions; returns the weights inside the grid, (B, rows, cols, 5, cols)."""
        inside = logits.masked_fill(self.masked, -1e9).flatten(3)
        both = torch.cat([inside, outside_logit + self.log_outside], dim=-1)
        return cast(Tensor, both.softmax(dim=-1)[..., :-1].unflatten(3, (WINDOW, self.cols)))


def _band(n: int) -> Tensor:
    index = torch.arange(n)
    return ((index[:, None] - index).abs() <= WINDOW // 2).float()


class SeparationAttention(nn.Module):
    """A soft gate splits the tokens in two branches of attention, joined by a norm; no residual (section 6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.gate = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1), nn.Sigmoid())
        self.foreground = AttentionBranch(width, inner)
        self.background = AttentionBranch(width, inner)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        gate = x
        for layer in self.gate:
            gate = linear(gate, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(gate)
        return cast(Tensor, self.norm(self.foreground(gate * x) + self.background((1 - gate) * x)))


class AttentionBranch(nn.Module):
    """LayerNorm, then attention with 8 heads of 64 whose score scale is learned."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.tensor(HEAD_WIDTH**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        # the learned scale multiplies q, because attention takes a constant one
        mixed = attention(self.to_q(x) * self.scale, self.to_k(x), self.to_v(x), HEADS, scale=1.0)
        return linear(mixed, self.to_out.weight, self.to_out.bias)


class ScoreAndMap(NamedTuple):
    """What a forward pass gives: score (B,) and patch_map (B, g, g) in 0..1."""

    score: Tensor
    patch_map: Tensor


class Visual(nn.Module):
    """The part that runs per image, and that is exported as it stands."""

    before: Tensor  # (K,), see `layers_before`

    def __init__(self, config: Config, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower
        self.spatial = SpatialView((config.grid, config.grid))
        self.separation = SeparationAttention(tower.proj.shape[0])
        self.scale_weights = nn.Parameter(torch.zeros(MAX_FEATURE_LAYERS))
        self.register_buffer("before", layers_before(len(config.feature_layers)), persistent=False)

    def forward(self, image: Tensor, text: Tensor, batched: bool = False) -> ScoreAndMap:
        """Normalised images (B, 3, S, S), float32, and text features (2, E) -> ScoreAndMap.

        Args:
            batched: all 3K inputs go through the separation attention as one batch: the smallest graph, and large
                products for a GPU. One after the other they stay in a CPU's caches and take a fraction of the memory.
        """
        return self.probabilities(self.token_logits(self.tower(image), text, batched))

    def token_logits(self, tokens: Tensor, text: Tensor, batched: bool = False) -> Tensor:
        """Tokens of the feature layers (B, K, N, C) and text features (2, E) -> fused logits (B, N)."""
        z = list(self.separated(tokens, batched))
        b = background(*z)
        logits = [self.logits(self.suppressed(part, b), text).flatten(1, 2) for part in z]
        return self.fused(torch.cat(logits, dim=1).unflatten(1, (-1, 3)))

    def separated(self, tokens: Tensor, batched: bool = False) -> Iterator[Tensor]:
        """Tokens (B, K, N, C) -> Z after separation attention: K times the identity, semantic and spatial view, each
        (B, 1, 1, N, C), or all of them batched, (B, K, 3, N, C)."""
        if batched:
            views = self.views(tokens)
            yield self.separation(views.flatten(0, 2)).unflatten(0, (-1, *views.shape[1:3]))
            return
        layers = tokens.unbind(1)
        for layer, previous in zip(layers, (layers[0], *layers[:-1]), strict=True):
            for view in self.layer_views(layer, previous):
                yield self.separation(view)[:, None, None]

    def views(self, tokens: Tensor) -> Tensor:
        """Tokens (B, K, N, C) -> three views (B, K, 3, N, C), computed with all layers as one batch."""
        previous = tokens.index_select(1, self.before)  # no slice, since one of no layers breaks runtimes
        views = self.layer_views(tokens.flatten(0, 1), previous.flatten(0, 1))
        return cast(Tensor, torch.stack(views, dim=1).unflatten(0, (-1, tokens.shape[1])))

    def layer_views(self, tokens: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of a feature layer and of the one before (B, N, C) -> identity, semantic and spatial view, each
        (B, N, C); their class token is the same."""
        q = distance_to_class(tokens)
        f = foreground_mask(tokens, previous, q)
        patches = semantic_view(tokens, f, q), self.spatial(tokens, f, q)
        semantic, spatial = (torch.cat([tokens[:, :1], view], dim=1) for view in patches)
        return tokens, semantic, spatial

    def suppressed(self, z: Tensor, b: Tensor) -> Tensor:
        """Background suppression (section 7): Z (B, K, 3, N, C), b (B, C) -> y·W_vis (B, K, 3, N, E)."""
        b = b[:, None, None, :, None]
        cosine = (z @ F.normalize(b, dim=-2)) / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # (B, K, 3, N, 1)
        # 0.5·z + 0.5·(z - b)·(1 - cos) is a sum of z and b with one weight each: project first, then weigh
        z, b = linear(z, self.tower.proj.mT), linear(b.mT, self.tower.proj.mT)
        return cast(Tensor, (1 - 0.5 * cosine) * z - (0.5 - 0.5 * cosine) * b)

    def logits(self, projected: Tensor, text: Tensor) -> Tensor:
        """Projected tokens (B, K, 3, N, E), text (2, E) -> abnormal minus normal logit (B, K, 3, N) (section 9.3)."""
        direction = (text[1:] - text[:1]).mT / TEMPERATURE  # a column: ONNX Runtime takes 12 times as long for a vector
        return cast(Tensor, (projected @ direction).squeeze(-1) / projected.norm(dim=-1).clamp_min(1e-12))

    def fused(self, logits: Tensor) -> Tensor:
        """Logits (B, K, 3, N) of all outputs -> their weighted sum (B, N) (section 7)."""
        weights = self.scale_weights.softmax(dim=0)[: logits.shape[1]]
        return (weights[:, None] * logits.sum(dim=2)).sum(dim=1)

    def probabilities(self, logits: Tensor) -> ScoreAndMap:
        """Fused logits (B, N) -> ScoreAndMap. A softmax of two logits is a sigmoid of their difference."""
        probability, side = logits.sigmoid(), self.spatial.rows
        return ScoreAndMap(probability[:, 0], probability[:, 1:].unflatten(1, (side, side)))


def background(*parts: Tensor) -> Tensor:
    """The background direction b (B, C) from the first half of the tokens of all outputs Z, parts (B, k, v, N, C) alike."""
    upper = [z[:, :, :, : z.shape[3] // 2].flatten(1, 3) for z in parts]
    # token by token first, because ONNX Runtime takes long along tokens, as in the mask
    total, highest = reduce(torch.add, upper), reduce(torch.maximum, upper)
    return 0.5 * total.mean(dim=1) / len(upper) + 0.5 * highest.amax(dim=1)


class FBCLIP(nn.Module):
    """The model: `encode_text()` once, then `visual(image, text)` per batch.

    Args:
        config: sizes, feature layers and noun.
        clip: the CLIP of `config.clip`; its modules are used, not copied. Frozen unless `train_tower`.
        train_tower: leave the vision tower trainable.
    """

    def __init__(self, config: Config, clip: open_clip.CLIP, train_tower: bool = False) -> None:
        super().__init__()
        self.config = config
        self.text = TextTower(clip).requires_grad_(False)
        tower = VisionTower(clip.visual, config.image_size, config.feature_layers).requires_grad_(train_tower)
        self.visual = Visual(config, tower)
        self.visual.tower.proj.requires_grad_(train_tower)
        self.prompts = PromptFusion(config, self.text)

    def set_noun(self, noun: str) -> None:
        """Call the inspected thing by another name in both prompts; needs no retraining."""
        self.config = replace(self.config, noun=noun)
        self.prompts.set_prompts(self.config.prompts, self.text)

    def encode_text(self) -> Tensor:
        """Unit text features float32 (2, E): normal, abnormal. They do not depend on the image."""
        return cast(Tensor, self.prompts(self.text))

    def forward(self, image: Tensor) -> ScoreAndMap:
        """Normalised images float32 (B, 3, S, S) -> ScoreAndMap."""
        return cast(ScoreAndMap, self.visual(image, self.encode_text()))
