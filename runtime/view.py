"""Where frames are looked at: the region of interest, the part that they are aligned to, the tiles they are cut into.

A view takes from a frame what the model is shown, and lays the map that comes of it back onto the frame. What good parts
taught was seen in one view, and counts in no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.errors import ImageError, UsageError
from fbclip.runtime.align import Align, Pose
from fbclip.runtime.roi import Roi
from fbclip.runtime.tiles import Box, Layout, Tiles


class Place(NamedTuple):
    """What distinguishes a view, as memories and calibrations store it; None for what there is none of."""

    roi: str | None = None
    tiles: str | None = None
    align: str | None = None

    def __str__(self) -> str:
        """ "for whole frames": a part of a sentence."""
        where = f"for the region {self.roi}" if self.roi else "for whole frames"
        if self.tiles:
            where += f" and tiles of {self.tiles}"
        return f"{where}, in line with {self.align}" if self.align else where

    def require_same(self, learned: Place, message: str) -> None:
        """Raise UsageError unless what was learned was learned here.

        Args:
            message: with "{learned}" and "{here}" for the two places.
        """
        for name, here, there in reversed([*zip(self._fields, self, learned, strict=True)]):
            if here != there:  # the part's mask makes a region, too
                raise UsageError(message.format(learned=learned, here=self), option=name)


class Taken(NamedTuple):
    """What a view takes from a frame.

    Attributes:
        shown: uint8 (H', W', 3), what is inspected.
        pose: where the part lies; None where frames are not aligned, or it is absent.
        absent: whether the part isn't in the frame: what is shown is the frame as it lies.
    """

    shown: NDArray[np.uint8]
    pose: Pose | None = None
    absent: bool = False


@dataclass(frozen=True)
class View:
    """How frames are looked at.

    Attributes:
        roi: where they are inspected; None for all of them. With `align` in the reference's pixels.
        tiles: how that is cut; None for the whole alone.
        align: the part that each frame is brought in line with; None for frames as they lie.
    """

    roi: Roi | None = None
    tiles: Tiles | None = None
    align: Align | None = None

    @classmethod
    def of(cls, roi: Roi | None, tiles: Tiles | None, align: Align | None) -> View:
        """Where the part has a mask, that is the region of interest.

        Raises:
            UsageError: there is another one besides, or the region doesn't fit the picture of the part.
        """
        if align and align.mask is not None:
            if roi:
                raise UsageError(
                    "the part's mask is the region of interest; got another one besides: leave one of them out",
                    option="roi",
                )
            roi = Roi.of_mask(align.mask, "the part's mask")
        if align and roi:
            try:
                roi.crop(align.image)
            except ImageError as error:
                height, width = align.image.shape[:2]
                raise UsageError(
                    f"with a part the region lies in its picture, of {width}x{height} (width x height); got {roi.text}",
                    option="roi",
                ) from error
        return cls(roi, tiles, align)

    @property
    def place(self) -> Place:
        return Place(
            self.roi.identity if self.roi else None,
            self.tiles.identity if self.tiles else None,
            self.align.identity if self.align else None,
        )

    def take(self, frame: NDArray[np.uint8]) -> Taken:
        """What is inspected of a frame uint8 (H, W, 3) RGB.

        Raises:
            ImageError: the region of interest doesn't fit it.
        """
        if self.align is None:
            return Taken(self._crop(frame))
        if pose := self.align.find(frame):
            return Taken(pose.onto_reference(frame, self.box), pose)
        height, width = self.align.image.shape[:2]
        return Taken(self._crop(np.asarray(cv2.resize(frame, (width, height)), np.uint8)), absent=True)

    def layout(self, shown: NDArray[np.uint8], grid: int) -> Layout | None:
        """The tiles of what a frame shows; None where it is looked at as a whole, or is no larger than one of them.

        Args:
            grid: patches along a side of the model's input.
        """
        if self.tiles is None:
            return None
        height, width = shown.shape[:2]
        return self.tiles.cut(height, width, grid)

    def boxes(self, layout: Layout) -> tuple[Box, ...]:
        """The tiles in pixels of the frame, or of the reference."""
        x, y = self.roi.box[:2] if self.roi else (0, 0)
        return tuple((x0 + x, y0 + y, x1 + x, y1 + y) for x0, y0, x1, y1 in layout.boxes)

    def onto_frame(
        self, part: NDArray[np.float32], pose: Pose, frame_hw: tuple[int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The map of what was shown, float32 (H', W'), on a frame whose part lies so: (H, W), 0 outside; and uint8 (H, W)
        of 0 and 1, what counts of it."""
        assert self.align is not None
        x0, y0, x1, y1 = self.box
        counts = np.zeros(self.align.image.shape[:2], np.uint8)
        inside = self.roi.inside if self.roi else None
        counts[y0:y1, x0:x1] = 1 if inside is None else inside
        whole = np.zeros(counts.shape, np.float32)
        whole[y0:y1, x0:x1] = part
        return pose.onto_frame(whole, frame_hw), pose.onto_frame(counts, frame_hw)

    def place_of(self, point: tuple[float, float], pose: Pose) -> tuple[float, float]:
        """Where a point (x, y) of the frame lies in what is inspected of the reference, in 0..1 of its width and height."""
        x0, y0, x1, y1 = self.box
        height, width = pose.reference_hw
        x, y = pose.place(point)
        return (x * width - x0) / (x1 - x0), (y * height - y0) / (y1 - y0)

    @property
    def box(self) -> Box:
        """What is inspected of the reference, in its pixels."""
        assert self.align is not None
        height, width = self.align.image.shape[:2]
        return self.roi.box if self.roi else (0, 0, width, height)

    def _crop(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.roi.crop(frame) if self.roi else frame
