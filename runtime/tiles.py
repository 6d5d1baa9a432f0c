"""Small defects in large pictures: a frame is seen whole and in overlapping tiles, and one map and one score come of it.

A model sees S x S pixels. What a picture of 4000 x 3000 loses on the way there, its tiles still have. Rules:

- Score: the mean of the odds of all views. If a defect is to be seen in one of them, and nobody knows in which, the
  evidence for a defect is the mean of their likelihood ratios. Whatever the views' dependence, that doesn't grow with
  their number where nothing is wrong, as the highest of them would (Vovk and Wang, E-values: calibration, combination
  and applications, Annals of Statistics 2021, arXiv:1912.06116, section 3).
- Map: tiles are blended with a window that fades towards their edges and adds up to 1 everywhere; with the whole frame's
  map, pixel by pixel, the mean of odds again. What is larger than a tile is seen in the whole frame.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.backend import Backend
from fbclip.errors import ImageError, UsageError
from fbclip.memory import Tensors
from fbclip.runtime.backends import require_probabilities

AUTO = "auto"
OVERLAP, MOST_OVERLAP = 0.25, 0.75  # of a tile's side
DETAIL = 32.0  # pixels of the frame that a patch covers, chosen on rendered surfaces (benchmarks/tiles.py)
LEAST_SIDE, MOST_SIDE = 16, 65_535  # pixels of a tile
MOST_TILES = 16_384  # of a frame: minutes of a small model
STRIP = 1 << 21  # pixels of a map that are worked on at once
EDGE = 2.0**-24  # the step of float32 below 1, where odds are highest

Box = tuple[int, int, int, int]
Probabilities = TypeVar("Probabilities", NDArray[np.float32], NDArray[np.float64])


@dataclass(frozen=True)
class Tiles:
    """How frames are cut; of what is inspected of them, where there is a region of interest.

    Attributes:
        grid: rows and columns; None where the size decides.
        side: of a tile, in pixels of the frame; None where the grid or `detail` decides.
        overlap: of neighbours, as a share of a tile's side.
        detail: "auto": so many pixels of the frame that a patch of the model covers, at most.
    """

    grid: tuple[int, int] | None = None
    side: int | None = None
    overlap: float = OVERLAP
    detail: float = DETAIL

    def __post_init__(self) -> None:
        grid, side = self.grid, self.side
        if grid is not None and not (
            side is None and isinstance(grid, tuple) and len(grid) == 2 and all(_is_count(n) for n in grid)
        ):
            raise UsageError(f"a grid of tiles is rows and columns, and no side; got {grid!r:.50}", option="tiles")
        if side is not None and not (_is_count(side) and LEAST_SIDE <= side <= MOST_SIDE):
            raise UsageError(
                f"a tile's side is a number of pixels from {LEAST_SIDE} on; got {side!r:.50}", option="tiles"
            )
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise UsageError(
                f"an overlap is a share of a tile's side, 0 to {MOST_OVERLAP:g}; got {self.overlap:g}", option="overlap"
            )
        if not 1 <= self.detail <= MOST_SIDE:
            raise UsageError(
                f"a detail is the pixels of the frame that a patch covers, from 1 on; got {self.detail:g}",
                option="detail",
            )

    @classmethod
    def parse(cls, value: Tiles | str | int, overlap: float = OVERLAP, detail: float | None = None) -> Tiles:
        """ "3x4" (rows x columns), "512" (pixels of a side) or "auto"; a `Tiles` stays as it is.

        Raises:
            UsageError: none of these, or `detail` without "auto".
        """
        if isinstance(value, Tiles):
            return value
        text = str(value).strip().lower()
        if text == AUTO:
            return cls(None, None, overlap, DETAIL if detail is None else detail)
        if detail is not None:
            raise UsageError(f"a detail is for tiles that are chosen by it, auto; got {value}", option="detail")
        if grid := re.fullmatch(r"(\d{1,3})\s*[x×]\s*(\d{1,3})", text):
            rows, columns = int(grid[1]), int(grid[2])
            if rows and columns and rows * columns <= MOST_TILES:
                return cls((rows, columns), None, overlap)
        elif re.fullmatch(r"\d{1,5}", text) and LEAST_SIDE <= int(text) <= MOST_SIDE:
            return cls(None, int(text), overlap)
        raise UsageError(
            f"tiles are ROWSxCOLUMNS like 3x4 (at most {MOST_TILES:,}), a side in pixels from {LEAST_SIDE} on, or auto; "
            f"got {value!r:.50}",
            option="tiles",
        )

    @property
    def identity(self) -> str:
        """What distinguishes it, for what is learned with it; as a person would ask for it."""
        if self.grid:
            what = f"{self.grid[0]}x{self.grid[1]}"
        else:
            what = f"auto of {self.detail:g} pixels a patch" if self.side is None else f"{self.side}"
        return f"{what}, overlap {self.overlap:g}"

    def cut(self, height: int, width: int, grid: int) -> Layout | None:
        """Where the tiles of a frame of this size lie; None where one is all of it.

        Args:
            grid: patches along a side of the model's input.

        Raises:
            ImageError: more than `MOST_TILES`, or tiles of less than `LEAST_SIDE` pixels.
        """
        layout = _layout(self, height, width, grid)
        return layout if len(layout) > 1 else None


@dataclass(frozen=True)
class Layout:
    """The tiles of frames of one size.

    Attributes:
        hw: height and width of the frames.
        tile_hw: of a tile.
        tops, lefts: of the rows and the columns of tiles, rising; neighbours overlap, the last ends where the frame does.
    """

    hw: tuple[int, int]
    tile_hw: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    @property
    def boxes(self) -> tuple[Box, ...]:
        """(x0, y0, x1, y1) of each tile in pixels, row by row; x1 and y1 are exclusive."""
        height, width = self.tile_hw
        return tuple((x, y, x + width, y + height) for y in self.tops for x in self.lefts)

    def views(
        self, frame: NDArray[np.uint8], prepare: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
    ) -> Iterator[NDArray[np.uint8]]:
        """What a model is shown of a frame uint8 (H, W, 3): the whole, then each tile, cut when its turn comes.

        Args:
            prepare: from pictures (1, H', W', 3) to what the graph takes, (1, S, S, 3).
        """
        yield prepare(frame[None])
        for x0, y0, x1, y1 in self.boxes:
            yield prepare(np.ascontiguousarray(frame[None, y0:y1, x0:x1]))

    def windows(self) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        """What rows and columns of tiles are weighted with, down and across: their products add up to 1 everywhere."""
        return _fades(self.tops, *self.tile_hw[:1], self.hw[0]), _fades(self.lefts, *self.tile_hw[1:], self.hw[1])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@lru_cache(maxsize=64)
def _layout(tiles: Tiles, height: int, width: int, grid: int) -> Layout:
    if tiles.grid:
        tile_hw = tuple(
            math.ceil(length / (count - (count - 1) * tiles.overlap))
            for length, count in zip((height, width), tiles.grid, strict=True)
        )
    else:  # square, as what the model sees is
        side = tiles.side or max(1, int(tiles.detail * grid))
        tile_hw = (height, width) if side >= max(height, width) else (min(height, width, side),) * 2
    counts = tiles.grid or tuple(
        1 if length <= side else math.ceil((length - side) / max(1.0, side * (1 - tiles.overlap))) + 1
        for length, side in zip((height, width), tile_hw, strict=True)
    )
    if math.prod(counts) > MOST_TILES:
        raise ImageError(
            f"a frame has at most {MOST_TILES:,} tiles; {tiles.identity} makes {math.prod(counts):,} of {width}x{height} "
            f"(width x height): choose larger ones",
            option="tiles",
        )
    if min(tile_hw) < LEAST_SIDE and math.prod(counts) > 1:
        raise ImageError(
            f"tiles have {LEAST_SIDE} pixels a side or more; {tiles.identity} makes {tile_hw[1]}x{tile_hw[0]} of "
            f"{width}x{height} (width x height): choose fewer, or leave tiles out",
            option="tiles",
        )
    tops, lefts = (
        tuple(int(start) for start in np.linspace(0, length - side, count).round())
        for length, side, count in zip((height, width), tile_hw, counts, strict=True)
    )
    return Layout((height, width), (tile_hw[0], tile_hw[1]), tops, lefts)


def _fades(starts: Sequence[int], side: int, length: int) -> list[NDArray[np.float32]]:
    """Hann windows along one axis, divided by their sum: 1 where a tile is alone, fading where it meets the next."""
    window = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + side] += window
    return [(window / total[start : start + side]).astype(np.float32) for start in starts]


def inspect(
    backend: Backend,
    views: Iterable[NDArray[np.uint8]],
    layout: Layout,
    batch: int = 1,
    by_place: Callable[[int], Tensors] | None = None,
    name: object = "an image",
) -> tuple[float, NDArray[np.float32]]:
    """Score and map of a frame from what a model says of it and of its tiles.

    Memory grows with the map, 4 bytes a pixel, and with the batch; the tiles are never there at once.

    Args:
        views: of the frame as the graph takes them, each uint8 (1, S, S, 3): the whole, then its tiles.
        layout: of frames of this size.
        batch: views that the model is given at once.
        by_place: the memory's tensors of each view, the whole frame's first, where each place has its own: then one view
            is looked at after the other. None where all have one, which is set.
        name: of the frame, for the message.

    Returns:
        The score, a float32 in 0..1, and the map float32 (H, W), 0..1.

    Raises:
        FBClipError: what the model gives are no probabilities.
    """
    mosaic, scores = _Mosaic(layout), np.empty(1 + len(layout), np.float32)
    whole_map = np.empty(0, np.float32)
    number = 0
    for found, maps in _run(backend, views, batch, by_place):
        require_probabilities(found, maps, [name] * len(found))
        for score, each in zip(found, maps, strict=True):
            scores[number] = score
            if number:
                mosaic.add(number - 1, each)
            else:
                whole_map = each.copy()
            number += 1
    return combined(scores), mosaic.finish(whole_map)


def _run(
    backend: Backend,
    shown: Iterable[NDArray[np.uint8]],
    batch: int,
    by_place: Callable[[int], Tensors] | None,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    if by_place is None:
        yield from backend.run_each(_batches(shown, batch))
        return
    for number, view in enumerate(shown):
        backend.set_memory(by_place(number))
        yield backend.run(view)


def _batches(shown: Iterable[NDArray[np.uint8]], size: int) -> Iterator[NDArray[np.uint8]]:
    views = iter(shown)
    while group := list(islice(views, size)):
        yield group[0] if len(group) == 1 else np.concatenate(group)


def combined(scores: NDArray[np.float32]) -> float:
    """One score of a frame from those of its views (1 + T,): see the module."""
    with np.errstate(divide="ignore"):  # the odds of 1 are infinite, and so is the inverse of none
        odds = scores / (1 - scores.astype(np.float64))
        return float(np.float32(1 / (1 + 1 / odds.mean())))


def _odds(probabilities: Probabilities) -> Probabilities:
    return np.asarray(probabilities / np.maximum(1 - probabilities, EDGE))


class _Mosaic:
    """The map of a frame in the making."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._down, self._across = layout.windows()
        self._map = np.zeros(layout.hw, np.float32)

    def add(self, number: int, tile_map: NDArray[np.float32]) -> None:
        """The map of a tile, of any size."""
        height, width = self._layout.tile_hw
        row, column = divmod(number, len(self._layout.lefts))
        if tile_map.shape != (height, width):
            enlarged = cv2.resize(tile_map, (width, height), interpolation=cv2.INTER_LINEAR)
            tile_map = np.asarray(enlarged, np.float32).reshape(height, width)
        y, x = self._layout.tops[row], self._layout.lefts[column]
        faded = tile_map * self._down[row][:, None]
        faded *= self._across[column]
        self._map[y : y + height, x : x + width] += faded

    def finish(self, whole: NDArray[np.float32]) -> NDArray[np.float32]:
        """With the map of the whole frame, strip by strip."""
        height, width = self._layout.hw
        wide = np.asarray(cv2.resize(whole, (width, len(whole)), interpolation=cv2.INTER_LINEAR), np.float32)
        wide = wide.reshape(len(whole), width)
        rows = ((np.arange(height) + 0.5) * len(whole) / height - 0.5).clip(0, len(whole) - 1)
        above = rows.astype(int)
        below, share = np.minimum(above + 1, len(whole) - 1), (rows - above).astype(np.float32)[:, None]
        step = max(1, STRIP // width)
        for top in range(0, height, step):
            strip, at = self._map[top : top + step], slice(top, top + step)
            mean = _odds(strip)
            mean += _odds(wide[above[at]] * (1 - share[at]) + wide[below[at]] * share[at])
            mean /= 2
            np.divide(mean, 1 + mean, out=strip)
        return self._map
