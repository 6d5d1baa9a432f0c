"""The search for what must stay float32 where a graph of lower precision deviates past its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fbclip.errors import ParityError
from fbclip.export.graph import MASK, SCORES, SEPARATION, VIEWS

BLOCK_GROUPS = 4  # parts that the backbone is widened by; more make the search finer and longer
LARGEST_ISLANDS = 0.5  # share of the weights; a graph with more in float32 is of no lower precision


@dataclass(frozen=True)
class Parts:
    """What the islands are made of, in the order of the model: groups of blocks, separation, projection.

    Attributes:
        sizes: weights of each part.
        stages: the last part that takes part in each stage of the graph.
    """

    sizes: dict[str, int]
    stages: dict[str, str]

    def share(self, islands: Collection[str]) -> float:
        """How much of the weights these parts hold, 0..1."""
        return sum(self.sizes[part] for part in islands) / sum(self.sizes.values())


def parts_by_stage(blocks: int) -> dict[str, str]:
    """The last part that takes part in each stage of a graph with so many blocks, in the order of the model."""
    size = math.ceil(blocks / BLOCK_GROUPS)
    stages: dict[str, str] = {}
    for first in range(1, blocks + 1, size):
        last = min(first + size - 1, blocks)
        part = f"blocks {first}-{last}" if last > first else f"block {first}"
        stages |= dict.fromkeys((f"block {n}" for n in range(first, last + 1)), part)
    return {**stages, MASK: part, VIEWS: part, SEPARATION: SEPARATION, SCORES: "projection"}


def widen(
    precision: str,
    parts: Parts,
    overrun: Callable[[Collection[str]], float],
    first: str | None,
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Find parts that must stay float32 for a graph to keep its budget, the best one first, by measuring each.

    Args:
        precision: of the graph, for messages.
        overrun: the deviation in budgets with these parts in float32, so 1 is just within.
        first: the stage where the graph diverges first; parts behind it can't mend that, those before it are tried
            the nearest first. None where it diverges everywhere a little: all are tried.
        say: told each measurement.

    Raises:
        ParityError: more than half of the weights would have to stay float32.
    """
    order = list(parts.sizes)
    if first in parts.stages:
        order = order[: order.index(parts.stages[first]) + 1]
    islands: list[str] = []
    while True:
        deviations = {}
        for part in reversed(order):
            if part in islands or parts.share([*islands, part]) > LARGEST_ISLANDS:
                continue
            deviations[part] = overrun([*islands, part])
            say(f"  float32 {', '.join([*islands, part])}: {deviations[part]:.2f} of the budget")
            if deviations[part] <= 1:
                return (*islands, part)
        if not deviations:
            where = f", and diverges first in {first}" if first else ""
            raise ParityError(
                f"{precision} must stay within its budget with at most {LARGEST_ISLANDS:.0%} of the weights in "
                f"float32; this model does not{where}: export it without, so no bundle was written"
            )
        islands.append(min(deviations, key=lambda part: deviations[part]))
