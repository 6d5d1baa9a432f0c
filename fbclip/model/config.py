"""What a model is, saved with its weights: the CLIP underneath, sizes, feature layers, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fbclip.errors import UsageError
from fbclip.memory import Shape
from fbclip.model.clip import ClipConfig

PROMPTS = ("{context} {noun} without defect.", "{context} {noun} with defect.")  # normal, abnormal
CONTEXT_TOKENS = 12  # learned vectors that stand in for the X tokens
MAX_FEATURE_LAYERS = 6  # entries of scale_weights in the published checkpoints
WIDEST_GROUP = 256  # a full covariance of ViT-L/14's four layers would be a twentieth of its operations
PUBLISHED: dict[str, tuple[int, tuple[int, ...]]] = {"ViT-L-14-336": (518, (1, 6, 12, 18, 24))}


@dataclass(frozen=True)
class Config:
    """What a model is, saved with its weights.

    Attributes:
        clip: the CLIP underneath.
        image_size: side S of the square input in pixels, a multiple of the patch side.
        feature_layers: blocks whose tokens are used, counted from 1, ascending.
        noun: what the prompts call the inspected thing.
    """

    clip: ClipConfig
    image_size: int
    feature_layers: tuple[int, ...]
    noun: str = "object"

    def __post_init__(self) -> None:
        patch, layers = self.clip.patch_size, self.feature_layers
        if self.image_size % patch or self.image_size < 2 * patch:
            nearest = max(2, round(self.image_size / patch)) * patch
            raise UsageError(
                f"the input's side is a multiple of the patch side {patch}, at least {2 * patch}; "
                f"got {self.image_size}, nearest is {nearest}",
                option="image_size",
            )
        ascending = list(layers) == sorted(set(layers))
        if not (
            1 <= len(layers) <= MAX_FEATURE_LAYERS and ascending and layers[0] >= 1 and layers[-1] <= self.clip.layers
        ):
            raise UsageError(
                f"feature layers are 1 to {MAX_FEATURE_LAYERS} ascending numbers between 1 and "
                f"{self.clip.layers} (the layers of {self.clip.name}); got {','.join(map(str, layers))}",
                option="feature_layers",
            )

    @property
    def grid(self) -> int:
        """Patches along a side, g."""
        return self.image_size // self.clip.patch_size

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Blocks whose tokens a memory of good parts is made of: the feature layers past a quarter of the depth, of
        which at least two are needed; where there is one alone, the block at two thirds of its depth besides."""
        last = self.feature_layers[-1]
        layers = tuple(n for n in self.feature_layers if n >= last / 4)
        return layers if len(layers) > 1 else tuple(sorted({max(1, round(last * 2 / 3)), last}))

    @property
    def memory_shape(self) -> Shape:
        """Of the features. Layers share a group, in which all is decorrelated, up to `WIDEST_GROUP` numbers."""
        width, count = self.clip.width, len(self.memory_layers)
        together = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * width <= WIDEST_GROUP))
        return Shape(self.grid, count // together, together * width)

    @property
    def prompts(self) -> tuple[str, str]:
        """The normal and the abnormal sentence."""
        context = " ".join(["X"] * CONTEXT_TOKENS)
        normal, abnormal = (p.format(context=context, noun=self.noun) for p in PROMPTS)
        return normal, abnormal

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        clip = ClipConfig.from_dict(values["clip"])
        return cls(**{**values, "clip": clip, "feature_layers": tuple(values["feature_layers"])})


def default_config(
    clip: ClipConfig, image_size: int | None = None, feature_layers: tuple[int, ...] | None = None, noun: str = "object"
) -> Config:
    """The published setting for ViT-L/14@336; elsewhere the trained input size and five layers spread over the depth."""
    if clip.name in PUBLISHED:
        size, layers = PUBLISHED[clip.name]
    else:
        size = clip.image_size
        layers = tuple(sorted({max(1, round(clip.layers * k / 4)) for k in range(5)}))
    return Config(clip, image_size or size, feature_layers or layers, noun)
