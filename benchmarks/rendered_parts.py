"""Six more parts for render_samples.py, each a relief under a lamp: four with a defect, two good.

Lengths on a part are shares of the picture's height, counted from its middle: x to the right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]  # (H, W)
Picture = NDArray[np.float32]  # (H, W, 3), 0..1, RGB
Mask = NDArray[np.uint8]  # (H, W), 1 where the defect is
Drawn = tuple[Picture, Mask]

FINE = 2  # parts are drawn this much larger than their picture, for smooth edges
LAMP = np.array([-0.42, -0.50, 0.757])  # unit vector to the lamp: left, up, towards the camera


@dataclass
class Relief:
    """A surface: `height` in drawn pixels, `colour` (H, W, 3), and how much it gleams, 0..1."""

    height: Field
    colour: Picture
    gloss: float | Field = 0.1


def grid(height: int, width: int) -> tuple[Field, Field]:
    """Where each drawn pixel lies, x and y."""
    y, x = np.mgrid[: height * FINE, : width * FINE].astype(np.float32)
    return (x - width * FINE / 2) / (height * FINE), (y - height * FINE / 2) / (height * FINE)


def noise(rng: np.random.Generator, like: Field, sigma_xy: tuple[float, float]) -> Field:
    """Smooth noise of mean 0 and variance 1; `sigma_xy` in drawn pixels."""
    white = rng.normal(0, 1, like.shape).astype(np.float32)
    blurred = cv2.GaussianBlur(white, (0, 0), sigmaX=sigma_xy[0], sigmaY=sigma_xy[1])
    return blurred / blurred.std()


def within(edge: Field, soft: float = 0.003) -> Field:
    """1 where `edge` is below zero, 0 above, `soft` wide between."""
    return np.clip(0.5 - edge / soft, 0, 1).astype(np.float32)


def mix(under: Picture, alpha: Field, colour: tuple[float, float, float] | Picture) -> Picture:
    return (under + alpha[..., None] * (np.asarray(colour, np.float32) - under)).astype(np.float32)


def tint(grey: Field, colour: tuple[float, float, float]) -> Picture:
    return (grey[..., None] * np.array(colour)).astype(np.float32)


def shadow(height: Field, reach: int = 90) -> Field:
    """1 where something between a place and the lamp hides it: walks towards the lamp, `reach` drawn pixels far."""
    along = LAMP[:2] / np.hypot(*LAMP[:2])
    climb = LAMP[2] / np.hypot(*LAMP[:2])
    hidden = np.zeros_like(height)
    for far in range(2, reach, 3):
        move = np.array([[1, 0, -along[0] * far], [0, 1, -along[1] * far]])
        nearer = cv2.warpAffine(height, move, height.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        hidden = np.maximum(hidden, np.clip((nearer - height - climb * far) / 4, 0, 1))
    return cv2.GaussianBlur(hidden, (0, 0), 3)


def lit(part: Relief, shine: float = 24) -> Picture:
    """The part under the lamp: Lambert's shading, Blinn's gleam, cast shadows, dimmer light in hollows."""
    height = cv2.GaussianBlur(part.height.astype(np.float32), (0, 0), 1.3)
    slope_y, slope_x = np.gradient(height)
    upright = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    half = LAMP + np.array([0, 0, 1])  # the slant of a mirror between lamp and camera
    towards = (LAMP, half / np.linalg.norm(half))
    facing, gleam = (np.clip((to[2] - slope_x * to[0] - slope_y * to[1]) * upright, 0, 1) for to in towards)
    seen = 1 - 0.85 * shadow(height)
    hollow = np.exp(-np.clip(cv2.GaussianBlur(height, (0, 0), 16) - height, 0, None) / 24)
    image = part.colour * (0.34 * hollow + 0.86 * facing * seen)[..., None]
    image = image + (part.gloss * gleam**shine * seen)[..., None]
    size_wh = (height.shape[1] // FINE, height.shape[0] // FINE)
    return cv2.resize(image.astype(np.float32), size_wh, interpolation=cv2.INTER_AREA)


def mask_of(alpha: Field) -> Mask:
    size_wh = (alpha.shape[1] // FINE, alpha.shape[0] // FINE)
    return (cv2.resize(alpha, size_wh, interpolation=cv2.INTER_AREA) > 0.3).astype(np.uint8)


def table(rng: np.random.Generator, like: Field, colour: tuple[float, float, float]) -> Relief:
    """What parts lie on: a slightly uneven, slightly spotted mat."""
    return Relief(0.12 * noise(rng, like, (2, 2)), tint(1 + 0.03 * noise(rng, like, (3, 3)), colour), 0.02)


def turned(rng: np.random.Generator, x: Field, y: Field) -> Field:
    """Grey of a face cut on a lathe: rings of the tool, and the two bright fans they throw back."""
    far, angle = np.hypot(x, y), np.arctan2(y, x)
    rings = np.convolve(rng.normal(0, 1, 1400), np.ones(3) / 3, "same").astype(np.float32)
    fans = np.exp(-((np.sin(angle - np.arctan2(LAMP[1], LAMP[0])) / 0.42) ** 2))
    return 0.52 + 0.22 * fans + 0.05 * rings[(far * 1500).astype(int).clip(0, 1399)]


def flange(rng: np.random.Generator, height: int = 640, width: int = 680) -> Relief:
    """A turned steel flange: a raised collar round the bore, eight countersunk bolt holes, a bevelled rim."""
    x, y = grid(height, width)
    mat = table(rng, x, (0.10, 0.17, 0.15))
    far, angle = np.hypot(x, y), np.arctan2(y, x)
    turn = (angle + 0.2 + np.pi / 8) % (np.pi / 4) - np.pi / 8
    bolt = np.hypot(far * np.cos(turn) - 0.325, far * np.sin(turn))
    body = 34 * within(far - 0.425, 0.014) + 14 * within(far - 0.215, 0.010) + 0.06 * noise(rng, x, (1.5, 1.5))
    body -= 5 * within(bolt - 0.050, 0.012)
    open_ = np.maximum(within(bolt - 0.036), within(far - 0.135, 0.006))
    steel = tint(turned(rng, x, y), (0.98, 1.0, 1.03))
    solid = within(far - 0.428) * (1 - open_)
    colour = mix(mat.colour, solid, mix(steel, open_, (0.1, 0.1, 0.1)))
    return Relief(np.where(far < 0.435, body * (1 - open_), mat.height), colour, 0.02 + 0.30 * solid)


def scored(part: Relief, path: list[tuple[float, float]], wide: int = 12) -> Drawn:
    """A score in the metal: a dark groove, and the burr it threw up along its lower edge."""
    shape = part.height.shape
    points = (np.array(path) * shape[0] + [shape[1] / 2, shape[0] / 2]).astype(np.int32)[:, None]
    groove, burr = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    cv2.polylines(groove, [points], False, 1.0, wide, cv2.LINE_AA)
    cv2.polylines(burr, [points + wide // 2 + 2], False, 1.0, wide // 2, cv2.LINE_AA)
    groove, burr = (cv2.GaussianBlur(line, (0, 0), 1.6) for line in (groove, burr))
    colour = mix(mix(part.colour, burr, (0.95, 0.95, 0.95)), groove, (0.13, 0.13, 0.14))
    picture = lit(Relief(part.height + 3 * burr - 5 * groove, colour, part.gloss * (1 - groove)))
    return picture, mask_of(np.maximum(groove, burr))


def perforated(rng: np.random.Generator, height: int = 520, width: int = 720) -> tuple[Relief, Field]:
    """A rolled sheet with round holes in staggered rows, over a dark tray; also how far each place is from a hole."""
    x, y = grid(height, width)
    u, v = np.cos(0.05) * x + np.sin(0.05) * y, np.cos(0.05) * y - np.sin(0.05) * x
    row = np.round(v / 0.155)
    shift = np.where(row % 2 == 0, 0, 0.0895)
    middle = np.round((u - shift) / 0.179) * 0.179 + shift
    hole = np.hypot(u - middle, v - row * 0.155) - 0.062
    rolled = 1 + 0.05 * noise(rng, x, (60, 1.2)) + 0.03 * noise(rng, x, (1.2, 1.2)) + 0.04 * noise(rng, x, (150, 90))
    tray = tint(1 + 0.08 * noise(rng, x, (3, 3)), (0.09, 0.085, 0.08))
    open_ = within(hole)
    pressed = -3 * within(hole - 0.008, 0.016)  # the punch draws the edge in
    colour = mix(tint(0.60 * rolled, (1.0, 0.99, 0.96)), open_, tray)
    return Relief((16 + pressed) * (1 - open_) + 0.07 * noise(rng, x, (1.5, 1.5)), colour, 0.22 * (1 - open_)), hole


def plugged(rng: np.random.Generator, part: Relief, hole: Field, centre: tuple[float, float]) -> Drawn:
    """One hole filled: a lump of dried coating sits in it, a little below the sheet."""
    y, x = np.mgrid[: hole.shape[0], : hole.shape[1]].astype(np.float32) / hole.shape[0]
    near = np.hypot(x - 0.5 * hole.shape[1] / hole.shape[0] - centre[0], y - 0.5 - centre[1])
    lump = within(hole - 0.003, 0.006) * (near < 0.085)
    surface = 11 + 2.5 * noise(rng, hole, (9, 9)) + 0.6 * noise(rng, hole, (2, 2))
    paste = tint(1 + 0.06 * noise(rng, hole, (8, 8)), (0.62, 0.55, 0.42))
    height = part.height + lump * (surface - part.height)
    return lit(Relief(height, mix(part.colour, lump, paste), part.gloss * (1 - lump) + 0.1 * lump)), mask_of(lump)


def cap(rng: np.random.Generator, height: int = 620, width: int = 660, short: bool = True) -> Drawn:
    """A moulded blue screw cap with a knurled rim, a step and the dot of its gate; `short`: the mould did not fill."""
    x, y = grid(height, width)
    mat = table(rng, x, (0.62, 0.61, 0.58))
    far, angle = np.hypot(x, y), np.arctan2(y, x)
    ragged = 0.004 * noise(rng, x, (7, 7))
    bite = within(np.hypot((x - 0.352) * 1.15, (y - 0.232) * 0.95) - 0.088 + ragged, 0.006) * float(short)
    knurl = 0.405 + 0.006 * np.tanh(2 * np.cos(84 * angle))
    body = 46 * within(far - knurl, 0.012) + 18 * within(far - 0.355, 0.050) - 7 * within(far - 0.270, 0.012)
    body += 5 * within(far - 0.245, 0.012) - 3 * within(far - 0.026, 0.008) + 4 * within(far - 0.012, 0.006)
    body += 0.05 * noise(rng, x, (3, 3))
    solid = within(far - knurl) * (1 - bite)
    plastic = tint(1 + 0.02 * noise(rng, x, (40, 40)), (0.10, 0.30, 0.66))
    relief = np.where(far < knurl + 0.006, body * (1 - bite), mat.height)
    part = Relief(relief, mix(mat.colour, solid, plastic), 0.02 + 0.55 * solid)
    return lit(part, 30), mask_of(bite * within(far - knurl))


def board(rng: np.random.Generator, height: int = 500, width: int = 760) -> Relief:
    """A planed pine board, no knots: arched growth rings, pale early and darker late wood, fine fibres along x."""
    x, y = grid(height, width)
    bend = 0.030 * noise(rng, x, (160, 60)) + 0.0025 * noise(rng, x, (90, 16))
    depth = np.hypot((x + 1.7) * 0.16, y + 0.06 + bend) + 0.10 * bend
    ring = (depth * 34) % 1
    late = np.clip(ring**2.2 - 0.15, 0, 1) * within(ring - 0.94, 0.10)
    fibre = noise(rng, x, (45, 0.8))
    pale, dark = np.array([0.84, 0.66, 0.44]), np.array([0.66, 0.43, 0.23])
    colour = (pale + late[..., None] * (dark - pale)) * (1 + 0.04 * fibre + 0.03 * noise(rng, x, (120, 50)))[..., None]
    return Relief((0.14 * fibre + 0.4 * late).astype(np.float32), colour.astype(np.float32), 0.05)


def gouged(rng: np.random.Generator, part: Relief, centre: tuple[float, float], tilt: float) -> Drawn:
    """Wood torn out across the grain: a dirty hollow with a splintered edge."""
    x, y = grid(part.height.shape[0] // FINE, part.height.shape[1] // FINE)
    u, v = x - centre[0], y - centre[1]
    u, v = np.cos(tilt) * u + np.sin(tilt) * v, np.cos(tilt) * v - np.sin(tilt) * u
    splinter = 0.11 * noise(rng, x, (14, 2.2)) + 0.16 * noise(rng, x, (14, 10))
    inside = 1 - (u / 0.135) ** 2 - (v / 0.030) ** 2 + splinter
    hollow = within(-inside, 0.25)
    height = part.height - hollow * (10 + 9 * np.clip(inside, 0, 1) + 1.8 * noise(rng, x, (14, 1.5)))
    dirt = tint(1 + 0.16 * noise(rng, x, (18, 1.5)), (0.24, 0.15, 0.085))
    return lit(Relief(height, mix(part.colour, 0.92 * hollow, dirt), part.gloss)), mask_of(hollow)


def gear(rng: np.random.Generator, height: int = 660, width: int = 680) -> Relief:
    """A brass gear: twenty-eight teeth, six round windows, a raised hub, a bore with a keyway."""
    x, y = grid(height, width)
    mat = table(rng, x, (0.20, 0.22, 0.26))
    far, angle = np.hypot(x, y), np.arctan2(y, x)
    tooth = np.abs((angle * 28 / (2 * np.pi) + 0.25) % 1 - 0.5) * 2  # 0 in the middle of a tooth, 1 between two
    outline = 0.392 + 0.042 * np.clip((0.58 - tooth) * 3.0, -1, 1)
    turn = (angle + 0.3 + np.pi / 6) % (np.pi / 3) - np.pi / 6
    window = np.hypot(far * np.cos(turn) - 0.225, far * np.sin(turn)) - 0.066
    bore = np.minimum(far - 0.070, np.maximum(np.abs(x) - 0.020, np.abs(y + 0.055) - 0.042))
    open_ = np.maximum(within(window), within(bore))
    body = 40 - 9 * within(far - 0.325, 0.010) + 14 * within(far - 0.130, 0.010) - 3 * within(window - 0.008, 0.012)
    body += 0.06 * noise(rng, x, (1.5, 1.5))
    solid = within(far - outline) * (1 - open_)
    brass = tint(1.12 * turned(rng, x, y), (1.0, 0.80, 0.44))
    relief = np.where(solid > 0, body * solid, mat.height)
    return Relief(relief, mix(mat.colour, solid, brass), 0.02 + 0.28 * solid)


def heat_sink(rng: np.random.Generator, height: int = 540, width: int = 740) -> Relief:
    """An extruded aluminium heat sink from above: fifteen fins on a plate, a gap milled across, two screw holes."""
    x, y = grid(height, width)
    mat = table(rng, x, (0.30, 0.33, 0.31))
    plate = np.maximum(np.abs(x) - 0.60, np.abs(y) - 0.37)
    hole = np.hypot(np.abs(x) - 0.545, y)
    field = np.maximum(np.abs(x) - 0.483, np.abs(y) - 0.345)
    fin = np.maximum(np.abs((x / 0.0665 + 0.5) % 1 - 0.5) * 0.0665 - 0.0155, field)
    fin = np.maximum(fin, 0.030 - np.abs(y))
    drawn = 1 + 0.06 * noise(rng, x, (1.0, 70)) + 0.015 * noise(rng, x, (1.2, 1.2))
    open_ = within(hole - 0.024)
    body = 12 * within(plate, 0.008) + 44 * within(fin, 0.008) - 4 * within(hole - 0.036, 0.010)
    solid = within(plate) * (1 - open_)
    metal = tint((0.50 + 0.24 * within(fin)) * drawn, (0.97, 0.99, 1.02))
    relief = np.where(plate < 0.004, body * (1 - open_), mat.height)
    return Relief(relief, mix(mat.colour, solid, mix(metal, open_, (0.06, 0.06, 0.06))), 0.02 + 0.25 * solid)


def good(part: Relief) -> Drawn:
    picture = lit(part)
    return picture, np.zeros(picture.shape[:2], np.uint8)


def parts(rng: np.random.Generator) -> dict[str, Drawn]:
    """All six, name -> (picture before the camera's noise, mask)."""
    return {
        "flange-scratch": scored(flange(rng), [(0.150, 0.205), (0.192, 0.247), (0.238, 0.281), (0.283, 0.303)]),
        "perforated-plugged": plugged(rng, *perforated(rng), (-0.27, 0.14)),
        "cap-short-shot": cap(rng),
        "board-gouge": gouged(rng, board(rng), (0.22, -0.13), 0.35),
        "gear-good": good(gear(rng)),
        "heat-sink-good": good(heat_sink(rng)),
    }
