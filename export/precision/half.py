"""Half precision: which products are float16."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fbclip.export.graph import SEPARATION
from fbclip.export.precision.float32_islands import Parts, parts_by_stage
from fbclip.model.network import Visual


class HalfWeights:
    """The weights of the backbone's and the separation attention's products, to be typed float16 part by part.

    `fbclip.model.towers.linear` casts to the type of its weights and back, so norms, softmax inputs of the views, views and
    scores stay float32 islands whatever is typed here (docs/method.md, section 10).

    Attributes:
        parts: that can be left float32.
    """

    def __init__(self, visual: Visual) -> None:
        blocks = list(visual.tower.blocks)
        stages = parts_by_stage(len(blocks))
        self._parameters: dict[str, list[nn.Parameter]] = {part: [] for part in stages.values()}
        for number, block in enumerate(blocks, start=1):
            self._parameters[stages[f"block {number}"]] += _products(block)
        self._parameters[SEPARATION] += _products(visual.separation)
        self._parameters["projection"] += [visual.tower.proj]
        self._float32 = {part: [p.data for p in parameters] for part, parameters in self._parameters.items()}
        sizes = {part: sum(p.numel() for p in parameters) for part, parameters in self._parameters.items()}
        self.parts = Parts(sizes, stages)

    def apply(self, islands: Collection[str] = ()) -> None:
        """Type everything float16 but the parts named."""
        for part, parameters in self._parameters.items():
            for parameter, value in zip(parameters, self._float32[part], strict=True):
                parameter.data = value if part in islands else value.half()


def _products(module: nn.Module) -> list[nn.Parameter]:
    layers = (m for m in module.modules() if isinstance(m, (nn.Linear, nn.MultiheadAttention)))
    return [p for layer in layers for p in layer.parameters(recurse=False)]
