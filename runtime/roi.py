"""Where a frame is inspected: a rectangle in pixels, or a mask."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.errors import ImageError, UsageError
from fbclip.images import read_mask


@dataclass(frozen=True)
class Roi:
    """A region of interest. The model sees its box alone, as if the frame ended there.

    The image score is the class token's, which looks at everything it is shown and can't be told apart by place: here
    it is the score of the frame cut to the box. A mask of another shape leaves out some of its box, and what lies there
    may raise the score. So with such a mask an anomaly also needs a region inside it, or the map's highest value where
    none reaches the map's threshold (see `find_evidence`), and the map is 0 outside.

    Attributes:
        text: what was asked for.
        box: (x0, y0, x1, y1) in pixels of the frame; x1 and y1 are exclusive.
        inside: uint8 (y1 - y0, x1 - x0) of 0 and 1, what counts of the box; None where all of it does.
        frame_hw: height and width of the mask, which frames must have; None for a rectangle.
    """

    text: str
    box: tuple[int, int, int, int]
    inside: NDArray[np.uint8] | None = field(default=None, repr=False)
    frame_hw: tuple[int, int] | None = None

    @classmethod
    def parse(cls, value: Roi | str | Path | Sequence[int]) -> Roi:
        """`"x0,y0,x1,y1"` or `(x0, y0, x1, y1)` in pixels, or the path of a mask: what isn't black counts (see
        `read_mask`). A `Roi` stays as it is.

        Raises:
            UsageError: none of these, an empty rectangle, or a mask that is all black.
        """
        if isinstance(value, Roi):
            return value
        text = str(value) if isinstance(value, (str, Path)) else _joined(value)
        if numbers := re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*", text):
            x0, y0, x1, y1 = (int(number) for number in numbers.groups())
            if x0 >= x1 or y0 >= y1:
                raise UsageError(
                    f"a region is x0,y0,x1,y1 in pixels with x0 < x1 and y0 < y1; got {text}", option="roi"
                )
            return cls(text, (x0, y0, x1, y1))
        if not Path(text).exists():
            raise UsageError(f"a region is x0,y0,x1,y1 in pixels, or the path of a mask; got {text!r}", option="roi")
        return cls.of_mask(read_mask(Path(text)), text)

    @classmethod
    def of_mask(cls, mask: NDArray[np.uint8], text: str) -> Roi:
        """What a mask uint8 (H, W) of 0 and 1 leaves of frames of its size.

        Raises:
            UsageError: nothing.
        """
        x, y, width, height = cv2.boundingRect(mask)
        if not width:
            raise UsageError(
                f"the mask {text} is black all over: paint white where frames are to be inspected", option="roi"
            )
        inside = mask[y : y + height, x : x + width]
        return cls(text, (x, y, x + width, y + height), None if inside.all() else inside, mask.shape)

    @property
    def identity(self) -> str:
        """What distinguishes it, wherever a mask's file may be."""
        x0, y0, x1, y1 = self.box
        if self.inside is None:
            return f"{x0},{y0},{x1},{y1}"
        return f"MASK (sha256 {hashlib.sha256(self.inside.tobytes()).hexdigest()[:16]}) in {x0},{y0},{x1},{y1}"

    def crop(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The box of a frame uint8 (H, W, 3).

        Raises:
            ImageError: the frame has another size than the mask, or doesn't hold the rectangle.
        """
        height, width = frame.shape[:2]
        x0, y0, x1, y1 = self.box
        if self.frame_hw not in (None, (height, width)):
            raise ImageError(
                f"the mask {self.text} is of {self.frame_hw[1]}x{self.frame_hw[0]} (width x height); the frame has "
                f"{width}x{height}: make a mask of that size, or set the camera to the mask's",
                option="roi",
            )
        if x1 > width or y1 > height:
            raise ImageError(
                f"the region {self.text} reaches beyond the frame of {width}x{height} (width x height): pass a smaller one, "
                f"or set the camera to a larger size",
                option="roi",
            )
        return np.ascontiguousarray(frame[y0:y1, x0:x1])


def _joined(numbers: Sequence[int]) -> str:
    whole = isinstance(numbers, (tuple, list, np.ndarray)) and len(numbers) == 4
    if not whole or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in numbers):
        raise UsageError(f"a region is four whole numbers x0, y0, x1, y1 in pixels; got {numbers!r:.50}", option="roi")
    return ",".join(str(int(number)) for number in numbers)
