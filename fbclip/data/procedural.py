"""Procedural defects on procedural surfaces: training data without a data set.

A defect is a shape and what the surface looks like inside it. Images are uint8 RGB, masks are 1 where defective.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.data.dataset import Sample
from fbclip.data.surfaces import Field, Generator, Mask, Pixels, direction, displaced, noise, rotated, surface, texture

FROM_AFAR = 0.3  # of the images are drawn larger and made smaller, as a camera's are


class ProceduralDefects:
    """Sample i of a seed is always the same image.

    Args:
        image_size: side in pixels.
        length: number of samples.
        seed: of the whole set.
        ramp: samples over which the variety grows from 0.
        defective_share: probability of a defect.
        variety: 0 for plain surfaces with clear defects, 1 for many of both, 2 for surfaces as irregular as those in
            photographs, too, seen by a camera with faults of its own and from afar.
    """

    def __init__(
        self,
        image_size: int = 128,
        length: int = 10_000,
        seed: int = 0,
        ramp: int = 0,
        defective_share: float = 0.5,
        variety: float = 1.0,
    ) -> None:
        if image_size < 32 or length < 1 or ramp < 0 or not 0 <= defective_share <= 1 or not 0 <= variety <= 2:
            raise ValueError(
                f"image_size >= 32, length >= 1, ramp >= 0, 0 <= defective_share <= 1, 0 <= variety <= 2; got "
                f"{image_size}, {length}, {ramp}, {defective_share}, {variety}"
            )
        self.image_size, self.length, self.seed = image_size, length, seed
        self.ramp, self.defective_share, self.variety = ramp, defective_share, variety

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        _, defective, mask, rng = self.render(index)
        image = camera(defective, rng, self._variety(index))
        return Sample(image, mask, int(mask.any()))

    def render(self, index: int) -> tuple[Pixels, Pixels, Mask, Generator]:
        """The surface before and after the defects, float32 (S, S, 3) in 0..1, the mask, and the generator's state."""
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        variety = self._variety(index)
        side = self.image_size
        if variety > 1 and rng.random() < FROM_AFAR:
            side = int(side * rng.uniform(1, 2.5))
        clean, support, behind = surface(rng, side, variety)
        image, mask = clean.copy(), np.zeros(support.shape, np.uint8)
        if rng.random() < self.defective_share:
            for _ in range(1 + int(rng.random() < 0.3 * min(variety, 1.0))):
                image, mask = add_defect(image, mask, support, behind, rng, variety)
        if side != self.image_size:
            shape = (self.image_size, self.image_size)
            clean, image, share = (
                cv2.resize(field, shape, interpolation=cv2.INTER_AREA).astype(np.float32)
                for field in (clean, image, mask.astype(np.float32))
            )
            mask = (share > 0.2).astype(np.uint8)
        return clean, image, mask, rng

    def _variety(self, index: int) -> float:
        return self.variety * (1.0 if index >= self.ramp else index / self.ramp)


def walk(rng: Generator, size: int, length: float, bend: float, start: NDArray[np.float64] | None = None) -> Field:
    """A wandering line, float32 (n, 2) points: around a random middle, or from `start` on."""
    steps = 24
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    path = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], 1) * length / steps, axis=0)
    origin = rng.uniform(0.15, 0.85, 2) * size - path.mean(0) if start is None else start
    return (path + origin).astype(np.float32)


SUBPIXEL = 4  # bits of cv2's fixed-point coordinates


def draw_line(alpha: Field, points: Field, width: int, strength: float = 1.0) -> None:
    fixed = (points * 2**SUBPIXEL).round().astype(np.int32)[:, None]
    cv2.polylines(alpha, [fixed], False, strength, width, cv2.LINE_AA, SUBPIXEL)


def scratch(rng: Generator, size: int, variety: float) -> Field:
    alpha = np.zeros((size, size), np.float32)
    width = max(1, round(rng.uniform(0.004, 0.03) * size))
    bend = rng.choice([0.01, 0.08])
    for _ in range(1 + int(rng.integers(0, 3)) * int(rng.random() < 0.3)):
        draw_line(alpha, walk(rng, size, rng.uniform(0.2, 0.9) * size, bend), width)
    return alpha


def crack(rng: Generator, size: int, variety: float) -> Field:
    """Jagged, thin, sometimes branching."""
    alpha = np.zeros((size, size), np.float32)
    width = max(1, round(rng.uniform(0.002, 0.02) * size))
    trunk = walk(rng, size, rng.uniform(0.2, 1.2) * size, rng.uniform(0.1, 0.5))
    draw_line(alpha, trunk, width)
    for _ in range(int(rng.integers(0, 4)) * int(rng.random() < 0.4)):
        start = trunk[rng.integers(len(trunk))].astype(np.float64)
        draw_line(alpha, walk(rng, size, rng.uniform(0.1, 0.5) * size, 0.3, start), 1)
    return alpha


def thread(rng: Generator, size: int, variety: float) -> Field:
    """One or two straight lines right across, as long as the frame: a missing or thick yarn, a dead conductor."""
    alpha = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(1, 3))):
        at, width = int(rng.uniform(0.1, 0.9) * size), max(1, round(rng.uniform(0.005, 0.04) * size))
        end = size if rng.random() < 0.5 else int(rng.uniform(0.3, 0.9) * size)
        alpha[at : at + width, :end] = 1
    return rotated(alpha, direction(rng))


def spot(rng: Generator, size: int, variety: float) -> Field:
    """Pits and inclusions, one to a cluster."""
    alpha = np.zeros((size, size), np.float32)
    count = int(rng.integers(1, 4)) if rng.random() < 0.8 else int(rng.integers(4, 15))
    middle, spread = rng.uniform(0.1, 0.9, 2), rng.uniform(0.02, 0.3)
    for _ in range(count):
        centre = tuple(int(v) for v in (middle + rng.normal(0, spread, 2)) * size)
        axes = tuple(max(1, int(v)) for v in rng.uniform(0.01, 0.05 + 0.04 * (1 - variety), 2) * size)
        cv2.ellipse(alpha, centre, axes, rng.uniform(0, 180), 0, 360, 1.0, -1, cv2.LINE_AA)
    return alpha


def blob(rng: Generator, size: int, variety: float) -> Field:
    """An irregular patch with soft or hard edges: stain, wear, dent; sometimes only its rim."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    cx, cy = rng.uniform(0.1, 0.9, 2)
    far = np.hypot(x - cx, (y - cy) * np.exp(rng.uniform(-0.8, 0.8))) / np.exp(rng.uniform(np.log(0.05), np.log(0.35)))
    alpha = (1.4 - far - rng.uniform(0.2, 1) * noise(rng, size, rng.uniform(4, 20))) * np.exp(rng.uniform(0, 2))
    if rng.random() < 0.15:
        alpha = 1 - np.abs(alpha - 1)
    return alpha.clip(0, 1).astype(np.float32)  # type: ignore[no-any-return]


def band(rng: Generator, size: int, variety: float) -> Field:
    """A large part of the frame beyond a line, or between two: uneven finish, shading, an inactive area."""
    x = np.linspace(-0.5, 0.5, size, dtype=np.float32)[None].repeat(size, 0)
    x = x + rng.uniform(0, 0.15) * (noise(rng, size, rng.uniform(2, 6)) - 0.5)
    soft = np.exp(rng.uniform(np.log(0.005), np.log(0.1)))
    alpha = 1 / (1 + np.exp(((x - rng.uniform(-0.35, 0.35)) / soft).clip(-30, 30)))
    if rng.random() < 0.5:
        alpha = alpha * (1 - 1 / (1 + np.exp(((x - rng.uniform(-0.6, 0.2)) / soft).clip(-30, 30))))
    alpha = rotated(alpha.astype(np.float32), direction(rng))
    if rng.random() < 0.4:  # ends across, too
        alpha = alpha * (rotated(x, rng.uniform(0, 180)) > rng.uniform(-0.3, 0.3))
    return alpha.astype(np.float32)


def patch(rng: Generator, size: int, variety: float) -> Field:
    """A polygon with hard edges: peeled, pressed, missing."""
    alpha = np.zeros((size, size), np.float32)
    angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
    reach = rng.uniform(0.04, 0.25) * size * rng.uniform(0.4, 1, len(angles))
    corners = rng.uniform(0.1, 0.9, 2) * size + np.stack([np.cos(angles), np.sin(angles)], 1) * reach[:, None]
    cv2.fillPoly(alpha, [corners.astype(np.int32)], 1.0, cv2.LINE_AA)
    return alpha


SHAPES: tuple[Callable[[Generator, int, float], Field], ...] = (
    scratch, spot, crack, blob, spot, crack, thread, band, patch,
)  # fmt: skip
SIMPLE = 4  # how many of them a plain curriculum starts with


def add_defect(
    image: Pixels, mask: Mask, support: Mask, behind: Pixels, rng: Generator, variety: float
) -> tuple[Pixels, Mask]:
    """Draw one defect on the part; drawn again where it missed the part or can hardly be seen."""
    size, shapes = mask.shape[0], min(variety, 1.0)
    for attempt in range(8):
        shape = SHAPES[int(rng.uniform(0, SIMPLE + shapes * (len(SHAPES) - SIMPLE)))]
        alpha = shape(rng, size, shapes)
        broken = rng.random() < 0.4 and not support.all() and shape in (patch, blob)
        if broken:
            alpha = moved_to_edge(alpha, support, rng)
        alpha = alpha * support
        drawn = alpha > 0.3
        if drawn.sum() < 4 or drawn.mean() > 0.6:
            continue
        filled = behind if broken else appearance(image, alpha, rng, variety, 1 + 0.4 * attempt)
        result = (image + alpha[..., None] * (filled - image)).clip(0, 1).astype(np.float32)
        change = np.abs(result - image).mean(2)[drawn].mean()
        if change > 0.035 + 0.25 * float(image[drawn].std()) + 0.08 * (1 - shapes):
            return result, mask | drawn.astype(np.uint8)
    return image, mask


def moved_to_edge(alpha: Field, support: Mask, rng: Generator) -> Field:
    """The shape moved onto a point of the part's outline: a chip, a broken corner."""
    edge = np.argwhere(cv2.morphologyEx(support, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)))
    inside = np.argwhere(alpha > 0.3)
    if not len(edge) or not len(inside):
        return alpha
    dy, dx = edge[rng.integers(len(edge))] - inside.mean(0)
    move = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
    return cv2.warpAffine(alpha, move, alpha.shape[::-1]).astype(np.float32)


def level(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    return image + np.float32(rng.uniform(0.08, 0.45) * boost * rng.choice([-1, 1]))


def hole(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """Nearly black, or nearly white, whatever the surface."""
    return image * np.float32(0.2) + np.float32(0.8 * (rng.uniform(0, 0.15) if rng.random() < 0.7 else 1))


def elsewhere(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """Another place of the surface, turned."""
    return np.rot90(np.roll(image, int(rng.integers(len(image) // 4, len(image) // 2)), axis=1)).copy()


def foreign(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    return texture(rng, len(image), max(1.0, variety))


def dent(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """Light on one side, dark on the other."""
    smooth = cv2.GaussianBlur(alpha, (0, 0), max(1.0, 0.02 * len(image)))
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * cv2.Sobel(smooth, cv2.CV_32F, 1, 0) + np.sin(angle) * cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    lit: Pixels = (image + 0.4 * boost * slope[..., None] / (np.abs(slope).max() + 1e-6)).astype(np.float32)
    return lit


def dirt(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    share = rng.uniform(0.3, 0.8)
    return ((1 - share) * image + share * rng.uniform(0, 1, 3)).astype(np.float32)


def smeared(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """The structure blurred away."""
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.02, 0.06) * len(image)).astype(np.float32)


def recontrasted(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """The structure stronger or weaker, and a little darker or brighter."""
    mean = cv2.GaussianBlur(image, (0, 0), 0.08 * len(image))
    gain = rng.uniform(0, 0.5) if rng.random() < 0.5 else rng.uniform(1.6, 3)
    return (mean * rng.uniform(0.8, 1.2) + gain * (image - mean)).astype(np.float32)


def warped(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """The structure pulled out of place."""
    size = len(image)
    reach, cells = rng.uniform(0.05, 0.25) * size * boost, rng.uniform(3, 12)
    dx, dy = (reach * (noise(rng, size, cells) - 0.5) for _ in range(2))
    return displaced(image, dx, dy)


def rescaled(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """The structure coarser or finer, and turned."""
    size = len(image)
    zoom = np.exp(rng.choice([-1, 1]) * rng.uniform(0.3, 1.0))
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(0, 180), zoom)
    return cv2.warpAffine(image, turn, (size, size), borderMode=cv2.BORDER_REFLECT_101).astype(np.float32)


def roughened(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """Fine grain where the surface is smoother: corroded, fretted, frayed."""
    fine = noise(rng, len(image), len(image) / rng.uniform(1, 3)) - 0.5
    return (image + rng.uniform(0.3, 1) * boost * fine[..., None]).astype(np.float32)


APPEARANCES: tuple[Callable[[Pixels, Field, Generator, float, float], Pixels], ...] = (
    level, hole, elsewhere, foreign, dent, dirt, smeared, recontrasted, warped, rescaled, roughened,
)  # fmt: skip


def appearance(image: Pixels, alpha: Field, rng: Generator, variety: float, boost: float) -> Pixels:
    """What a defect looks like inside: (S, S, 3). Half of the thin and small ones are lighter or darker, no more."""
    simple = rng.random() > (0.5 if (alpha > 0.3).mean() < 0.04 else 0.85) * min(variety, 1.0)
    kind = APPEARANCES[int(rng.integers(2)) if simple else int(rng.integers(len(APPEARANCES)))]
    return kind(image, alpha, rng, variety, boost)


def camera(image: Pixels, rng: Generator, variety: float) -> NDArray[np.uint8]:
    """What a camera makes of it: blur, gamma, noise, often grey, above variety 1 sharpening and compression; uint8."""
    if variety > 1:
        image = lens(image, rng)
    elif rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (3, 3), 0).astype(np.float32)
    if rng.random() < 0.5:
        image = image.mean(axis=2, keepdims=True)
    grain = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.025))
    pixels = ((image ** np.float32(rng.uniform(0.75, 1.3)) + grain) * 255).clip(0, 255).astype(np.uint8)
    if variety > 1 and rng.random() < 0.3:
        _, file = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(40, 95))))
        pixels = np.asarray(cv2.imdecode(file, cv2.IMREAD_UNCHANGED), np.uint8).reshape(pixels.shape)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()


def lens(image: Pixels, rng: Generator) -> Pixels:
    """A little out of focus, and sharpened again."""
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1)).astype(np.float32)
    if rng.random() < 0.2:
        image = image + np.float32(rng.uniform(0.3, 1)) * (image - cv2.GaussianBlur(image, (0, 0), 1))
    return image.clip(0, 1).astype(np.float32)
