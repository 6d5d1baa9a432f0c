"""Half precision: which products are float16, and how far the float32 islands widen where that drifts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from torch import nn

from fbclip.errors import ParityError
from fbclip.model import Visual

BLOCK_GROUPS = 4  # parts that the backbone is widened by; more make the search finer and longer
LARGEST_ISLANDS = 0.5  # share of the weights; a graph with more in float32 is no half-precision graph


class HalfWeights:
    """The weights of the backbone's and the separation attention's products, to be typed float16 part by part.

    `fbclip.clip.linear` casts to the type of its weights and back, so norms, softmax inputs of the views, views and
    scores stay float32 islands whatever is typed here (spec, section 10).

    Attributes:
        parts: the parameters of each part: groups of blocks, the separation attention, the projection.
    """

    def __init__(self, visual: Visual) -> None:
        blocks = list(visual.tower.blocks)
        size = math.ceil(len(blocks) / BLOCK_GROUPS)
        self.parts: dict[str, list[nn.Parameter]] = {}
        self.stages: dict[str, str] = {"scores": "projection", "separation": "separation"}
        for first in range(0, len(blocks), size):
            group = blocks[first : first + size]
            numbers = range(first + 1, first + len(group) + 1)
            part = f"blocks {numbers[0]}-{numbers[-1]}" if len(group) > 1 else f"block {numbers[0]}"
            self.parts[part] = [p for block in group for p in _products(block)]
            self.stages |= {f"block {number}": part for number in numbers}
        self.parts["separation"] = _products(visual.separation)
        self.parts["projection"] = [visual.tower.proj]
        self._float32 = {part: [p.data for p in parameters] for part, parameters in self.parts.items()}

    def apply(self, islands: Collection[str] = ()) -> None:
        """Type everything float16 but the parts named."""
        for part, parameters in self.parts.items():
            for parameter, value in zip(parameters, self._float32[part], strict=True):
                parameter.data = value if part in islands else value.half()

    def share(self, islands: Collection[str]) -> float:
        """How much of the weights these parts hold, 0..1."""
        sizes = {part: sum(p.numel() for p in parameters) for part, parameters in self.parts.items()}
        return sum(sizes[part] for part in islands) / sum(sizes.values())


def _products(module: nn.Module) -> list[nn.Parameter]:
    layers = (m for m in module.modules() if isinstance(m, (nn.Linear, nn.MultiheadAttention)))
    return [p for layer in layers for p in layer.parameters(recurse=False)]


def widen(
    weights: HalfWeights, overrun: Callable[[], float], first: str | None, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Find parts that must stay float32 for the model to keep its budget, the best one first, by measuring each.

    Leaves the weights so typed.

    Args:
        overrun: runs the model as it is typed; its drift in budgets, so 1 is just within.
        first: the stage where the graph diverges first; its part is tried first.
        say: told each measurement.

    Raises:
        ParityError: more than half of the weights would have to stay float32.
    """
    islands: list[str] = []
    diverging = weights.stages.get(first or "")
    while True:
        drifts = {}
        for part in sorted(weights.parts.keys() - set(islands), key=lambda part: (part != diverging, part)):
            if weights.share([*islands, part]) > LARGEST_ISLANDS:
                continue
            weights.apply([*islands, part])
            drifts[part] = overrun()
            say(f"  float32 {', '.join([*islands, part])}: {drifts[part]:.2f} of the budget")
            if drifts[part] <= 1:
                return (*islands, part)
        if not drifts:
            raise ParityError(
                f"half precision must stay within its budget with at most {LARGEST_ISLANDS:.0%} of the weights in "
                f"float32; this model does not, and diverges first in {first or 'no single layer'}: export without --fp16"
            )
        islands.append(min(drifts, key=lambda part: drifts[part]))
