"""Which masks belong to which image, by their names as people give them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from fbclip.folders import plain
from fbclip.images import SUFFIXES

Named = tuple[Path, str]  # a file, and its path below its folder without suffix, each part `plain`, with "/" between

_WORD = "(?:mask|label|segmentation|seg|gt)"
_BEHIND = re.compile(rf"(?P<image>.+?)[-_ .]{_WORD}(?P<number>[-_ .]?\d+)?", re.IGNORECASE)
_BEFORE = re.compile(rf"^{_WORD}[-_ .](?=.)", re.IGNORECASE)


class _Meant(NamedTuple):
    """A mask, the image that its name may mean, and whether it may be one of several."""

    mask: Path
    image: str
    counts: bool


def _written(file: Path) -> str:
    """A file's name without suffix, as `plain` has it but in its own case."""
    return unicodedata.normalize("NFC", file.stem).strip()


def named(files: Iterable[Path], folder: Path, prefix: str = "") -> list[Named]:
    """Files below a folder with their names, perhaps below a prefix."""
    return [
        (file, "/".join(filter(None, [prefix, *map(plain, file.relative_to(folder).parent.parts), plain(file.stem)])))
        for file in files
    ]


def pair(
    images: Sequence[Named], masks: Sequence[Named], others: Sequence[Named] = ()
) -> tuple[dict[Path, list[Path]], list[Path]]:
    """Which masks belong to which image by their names, and those that belong to none.

    In this order: the image's name; with a word behind it (0_mask, and 0_mask_1, 0_mask_2, which are two masks) or
    with its suffix (0.png.png); with a word before it (mask_0); a folder that is called like the image (MVTec LOCO).
    At last a name without a folder, where it is of one image and of one mask only: masks/1 of defective/scratch/1.

    Args:
        images: defective ones.
        masks: of them, and perhaps of others.
        others: images without defects, which may have masks too: black ones.
    """
    ranks: list[defaultdict[str, list[_Meant]]] = [defaultdict(list) for _ in range(5)]
    alone: defaultdict[str, set[Path]] = defaultdict(set)
    for mask, name in masks:
        above, stem = name.rpartition("/")[0], _written(mask)
        behind = _BEHIND.fullmatch(stem)
        image, numbered = (behind["image"], behind["number"] is not None) if behind else (stem, False)
        meanings = (
            (stem, False),
            (image, numbered),
            (_BEFORE.sub("", stem), False),
            (_BEFORE.sub("", image), numbered),
        )
        for rank, (meant, counts) in enumerate(meanings):
            meant = PurePath(meant).stem if rank and PurePath(meant.lower()).suffix in SUFFIXES else meant
            ranks[rank][f"{above}/{meant.lower()}".lstrip("/")].append(_Meant(mask, meant, counts))
            alone[meant.lower()].add(mask)
        ranks[4][above].append(_Meant(mask, "", True))
    above_of = {mask: name.rpartition("/")[0] for mask, name in masks}
    how_many = Counter(name.rpartition("/")[2] for _, name in (*images, *others))

    pairs: dict[Path, list[Path]] = {}
    for image_file, name in images:
        meant_here = next((rank[name] for rank in ranks if name in rank), [])
        same_case = [one for one in meant_here if one.image == _written(image_file)] or meant_here  # A.png beside a.png
        single, several = ([one.mask for one in same_case if one.counts is wanted] for wanted in (False, True))
        if single or several:
            pairs[image_file] = single[:1] + several
    taken = {mask for mine in pairs.values() for mask in mine}
    for image_file, name in images:
        above, _, stem = name.rpartition("/")
        free = [mask for mask in alone.get(stem, ()) if mask not in taken and not (above and above_of[mask])]
        if image_file not in pairs and len(free) == 1 and how_many[stem] == 1:
            pairs[image_file] = free
            taken.add(free[0])
    missing = {name.rpartition("/")[2] for image_file, name in images if image_file not in pairs}
    for image_file, name in others:
        if name.rpartition("/")[2] not in missing:
            mine = dict.fromkeys(one.mask for rank in ranks for one in rank.get(name, ()) if one.mask not in taken)
            if mine:
                pairs[image_file] = list(mine)
                taken.update(mine)
    return pairs, [mask for mask, _ in masks if mask not in taken]
