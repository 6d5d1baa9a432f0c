"""What good parts taught a bundle: its `memory.npz`. Needs numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fbclip.errors import UsageError

# Names of the graph's tensors of a memory, for the exporter and for every runtime; `Tensors` has them in this order.
MEMORY_INPUTS = ("memory_matrix", "memory_places", "memory_bank", "memory_weights")
FEATURES, LOGITS = "features", "logits"  # outputs: what patches are known by, and the zero-shot logits

Array = NDArray[np.float32]

REACH = 2  # patches: the furthest that positions may look around
FAR = 1e30  # a squared distance beyond all others; float32 holds sums of it
TOP_SHARE = 0.01  # of the patches, whose mean is the map's part of the score


class Weight(IntEnum):
    """Places in the tensor of weights."""

    MAP_ZERO_SHOT = 0  # map logit = MAP_ZERO_SHOT * zero-shot + MAP_MEMORY * log(squared distance) + MAP_OFFSET
    MAP_MEMORY = 1
    MAP_OFFSET = 2
    SCORE_CLASS = 3  # score logit = SCORE_CLASS * class token's + SCORE_TOP * mean of the highest + SCORE_OFFSET
    SCORE_TOP = 4
    SCORE_OFFSET = 5
    REACH = 6  # patches around its own place that one is compared with; 0 for its own alone
    PLACES_FAR = 7  # added to distances to `places`: 0, or FAR where the bank alone counts


class Shape(NamedTuple):
    """Of a model's features: side of the grid, groups of layers, numbers of a group."""

    grid: int
    groups: int
    width: int

    @property
    def features(self) -> int:
        return self.groups * self.width

    @property
    def numbers(self) -> int:
        """In all tensors of a memory."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a memory's tensors, by the names of the graph's inputs."""
        matrix = (self.groups, self.width, self.width)
        shapes = (matrix, (self.grid**2, self.features), (self.width,), (len(Weight),))
        return dict(zip(MEMORY_INPUTS, shapes, strict=True))


@dataclass(frozen=True)
class Tensors:
    """A memory as the graph takes it, float32, of one shape for any number of references.

    Attributes:
        matrix: (G, W, W), what the features of each group are multiplied with: whitening, or the bank's tokens in columns.
        places: (L, F), what is expected at each place, after that product.
        bank: (W,), squared length of each of the bank's tokens and of a patch's; FAR where there is none.
        weights: see `Weight`.
    """

    matrix: Array
    places: Array
    bank: Array
    weights: Array

    @classmethod
    def neutral(cls, shape: Shape) -> Tensors:
        """The memory of nothing: with it the results are the zero-shot ones, bit for bit."""
        weights = np.zeros(len(Weight), np.float32)
        weights[[Weight.MAP_ZERO_SHOT, Weight.SCORE_CLASS]] = 1
        return cls(
            np.zeros((shape.groups, shape.width, shape.width), np.float32),
            np.zeros((shape.grid**2, shape.features), np.float32),
            np.full(shape.width, FAR, np.float32),
            weights,
        )

    def checked(self, shape: Shape) -> Tensors:
        """These tensors, if they are those of a shape.

        Raises:
            UsageError: they are not.
        """
        found = {name: (str(value.dtype), value.shape) for name, value in self.named().items()}
        if found != {name: ("float32", wanted) for name, wanted in shape.shapes().items()}:
            raise UsageError(f"a memory for this model is float32 {shape.shapes()}; got {found}")
        return self

    def named(self) -> dict[str, Array]:
        """By the names of the graph's inputs."""
        return dict(zip(MEMORY_INPUTS, (self.matrix, self.places, self.bank, self.weights), strict=True))
