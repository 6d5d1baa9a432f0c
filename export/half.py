"""Half precision: which products are float16, and how far the float32 islands widen where that drifts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from torch import nn

from fbclip.errors import ParityError
from fbclip.export.graph import MASK, SCORES, SEPARATION, VIEWS
from fbclip.model import Visual

BLOCK_GROUPS = 4  # parts that the backbone is widened by; more make the search finer and longer
LARGEST_ISLANDS = 0.5  # share of the weights; a graph with more in float32 is no half-precision graph


class HalfWeights:
    """The weights of the backbone's and the separation attention's products, to be typed float16 part by part.

    `fbclip.clip.linear` casts to the type of its weights and back, so norms, softmax inputs of the views, views and
    scores stay float32 islands whatever is typed here (spec, section 10).

    Attributes:
        parts: the parameters of each part, in the order of the model: groups of blocks, separation, projection.
        stages: the last part that takes part in each stage of the graph.
    """

    def __init__(self, visual: Visual) -> None:
        blocks = list(visual.tower.blocks)
        size = math.ceil(len(blocks) / BLOCK_GROUPS)
        self.parts: dict[str, list[nn.Parameter]] = {}
        self.stages: dict[str, str] = {}
        for first in range(1, len(blocks) + 1, size):
            last = min(first + size - 1, len(blocks))
            part = f"blocks {first}-{last}" if last > first else f"block {first}"
            self.parts[part] = [p for block in blocks[first - 1 : last] for p in _products(block)]
            self.stages |= dict.fromkeys((*(f"block {n}" for n in range(first, last + 1)), MASK, VIEWS), part)
        self.parts[SEPARATION] = _products(visual.separation)
        self.parts["projection"] = [visual.tower.proj]
        self.stages |= {SEPARATION: SEPARATION, SCORES: "projection"}
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
        first: the stage where the graph diverges first; parts behind it can't mend that, those before it are tried
            the nearest first.
        say: told each measurement.

    Raises:
        ParityError: more than half of the weights would have to stay float32.
    """
    order = list(weights.parts)
    if first in weights.stages:
        order = order[: order.index(weights.stages[first]) + 1]
    islands: list[str] = []
    while True:
        drifts = {}
        for part in reversed(order):
            if part in islands or weights.share([*islands, part]) > LARGEST_ISLANDS:
                continue
            weights.apply([*islands, part])
            drifts[part] = overrun()
            say(f"  float32 {', '.join([*islands, part])}: {drifts[part]:.2f} of the budget")
            if drifts[part] <= 1:
                return (*islands, part)
        if not drifts:
            raise ParityError(
                f"half precision must stay within its budget with at most {LARGEST_ISLANDS:.0%} of the weights in "
                f"float32; this model does not, and diverges first in {first or 'no single layer'}: "
                f"export without --fp16, so no bundle was written"
            )
        islands.append(min(drifts, key=lambda part: drifts[part]))
