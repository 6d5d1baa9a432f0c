"""Stub."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pose:
    matrix: NDArray[np.float64]

    def corners(self) -> NDArray[np.float64]: ...
    def onto_reference(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]: ...
    def onto_frame(self, map, frame_hw): ...
    @property
    def scale(self) -> float: ...


@dataclass(frozen=True)
class Align:
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None
    identity: str

    @classmethod
    def parse(cls, reference, mask=None) -> Align: ...
    def find(self, frame: NDArray[np.uint8]) -> Pose | None: ...
