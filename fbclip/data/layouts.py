"""Data sets by their published layouts: which tree is whose, and `open_dataset`, which recognises them.

Trees and sources: docs/guides/data.md. Needs neither torch nor open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fbclip.data import indexes, trees
from fbclip.data.dataset import Dataset, Item
from fbclip.errors import UsageError
from fbclip.folders import is_hidden, what_was_left_out
from fbclip.terminal import printable

Recognise = Callable[[Path, list[Item]], bool]


def always(root: Path, items: list[Item]) -> bool:
    return True


def named(pattern: str) -> Recognise:
    """The root's name holds the pattern."""
    return lambda root, items: re.search(pattern, root.name, re.IGNORECASE) is not None


def of_classes(names: str) -> Recognise:
    """Every class is one of these."""
    known = frozenset(names.split())
    return lambda root, items: {item.class_name for item in items} <= known


def says_ok(root: Path, items: list[Item]) -> bool:
    """Good images are in folders called ok."""
    return any(item.image.parent.name == "ok" for item in items)


@dataclass(frozen=True)
class Layout:
    """A data set and how it is laid out.

    Attributes:
        name: as users have it.
        title: of the data set; the root's name if empty.
        tree: what is expected below the root.
        read: the root to items; none where the tree is another.
        recognise: whether items read from the root are this data set's: several share a tree.
    """

    name: str
    title: str
    tree: str
    read: trees.Reader
    recognise: Recognise = always


MVTEC_TREE = "CLASS/test/good, CLASS/test/DEFECT, CLASS/ground_truth/DEFECT"
MASKED_TREE = "images/, masks/"
YES_NO_TREE = "yes/, no/"
colon = trees.image_mask_tree([("images", "masks", "test")], "colon")
clinicdb = trees.image_mask_tree([(f"{top}Original", f"{top}Ground Truth", "test") for top in ("", "PNG/")], "colon")
tn3k = trees.image_mask_tree(
    [("trainval-image", "trainval-mask", "train"), ("test-image", "test-mask", "test")], "thyroid"
)
isic = trees.image_mask_tree(
    [
        ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth", "train"),
        ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth", "test"),
    ],
    "skin",
)


def brain_tumor_dataset(root: Path) -> trees.Found:
    return trees.yes_no_tree(root / "brain_tumor_dataset")


MVTEC = """bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood
    zipper"""
VISA = "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum"
MPDD = "bracket_black bracket_brown bracket_white connector metal_plate tubes"
DTD = """Woven_001 Woven_127 Woven_104 Stratified_154 Blotchy_099 Woven_068 Woven_125 Marbled_078 Perforated_037
    Mesh_114 Fibrous_183 Matted_069"""
DAGM = " ".join(f"Class{n}" for n in range(1, 11))

# The most specific first: the first row that reads something and recognises it wins. Several rows of one name are
# several trees of one data set.
LAYOUTS = (
    Layout("meta", "", "meta.json", indexes.meta_index),
    Layout("visa", "VisA", "CLASS/Data/, split_csv/1cls.csv", indexes.visa_index),
    Layout("real-iad", "Real-IAD", "realiad_jsons/CLASS.json, realiad_1024/CLASS/", indexes.real_iad_index),
    Layout("dagm", "DAGM 2007", "ClassN/Train/Label, ClassN/Test/Label", trees.dagm_tree),
    Layout("kolektorsdd", "KolektorSDD", "kosNN/PartN.jpg, kosNN/PartN_label.bmp", trees.kolektor_tree),
    Layout("isic", "ISIC 2016", "ISBI2016_ISIC_Part1_Test_Data/, ..._Test_GroundTruth/", isic),
    Layout("tn3k", "TN3K", "test-image/, test-mask/", tn3k),
    Layout("headct", "HeadCT", "labels.csv, head_ct/", indexes.headct_index),
    Layout("clinicdb", "CVC-ClinicDB", "Original/, Ground Truth/", clinicdb),
    Layout("clinicdb", "CVC-ClinicDB", MASKED_TREE, colon, named("clinic|cvc-?612")),
    Layout("colondb", "CVC-ColonDB", MASKED_TREE, colon, named("colon")),
    Layout("kvasir", "Kvasir", MASKED_TREE, colon, named("kvasir")),
    Layout("endo", "Endo", MASKED_TREE, colon, named("endo")),
    Layout("brainmri", "BrainMRI", YES_NO_TREE, trees.yes_no_tree, named("brain_tumor_dataset|brain[-_ ]?mri")),
    Layout("brainmri", "BrainMRI", "brain_tumor_dataset/{yes,no}", brain_tumor_dataset),
    Layout("br35h", "Br35H", YES_NO_TREE, trees.yes_no_tree),
    Layout("btad", "BTAD", MVTEC_TREE.replace("good", "ok"), trees.mvtec_tree, says_ok),
    Layout(
        "headct", "HeadCT", MVTEC_TREE, trees.mvtec_tree, named("head[-_ ]?ct")
    ),  # as AdaCLIP's authors pass them on
    Layout("kolektorsdd", "KolektorSDD", MVTEC_TREE, trees.mvtec_tree, named("kolektor|k?sdd")),
    Layout("dagm", "DAGM 2007", MVTEC_TREE, trees.mvtec_tree, of_classes(DAGM)),
    Layout("mpdd", "MPDD", MVTEC_TREE, trees.mvtec_tree, of_classes(MPDD)),
    Layout("dtd-synthetic", "DTD-Synthetic", MVTEC_TREE, trees.mvtec_tree, of_classes(DTD)),
    Layout("visa", "VisA", MVTEC_TREE, trees.mvtec_tree, of_classes(VISA)),
    Layout("mvtec", "MVTec AD", MVTEC_TREE, trees.mvtec_tree, of_classes(MVTEC)),
    Layout("mvtec", "", MVTEC_TREE, trees.mvtec_tree),
    Layout("images-masks", "", MASKED_TREE, trees.image_mask_tree([("images", "masks", "test")])),
    Layout("folder", "", "good/, defective/, perhaps masks/", trees.folder_pair),
    Layout("csv", "", "a CSV with columns image, label, perhaps mask and class", indexes.csv_index),
)
NAMES = tuple(dict.fromkeys(layout.name for layout in LAYOUTS))


def open_dataset(path: Path, layout: str | None = None) -> Dataset:
    """Find the images, labels and masks of a data set.

    No image is read, except KolektorSDD's masks, which are its only labels.

    Args:
        path: its root; one that isn't laid out so and holds one folder only is looked through. An index (meta.json,
            CSV) may be named itself.
        layout: one of `NAMES`; recognised if left out. Where several fit, the most specific wins: an index that
            lists its files before a tree, a data set that is known by its classes before any set of that tree.

    A file that looks like an index and can't be understood is another program's where the rest is recognised; the
    data set's notes then name it.

    Raises:
        UsageError: no such path or layout, a path that is not laid out so, or an index with a mistake.
    """
    if layout is not None and layout not in NAMES:
        raise UsageError(f"a layout is one of {', '.join(NAMES)}; got {layout!r}", option="layout")
    rows = [row for row in LAYOUTS if layout in (None, row.name)]
    unknown: dict[str, indexes.NotOurs] = {}
    try:
        if not path.exists():
            raise UsageError(f"a data set is a folder or an index file; there is none at {printable(path)}")
        root: Path | None = path.resolve() if path.name in ("", "..") else path.absolute()
        while root is not None:
            if dataset := _recognised(root, rows, unknown, sure=layout is not None):
                return replace(dataset, notes=(*dataset.notes, *(f"left aside: {text}" for text in unknown)))
            root = _only_folder(root)
    except OSError as error:
        raise UsageError(f"{printable(error.filename or path)} can't be read: {error.strerror or error}") from error
    if unknown:
        raise next(iter(unknown.values()))
    columns = _columns(path)
    if layout is not None:
        trees_of = " or ".join(row.tree for row in rows)
        raise UsageError(f"{printable(path)} is not laid out as {layout}: expected {trees_of}{columns}")
    raise UsageError(
        f"{printable(path)} is laid out like none of {', '.join(NAMES)}: see docs/guides/data.md for their trees, "
        f"and name one of them to read it as such{columns}",
        option="layout",
    )


def _columns(path: Path) -> str:
    """What a table that is no index has instead of the columns of one."""
    tables = [path] if path.suffix.lower() == ".csv" else sorted(path.glob("*.csv")) if path.is_dir() else []
    found = {table: indexes.read_table(table, {"image", "label"}).columns for table in tables[:3]}
    return "".join(
        f"; the columns of {printable(table.name)} are {printable(', '.join(sorted(columns)))[:200] or 'none'}"
        for table, columns in found.items()
    )


def _recognised(root: Path, rows: list[Layout], unknown: dict[str, indexes.NotOurs], sure: bool) -> Dataset | None:
    """The first row that recognises the root; where the layout is sure, at least the last that reads anything."""
    read: dict[trees.Reader, trees.Found] = {}  # rows share readers, and large trees take time to list
    fallback = None
    for row in rows:
        if row.read not in read:
            try:
                read[row.read] = row.read(root)
            except indexes.NotOurs as error:
                unknown.setdefault(str(error), error)
                read[row.read] = trees.Found()
        found = read[row.read]
        if found.items:
            folder = root if root.is_dir() else root.parent
            left_out = what_was_left_out(found.left_out)
            dataset = Dataset(
                row.title or folder.name,
                row.name,
                folder,
                tuple(found.items),
                tuple(found.strays),
                (*found.notes, left_out) if left_out else tuple(found.notes),
            )
            if row.recognise(root, found.items):
                return dataset
            fallback = dataset
    return fallback if sure else None


def _only_folder(root: Path) -> Path | None:
    """The one folder that a folder holds, perhaps beside files: archives often unpack so."""
    inside = [f for f in root.iterdir() if f.is_dir() and not is_hidden(f.name)] if root.is_dir() else []
    return inside[0] if len(inside) == 1 else None
