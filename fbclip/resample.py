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

BLUR_SIGMA = 4.0  # pixels of the model's input, docs/method.md, section 7
BLUR_TRUNCATE = 4.0  # standard deviations

BICUBIC_A = -0.5  # Pillow's, src/libImaging/Resample.c
BICUBIC_SUPPORT = 2.0  # source pixels on each side of a sample, at a scale of 1
COEFFICIENT_BITS = 22  # Pillow's fixed point for 8-bit images: 32 bits less 8 of the pixel and 2 to spare
COARSE_BITS = 10  # with the one before the point 11, what a float16 or TensorFloat-32 holds


def resize(image_rgb: NDArray[np.uint8], size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Resize to the model's square input, the aspect ratio not kept.

    Pillow's bicubic: antialiased, rounded to 8 bit after each of its two passes (docs/method.md, section 1).

    Args:
        image_rgb: uint8 (H, W, 3).
        size: side in pixels, or height and width.

    Returns:
        uint8 (size, size, 3).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image_rgb.shape[:2] == (height, width):
        return image_rgb
    return np.asarray(Image.fromarray(image_rgb).resize((width, height), Image.Resampling.BICUBIC))


def bicubic_matrices(out_size: int, in_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One pass of `resize`, coarse and fine part of its weights: each float32 (out_size, in_size).

    Pillow's antialiased bicubic (src/libImaging/Resample.c): a = -0.5, the kernel stretched by the scale when
    downsizing, cut off and renormalised at the edges, its weights in 22-bit fixed point, the result rounded to 8 bit.
    Products of 8-bit pixels with 22-bit weights are too long for float32. Cut in two of 11 bits, products and sums are
    exact (up to a scale of 8), even where a GPU multiplies in TensorFloat-32: floor(coarse sum + 1/2 + fine sum) in
    two steps is Pillow's pixel.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    centres = (np.arange(out_size)[:, None] + 0.5) * scale
    pixels = np.arange(in_size)
    first = np.maximum(np.floor(centres - BICUBIC_SUPPORT * stretch + 0.5), 0)
    end = np.minimum(np.floor(centres + BICUBIC_SUPPORT * stretch + 0.5), in_size)
    x = np.abs(pixels - centres + 0.5) / stretch
    a = BICUBIC_A
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, (((x - 5) * x + 8) * x - 4) * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * ((pixels >= first) & (pixels < end))
    weights = np.rint(weights / weights.sum(axis=1, keepdims=True) * 2**COEFFICIENT_BITS) / 2**COEFFICIENT_BITS
    coarse = np.rint(weights * 2**COARSE_BITS) / 2**COARSE_BITS
    return coarse.astype(np.float32), (weights - coarse).astype(np.float32)


def width_first(size: int, frame_hw: tuple[int, int]) -> bool:
    """Which of its two passes `resize` makes first for frames of this size; the rounding between them differs.

    Up to release 12 Pillow's first pass is along the width; 13 takes the height first where that shrinks much more.
    """
    noise = np.random.default_rng(0).integers(0, 256, frame_hw, np.uint8)
    halfway = resize(noise, (frame_hw[0], size))
    return bool((resize(halfway, size) == resize(noise, size)).all())


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


def upsampling_matrix(size: int, grid: int, out_size: int | None = None) -> NDArray[np.float32]:
    """A of `anomaly_map = A @ patch_map @ A.T`: bilinear upsampling, then the blur (docs/method.md, section 9.4); float32 (size, grid).

    With `out_size`, the map is then interpolated to a frame's side: float32 (out_size, grid).
    """
    matrix = gaussian_matrix(size) @ bilinear_matrix(size, grid)
    if out_size not in (None, size):
        matrix = bilinear_matrix(out_size, size) @ matrix
    return matrix.astype(np.float32)


def in_order(images_rgb: NDArray[np.uint8], channel_order: str) -> NDArray[np.uint8]:
    """RGB images (..., 3) in the channel order of a graph's input, "rgb" or "bgr"."""
    return images_rgb if channel_order == "rgb" else np.ascontiguousarray(images_rgb[..., ::-1])
