"""Whether a frame shows anything: what is black, of one colour or frozen says nothing of a part.

Nor does one that is darker, brighter, greener or less sharp than all frames of good parts: `look` measures that,
`Usual` knows how far good parts go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.untrusted import Probability, Range

DARK = 10.0  # mean grey level, of 255, below which a frame without contrast is black: a covered lens has some noise
FLAT = 1.0  # standard deviation in grey levels; a dark surface that can be seen at all has more
FROZEN_S = 10.0  # seconds of frames that are the same to the last bit; a sensor's noise makes each another
SAMPLED = 128  # pixels of the shorter side that are looked at first

BLOWN = 254  # grey levels, of 255, from which a pixel is blown out
GREEN = (0, 72, 0), (4, 158, 4)  # RGB of a decoder's empty frame, YUV 0, 0, 0: BT.709 76 and 82, BT.601 135 and 154
GLANCE = 180  # pixels of the shorter side from which light is measured and places with structure are chosen
CELLS = 4  # along either side of a frame, with a block in each: no defect is in most of them
BLOCK, MARGIN = 48, 9  # pixels of a block's sides, and around it for the filters
STRONG = 0.05  # share of a block's pixels, those of its strongest edge, that sharpness is measured at
FINE, COARSE = 1.0, 3.0  # standard deviations in pixels of the Gaussians whose gradients are compared
SHARPEST = 0.75  # quantile of the blocks' sharpness that is a frame's
FAINT = 1e-6  # squared grey levels per pixel, in place of a gradient that is none

FEWEST = 5  # good frames that say how far they go
SURE = 5  # frames from whose range on less than the whole range is added to it, by the square root of their number
COMPARED = 300  # looks that are compared with all others
LIGHT_ROOM = 0.75  # least room beside the range of good frames: powers of two of their mean grey level,
SHARE_ROOM, BLOWN_ROOM = 0.15, 0.4  # share of pixels; more of blown out ones, since a defect may be white,
SHARP_ROOM = 0.5  # powers of two of sharpness; a defocus of 2 pixels (standard deviation) costs about 1

EXPLAINED = {
    "black": f"black (below {DARK:g} of 255 grey levels, no contrast): look for a covered lens, light and exposure",
    "uniform": "of one colour (all pixels within one grey level): look at the signal, the lens and exposure",
    "green": "green as a decoder leaves what it has no data for: look at the network, the cable and the stream",
    "dark": "darker than good parts: look at light, lens and exposure; calibrate again if the light is meant to be so",
    "bright": "brighter or more blown out than good parts: look at light and exposure; calibrate again if the light is "
    "meant to be so",
    "blurred": "less sharp than good parts: look for a lens out of focus, dirt on it, a part or a camera that moves; "
    "calibrate again if the distance is meant to be so",
    "frozen": f"the same to the last bit for {FROZEN_S:g} s: the camera repeats one picture",
}


def find_blindness(batch: NDArray[np.uint8]) -> str | None:
    """Why a frame shows nothing: "black", "uniform", or None where it shows something.

    Judged is what the model is shown, where noise of single pixels is averaged away.

    Args:
        batch: the frame as `Predictor.prepare` gives it, uint8 (1, H, W, 3).
    """
    image = batch[0]
    if cv2.meanStdDev(np.ascontiguousarray(_glance(image)))[1].max() >= FLAT:
        return None
    mean, deviation = cv2.meanStdDev(image)  # of all pixels: a small defect on a smooth surface is something
    if mean.max() < DARK and deviation.max() < FLAT:
        return "black"
    ranges = (cv2.minMaxLoc(cv2.extractChannel(image, channel))[:2] for channel in range(3))
    return "uniform" if all(high - low <= 1 for low, high in ranges) else None


def _glance(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Some pixels of an image (H, W, 3), spread over it: a view."""
    step = max(1, min(image.shape[:2]) // SAMPLED)
    return image[::step, ::step]


class Repetition:
    """Whether a camera goes on giving one frame."""

    def __init__(self) -> None:
        self._image = np.empty((0, 0, 3), np.uint8)  # the first of those that are the same
        self._since = 0.0

    def is_frozen(self, image: NDArray[np.uint8], captured: float) -> bool:
        """Take the next frame; whether all of the last `FROZEN_S` seconds are the same.

        Args:
            image: uint8 (H, W, 3).
            captured: seconds of a clock.
        """
        # frames that differ nearly always differ at first glance
        if not (np.array_equal(_glance(image), _glance(self._image)) and np.array_equal(image, self._image)):
            self._image, self._since = image, captured
        return captured - self._since >= FROZEN_S


@dataclass(frozen=True)
class Look:
    """What is measured of a frame.

    Attributes:
        light: mean grey level, 0..255.
        blown: share of its pixels that are blown out.
        green: share that has the green of a decoder without data.
        sharpness: log2 of how much more the squared gradient is at `FINE` than at `COARSE` where edges are strongest.
            At a step edge that a Gaussian of s pixels blurred it is log2((s^2 + 3^2) / (s^2 + 1^2)), 3.2 to 0.
    """

    light: float
    blown: float
    green: float
    sharpness: float


def look(image: NDArray[np.uint8]) -> Look:
    """Measure a frame; the time doesn't depend on its size.

    Sharpness compares gradients at edges at two scales (Zhuo and Sim, Defocus map estimation from a single image,
    Pattern Recognition 2011), which neither contrast nor exposure changes; where edges are strong, noise hardly does.

    Args:
        image: uint8 (H, W, 3) RGB, what is inspected of a frame.
    """
    height, width = image.shape[:2]
    step = max(1, min(height, width) // GLANCE, math.isqrt(height * width // (4 * GLANCE) ** 2))
    glance = np.ascontiguousarray(image[::step, ::step])
    grey = cv2.cvtColor(glance, cv2.COLOR_RGB2GRAY)
    return Look(
        light=float(grey.mean()),
        blown=float(np.mean(grey >= BLOWN)),
        green=cv2.countNonZero(cv2.inRange(glance, *GREEN)) / grey.size,
        sharpness=_sharpness(_structured(image, np.asarray(grey, np.uint8), step)),
    )


def _structured(image: NDArray[np.uint8], grey: NDArray[np.uint8], step: int) -> NDArray[np.float32]:
    """The block with the most structure of each cell of a frame, as grey levels (N, S, S).

    Args:
        grey: each `step`-th pixel of the image.
    """
    height, width = image.shape[:2]
    size = min(BLOCK + 2 * MARGIN, height, width)
    across, down = (cv2.convertScaleAbs(each, alpha=0.25) for each in cv2.spatialGradient(cv2.blur(grey, (3, 3))))
    structure = cv2.blur(cv2.add(across, down), (3, 3))
    rows, columns = (np.linspace(0, side, min(CELLS, side) + 1).astype(int) for side in structure.shape)
    blocks = []
    for y, next_y in pairwise(rows):
        for x, next_x in pairwise(columns):
            in_x, in_y = cv2.minMaxLoc(structure[y:next_y, x:next_x])[3]
            top = max(0, min((y + in_y) * step - size // 2, height - size))
            left = max(0, min((x + in_x) * step - size // 2, width - size))
            blocks.append(image[top : top + size, left : left + size])
    return cv2.cvtColor(np.concatenate(blocks), cv2.COLOR_RGB2GRAY).astype(np.float32).reshape(-1, size, size)


def _sharpness(blocks: NDArray[np.float32]) -> float:
    """See `Look`: of the sharpest quarter of blocks (N, S, S) with edges, the least: a soft stain is no defocus.

    Left out are blocks nearer to the faintest than to the strongest edge: they may show noise, which is always sharp.
    """
    count, size, _ = blocks.shape
    margin = MARGIN if size > 3 * MARGIN else 0
    energies = []
    for deviation in (FINE, COARSE):
        side = 2 * math.ceil(3 * deviation) + 1
        smooth = cv2.GaussianBlur(blocks.reshape(-1, size), (side, side), deviation)
        across, down = (cv2.Sobel(smooth, cv2.CV_32F, *axis, ksize=1, scale=0.5) for axis in ((1, 0), (0, 1)))
        energy = (across * across + down * down).reshape(count, size, size)
        energies.append(energy[:, margin : size - margin, margin : size - margin].reshape(count, -1))
    weakest = round((1 - STRONG) * (energies[1].shape[1] - 1))
    strong = energies[1] >= np.partition(energies[1], weakest, axis=1)[:, weakest, None]
    fine, coarse = ((energy * strong).sum(1) / strong.sum(1) + FAINT for energy in energies)
    ratios = np.log2(fine / coarse)[coarse >= math.sqrt(float(coarse.min() * coarse.max()))]
    return float(np.sort(ratios)[int(SHARPEST * (len(ratios) - 1))])


@dataclass(frozen=True)
class Usual:
    """How far frames of good parts go; what goes further can't be judged by what they taught.

    Attributes:
        darkest, brightest: mean grey level, 0..255.
        blown, green: share of pixels, at most.
        sharpness: at least.
    """

    darkest: Annotated[float, Range(0, 255)]
    brightest: Annotated[float, Range(0, 255)]
    blown: Probability
    green: Probability
    sharpness: Annotated[float, Range(-40, 40)]

    def __post_init__(self) -> None:
        if self.darkest > self.brightest:
            raise ValueError(f"darkest is at most brightest; got {self.darkest:g} and {self.brightest:g}")

    @classmethod
    def learn(cls, looks: Sequence[Look]) -> Usual | None:
        """From looks of good parts; None from fewer than `FEWEST`.

        Each bound lies beyond the range of the n looks by sqrt(`SURE` / n) of it, which of a normal distribution is about
        3.6 standard deviations from the mean whatever n is (a good frame in some thousands), and by a least room, for
        looks that are alike to the last bit.
        """
        if len(looks) < FEWEST:
            return None
        darkest, brightest = _beyond([math.log2(1 + each.light) for each in looks], LIGHT_ROOM)
        return cls(
            darkest=max(0.0, 2**darkest - 1),
            brightest=min(255.0, 2**brightest - 1),
            blown=min(1.0, _beyond([each.blown for each in looks], BLOWN_ROOM)[1]),
            green=min(1.0, _beyond([each.green for each in looks], SHARE_ROOM)[1]),
            sharpness=max(-40.0, _beyond([each.sharpness for each in looks], SHARP_ROOM)[0]),
        )

    @classmethod
    def find_odd(cls, looks: Sequence[Look]) -> dict[int, str]:
        """Which of some looks are beyond those of the others, by their place, and in what; of the first `COMPARED`."""
        looks = looks[:COMPARED]
        others = (cls.learn([*looks[:place], *looks[place + 1 :]]) for place in range(len(looks)))
        faults = ((place, usual and usual.find_fault(looks[place])) for place, usual in enumerate(others))
        return {place: fault for place, fault in faults if fault}

    def find_fault(self, seen: Look) -> str | None:
        """Why a frame can't be judged: "green", "dark", "bright" or "blurred", or None where it can."""
        if seen.green > self.green:
            return "green"
        if seen.light < self.darkest:
            return "dark"
        if seen.light > self.brightest or seen.blown > self.blown:
            return "bright"
        return "blurred" if seen.sharpness < self.sharpness else None


def _beyond(values: Iterable[float], room: float) -> tuple[float, float]:
    """The range of values of good frames, and beyond; see `Usual.learn`."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    margin = max(room, (high - low) * math.sqrt(SURE / len(ordered)))
    return low - margin, high + margin
