"""A rendered board that lies anywhere in a frame, where it lies, and what its picture and mask are."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH, SIDE = 480, 640, 240
HOME = np.array([(1.0, 0, 200), (0, 1, 120), (0, 0, 1)])  # from the part's pixels to the reference's
Frame = NDArray[np.uint8]
Matrix = NDArray[np.float64]


def board(seed: int = 0) -> Frame:
    """A part, uint8 (240, 240): chips and tracks on a plate."""
    rng = np.random.default_rng(seed)
    part = np.full((SIDE, SIDE), 80, np.uint8)
    for _ in range(45):
        x, y, w, h = (int(each) for each in rng.integers((8, 8, 6, 6), (200, 200, 34, 26)))
        cv2.rectangle(part, (x, y), (x + w, y + h), int(rng.choice([20, 130, 200])), -1)
    cv2.rectangle(part, (0, 0), (SIDE - 1, SIDE - 1), 120, 4)
    return part


def lying(turn: float = 0, scale: float = 1, x: float = 320, y: float = 240, slant: float = 0) -> Matrix:
    """From the part's pixels to the frame's: turned by degrees, its middle at (x, y)."""
    turned = np.vstack([cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), turn, scale), (0, 0, 1)])
    moved = np.array([(1, 0, x - SIDE / 2), (0, 1, y - SIDE / 2), (0, 0, 1)]) @ turned
    moved[2, :2] += slant / WIDTH
    return moved / moved[2, 2]


def photograph(part: Frame | None, place: Matrix, light: float = 1, seed: int = 0) -> Frame:
    """A frame uint8 (480, 640, 3): the part on a belt, or the belt alone."""
    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH), 45.0)
    if part is not None:
        size = (WIDTH, HEIGHT)
        alpha = cv2.warpPerspective(np.ones(part.shape, np.float32), place, size)
        image = image * (1 - alpha) + alpha * cv2.warpPerspective(part.astype(np.float32), place, size)
    image = image * light * np.linspace(0.9, 1.1, WIDTH) + rng.normal(0, 3, image.shape)
    return np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def mask() -> Frame:
    """Of the reference: the part and a little around it, uint8 (480, 640) of 0 and 1."""
    whole = np.zeros((HEIGHT, WIDTH), np.uint8)
    whole[112:368, 192:448] = 1
    return whole


def points(matrix: Matrix) -> Matrix:
    """The part's corners through a matrix, (4, 2)."""
    corners = np.array([(0, 0, 1), (SIDE, 0, 1), (SIDE, SIDE, 1), (0, SIDE, 1.0)]) @ matrix.T
    return np.asarray(corners[:, :2] / corners[:, 2:])
