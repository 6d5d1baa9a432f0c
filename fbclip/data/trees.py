"""Readers of the trees that data sets are published in.

A reader takes the root and returns what it found, its items in a fixed order; no items where the tree is not laid out
its way. Directories are listed; of image files only KolektorSDD's masks are opened. Readers of indexes are in
`indexes.py`; which data set uses which reader is a table in `layouts.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fbclip.data.dataset import GOOD, Item, parallel_map
from fbclip.data.pairing import Named, named, pair
from fbclip.errors import ImageError
from fbclip.folders import images_below, is_hidden, plain
from fbclip.images import read_mask

GOOD_KINDS = ("good", "ok", "normal")  # folders of the MVTec tree; BTAD says ok


@dataclass
class Found:
    """What a reader found.

    Attributes:
        items: images with their labels and masks.
        strays: mask files that belong to no image.
        left_out: suffixes of files among the images and masks that are no images by it.
        notes: on the reading itself, for a person.
    """

    items: list[Item] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def images(self, folder: Path) -> list[Path]:
        """Image files below a folder, sorted; none where there is no such folder."""
        return images_below(folder, self.left_out) if folder.is_dir() else []

    def named(self, folder: Path, prefix: str = "") -> list[Named]:
        """The same with their names for `pair`."""
        return named(self.images(folder), folder, prefix)

    def pair(self, images: list[Named], masks: list[Named], others: Sequence[Named] = ()) -> dict[Path, list[Path]]:
        """Masks by their image, see `pair`; those that are left over are strays."""
        pairs, strays = pair(images, masks, others)
        self.strays += strays
        return pairs


Reader = Callable[[Path], Found]


def mvtec_tree(root: Path) -> Found:
    """CLASS/{train,test}/KIND/IMAGE and CLASS/ground_truth/KIND/MASK; the root holds classes or is one.

    MVTec LOCO's ground_truth/KIND/IMAGE/MASK, several masks of one image, is read too.
    """
    found = Found()
    folders = _folders(root, lambda f: (f / "test").is_dir())
    if not any(
        (folder / "ground_truth").is_dir()
        or any(plain(kind.name) in GOOD_KINDS for kind in _subfolders(folder / "test"))
        for folder in folders
    ):
        return found  # test/images beside test/masks, for instance
    for folder in folders:
        kinds = [(split, kind) for split in ("train", "test") for kind in _subfolders(folder / split)]
        images = [(split, kind, found.named(kind, plain(kind.name))) for split, kind in kinds]
        bad = [named for _, kind, below in images if plain(kind.name) not in GOOD_KINDS for named in below]
        good = [named for _, kind, below in images if plain(kind.name) in GOOD_KINDS for named in below]
        masks = found.pair(bad, found.named(folder / "ground_truth"), good)
        for split, kind, below in images:
            label = int(plain(kind.name) not in GOOD_KINDS)
            for image, _ in below:
                found.items.append(_item(image, label, masks, folder.name, kind.name, split))
    return found


def dagm_tree(root: Path) -> Found:
    """ClassN/{Train,Test}/IMAGE.PNG and ClassN/{Train,Test}/Label/IMAGE_label.PNG for the defective ones."""
    found = Found()
    for folder in _folders(root, lambda f: (f / "Test" / "Label").is_dir(), deeper="Class*/Class*"):
        for split in ("Train", "Test"):
            images = [named for named in found.named(folder / split) if named[0].parent == folder / split]
            masks = found.pair(images, found.named(folder / split / "Label"))
            for image, _ in images:
                found.items.append(_item(image, int(image in masks), masks, folder.name, "defect", split.lower()))
    return found


def kolektor_tree(root: Path) -> Found:
    """kosNN/PartN.jpg with kosNN/PartN_label.bmp, which is black where the part is good: the label is in the mask.

    There is no published split into train and test (the authors cross-validate): everything is test.
    """
    images = sorted(root.glob("kos*/*.jpg"))
    masks = [image.with_name(f"{image.stem}_label.bmp") for image in images]
    if not any(mask.is_file() for mask in masks):
        return Found()

    def marked(mask: Path) -> bool:
        try:
            return bool(read_mask(mask).any())
        except ImageError:
            return True  # kept with its mask, so that the damage is reported where it is read

    found = Found(strays=sorted(set(root.glob("kos*/*_label.bmp")) - set(masks)))
    for image, mask, defective in zip(images, masks, parallel_map(marked, masks), strict=True):
        pair = {image: [mask]} if defective else {}
        found.items.append(_item(image, int(defective), pair, "commutator", "defect", "test"))
    return found


def image_mask_tree(folders: Iterable[tuple[str, str, str]], class_name: str = "") -> Reader:
    """A reader of folders of images beside folders of masks, where every image is defective.

    Args:
        folders: images, masks and split of each pair.
        class_name: of all images; the root's name if left out.
    """

    def read(root: Path) -> Found:
        found = Found()
        for images, masks, split in folders:
            if (root / images).is_dir() and (root / masks).is_dir():
                named = found.named(root / images)
                pairs = found.pair(named, found.named(root / masks))
                found.items += [_item(image, 1, pairs, class_name or root.name, "defect", split) for image, _ in named]
        return found

    return read


def yes_no_tree(root: Path) -> Found:
    """yes/IMAGE has a tumour, no/IMAGE has none; no masks, no split."""
    found = Found()
    if (root / "yes").is_dir() and (root / "no").is_dir():
        for name, label in (("no", 0), ("yes", 1)):
            found.items += [_item(image, label, {}, "brain", "tumor", "test") for image in found.images(root / name)]
    return found


def folder_pair(root: Path) -> Found:
    """good/IMAGE and defective/[KIND/]IMAGE, with masks of the same names below masks/ or ground_truth/, if any.

    The root holds these or classes that do.
    """
    found = Found()
    for folder in _folders(root, lambda f: (f / GOOD).is_dir() and (f / "defective").is_dir()):
        good, bad = found.named(folder / GOOD), found.named(folder / "defective")
        masks = found.pair(bad, found.named(folder / "masks") + found.named(folder / "ground_truth"), good)
        found.items += [_item(image, 0, masks, folder.name, GOOD, "test") for image, _ in good]
        for image, _ in bad:
            kind = image.parent.name if image.parent != folder / "defective" else "defect"
            found.items.append(_item(image, 1, masks, folder.name, kind, "test"))
    return found


# --- what they share -----------------------------------------------------------------------------------------------


def _folders(root: Path, fits: Callable[[Path], bool], deeper: str = "") -> list[Path]:
    """The root if it fits, else those of its subfolders that do, else those that match the pattern `deeper`."""
    if fits(root):
        return [root]
    found = [f for f in _subfolders(root) if fits(f)]
    return found or [f for f in sorted(root.glob(deeper) if deeper else ()) if fits(f)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not is_hidden(f.name)) if folder.is_dir() else []


def _item(image: Path, label: int, masks: dict[Path, list[Path]], class_name: str, defect: str, split: str) -> Item:
    mine = masks.get(image, [])
    kind = defect if label else GOOD
    return Item(image, label, mine[0] if mine else None, class_name, kind, split, tuple(mine[1:]))
