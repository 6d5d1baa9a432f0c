"""What a data set is to fbclip, whatever its layout on disk. Needs neither torch nor open_clip.

A `Dataset` is a list of paths with labels; nothing is read until a sample is asked for, so memory does not grow
with the data set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.image import resize
from fbclip.reading import read_image, read_mask

GOOD = "good"


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Attributes:
        image: its file.
        label: 0 good, 1 defective.
        mask: the file that marks the defect, white where defective. None with label 0 means no defect anywhere,
            None with label 1 that nobody marked where it is.
        class_name: the object or texture, as the data set calls it.
        defect: the kind of defect, "good" where there is none.
        split: "train" or "test", as published.
    """

    image: Path
    label: int
    mask: Path | None
    class_name: str
    defect: str
    split: str


@dataclass(frozen=True)
class Sample:
    """image uint8 (S, S, 3) RGB; mask uint8 (S, S) of 0 and 1, None where nobody marked the defect; label 0 or 1."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None
    label: int


class SampleSet(Protocol):
    """Anything with a length and samples by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Dataset:
    """Items of a data set found on disk.

    Attributes:
        name: of the data set, as results are titled.
        layout: which published layout it was read as.
        root: its folder.
        items: every image, in a fixed order.
    """

    name: str
    layout: str
    root: Path
    items: tuple[Item, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted."""
        return tuple(sorted({item.class_name for item in self.items}))

    @property
    def has_masks(self) -> bool:
        """Whether pixels can be judged: every defective image has a mask."""
        return all(item.mask is not None for item in self.items if item.label)

    def select(self, split: str | None = None, class_name: str | None = None) -> Dataset:
        """The items of a split, of a class, or both."""
        chosen = (
            item
            for item in self.items
            if (split is None or item.split == split) and (class_name is None or item.class_name == class_name)
        )
        return replace(self, items=tuple(chosen))


@dataclass(frozen=True)
class Samples:
    """The items of a data set at the model's input size, read when asked for.

    Attributes:
        items: of a data set.
        image_size: side S in pixels that images and masks are resized to.
    """

    items: tuple[Item, ...]
    image_size: int

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        """Raises ImageError for a file that can't be read."""
        item, size = self.items[index], self.image_size
        image = resize(read_image(item.image), size)
        mask: NDArray[np.uint8] | None = None
        if item.mask is not None:
            smooth = Image.fromarray(read_mask(item.mask) * np.uint8(255)).resize(
                (size, size), Image.Resampling.BILINEAR
            )
            mask = (np.asarray(smooth) > 127).astype(np.uint8)  # binarised at a half (spec, section 1)
        elif not item.label:
            mask = np.zeros((size, size), np.uint8)
        return Sample(image, mask, item.label)
