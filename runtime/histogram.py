"""The picture of a calibration: where good parts score, where defects do, and the threshold between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fbclip.files import replacing
from fbclip.runtime.calibration import Calibration, percent

SIZE = (1200, 640)
PLOT = (90, 130, 1160, 560)  # left, top, right, bottom
BINS = 36
GOOD, BAD = (9, 105, 218), (207, 34, 46)  # blue and red: red and green look alike to one man in twelve
INK, FAINT, PAPER = (36, 41, 47), (208, 215, 222), (255, 255, 255)


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
    first, last = min(values) - margin, max(values) + margin
    edges = np.linspace(first, last, BINS + 1)
    good = np.histogram(c.scores, edges)[0] / c.count
    bad = np.histogram(defects, edges)[0] / max(1, len(defects))
    top = 1.08 * float(max(good.max(), bad.max()))

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
    for score in np.arange(np.ceil(first / step) * step, last, step):
        draw.line((x(score), floor, x(score), floor + 6), INK, 2)
        draw.text((x(score), floor + 10), f"{score:.10g}", INK, _font(18), "mt")
    for shares, colour in ((good, GOOD), (bad, BAD)):
        for share, start, end in zip(shares, edges[:-1], edges[1:], strict=True):
            if share:
                draw.rectangle((x(start) + 1, y(share), x(end) - 1, floor), (*colour, 150))
    draw.line((left, floor, right, floor), INK, 2)
    draw.line((x(c.threshold), ceiling - 14, x(c.threshold), floor), INK, 3)
    anchor = "rb" if x(c.threshold) > SIZE[0] / 2 else "lb"
    draw.text((x(c.threshold), ceiling - 18), f"threshold {c.threshold:.4f}", INK, _font(22), anchor)

    promise = (
        f"At most {100 * c.false_alarm_rate:g} % false alarms promised; here {percent(c.interval)} (95 % confidence)"
    )
    draw.text((left, 24), promise, INK, _font(26), "lt")
    keys = [(GOOD, f"{c.count} good")]
    if defects:
        keys.append((BAD, f"{len(defects)} defective"))
    place: float = left
    for colour, text in keys:
        draw.rectangle((place, 68, place + 18, 86), (*colour, 150))
        draw.text((place + 28, 77), text, INK, _font(20), "lm")
        place += 28 + draw.textlength(text, _font(20)) + 36
    draw.text(((left + right) / 2, SIZE[1] - 14), "image score (height: share of each kind)", INK, _font(20), "mb")
    with replacing(path) as file:
        image.save(file, "PNG")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _step(span: float, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that divides a span into at most so many parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * times for times in (1, 2, 5, 10) if span / (power * times) <= most)
