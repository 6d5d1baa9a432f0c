"""Made-up memories, and what the formulas of docs/method.md make of them, written down once more as they stand there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fbclip.memory import FAR, Shape, Tensors
from fbclip.resample import upsampling_matrix

Array = NDArray[np.float32]


def made_up(shape: Shape, reach: int = 0, bank: bool = False, seed: int = 0) -> Tensors:
    """Whitening with places, or a bank; logits around 0 for features whose layers have length 1."""
    random = np.random.default_rng(seed)
    made = Tensors.neutral(shape)
    made.matrix[:] = random.standard_normal(made.matrix.shape)
    made.weights[:] = [0.1, 4, -4 * np.log(3 * shape.features), 0.1, 1, -0.5, reach, 0]
    if bank:  # half full
        made.matrix[:] /= np.linalg.norm(made.matrix, axis=1, keepdims=True)
        made.bank[: shape.width // 2] = 5
        made.weights[2], made.weights[7] = -4 * np.log(4), FAR
    else:
        made.places[:] = random.standard_normal(made.places.shape)
    return made


def formula(
    shape: Shape, image_size: int, memory: Tensors, features: Array, logits: Array
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores (B,) and maps (B, S, S) from features (B, L, F) and zero-shot logits (B, 1 + L), in float64."""
    rise = upsampling_matrix(image_size, shape.grid).astype(np.float64)
    a, b, c, d, e, f, reach, far = memory.weights.astype(np.float64)
    scores, maps = [], []
    for image, zero_shot in zip(features.astype(np.float64), logits.astype(np.float64), strict=True):
        squared = []
        for i, patch in enumerate(image):
            groups = [x @ m for x, m in zip(np.split(patch, shape.groups), memory.matrix, strict=True)]
            z = np.concatenate(groups)
            near = [
                np.square(z - place).sum()
                for j, place in enumerate(memory.places)
                if max(abs(i // shape.grid - j // shape.grid), abs(i % shape.grid - j % shape.grid)) <= reach
            ]
            remembered = memory.bank - 2 * sum(groups)
            squared.append(max(min(min(near) + far, remembered.min()), 1e-6))
        patches = a * zero_shot[1:] + b * np.log(squared) + c
        highest = np.sort(patches)[-int(np.ceil(0.01 * len(patches))) :]
        scores.append(1 / (1 + np.exp(-(d * zero_shot[0] + e * highest.mean() + f))))
        maps.append(rise @ (1 / (1 + np.exp(-patches.reshape(shape.grid, shape.grid)))) @ rise.T)
    return np.array(scores), np.array(maps)
