"""Procedural industrial surfaces and parts, sound and defective, to learn what a defect is from.

A scene is a surface, or an object on a backdrop, with the structure it ought to have: edges, holes, prints, periods.
A defect is a layer and an opacity, laid over the scene before the camera adds light, blur and noise. Hence everything
outside the mask is the same, pixel by pixel, in the sound and in the defective rendition.

Scenes are float32, about 0..1; all lengths scale with the image's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Rng = np.random.Generator
Texture = Callable[[Rng, int, float, float], Floats]
T = TypeVar("T")

MASK_ALPHA = 0.25  # a defect's opacity from which a pixel counts as defective
MIN_SIZE, MAX_SIZE = 32, 1024
_SHIFT = 4  # fractional bits of drawing coordinates


@dataclass(frozen=True)
class Sample:
    """An image, uint8 (S, S, 3), RGB, and its mask, uint8 (S, S), 1 where defective, else 0."""

    image: Bytes
    mask: Bytes

    @property
    def label(self) -> int:
        """1 if any pixel is defective, else 0."""
        return int(self.mask.any())


class ProceduralDefects:
    """A map-style data set without end to its variety: sample i of a seed is always the same image.

    Args:
        image_size: side S of the square images, 32..1024.
        length: number of samples.
        seed: of the whole set.
        diversity: 0 (plain surfaces, clear scratches and spots) .. 1 (everything), the knob of a curriculum.
        defective_share: probability 0..1 that a sample is defective.
    """

    def __init__(
        self,
        image_size: int = 128,
        length: int = 10_000,
        seed: int = 0,
        diversity: float = 1.0,
        defective_share: float = 0.5,
    ) -> None:
        _require("image_size", image_size, MIN_SIZE, MAX_SIZE)
        _require("length", length, 0, math.inf)
        _require("seed", seed, 0, math.inf)
        _require("diversity", diversity, 0, 1)
        _require("defective_share", defective_share, 0, 1)
        self.image_size = image_size
        self.length = length
        self.seed = seed
        self.diversity = diversity
        self.defective_share = defective_share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in 0..{self.length - 1}, got {index}")
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        defective = rng.random() < self.defective_share
        _, image, mask = _render(rng, self.image_size, self.diversity, defective)
        return Sample(image, mask)


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")


def _render(rng: Rng, size: int, diversity: float, defective: bool) -> tuple[Bytes, Bytes, Bytes]:
    """The sound image, the image, both uint8 (size, size, 3), and the mask, uint8 (size, size), 0 or 1."""
    scene = _scene(rng, size, diversity)
    develop = _camera(rng, size, diversity)
    artefacts = rng.random() < 0.3 * diversity
    quality = int(rng.integers(40, 90))
    clean = image = develop(scene.image)
    mask: Bytes = np.zeros((size, size), np.uint8)
    if defective:
        image, mask = _spoil(rng, scene, clean, develop, diversity)
    if artefacts:  # those of the sound image for both, because a block of its own would reach beyond the mask
        packed = cv2.imencode(".jpg", clean, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        residue = cv2.imdecode(packed, cv2.IMREAD_COLOR).astype(np.int16) - clean
        clean, image = (np.clip(each + residue, 0, 255).astype(np.uint8) for each in (clean, image))
    return clean, image, mask


# ---- fields and drawing ----


def _floats(array: ArrayLike) -> Floats:
    return np.asarray(array, np.float32)


def _pick(rng: Rng, things: Sequence[T], diversity: float, least: int) -> T:
    """One of the `least` first things at diversity 0, one of all at 1."""
    return things[int(rng.integers(least + round(diversity * (len(things) - least))))]


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Floats, Floats]:
    """Pixel centres as x and y, float32 (size, size), 0..1."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    x, y = (np.ascontiguousarray(each) for each in np.meshgrid(axis, axis))
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _turned(size: int, angle: float, x0: float = 0.5, y0: float = 0.5) -> tuple[Floats, Floats]:
    """Coordinates along and across `angle`, from (x0, y0), in sides of the image."""
    x, y = _grid(size)
    c, s = math.cos(angle), math.sin(angle)
    return c * x + s * y - (c * x0 + s * y0), c * y - s * x - (c * y0 - s * x0)


def _noise(rng: Rng, size: int, rows: float, columns: float = 0) -> Floats:
    """Smooth noise of `rows` x `columns` cells (square if not given), zero mean, standard deviation near 1."""
    shape = [max(2, min(size, round(cells))) for cells in (rows, columns or rows)]
    return _floats(cv2.resize(rng.standard_normal(shape, np.float32), (size, size), interpolation=cv2.INTER_CUBIC))


def _spin(field: Floats, angle: float) -> Floats:
    """A field turned about its centre; mirrored where it ends."""
    size = field.shape[0]
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), -math.degrees(angle), 1.0)
    return _floats(cv2.warpAffine(field, turn, (size, size), borderMode=cv2.BORDER_REFLECT))


def _ramp(field: Floats, width: float) -> Floats:
    """0 below, 1 above zero, with a linear edge of `width`."""
    return np.clip(field / np.float32(width) + np.float32(0.5), 0, 1)


def _fill(size: int, outline: ArrayLike) -> Floats:
    """A filled polygon (n, 2) of pixels as opacity 0..1, antialiased."""
    canvas = np.zeros((size, size), np.uint8)
    points = np.round(np.asarray(outline) * (1 << _SHIFT)).astype(np.int32)
    return _floats(cv2.fillPoly(canvas, [points], 255, cv2.LINE_AA, _SHIFT)) / np.float32(255)


def _stroke(size: int, lines: Sequence[ArrayLike], width: float) -> Floats:
    """Polylines (n, 2) of pixels as opacity 0..1, antialiased, at least one pixel wide."""
    canvas = np.zeros((size, size), np.uint8)
    points = [np.round(np.asarray(line) * (1 << _SHIFT)).astype(np.int32) for line in lines]
    cv2.polylines(canvas, points, False, 255, max(1, round(width)), cv2.LINE_AA, _SHIFT)
    return _floats(canvas) / np.float32(255)


def _worley(rng: Rng, size: int, cells: float) -> tuple[Floats, NDArray[np.int32]]:
    """Distance to the nearest of about cells² random points, in cells, and that point's number."""
    points = (rng.random((max(4, round(cells * cells)), 2)) * size).astype(np.intp)
    field = np.full((size, size), 255, np.uint8)
    field[points[:, 0], points[:, 1]] = 0
    distance, labels = cv2.distanceTransformWithLabels(field, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    return _floats(distance) * np.float32(cells / size), np.asarray(labels, np.int32)


# ---- textures: a tone around 0, of a standard deviation near 1; pitch is the period in sides of the image ----


def _plain(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    return _noise(rng, size, 4) * np.float32(0.15)


def _clouds(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    cells = rng.uniform(2, 6)
    return sum((_noise(rng, size, cells * 2.2**i) * np.float32(0.6**i) for i in range(4)), _floats(0))


def _brushed(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    if rng.random() < 0.25:  # turned on a lathe
        u, v = _turned(size, 0, *rng.uniform(-0.2, 1.2, 2))
        track = _noise(rng, 256, rng.uniform(60, 256), 2)[:, 0]
        return track[(np.sqrt(u * u + v * v) * 150).astype(np.intp)]
    fine = _noise(rng, size, rng.uniform(40, 160), rng.uniform(2, 8))
    return _spin(fine + np.float32(0.5) * _noise(rng, size, 12, 2), angle)


def _cast(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    grain = _noise(rng, size, rng.uniform(30, 130))
    relief = cv2.Sobel(grain, cv2.CV_32F, 1, 1, ksize=3) if rng.random() < 0.5 else grain
    return _floats(relief) + np.float32(0.5) * _noise(rng, size, 6)


def _stripes(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    u, _ = _turned(size, angle)
    wobble = _noise(rng, size, 3) * np.float32(rng.uniform(0, 0.12))
    return np.clip(np.cos(u * np.float32(math.tau / pitch) + wobble) * np.float32(rng.uniform(1, 4)), -1, 1)


def _weave(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    u, v = (axis / np.float32(pitch) + _noise(rng, size, 8) * np.float32(0.06) for axis in _turned(size, angle))
    twill = int(rng.integers(1, 3))  # threads crossed at a time
    over = (np.floor(u) + np.floor(v)) % (2 * twill) < twill
    warp, weft = np.abs(np.sin(u * np.float32(math.pi))), np.abs(np.sin(v * np.float32(math.pi)))
    return np.where(over, warp * (1 + weft), weft * np.float32(1.4)) - 1 + np.float32(0.2) * _noise(rng, size, 100)


def _lattice(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    """Mesh, or round holes in rows."""
    u, v = (np.cos(axis * np.float32(math.tau / pitch)) for axis in _turned(size, angle))
    shape = np.maximum(u, v) if rng.random() < 0.5 else u + v
    return 2 * _ramp(shape - np.float32(rng.uniform(0.4, 0.9)), 0.3) - 1


def _wood(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    _, v = _turned(size, 0)
    rings = v * np.float32(rng.uniform(6, 20)) + _noise(rng, size, 5, 2) * np.float32(rng.uniform(0.3, 1))
    fibres = _noise(rng, size, 110, 5) * np.float32(0.5)
    return _spin(np.abs(rings % 2 - 1) * 2 - 1 + fibres, angle)


def _tiles(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    u, v = (axis / np.float32(pitch * 2) + 16 for axis in _turned(size, angle))
    v = v + np.float32(0.5) * (np.floor(u) % 2) if rng.random() < 0.5 else v
    tones = rng.standard_normal((64, 64), np.float32) * np.float32(rng.uniform(0, 0.6))
    joint = np.maximum(np.abs(u % 1 - np.float32(0.5)), np.abs(v % 1 - np.float32(0.5)))
    body = tones[u.astype(np.intp) % 64, v.astype(np.intp) % 64] + np.float32(0.2) * _noise(rng, size, 60)
    return body - np.float32(rng.choice([-2.5, 2.5])) * _ramp(joint - np.float32(rng.uniform(0.42, 0.48)), 0.03)


def _granite(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    cells = rng.uniform(12, 60)
    return sum((_ramp(_noise(rng, size, cells * k) - 1, 0.4) * t for k, t in ((1, 2), (1.7, -2), (2.5, 1))), _floats(0))


def _terrazzo(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    distance, labels = _worley(rng, size, rng.uniform(6, 25))
    tones = rng.standard_normal(labels.max() + 1, np.float32)
    return np.asarray(tones[labels] * _ramp(np.float32(rng.uniform(0.3, 0.8)) - distance, 0.2), np.float32)


def _leather(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    distance, _ = _worley(rng, size, rng.uniform(8, 35))
    return np.clip(distance * 3 - 1, -1, 1.5) + np.float32(0.2) * _noise(rng, size, 60)


def _solar(rng: Rng, size: int, angle: float, pitch: float) -> Floats:
    """Cells of dark crystals, with bus bars across and fine fingers along."""
    _, labels = _worley(rng, size, rng.uniform(5, 14))
    crystals = rng.standard_normal(labels.max() + 1, np.float32)[labels] * np.float32(rng.uniform(0.1, 0.5))
    u, v = _turned(size, round(angle / math.pi * 2) * math.pi / 2, rng.random(), rng.random())
    bars = np.abs((u * 6) % 1 - np.float32(0.5)) < 0.05
    joints = (np.abs((u * 2) % 1 - np.float32(0.5)) > 0.485) | (np.abs((v * 2) % 1 - np.float32(0.5)) > 0.485)
    fingers = np.cos(v * np.float32(math.tau * 32)) * np.float32(0.2)
    return np.asarray(crystals + fingers + 3 * bars + 4 * joints, np.float32)


_TEXTURES: tuple[Texture, ...] = (
    _plain, _clouds, _brushed, _cast, _stripes, _weave, _lattice, _wood, _tiles, _granite, _terrazzo, _leather, _solar,
)  # fmt: skip


# ---- scenes ----


@dataclass(frozen=True)
class _Scene:
    image: Floats  # (S, S, 3)
    backdrop: Floats  # (S, S, 3), without the object
    region: Floats  # (S, S), 0..1, opacity of the object; 1 everywhere if the surface fills the image
    angle: float  # of the texture
    pitch: float  # pixels, of the texture


def _surface(rng: Rng, size: int, diversity: float, angle: float, pitch: float) -> Floats:
    """A texture in two colours, float32 (size, size, 3)."""
    tone = _pick(rng, _TEXTURES, diversity, 2)(rng, size, angle, pitch)
    contrast = _log_uniform(rng, 0.02, 0.02 + 0.18 * diversity) * rng.choice([-1, 1])
    colour = rng.uniform(0.15, 0.85) * (1 + rng.uniform(0, 0.35) * rng.uniform(-1, 1, 3))
    slope = contrast * (1 + 0.4 * rng.uniform(-1, 1, 3))
    return _floats(colour) + tone[:, :, None] * _floats(slope)


def _outline(rng: Rng) -> NDArray[np.float64]:
    """A part's silhouette around the origin, (n, 2), about -1..1."""
    kind = rng.random()
    if kind < 0.15:  # a screw: head, then a threaded shank
        length, shank = rng.uniform(0.8, 1.6), rng.uniform(0.2, 0.45)
        thread = np.linspace(-0.6, length, 2 * int(rng.integers(6, 14)))
        side = np.stack([shank * (1 + 0.2 * (np.arange(thread.size) % 2)), thread], 1)
        head = np.array([[-0.7, -0.6], [-0.6, -1.0], [0.6, -1.0], [0.7, -0.6]])
        return np.concatenate([head, side, side[::-1] * [-1, 1]])
    if kind < 0.3:  # a nut, a plate
        turns = np.arange(corners := int(rng.integers(3, 9))) * math.tau / corners
        return np.stack([np.cos(turns), np.sin(turns)], 1) * [1, rng.uniform(0.7, 1)]
    turns = np.linspace(0, math.tau, 180, endpoint=False)
    power = 2 / rng.choice([2, 2, 5, 12])  # disc, rounded, rectangle
    points = np.stack([np.sign(f) * np.abs(f) ** power for f in (np.cos(turns), np.sin(turns))], 1)
    wave = np.sin(turns * rng.integers(2, 20) + rng.uniform(0, math.tau))
    swell = rng.choice([0, 0, 0.06]) * wave + rng.choice([0, 0, 0.08]) * np.clip(3 * wave, -1, 1)
    return points * (1 + swell)[:, None] * [1, rng.choice([1, rng.uniform(0.35, 1)])]


def _fittings(rng: Rng, size: int, x0: float, y0: float, reach: float) -> Floats:
    """Structure that belongs there: holes, grooves, prints, a frame; opacity 0..1. (x0, y0) and reach in pixels."""
    kind, width = rng.integers(6), size * rng.uniform(0.008, 0.03)
    turns = np.linspace(0, math.tau, 48)
    circle = np.stack([np.cos(turns), np.sin(turns)], 1)
    if kind == 0:  # concentric grooves
        return _stroke(size, [(x0, y0) + circle * reach * r for r in rng.uniform(0.2, 0.9, 2)], width)
    if kind == 1:  # a circle or a row of holes
        count, radius = int(rng.integers(3, 9)), reach * rng.uniform(0.06, 0.14)
        steps = np.arange(count)
        places = circle[steps * 47 // count] * 0.6 if rng.random() < 0.6 else steps[:, None] / count * [1.6, 0] - [0.7, 0]
        return np.max([_fill(size, (x0, y0) + place * reach + circle * radius) for place in places], axis=0)
    if kind == 2:  # a print
        canvas = np.zeros((size, size), np.uint8)
        text = "".join(rng.choice(list("ABCDEFGHKLMNPRSTXZ0123456789-"), int(rng.integers(2, 7))))
        origin = (round(x0 - reach * 0.6), round(y0))
        cv2.putText(canvas, text, origin, cv2.FONT_HERSHEY_SIMPLEX, reach / 70, 255, max(1, round(width / 2)), cv2.LINE_AA)
        return _floats(canvas) / np.float32(255)
    if kind == 3:  # a frame
        box = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * reach * rng.uniform(0.5, 0.9, 2)
        return _stroke(size, [box + (x0, y0)], width)
    if kind == 4:  # a hub, a label
        return _fill(size, (x0, y0) + _outline(rng) * reach * rng.uniform(0.2, 0.5))
    step = reach * rng.uniform(0.15, 0.4)  # grooves, seams
    return _stroke(size, [np.array([[-2, k * step / reach], [2, k * step / reach]]) * reach + (x0, y0) for k in (-1, 0, 1)], width)


def _relief(alpha: Floats, direction: float, width: float) -> Floats:
    """The light on the rim of a raised shape, about -1..1, lit from `direction`."""
    soft = cv2.GaussianBlur(alpha, (0, 0), width)
    shift = np.array([[1, 0, width * math.cos(direction)], [0, 1, width * math.sin(direction)]], np.float32)
    return _floats(soft - cv2.warpAffine(soft, shift, alpha.shape[::-1], borderMode=cv2.BORDER_REPLICATE))


def _scene(rng: Rng, size: int, diversity: float) -> _Scene:
    angle = rng.choice([0, math.pi / 2, math.pi / 4, rng.uniform(0, math.pi)])
    pitch = _log_uniform(rng, 0.03, 0.2)
    image = backdrop = _surface(rng, size, diversity, angle, pitch)
    region: Floats = np.ones((size, size), np.float32)
    direction, reach = rng.uniform(0, math.tau), size * rng.uniform(0.25, 0.48)
    x0, y0 = size / 2 + rng.uniform(-1, 1, 2) * (size * 0.52 - reach)
    if rng.random() < 0.55 * diversity:
        region = _part(rng, size, x0, y0, reach)
        backdrop = _surface(rng, size, diversity * rng.choice([0, 0, 1]), angle, pitch)
        backdrop = backdrop * _floats(rng.choice([0.15, 0.5, 1.0]))
        shadow = _floats(cv2.GaussianBlur(region, (0, 0), size * 0.03)) * np.float32(rng.uniform(0, 0.5))
        rim = _relief(region, direction, size * rng.uniform(0.008, 0.025)) * np.float32(rng.uniform(0, 0.5))
        backdrop = backdrop * (1 - shadow)[:, :, None]
        image = backdrop + region[:, :, None] * (image + rim[:, :, None] - backdrop)
    if rng.random() < 0.45 * diversity:
        extra = _fittings(rng, size, x0, y0, reach) * region
        tone = _relief(extra, direction, size * 0.008) * np.float32(0.6) + extra * np.float32(rng.uniform(-0.4, 0.4))
        image = image + tone[:, :, None]
    return _Scene(np.clip(image, 0, 1), np.clip(backdrop, 0, 1), region, angle, pitch * size)


def _part(rng: Rng, size: int, x0: float, y0: float, reach: float) -> Floats:
    """An object's opacity: a turned silhouette, often with a bore."""
    turn = rng.choice([0, rng.uniform(0, math.tau)])
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    region = _fill(size, (x0, y0) + _outline(rng) @ rotation * reach)
    if rng.random() < 0.3:
        turns = np.linspace(0, math.tau, 64)
        bore = np.stack([np.cos(turns), np.sin(turns)], 1) * reach * rng.uniform(0.12, 0.6)
        region = region * (1 - _fill(size, (x0, y0) + bore))
    return region


def _camera(rng: Rng, size: int, diversity: float) -> Callable[[Floats], Bytes]:
    """Light, focus, noise and tone curve, drawn once, to be applied to the sound and to the defective scene."""
    uneven = 0.1 + 0.9 * diversity
    along, _ = _turned(size, rng.uniform(0, math.tau))
    x, y = (axis - np.float32(centre) for axis, centre in zip(_grid(size), rng.uniform(0.1, 0.9, 2), strict=True))
    far = x * x + y * y
    light = 1 + np.float32(uneven * rng.uniform(0, 0.8)) * along - np.float32(uneven * rng.uniform(0, 0.6)) * far
    glow = np.exp(far * np.float32(-1 / rng.uniform(0.01, 0.15))) * np.float32(uneven * rng.choice([0, 0, 0.15, 0.3]))
    exposure = np.float32(rng.uniform(0.8, 1.15))
    gain, lift = (light * exposure * 255)[:, :, None], (glow * 255)[:, :, None]
    noise = rng.standard_normal((size, size, rng.choice([1, 3])), np.float32)
    lift = lift + noise * np.float32(255 * _log_uniform(rng, 0.002, 0.005 + 0.025 * diversity))
    focus = rng.choice([0, 0, rng.uniform(0.3, 0.9)]) * max(1, size / 256)
    grey = rng.random() < 0.35
    curve = np.power(np.linspace(0, 1, 256), 1 + uneven * rng.uniform(-0.35, 0.5))
    table = np.round(curve * 255).astype(np.uint8)

    def develop(scene: Floats) -> Bytes:
        sharp = cv2.GaussianBlur(scene, (0, 0), focus) if focus else scene
        image = cv2.LUT(np.clip(sharp * gain + lift, 0, 255).astype(np.uint8), table)
        if grey:
            image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return np.asarray(image, np.uint8)

    return develop
