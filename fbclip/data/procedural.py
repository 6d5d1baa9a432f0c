"""Procedural surfaces and defects, drawn by numpy and OpenCV: training data without a data set.

Lengths scale with the image side. Images are uint8 RGB, masks are 1 where defective. Normal surfaces carry
lawful structure (weave, brushing, holes, edges, light), so that an edge alone is no defect.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.data.dataset import Sample

Field = NDArray[np.float32]  # (S, S), about 0..1
Generator = np.random.Generator


class ProceduralDefects:
    """Sample i of a seed is always the same image.

    Args:
        image_size: side in pixels.
        length: number of samples.
        seed: of the whole set.
        ramp: samples over which the variety grows from plain surfaces with clear defects to everything.
        defective_share: probability of a defect.
    """

    def __init__(
        self, image_size: int = 128, length: int = 10_000, seed: int = 0, ramp: int = 0, defective_share: float = 0.5
    ) -> None:
        if image_size < 32 or length < 1 or ramp < 0 or not 0 <= defective_share <= 1:
            raise ValueError(
                f"image_size >= 32, length >= 1, ramp >= 0, 0 <= defective_share <= 1; got "
                f"{image_size}, {length}, {ramp}, {defective_share}"
            )
        self.image_size, self.length, self.seed = image_size, length, seed
        self.ramp, self.defective_share = ramp, defective_share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        _, defective, mask, rng = self.render(index)
        image = camera(defective, rng)
        return Sample(image, mask, int(mask.any()))

    def render(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8], Generator]:
        """The surface before and after the defects, float32 (S, S, 3) in 0..1, the mask, and the generator's state."""
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        variety = 1.0 if index >= self.ramp else index / self.ramp
        clean, support = surface(rng, self.image_size, variety)
        image, mask = clean.copy(), np.zeros(support.shape, np.uint8)
        if rng.random() < self.defective_share:
            for _ in range(1 + int(rng.random() < 0.3 * variety)):
                image, mask = add_defect(image, mask, support, rng, variety)
        return clean, image, mask, rng


def noise(rng: Generator, size: int, cells: float, stretch: float = 1.0) -> Field:
    """Smooth noise in 0..1 with about `cells` blobs along a side, stretched along x."""
    rows = max(2, min(size, round(cells)))
    cols = max(2, min(size, round(cells / stretch)))
    small = rng.random((rows, cols), dtype=np.float32)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1).astype(np.float32)


def rotated(field: Field, degrees: float) -> Field:
    size = field.shape[0]
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), degrees, 1.0)
    return cv2.warpAffine(field, turn, (size, size), borderMode=cv2.BORDER_REFLECT_101).astype(np.float32)


def plain(rng: Generator, size: int) -> Field:
    return np.full((size, size), 0.5, np.float32)


def clouds(rng: Generator, size: int) -> Field:
    cells = rng.uniform(2, 10)
    octaves = [noise(rng, size, cells * 2**k) / 2 ** (k + 1) for k in range(int(rng.integers(1, 5)))]
    total: Field = np.sum(octaves, axis=0, dtype=np.float32)
    return total


def grain(rng: Generator, size: int) -> Field:
    return noise(rng, size, size / rng.uniform(1, 5))


def brushed(rng: Generator, size: int) -> Field:
    field = noise(rng, size, size / rng.uniform(1, 2.5), stretch=rng.uniform(8, 60))
    return rotated(field, rng.choice([0, 90]) if rng.random() < 0.5 else rng.uniform(0, 180))


def weave(rng: Generator, size: int) -> Field:
    y, x = np.mgrid[:size, :size].astype(np.float32)
    period = rng.uniform(0.03, 0.14) * size
    u, v = np.sin(2 * np.pi * x / period), np.sin(2 * np.pi * y / period * rng.uniform(0.7, 1.4))
    field = np.maximum(u, v) if rng.random() < 0.5 else u * v
    field = 0.5 + 0.5 * field * rng.uniform(0.4, 1) + 0.2 * (noise(rng, size, size / 2) - 0.5)
    return rotated(field.astype(np.float32), rng.uniform(0, 90))


def stripes(rng: Generator, size: int) -> Field:
    x = np.arange(size, dtype=np.float32)[None].repeat(size, 0)
    wave = np.sin(2 * np.pi * x / (rng.uniform(0.04, 0.4) * size) + 2 * noise(rng, size, 4))
    return rotated((0.5 + 0.5 * np.tanh(wave * rng.uniform(0.5, 6))).astype(np.float32), rng.uniform(0, 180))


def wood(rng: Generator, size: int) -> Field:
    rings = noise(rng, size, rng.uniform(3, 7), stretch=rng.uniform(2, 5)) * rng.uniform(3, 9)
    field = 0.7 * (rings % 1) + 0.3 * noise(rng, size, size, stretch=20)
    return rotated(field.astype(np.float32), rng.choice([0, 90]))


def cells(rng: Generator, size: int) -> Field:
    seeds = np.ones((size, size), np.uint8)
    count = int(rng.uniform(20, 300))
    seeds[rng.integers(0, size, count), rng.integers(0, size, count)] = 0
    far: Field = cv2.distanceTransform(seeds, cv2.DIST_L2, 3).astype(np.float32)
    field: Field = far / np.float32(max(far.max(), 1e-6))
    return field


def speckle(rng: Generator, size: int) -> Field:
    field = noise(rng, size, size / rng.uniform(2, 6))
    return (0.3 + 0.5 * (field > rng.uniform(0.4, 0.7)) + 0.2 * field).astype(np.float32)


def tiles(rng: Generator, size: int) -> Field:
    field = 0.6 + 0.2 * noise(rng, size, rng.uniform(5, 30))
    step, width = max(6, int(rng.uniform(0.12, 0.5) * size)), max(1, int(0.012 * size * rng.uniform(1, 3)))
    dark = rng.uniform(0, 0.4)
    for start in range(int(rng.integers(0, step)), size, step):
        field[start : start + width] = dark
        field[:, start : start + width] = dark
    return field.astype(np.float32)


TEXTURES: tuple[Callable[[Generator, int], Field], ...] = (
    plain,
    grain,
    clouds,
    brushed,
    weave,
    stripes,
    wood,
    cells,
    speckle,
    tiles,
)
SIMPLE = 4  # how many of them a plain curriculum starts with


def texture(rng: Generator, size: int, variety: float) -> NDArray[np.float32]:
    """One surface, float32 (S, S, 3) in 0..1."""
    last = SIMPLE + variety * (len(TEXTURES) - SIMPLE)
    field = TEXTURES[int(rng.uniform(0, last))](rng, size)
    base = rng.uniform(0.2, 0.8)
    tint = np.ones(3) if rng.random() < 0.5 else rng.uniform(0.6, 1.3, 3)
    contrast = rng.uniform(0.03, 0.12 + 0.4 * variety)
    value = base + contrast * (field - field.mean())
    coloured: NDArray[np.float32] = (value[..., None] * tint).astype(np.float32)
    return coloured


def surface(rng: Generator, size: int, variety: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A surface that fills the frame, or a part with lawful holes before a background; and where the part is."""
    image = texture(rng, size, variety)
    support = np.ones((size, size), np.uint8)
    if rng.random() < 0.35 * variety:
        support = silhouette(rng, size)
        behind = texture(rng, size, 0) * rng.choice([0.15, 0.5, 1.4])
        edge = cv2.GaussianBlur(support.astype(np.float32), (3, 3), 0)[..., None]
        image = image * edge + behind * (1 - edge)
    light = 1 + rng.uniform(0, 0.5 * variety) * (noise(rng, size, 2) - 0.5)
    return (image * light[..., None]).clip(0, 1).astype(np.float32), support


def silhouette(rng: Generator, size: int) -> NDArray[np.uint8]:
    """A disc, ring, plate or capsule, perhaps with holes, not always centred: uint8 (S, S) of 0 and 1."""
    mask = np.zeros((size, size), np.uint8)
    x, y = (int(v) for v in rng.uniform(0.42, 0.58, 2) * size)
    radius = int(rng.uniform(0.28, 0.46) * size)
    kind = rng.integers(4)
    if kind < 2:
        cv2.circle(mask, (x, y), radius, 1, -1)
        if kind == 1:
            cv2.circle(mask, (x, y), int(radius * rng.uniform(0.2, 0.6)), 0, -1)
    else:
        box = ((float(x), float(y)), (2.0 * radius, radius * rng.uniform(0.6, 2)), rng.uniform(0, 180))
        cv2.fillPoly(mask, [cv2.boxPoints(box).astype(np.int32)], 1)
    for _ in range(int(rng.integers(0, 4))):
        angle, far = rng.uniform(0, 2 * np.pi), radius * 0.7
        centre = (int(x + far * np.cos(angle)), int(y + far * np.sin(angle)))
        cv2.circle(mask, centre, max(2, int(rng.uniform(0.02, 0.06) * size)), 0, -1)
    return mask


def walk(rng: Generator, size: int, length: float, bend: float) -> NDArray[np.int32]:
    """A wandering line: int32 (n, 1, 2) points."""
    steps = 24
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    path = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], 1) * length / steps, axis=0)
    middle = rng.uniform(0.15, 0.85, 2) * size
    points: NDArray[np.int32] = (path - path.mean(0) + middle).round().astype(np.int32)
    return points[:, None]


def line_alpha(rng: Generator, size: int, bend: float, variety: float) -> Field:
    alpha = np.zeros((size, size), np.float32)
    width = max(1, round(rng.uniform(0.006, 0.03) * size))
    for _ in range(1 + int(rng.integers(0, 3)) * int(rng.random() < 0.3)):
        cv2.polylines(alpha, [walk(rng, size, rng.uniform(0.2, 0.9) * size, bend)], False, 1.0, width, cv2.LINE_AA)
    return alpha


def scratch(rng: Generator, size: int, variety: float) -> Field:
    return line_alpha(rng, size, rng.choice([0.01, 0.08]), variety)


def crack(rng: Generator, size: int, variety: float) -> Field:
    return line_alpha(rng, size, 0.5, variety)


def spot(rng: Generator, size: int, variety: float) -> Field:
    alpha = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(1, 4))):
        centre = tuple(int(v) for v in rng.uniform(0.1, 0.9, 2) * size)
        axes = tuple(max(1, int(v)) for v in rng.uniform(0.012, 0.06 + 0.04 * (1 - variety), 2) * size)
        cv2.ellipse(alpha, centre, axes, rng.uniform(0, 180), 0, 360, 1.0, -1, cv2.LINE_AA)
    return alpha


def blob(rng: Generator, size: int, variety: float) -> Field:
    """An irregular patch with soft edges: stain, wear, dent."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    cx, cy = rng.uniform(0.15, 0.85, 2)
    radius = rng.uniform(0.06, 0.3)
    far = np.hypot(x - cx, (y - cy) * rng.uniform(0.6, 1.6)) / radius
    alpha = 1.6 - far - rng.uniform(0.3, 1) * noise(rng, size, rng.uniform(6, 20))
    return alpha.clip(0, 1).astype(np.float32)  # type: ignore[no-any-return]


SHAPES: tuple[Callable[[Generator, int, float], Field], ...] = (scratch, spot, crack, blob)


def add_defect(
    image: NDArray[np.float32], mask: NDArray[np.uint8], support: NDArray[np.uint8], rng: Generator, variety: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Draw one defect on the part; drawn again where it missed the part or can hardly be seen."""
    size = mask.shape[0]
    for attempt in range(8):
        alpha = SHAPES[rng.integers(len(SHAPES))](rng, size, variety) * support
        drawn = alpha > 0.3
        if drawn.sum() < 4:
            continue
        filled = appearance(image, alpha, rng, variety, boost=1 + 0.4 * attempt)
        result = (image + alpha[..., None] * (filled - image)).clip(0, 1).astype(np.float32)
        change = np.abs(result - image).mean(2)[drawn].mean()
        if change > 0.05 + 0.25 * float(image[drawn].std()) + 0.06 * (1 - variety):
            return result, mask | drawn.astype(np.uint8)
    return image, mask


def appearance(
    image: NDArray[np.float32], alpha: Field, rng: Generator, variety: float, boost: float
) -> NDArray[np.float32]:
    """What a defect looks like inside: (S, S, 3)."""
    size = alpha.shape[0]
    kind = rng.integers(5) if rng.random() < variety else 0
    if kind == 1:  # another place of the surface, turned
        return np.rot90(np.roll(image, int(rng.integers(size // 4, size // 2)), axis=1)).copy()
    if kind == 2:  # another surface
        return texture(rng, size, 1)
    if kind == 3:  # a dent: light on one side, dark on the other
        slope = cv2.Sobel(cv2.GaussianBlur(alpha, (0, 0), max(1.0, 0.02 * size)), cv2.CV_32F, 1, 0)
        slope = slope / (np.abs(slope).max() + 1e-6)
        return (image + 0.4 * boost * slope[..., None]).astype(np.float32)  # type: ignore[no-any-return]
    if kind == 4:  # worn or dirty: coloured and smooth
        colour = rng.uniform(0, 1, 3)
        return (0.5 * image + 0.5 * colour).astype(np.float32)
    level = rng.uniform(0.15, 0.5) * boost * rng.choice([-1, 1])
    return image + np.float32(level)


def camera(image: NDArray[np.float32], rng: Generator) -> NDArray[np.uint8]:
    """What a camera makes of it: blur, gamma, noise, often grey; uint8."""
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (3, 3), 0).astype(np.float32)
    if rng.random() < 0.5:
        image = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    noisy = image ** rng.uniform(0.75, 1.3) + rng.normal(0, rng.uniform(0, 0.025), image.shape)
    return (noisy * 255).clip(0, 255).astype(np.uint8)
