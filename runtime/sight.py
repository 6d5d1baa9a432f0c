"""Whether a frame shows anything: what is black, of one colour or frozen says nothing of a part."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

DARK = 10.0  # mean grey level, of 255, below which a frame without contrast is black: a covered lens has some noise
FLAT = 1.0  # standard deviation in grey levels; a dark surface that can be seen at all has more
FROZEN_S = 10.0  # seconds of frames that are the same to the last bit; a sensor's noise makes each another
SAMPLED = 128  # pixels of the shorter side that are looked at first

EXPLAINED = {
    "black": f"black (below {DARK:g} of 255 grey levels, no contrast): look for a covered lens, light and exposure",
    "uniform": "of one colour (all pixels within one grey level): look at the signal, the lens and exposure",
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
