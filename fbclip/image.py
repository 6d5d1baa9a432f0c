"""The one resize, and the constant matrices of pre- and postprocessing.

Images are uint8 (H, W, 3), RGB, 0..255. Needs numpy and Pillow, nothing else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# OpenAI's CLIP: github.com/openai/CLIP, clip/clip.py
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

BLUR_SIGMA = 4.0  # pixels of the model's input, spec section 7
BLUR_TRUNCATE = 4.0  # standard deviations


def resize(image_rgb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize to the model's square input, the aspect ratio not kept.

    Pillow's bicubic: antialiased, rounded to 8 bit after each of its two passes (spec, section 1).

    Args:
        image_rgb: uint8 (H, W, 3).
        size: side in pixels.

    Returns:
        uint8 (size, size, 3).
    """
    if image_rgb.shape[:2] == (size, size):
        return image_rgb
    return np.asarray(Image.fromarray(image_rgb).resize((size, size), Image.Resampling.BICUBIC))


def bilinear_matrix(out_size: int, in_size: int) -> NDArray[np.float64]:
    """Linear interpolation of `in_size` samples at `out_size` points: float64 (out_size, in_size), rows sum to 1.

    Half-pixel centres, edges repeated, no antialias: torch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    centres = (np.arange(out_size) + 0.5) * in_size / out_size - 0.5
    centres = np.clip(centres, 0, in_size - 1)
    left = np.minimum(np.floor(centres).astype(int), max(in_size - 2, 0))
    right = np.minimum(left + 1, in_size - 1)
    weight = centres - left
    matrix = np.zeros((out_size, in_size))
    rows = np.arange(out_size)
    np.add.at(matrix, (rows, left), 1 - weight)
    np.add.at(matrix, (rows, right), weight)
    return matrix


def gaussian_matrix(size: int, sigma: float = BLUR_SIGMA) -> NDArray[np.float64]:
    """One axis of a Gaussian blur: float64 (size, size), rows sum to 1.

    Reflected at the borders (d c b a | a b c d | d c b a), truncated at 4 sigma: scipy.ndimage's `gaussian_filter`.
    """
    radius = int(BLUR_TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    columns = (np.arange(size)[:, None] + offsets) % (2 * size)
    columns = np.where(columns < size, columns, 2 * size - 1 - columns)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], columns), kernel)
    return matrix


def upsampling_matrix(size: int, grid: int, sigma: float = BLUR_SIGMA) -> NDArray[np.float32]:
    """A of `anomaly_map = A @ patch_map @ A.T`: bilinear upsampling, then the blur (spec 9.4); float32 (size, grid)."""
    return (gaussian_matrix(size, sigma) @ bilinear_matrix(size, grid)).astype(np.float32)
