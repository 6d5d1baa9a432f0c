"""Procedural surfaces, drawn by numpy and OpenCV: textures, the parts they cover, and the light on them.

Lengths scale with the image side S. Surfaces carry lawful structure (weave, brushing, facets, grids, holes, edges,
shading), so that an edge or a shadow alone is no defect.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]  # (S, S), about 0..1
Pixels = NDArray[np.float32]  # (S, S, 3), 0..1
Mask = NDArray[np.uint8]  # (S, S), 0 or 1
Generator = np.random.Generator


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


def displaced(picture: NDArray[np.float32], dx: Field, dy: Field) -> NDArray[np.float32]:
    """Each pixel taken from (x + dx, y + dy), in pixels."""
    y, x = np.mgrid[: dx.shape[0], : dx.shape[1]].astype(np.float32)
    warped: NDArray[np.float32] = cv2.remap(
        picture, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    ).astype(np.float32)
    return warped


def direction(rng: Generator) -> float:
    """An angle in degrees; along an axis half of the time, as parts lie before cameras."""
    return float(rng.choice([0, 90]) if rng.random() < 0.5 else rng.uniform(0, 180))


def plain(rng: Generator, size: int) -> Field:
    return np.full((size, size), 0.5, np.float32) + 0.02 * noise(rng, size, size)


def clouds(rng: Generator, size: int) -> Field:
    cells = rng.uniform(2, 10)
    octaves = [noise(rng, size, cells * 2**k) / 2 ** (k + 1) for k in range(int(rng.integers(1, 5)))]
    total: Field = np.sum(octaves, axis=0, dtype=np.float32)
    return total


def grain(rng: Generator, size: int) -> Field:
    return noise(rng, size, size / rng.uniform(1, 5))


def brushed(rng: Generator, size: int) -> Field:
    field = noise(rng, size, size / rng.uniform(1, 2.5), stretch=rng.uniform(8, 60))
    if rng.random() < 0.5:  # strokes of several widths
        field = 0.6 * field + 0.6 * noise(rng, size, rng.uniform(8, 40), stretch=rng.uniform(8, 40))
    return rotated(field, direction(rng))


def spectral(rng: Generator, size: int) -> Field:
    """A Gaussian random field with a random power law, band and orientation: stone, felt, nonwoven, cast metal."""
    fy, fx = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None] * size
    angle, squeeze = rng.uniform(0, np.pi), np.exp(rng.uniform(0, 1.6))
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = fy * np.cos(angle) - fx * np.sin(angle)
    f = np.hypot(along * squeeze, across / squeeze) + 1e-3
    low, high = np.exp(rng.uniform(0, 2.5)), np.exp(rng.uniform(2.5, np.log(size)))
    amplitude = f ** -rng.uniform(0, 1.5) * (f > low) * np.exp(-((f / high) ** 2))
    white = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    field = np.fft.irfft2(white * amplitude, s=(size, size))
    return (0.5 + 0.2 * field / (field.std() + 1e-6)).astype(np.float32)  # type: ignore[no-any-return]


def relief(rng: Generator, size: int) -> Field:
    """A rough height field lit from one side."""
    height = (clouds if rng.random() < 0.5 else spectral)(rng, size)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * cv2.Sobel(height, cv2.CV_32F, 1, 0) + np.sin(angle) * cv2.Sobel(height, cv2.CV_32F, 0, 1)
    return (0.5 + 0.2 * slope / (slope.std() + 1e-6)).astype(np.float32)  # type: ignore[no-any-return]


def weave(rng: Generator, size: int) -> Field:
    """Warp and weft that pass over each other by a rule (plain, twill, satin), with uneven yarns."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    period = rng.uniform(0.02, 0.1) * size
    sway = rng.uniform(0, 0.3) * period
    u = (x + sway * noise(rng, size, 6)) / period
    v = (y + sway * noise(rng, size, 6)) / (period * rng.uniform(0.7, 1.4))
    repeat = int(rng.integers(2, 6))
    over = (np.floor(u) + int(rng.integers(1, repeat)) * np.floor(v)) % repeat < max(1, repeat // 2)
    round_ = rng.uniform(0.3, 1)
    warp = 1 - round_ * np.abs(2 * (u % 1) - 1) ** 2
    weft = 1 - round_ * np.abs(2 * (v % 1) - 1) ** 2
    field = np.where(over, warp, rng.uniform(0.4, 1) * weft) + rng.uniform(0, 0.3) * noise(rng, size, size / 2)
    return rotated((0.7 * field).astype(np.float32), rng.uniform(0, 180) if rng.random() < 0.5 else 0)


def stripes(rng: Generator, size: int) -> Field:
    x = np.arange(size, dtype=np.float32)[None].repeat(size, 0)
    wave = np.sin(2 * np.pi * x / (rng.uniform(0.04, 0.4) * size) + 2 * noise(rng, size, 4))
    return rotated((0.5 + 0.5 * np.tanh(wave * rng.uniform(0.5, 6))).astype(np.float32), direction(rng))


def wood(rng: Generator, size: int) -> Field:
    rings = noise(rng, size, rng.uniform(3, 7), stretch=rng.uniform(2, 5)) * rng.uniform(3, 9)
    field = 0.7 * (rings % 1) + 0.3 * noise(rng, size, size, stretch=20)
    return rotated(field.astype(np.float32), rng.choice([0, 90]))


def cells(rng: Generator, size: int) -> Field:
    """Distance to the nearest of scattered seeds: pebbles, foam, leather."""
    far, _ = _nearest_seed(rng, size)
    field: Field = far / np.float32(max(far.max(), 1e-6))
    return field


def facets(rng: Generator, size: int) -> Field:
    """Crystals, each of its own grey."""
    _, label = _nearest_seed(rng, size)
    grey = rng.random(int(label.max()) + 1, dtype=np.float32)
    return cv2.GaussianBlur(grey[label], (0, 0), rng.uniform(0.3, 2)).astype(np.float32)


def _nearest_seed(rng: Generator, size: int) -> tuple[Field, NDArray[np.int32]]:
    seeds = np.ones((size, size), np.uint8)
    count = int(np.exp(rng.uniform(np.log(15), np.log(400))))
    seeds[rng.integers(0, size, count), rng.integers(0, size, count)] = 0
    far, label = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL)
    return far.astype(np.float32), label.astype(np.int32)


def speckle(rng: Generator, size: int) -> Field:
    field = noise(rng, size, size / rng.uniform(2, 8))
    return (0.3 + 0.5 * (field > rng.uniform(0.4, 0.8)) + 0.2 * field).astype(np.float32)


def lines(rng: Generator, size: int) -> Field:
    """1 on lines at regular distances in one or both directions, 0 elsewhere: joints, conductors, ribs."""
    field = np.zeros((size, size), np.float32)
    for axis in range(2):
        if rng.random() < 0.3:
            continue
        step = max(6, int(rng.uniform(0.08, 0.5) * size))
        width = max(1, int(0.012 * size * rng.uniform(0.5, 3)))
        for start in range(int(rng.integers(0, step)), size, step):
            np.moveaxis(field, axis, 0)[start : start + width] = 1
    return rotated(field, 0 if rng.random() < 0.7 else rng.uniform(0, 90))


def grid(rng: Generator, size: int) -> Field:
    """Tiles with their joints."""
    field = 0.6 + 0.2 * noise(rng, size, rng.uniform(5, 30))
    return field + (rng.choice([-0.4, 0.4]) * lines(rng, size)).astype(np.float32)  # type: ignore[no-any-return]


def dots(rng: Generator, size: int) -> Field:
    """A lattice of discs: perforated sheet, pads, knobs."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    step = rng.uniform(0.06, 0.25) * size
    row = np.floor(y / step)
    u, v = (x / step + 0.5 * (row % 2) * rng.integers(2)) % 1 - 0.5, y / step % 1 - 0.5
    edge = (rng.uniform(0.2, 0.42) - np.hypot(u, v)) * step
    return rotated((0.5 + 0.4 * np.tanh(edge) * rng.choice([-1, 1])).astype(np.float32), direction(rng))


def leaves(rng: Generator, size: int) -> Field:
    """Plates of all sizes that cover each other, each of its own grey: chips, gravel, foliage.

    The dead leaves model, whose sizes follow a power law, so that it looks alike at every distance, as photographs do
    (Lee, Mumford and Huang, "Occlusion Models for Natural Images", IJCV 2001).
    """
    field = 0.5 * noise(rng, size, size / 2)
    count, least = int(np.exp(rng.uniform(np.log(40), np.log(500)))), np.exp(rng.uniform(np.log(0.008), np.log(0.04)))
    reach = size * least / np.sqrt(rng.uniform((least / 0.3) ** 2, 1, count))  # density of the radius r: r^-3
    round_, turned, flat = rng.random() < 0.5, rng.random() < 0.7, rng.uniform(0, 0.8)
    places, greys = rng.uniform(0, size, (count, 2)), rng.random(count)
    for (x, y), r, grey in zip(places, reach, greys, strict=True):
        axes, angle = (r, r * (1 - flat * rng.random())), rng.uniform(0, 360) if turned else 0.0
        if round_:
            cv2.ellipse(field, ((x, y), (2 * axes[0], 2 * axes[1]), angle), float(grey), -1)
        else:
            corners = cv2.boxPoints(((x, y), (2 * axes[0], 2 * axes[1]), angle))
            cv2.fillConvexPoly(field, corners.astype(np.int32), float(grey))
    return field


def flecked(rng: Generator, size: int) -> Field:
    """Marks of one kind all over: fibres, pores, seeds. What is everywhere is no defect."""
    field = 0.5 + 0.2 * noise(rng, size, size / rng.uniform(1, 4))
    count = int(np.exp(rng.uniform(np.log(15), np.log(300))))
    length = size * np.exp(rng.uniform(np.log(0.01), np.log(0.12)))
    width, along, spread = max(1, int(length * rng.uniform(0.1, 1))), rng.uniform(0, np.pi), rng.uniform(0, 2)
    grey = float(rng.choice([-0.3, 1.3]))
    for x, y in rng.uniform(0, size, (count, 2)):
        angle, reach = along + spread * rng.normal(), length * rng.uniform(0.5, 1) / 2
        dx, dy = reach * np.cos(angle), reach * np.sin(angle)
        start, end = (int(x - dx), int(y - dy)), (int(x + dx), int(y + dy))
        cv2.line(field, start, end, grey + rng.uniform(-0.2, 0.2), width, cv2.LINE_AA)
    return field


def crazed(rng: Generator, size: int) -> Field:
    """A net of fine lines between cells: leather, glaze, dry ground."""
    _, label = _nearest_seed(rng, size)
    edge = ((label != np.roll(label, 1, 0)) | (label != np.roll(label, 1, 1))).astype(np.float32)
    edge = cv2.GaussianBlur(edge, (0, 0), rng.uniform(0.4, 1.5)).astype(np.float32)
    return (rng.choice([-1, 1]) * edge + rng.uniform(0, 0.6) * noise(rng, size, size / 2)).astype(np.float32)  # type: ignore[no-any-return]


def bond(rng: Generator, size: int) -> Field:
    """Bricks, planks or plates with joints, no two of one grey."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    sway = rng.uniform(0, 0.03) * size
    height = rng.uniform(0.06, 0.3) * size
    width = height * np.exp(rng.uniform(0, 2.5))
    v = (y + sway * noise(rng, size, 8)) / height + rng.random()
    row = np.floor(v).astype(int)
    u = (x + sway * noise(rng, size, 8)) / width + rng.choice([0.5, 0.37]) * (row % 2) + rng.random()
    column = np.floor(u).astype(int)
    greys = rng.random((int(row.max()) + 1, int(column.max()) + 1), dtype=np.float32)
    joint = np.minimum(np.minimum(u % 1, 1 - u % 1) * width, np.minimum(v % 1, 1 - v % 1) * height)
    field = rng.uniform(0, 1) * greys[row, column] + rng.uniform(0, 0.5) * noise(rng, size, size / 2, stretch=4)
    field = field + rng.choice([-1, 1]) * (joint < rng.uniform(0.5, 0.02 * size + 0.6))
    return rotated(field.astype(np.float32), rng.choice([0, 90]) if rng.random() < 0.8 else rng.uniform(0, 180))


def filtered(rng: Generator, size: int) -> Field:
    """Noise through a few random filters and rectifiers, coarse to fine: structure that nobody thought of."""
    side = max(8, size // int(rng.choice([2, 4, 8])))
    channels = rng.standard_normal((side, side, 3), dtype=np.float32)
    while True:
        width = int(rng.choice([3, 5, 7]))
        for c in range(3):
            kernel = rng.standard_normal((width, width)).astype(np.float32) / width
            channels[..., c] = cv2.filter2D(channels[..., c], -1, kernel, borderType=cv2.BORDER_REFLECT_101)
        channels = cv2.transform(channels, rng.standard_normal((3, 3)).astype(np.float32)).astype(np.float32)
        channels = channels / (channels.std() + np.float32(1e-6))
        if side == size:
            return channels[..., 0] if rng.random() < 0.5 else np.abs(channels[..., 1])  # type: ignore[no-any-return]
        channels = np.maximum(channels, np.float32(-0.2) * channels)
        side = min(size, 2 * side)
        channels = cv2.resize(channels, (side, side), interpolation=cv2.INTER_LINEAR).astype(np.float32)
        channels = channels + np.float32(rng.uniform(0, 0.5)) * rng.standard_normal(channels.shape, dtype=np.float32)


TEXTURES: tuple[Callable[[Generator, int], Field], ...] = (
    plain,
    grain,
    clouds,
    brushed,
    spectral,
    relief,
    weave,
    stripes,
    wood,
    cells,
    facets,
    speckle,
    grid,
    dots,
    leaves,
    flecked,
    crazed,
    bond,
    filtered,
    filtered,
)
AT_VARIETY = (4, 14, len(TEXTURES))  # how many of them there are at variety 0, 1 and 2


def texture(rng: Generator, size: int, variety: float) -> Pixels:
    """One material, or one over another, float32 (S, S, 3) in about 0..1."""
    last, natural, variety = np.interp(variety, (0, 1, 2), AT_VARIETY), variety > 1, min(variety, 1.0)
    field = _standardised(TEXTURES[int(rng.uniform(0, last))](rng, size))
    if rng.random() < 0.4 * variety:  # a second structure on top, like grain on a weave
        second = TEXTURES[int(rng.uniform(0, last))](rng, size)
        field = _standardised(field + rng.uniform(0.1, 1) * _standardised(second))
    if natural and rng.random() < 0.25:  # more of it here, less there
        field = field * np.float32(rng.uniform(0.5, 2)) * noise(rng, size, rng.uniform(2, 8))
    if rng.random() < 0.15 * variety:
        field = field + np.float32(rng.choice([-1, 1]) * rng.uniform(1, 4)) * lines(rng, size)
    base = rng.uniform(0.15, 0.85)
    contrast = np.exp(rng.uniform(np.log(0.01), np.log(0.05 + 0.15 * variety)))
    value = base + contrast * field
    tint = np.ones(3) if rng.random() < 0.5 else rng.uniform(0.6, 1.3, 3)
    coloured: Pixels = (value[..., None] * tint).astype(np.float32)
    return coloured


def _standardised(field: Field) -> Field:
    return ((field - field.mean()) / max(float(field.std()), 0.02)).astype(np.float32)  # type: ignore[no-any-return]


def surface(rng: Generator, size: int, variety: float) -> tuple[Pixels, Mask, Pixels]:
    """A part in its light: the picture, where the part is, and what lies behind it.

    The part fills the frame, or nearly fills it with its edges in view, or lies before a background.
    """
    image, variety = texture(rng, size, variety), min(variety, 1.0)
    support = np.ones((size, size), np.uint8)
    behind = texture(rng, size, 0) * rng.choice([0.1, 0.4, 1, 1.4])
    kind = rng.random()
    if kind < 0.6 * variety:
        support = silhouette(rng, size) if kind < 0.3 * variety else framed(rng, size)
        edge = cv2.GaussianBlur(support.astype(np.float32), (0, 0), rng.uniform(0.4, 0.02 * size))[..., None]
        image = image * edge + behind * (1 - edge)
    return (image * light(rng, size, variety)[..., None]).clip(0, 1).astype(np.float32), support, behind


def light(rng: Generator, size: int, variety: float) -> Field:
    """What the lighting multiplies: soft spots, and the falloff or gloss across a curved part."""
    total = 1 + rng.uniform(0, 0.5 * variety) * (noise(rng, size, 2) - 0.5)
    if rng.random() < 0.4 * variety:
        x = np.linspace(-1, 1, size, dtype=np.float32)[None].repeat(size, 0)
        falloff = 1 - rng.uniform(0, 0.8) * np.abs(x - rng.uniform(-0.5, 0.5)) ** rng.uniform(1, 8)
        gloss = rng.uniform(0, 0.5) * np.exp(-(((x - rng.uniform(-1, 1)) / rng.uniform(0.1, 0.5)) ** 2))
        total = total * rotated((falloff + gloss).astype(np.float32), direction(rng))
    return total.clip(0, None).astype(np.float32)


def framed(rng: Generator, size: int) -> Mask:
    """A plate whose edges run near those of the frame, some outside it, perhaps with cut corners or notches."""
    mask = np.zeros((size, size), np.uint8)
    x0, y0, x1, y1 = (rng.uniform(-0.04, 0.1, 4) * size).clip(0, None)
    box = np.array([[x0, y0], [size - x1, y0], [size - x1, size - y1], [x0, size - y1]], np.float32)
    cv2.fillPoly(mask, [(box + rng.normal(0, 0.01 * size, (4, 2))).astype(np.int32)], 1)
    if rng.random() < 0.3:
        reach = int(rng.uniform(0.04, 0.15) * size)
        for x, y in box.astype(int):
            if rng.random() < 0.7:
                cv2.fillPoly(
                    mask, [np.array([[x - reach, y], [x, y - reach], [x + reach, y], [x, y + reach]], np.int32)], 0
                )
    return mask


def silhouette(rng: Generator, size: int) -> Mask:
    """A disc, ring, plate or capsule, perhaps with holes, not always centred."""
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
