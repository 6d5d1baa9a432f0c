"""What a data set is to fbclip, whatever its layout on disk. Needs neither torch nor open_clip.

A `Dataset` is a list of paths with labels; nothing is read until a sample is asked for, so memory does not grow
with the data set.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.errors import UsageError
from fbclip.files import sha256
from fbclip.images import read_image, union_of_masks
from fbclip.resample import resize

GOOD = "good"
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
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
        more_masks: further files that mark defects of this image; what any of them marks is defective.
    """

    image: Path
    label: int
    mask: Path | None
    class_name: str
    defect: str
    split: str
    more_masks: tuple[Path, ...] = ()

    @property
    def masks(self) -> tuple[Path, ...]:
        """All its mask files."""
        return () if self.mask is None else (self.mask, *self.more_masks)


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
        strays: mask files that belong to no image.
        notes: what a person should know of how it was read.
    """

    name: str
    layout: str
    root: Path
    items: tuple[Item, ...]
    strays: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted."""
        return tuple(sorted({item.class_name for item in self.items}))

    def select(self, split: str | None = None, class_name: str | None = None) -> Dataset:
        """The items of a split, of a class, or both."""
        chosen = (
            item
            for item in self.items
            if (split is None or item.split == split) and (class_name is None or item.class_name == class_name)
        )
        return replace(self, items=tuple(chosen))

    def for_training(self) -> tuple[Item, ...]:
        """The items of the test split, which is what the published recipe trains on (docs/method.md, section 8).

        Raises:
            UsageError: nothing in the test split, no good or no defective image, or a defective one without a mask file.
        """
        items = self.select("test").items
        if not items:
            raise UsageError(f"training takes the test split; {self.root} has none")
        for label, kind in enumerate((GOOD, "defective")):
            if all(item.label != label for item in items):
                raise UsageError(
                    f"training takes good and defective images; {self.root} has no {kind} ones in its test split: "
                    f"fbclip data {self.root} says what it is good for"
                )
        for item in items:
            if item.label and (item.mask is None or not item.mask.is_file()):
                raise UsageError(
                    f"training needs a mask for every defective image; {item.image} has none: "
                    f"fbclip data {self.root} lists what is missing"
                )
        return items

    def relative(self, path: Path) -> str:
        """The path below the root with forward slashes; the bare name of a file that lies elsewhere."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name

    def fingerprint(self, digests: Mapping[Path, str] | None = None) -> str:
        """What the data set is, as 64 hexadecimal digits to stamp results with.

        SHA-256 over every item's class, split, label, relative file names and whole file contents; neither the order
        of the items nor the place of the root matters. It reads every file once, which takes a small part of the time
        that decoding them does.

        Args:
            digests: of files that were hashed already, from `file_digest`.
        """
        files = {file for item in self.items for file in (item.image, *item.masks)}
        known = dict(digests or {})
        left = [file for file in files if file not in known]
        known.update(zip(left, parallel_map(file_digest, left), strict=True))
        lines = sorted(
            "\t".join(
                [item.class_name, item.split, str(item.label)]
                + [f"{self.relative(file)}\t{known[file]}" for file in (item.image, *item.masks)]
            )
            for item in self.items
        )
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()  # any name


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
        return read_sample(self.items[index], self.image_size)


def read_sample(item: Item, image_size: int | None) -> Sample:
    """An item of a data set, image and mask in this size, or in the image's own without one.

    Raises:
        ImageError: a file that can't be read.
    """
    image = read_image(item.image)
    if image_size is not None:
        image = resize(image, image_size)
    height, width = image.shape[:2]
    mask: NDArray[np.uint8] | None = None
    if item.mask is not None:
        smooth = Image.fromarray(union_of_masks(item.masks) * np.uint8(255)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        mask = (np.asarray(smooth) > 127).astype(np.uint8)  # binarised at a half (docs/method.md, section 1)
    elif not item.label:
        mask = np.zeros((height, width), np.uint8)
    return Sample(image, mask, item.label)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal; "missing" where it can't be opened."""
    try:
        return sha256(path) if path.is_file() else "missing"  # a pipe would never end
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return "missing"


def parallel_map(function: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """Results in order, computed by threads a few items ahead: memory holds two results per thread, never all.

    Reading, decoding and hashing files release Python's lock, so threads are enough. An exception of `function` is
    raised where its result would come.

    Args:
        workers: threads; one per core, at most 16, if left out.
    """
    workers = workers or min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) >= 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
