"""A predictor that misses the part in some pictures, as alignment does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fbclip import Predictor
from fbclip.runtime.predictor import Prepared

GONE = 30  # blue of the upper left pixel of a picture without the part


class Missing(Predictor):
    """By its threshold everything else is good, unless it is set."""

    def prepare(self, frame: NDArray[np.uint8], name: str = "") -> Prepared:
        return super().prepare(frame, name)._replace(absent=bool(frame[0, 0, 2] == GONE))


def part(level: int = 90) -> NDArray[np.uint8]:
    """A dark or bright surface that can be seen, uint8 (48, 64, 3)."""
    picture = np.full((48, 64, 3), level, np.uint8)
    picture[:, ::8] += 6
    return picture


def gap(level: int = 90) -> NDArray[np.uint8]:
    """The same without the part."""
    picture = part(level)
    picture[0, 0, 2] = GONE
    return picture
