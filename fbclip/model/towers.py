"""CLIP's two towers from open_clip, brought to what FB-CLIP needs of them.

The vision tower gives the tokens of several layers at any input size; the text tower runs on prompt
embeddings without a causal mask. Both share open_clip's modules, so its weights and names stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from fbclip.resample import bilinear_matrix


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matrix product, back in float32 where autocast computes it in half precision: what follows is an island of it
    (docs/method.md, section 10)."""
    return F.linear(x, weight, bias).float()


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Multi-head attention without a mask: three times (B, N, A) -> (B, N, A)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, N, A) -> (B, heads, N, A/heads)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def block_forward(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """One transformer block without a mask, (B, N, C) -> (B, N, C); the residual stream stays float32.

    The same as `block(x)` up to rounding. Written out, because torch's MultiheadAttention exports to several times
    as many nodes and offers no place for the cast of mixed precision. Of the attention's biases only the query's is
    added where it stands: the key's adds the same to all logits of a query, which softmax takes away again, and the
    value's passes the average as it is, so that it can be part of the output's.
    """
    attn: nn.MultiheadAttention = block.attn
    weight, bias = (t.unflatten(0, (3, -1)) for t in (attn.in_proj_weight, attn.in_proj_bias))  # query, key, value
    hidden = block.ln_1(x)
    # three products: a runtime would copy the parts of one
    q, k, v = F.linear(hidden, weight[0], bias[0]), F.linear(hidden, weight[1]), F.linear(hidden, weight[2])
    mixed = attention(q, k, v, attn.num_heads, attn.head_dim**-0.5)
    x = x + block.ls_1(linear(mixed, attn.out_proj.weight, attn.out_proj.bias + attn.out_proj.weight @ bias[2]))
    hidden = block.ln_2(x)
    hidden = F.linear(hidden, block.mlp.c_fc.weight, block.mlp.c_fc.bias)
    hidden = block.mlp.gelu(hidden)
    return cast(Tensor, x + block.ls_2(linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias)))


class VisionTower(nn.Module):
    """CLIP's vision transformer up to the last feature layer.

    Holds the positional embedding at the grid it was trained at and resizes it to the grid of `image_size`.
    """

    resizing: Tensor | None  # (g, trained) bilinear, where the grid is another than the trained one

    def __init__(self, visual: VisionTransformer, image_size: int, feature_layers: tuple[int, ...]) -> None:
        super().__init__()
        self.feature_layers = feature_layers
        self.conv1: nn.Conv2d = visual.conv1
        self.class_embedding: nn.Parameter = visual.class_embedding
        self.positional_embedding: nn.Parameter = visual.positional_embedding
        self.ln_pre: nn.Module = visual.ln_pre
        # Blocks past the last feature layer take no part: FB-CLIP uses neither CLIP's pooled output nor ln_post.
        self.blocks = nn.ModuleList(visual.transformer.resblocks[: max(feature_layers)])
        self.proj: nn.Parameter = visual.proj
        self.grid = image_size // self.conv1.kernel_size[0]
        trained = round((self.positional_embedding.shape[0] - 1) ** 0.5)
        resizing = None
        # a model on the meta device is only looked at, its sizes not yet trusted
        if trained != self.grid and not self.positional_embedding.is_meta:
            resizing = torch.from_numpy(bilinear_matrix(self.grid, trained)).to(self.positional_embedding)
        self.register_buffer("resizing", resizing, persistent=False)

    def positions(self) -> Tensor:
        """The positional embedding (N, C) at this tower's grid: bilinear, the class position kept (docs/method.md, section 2)."""
        positions, resizing = self.positional_embedding, self.resizing
        if resizing is None:
            return positions
        trained = positions[1:].unflatten(0, (resizing.shape[1], -1))
        patches = torch.einsum("yv,xu,vuc->yxc", resizing, resizing, trained)
        return torch.cat([positions[:1], patches.flatten(0, 1)])

    def embed(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> what the first block takes (B, N, C), class token first."""
        patches = self.conv1(image).flatten(2).mT  # (B, C, g, g) -> (B, L, C)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        return cast(Tensor, self.ln_pre(torch.cat([class_token, patches], dim=1) + self.positions()))

    def forward(self, image: Tensor, layers: Sequence[int] | None = None) -> Tensor | list[Tensor]:
        """Normalised images (B, 3, S, S) -> tokens of the K feature layers (B, K, N, C), class token first; or, where
        layers are named, a list of theirs, each (B, N, C)."""
        x = self.embed(image)
        tokens = []
        for number, block in enumerate(self.blocks, start=1):
            x = block_forward(cast(ResidualAttentionBlock, block), x)
            if number in (layers or self.feature_layers):
                tokens.append(x)
        return tokens if layers else torch.stack(tokens, dim=1)

    @torch.no_grad()
    def fold_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...], channel_order: str = "rgb") -> None:
        """Make the tower take raw pixels 0..255, "rgb" or "bgr": (x/255 - mean)/std moves into the patch embedding
        (docs/method.md, section 9.4)."""
        weight = self.conv1.weight.double()
        mean_, std_ = (weight.new_tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        bias = -(weight * mean_ / std_).sum(dim=(1, 2, 3))
        folded = nn.Conv2d(3, weight.shape[0], self.conv1.kernel_size, self.conv1.stride)  # type: ignore[arg-type]
        weight = weight / (255 * std_)
        folded.weight.copy_(weight if channel_order == "rgb" else weight.flip(1))
        cast(Tensor, folded.bias).copy_(bias)
        self.conv1 = folded.to(self.conv1.weight.device)
        self.positional_embedding = nn.Parameter(self.positions().clone())
        self.resizing = None


class TextTower(nn.Module):
    """CLIP's text transformer on embeddings, without a causal mask (docs/method.md, section 3)."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.context_length: int = clip.context_length
        self.token_embedding: nn.Embedding = clip.token_embedding
        self.positional_embedding: nn.Parameter = clip.positional_embedding
        self.blocks: nn.ModuleList = clip.transformer.resblocks
        self.ln_final: nn.Module = clip.ln_final
        self.projection: nn.Parameter = clip.text_projection

    def tokenize(self, prompts: list[str]) -> Tensor:
        """CLIP's byte-pair tokens, int64 (len(prompts), context length)."""
        tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        return cast(Tensor, tokenizer(prompts))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Prompt embeddings (P, T, D) without positions -> hidden states (P, T, D) after `ln_final`."""
        x = embeddings + self.positional_embedding
        for block in self.blocks:
            x = block_forward(cast(ResidualAttentionBlock, block), x)
        return cast(Tensor, self.ln_final(x))
