"""The picture of a calibration: where good parts score, where defects do, and the threshold between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fbclip.files import replacing
from fbclip.runtime.calibration import Calibration, percent

SIZE = (1200, 640)
PLOT = (90, 130, 1160, 560)  # left, top, right, bottom
BINS = 36
GOOD, BAD = (9, 105, 218), (207, 34, 46)  # blue and red: red and green look alike to one man in twelve
INK, FAINT, PAPER = (36, 41, 47), (208, 215, 222), (255, 255, 255)


class Kind(NamedTuple):
    """Images of a kind.

    Attributes:
        name: what the picture calls it, with its number.
        colour: RGB.
        counts: (N,), how many have a score in each bin.
    """

    name: str
    colour: tuple[int, int, int]
    counts: NDArray[np.int64]


def write_histogram(calibration: Calibration, defects: Sequence[float], path: Path) -> None:
    """Write the score distribution as a PNG.

    Args:
        calibration: of the good parts.
        defects: scores of defective ones; none are drawn where it is empty.
        path: of the picture.

    Raises:
        FBClipError, UsageError: it can't be written; see `fbclip.files.write_error`.
    """
    c = calibration
    values = [*c.scores, *defects, c.threshold]
    margin = max(0.05 * (max(values) - min(values)), 0.005)
    edges = np.linspace(min(values) - margin, max(values) + margin, BINS + 1)
    kinds = [Kind(f"{c.count} good", GOOD, np.histogram(c.scores, edges)[0])]
    if defects:
        kinds.append(Kind(f"{len(defects)} defective", BAD, np.histogram(defects, edges)[0]))
    promise = (
        f"At most {100 * c.false_alarm_rate:g} % false alarms promised; here {percent(c.interval)} (95 % confidence)"
    )
    with replacing(path) as file:
        draw_histogram(kinds, edges, c.threshold, promise).save(file, "PNG")


def draw_histogram(kinds: Sequence[Kind], edges: NDArray[np.float64], threshold: float, title: str) -> Image.Image:
    """A picture of how the scores of some kinds of images are spread.

    Args:
        kinds: each is drawn as shares of its own number.
        edges: (N + 1,), of the bins.
        threshold: where a line stands.
        title: over it all.
    """
    shares = [kind.counts / max(1, kind.counts.sum()) for kind in kinds]
    first, last = float(edges[0]), float(edges[-1])
    top = 1.08 * max(float(np.max(shares)), 1e-9)
    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image, "RGBA")
    left, ceiling, right, floor = PLOT

    def x(score: float) -> float:
        return left + (right - left) * (score - first) / (last - first)

    def y(share: float) -> float:
        return floor - (floor - ceiling) * share / top

    step = _step(top, 5)
    for share in np.arange(0, top, step):
        draw.line((left, y(share), right, y(share)), FAINT, 1)
        draw.text((left - 10, y(share)), f"{100 * share:.3g} %", INK, _font(18), "rm")
    step = _step(last - first, 10)
    for score in np.arange(np.ceil(first / step) * step, last + step / 1000, step):
        draw.line((x(score), floor, x(score), floor + 6), INK, 2)
        draw.text((x(score), floor + 10), f"{score:.10g}", INK, _font(18), "mt")
    for kind, heights in zip(kinds, shares, strict=True):
        for share, start, end in zip(heights, edges[:-1], edges[1:], strict=True):
            if share:
                draw.rectangle((x(start) + 1, y(share), x(end) - 1, floor), (*kind.colour, 150))
    draw.line((left, floor, right, floor), INK, 2)
    draw.line((x(threshold), ceiling - 14, x(threshold), floor), INK, 3)
    anchor = "rb" if x(threshold) > SIZE[0] / 2 else "lb"
    draw.text((x(threshold), ceiling - 18), f"threshold {threshold:.4f}", INK, _font(22), anchor)
    draw.text((left, 24), title, INK, _font(26), "lt")
    place: float = left
    for kind in kinds:
        draw.rectangle((place, 68, place + 18, 86), (*kind.colour, 150))
        draw.text((place + 28, 77), kind.name, INK, _font(20), "lm")
        place += 28 + draw.textlength(kind.name, _font(20)) + 36
    draw.text(
        ((left + right) / 2, SIZE[1] - 14),
        f"image score (height: share of {'each kind' if len(kinds) > 1 else 'images'})",
        INK,
        _font(20),
        "mb",
    )
    return image


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _step(span: float, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that divides a span into at most so many parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * times for times in (1, 2, 5, 10) if span / (power * times) <= most)
