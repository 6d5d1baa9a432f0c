"""Readers of the trees and indexes that data sets are published in.

A reader takes the root and returns its items in a fixed order, or an empty list where the tree is not laid out its
way. Directories are listed and indexes parsed; of image files only KolektorSDD's masks are opened. Which data set
uses which reader is a table in `layouts.py`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fbclip.data.dataset import GOOD, Item, parallel_map
from fbclip.errors import ImageError, UsageError
from fbclip.reading import SUFFIXES, read_mask

Reader = Callable[[Path], list[Item]]

GOOD_KINDS = ("good", "ok")  # folders of the MVTec tree; BTAD says ok
LABELS = {
    **dict.fromkeys(("0", "good", "normal", "ok", "no", "false"), 0),
    **dict.fromkeys(
        ("1", "defective", "defect", "bad", "anomaly", "anomalous", "abnormal", "ko", "ng", "yes", "true"), 1
    ),
}
COLUMNS = {"object": "class", "category": "class", "img_path": "image", "mask_path": "mask"}  # other names in use


# --- trees ---------------------------------------------------------------------------------------------------------


def mvtec_tree(root: Path) -> list[Item]:
    """CLASS/{train,test}/KIND/IMAGE and CLASS/ground_truth/KIND/MASK; the root holds classes or is one."""
    items = []
    for folder in _folders(root, lambda f: (f / "test").is_dir()):
        kinds = {kind.name.lower() for kind in _subfolders(folder / "test")}
        if not kinds.intersection(GOOD_KINDS) and not (folder / "ground_truth").is_dir():
            return []  # test/images beside test/masks, for instance
        for split in ("train", "test"):
            for kind in _subfolders(folder / split):
                good = kind.name.lower() in GOOD_KINDS
                masks = {} if good else _masks(folder / "ground_truth" / kind.name)
                items += _items(kind, int(not good), masks, folder.name, kind.name, split)
    return items


def dagm_tree(root: Path) -> list[Item]:
    """ClassN/{Train,Test}/IMAGE.PNG and ClassN/{Train,Test}/Label/IMAGE_label.PNG for the defective ones."""
    items = []
    for folder in _folders(root, lambda f: (f / "Test" / "Label").is_dir(), deeper="Class*/Class*"):
        for split in ("Train", "Test"):
            masks = _masks(folder / split / "Label")
            for image in _images(folder / split, "*"):
                mask = masks.get(_key(image, folder / split))
                label, defect = (0, GOOD) if mask is None else (1, "defect")
                items.append(Item(image, label, mask, folder.name, defect, split.lower()))
    return items


def kolektor_tree(root: Path) -> list[Item]:
    """kosNN/PartN.jpg with kosNN/PartN_label.bmp, which is black where the part is good: the label is in the mask.

    There is no published split into train and test (the authors cross-validate): everything is test.
    """
    masks = [(image, image.with_name(f"{image.stem}_label.bmp")) for image in sorted(root.glob("kos*/*.jpg"))]
    if not any(mask.is_file() for _, mask in masks):
        return []

    def marked(mask: Path) -> bool:
        try:
            return bool(read_mask(mask).any())
        except ImageError:
            return True  # kept with its mask, so that the damage is reported where it is read

    found = parallel_map(marked, (mask for _, mask in masks))
    return [
        Item(image, int(defective), mask if defective else None, "commutator", "defect" if defective else GOOD, "test")
        for (image, mask), defective in zip(masks, found, strict=True)
    ]


def image_mask_tree(folders: Iterable[tuple[str, str, str]], class_name: str = "") -> Reader:
    """A reader of folders of images beside folders of masks, where every image is defective.

    Args:
        folders: images, masks and split of each pair.
        class_name: of all images; the root's name if left out.
    """

    def read(root: Path) -> list[Item]:
        items = []
        for images, masks, split in folders:
            if (root / images).is_dir() and (root / masks).is_dir():
                items += _items(root / images, 1, _masks(root / masks), class_name or root.name, "defect", split)
        return items

    return read


def yes_no_tree(root: Path) -> list[Item]:
    """yes/IMAGE has a tumour, no/IMAGE has none; no masks, no split."""
    if not ((root / "yes").is_dir() and (root / "no").is_dir()):
        return []
    return [
        item
        for name, label in (("no", 0), ("yes", 1))
        for item in _items(root / name, label, {}, "brain", "tumor", "test")
    ]


def folder_pair(root: Path) -> list[Item]:
    """good/IMAGE and defective/[KIND/]IMAGE, with masks of the same names below masks/ or ground_truth/, if any.

    The root holds these or classes that do.
    """
    items = []
    for folder in _folders(root, lambda f: (f / GOOD).is_dir() and (f / "defective").is_dir()):
        masks = {**_masks(folder / "ground_truth"), **_masks(folder / "masks")}
        items += _items(folder / GOOD, 0, {}, folder.name, GOOD, "test")
        items += _items(folder / "defective", 1, masks, folder.name, "", "test")
    return items


# --- indexes -------------------------------------------------------------------------------------------------------


def meta_index(root: Path) -> list[Item]:
    """meta.json of AnomalyCLIP and its relatives: {split: {class: [{img_path, mask_path, specie_name, anomaly}]}}.

    Paths are relative to the index; `mask_path` may be empty.
    """
    path = root if root.suffix == ".json" else root / "meta.json"
    content = _json(path)
    if not all(isinstance(classes, dict) for classes in content.values()) or not all(
        isinstance(records, list) for classes in content.values() for records in classes.values()
    ):
        return []  # another program's meta.json
    items = []
    for name, classes in content.items():
        split = _split(name, path)
        for class_name, records in classes.items():
            for record in records:
                if not isinstance(record, dict) or not {"img_path", "anomaly"} <= record.keys():
                    raise UsageError(
                        f"an entry of {path} has img_path and anomaly; {split}/{class_name} holds {record}"
                    )
                image, label = path.parent / record["img_path"], _label(record["anomaly"], path)
                mask = path.parent / record["mask_path"] if record.get("mask_path") else None
                kind = (record.get("specie_name") or "defect") if label else GOOD
                items.append(Item(image, label, mask, class_name, kind, split))
    return items


def csv_index(root: Path) -> list[Item]:
    """A CSV with the columns image and label, and perhaps mask, class, defect and split; paths relative to the file.

    The root is the file, or a folder with one such file in it.
    """
    if root.suffix.lower() == ".csv":
        return _csv_items(root, root.parent)
    tables = [items for path in sorted(root.glob("*.csv")) if (items := _csv_items(path, root))]
    if len(tables) > 1:
        raise UsageError(f"{root} holds {len(tables)} CSV files with columns image and label: pass one of them")
    return tables[0] if tables else []


def visa_index(root: Path) -> list[Item]:
    """VisA as published: CLASS/Data/... with its one-class split in split_csv/1cls.csv."""
    return _csv_items(root / "split_csv" / "1cls.csv", root)


def headct_index(root: Path) -> list[Item]:
    """labels.csv (id, hemorrhage) with the images in head_ct/NNN.png, in an archive head_ct/head_ct/NNN.png."""
    folder = next((f for f in (root / "head_ct" / "head_ct", root / "head_ct") if f.is_dir()), root)
    rows = _csv_rows(root / "labels.csv")
    if not rows or not {"id", "hemorrhage"} <= rows[0].keys():
        return []
    return [
        Item(folder / f"{row['id']:0>3}.png", label, None, "brain", "hemorrhage" if label else GOOD, "test")
        for row in rows
        for label in [_label(row["hemorrhage"], root / "labels.csv")]
    ]


def real_iad_index(root: Path) -> list[Item]:
    """Real-IAD: one JSON per class in realiad_jsons/, images and masks below realiad_1024/ (or 512, 256, raw).

    The root may also be one of the other folders of splits, like realiad_jsons/realiad_jsons_sv. As in the authors'
    program, a view in which the defect can't be seen (no mask) is good.
    """
    above = root / "realiad_jsons"
    sources = [above / "realiad_jsons", above] if above.is_dir() else [root]
    splits: dict[Path, dict[str, Any]] = {}
    if above.is_dir() or root.name.startswith("realiad_jsons"):
        source = next((source for source in sources if any(source.glob("*.json"))), root)
        splits = {path: _json(path) for path in sorted(source.glob("*.json"))}
    names = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")
    places = [place / name for place in (root, *root.parents[:2]) for name in names]
    base = next((place for place in places if place.is_dir()), root)
    items = []
    for path, content in splits.items():
        if not {"meta", "train", "test"} <= content.keys():
            raise UsageError(f"a split of Real-IAD has meta, train and test; {path} has {', '.join(content)}")
        folder = base / content["meta"]["prefix"]
        normal = content["meta"]["normal_class"]
        for split in ("train", "test"):
            for record in content[split]:
                kind, mask = record["anomaly_class"], record.get("mask_path")
                good = kind == normal or not mask
                items.append(
                    Item(
                        folder / record["image_path"],
                        int(not good),
                        None if good else folder / mask,
                        record.get("category", path.stem),
                        GOOD if good else kind,
                        split,
                    )
                )
    return items


# --- what they share -----------------------------------------------------------------------------------------------


def _folders(root: Path, fits: Callable[[Path], bool], deeper: str = "") -> list[Path]:
    """The root if it fits, else those of its subfolders that do, else those that match the pattern `deeper`."""
    if fits(root):
        return [root]
    found = [f for f in _subfolders(root) if fits(f)]
    return found or [f for f in sorted(root.glob(deeper) if deeper else ()) if fits(f)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")) if folder.is_dir() else []


def _images(folder: Path, pattern: str = "**/*") -> list[Path]:
    """Image files by suffix, sorted; hidden ones (like macOS's ._0.png) are no images."""
    files = (f for f in folder.glob(pattern) if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    return sorted(f for f in files if f.is_file())


def _items(folder: Path, label: int, masks: Mapping[str, Path], class_name: str, defect: str, split: str) -> list[Item]:
    """Every image below a folder; `defect` "" takes the name of the subfolder it is in."""
    items = []
    for image in _images(folder):
        kind = defect or (image.parent.name if image.parent != folder else "defect")
        items.append(Item(image, label, masks.get(_key(image, folder)), class_name, kind if label else GOOD, split))
    return items


def _key(image: Path, folder: Path) -> str:
    """What an image and its mask have in common: the path below their folders without suffix, in lower case."""
    return image.relative_to(folder).with_suffix("").as_posix().lower()


def _masks(folder: Path) -> dict[str, Path]:
    """Masks below a folder by `_key`; they may end in _mask, _label, _segmentation or _gt. Exact names come first."""
    exact = {_key(mask, folder): mask for mask in _images(folder)}
    return {re.sub(r"_(mask|label|segmentation|gt)$", "", key): mask for key, mask in exact.items()} | exact


def _split(text: str, where: str | Path) -> str:
    if text.lower() not in ("train", "test"):
        raise UsageError(f"a split is train or test; {where} has {text!r}")
    return text.lower()


def _label(text: object, where: str | Path) -> int:
    try:
        return LABELS[str(text).lower()]
    except KeyError:
        raise UsageError(f"a label is one of {', '.join(LABELS)}; {where} has {text!r}") from None


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file or it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows by lower-case column name, without surrounding blanks; none where there is no such file."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [
                {key.strip().lower(): (value or "").strip() for key, value in row.items() if key is not None}
                for row in csv.DictReader(file)
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is no CSV in UTF-8: {error}") from error


def _csv_items(path: Path, base: Path) -> list[Item]:
    rows = [{COLUMNS.get(key, key): value for key, value in row.items()} for row in _csv_rows(path)]
    if not rows or not {"image", "label"} <= rows[0].keys():
        return []
    items = []
    for number, row in enumerate(rows, start=2):
        label = _label(row["label"], f"line {number} of {path}")
        mask = base / row["mask"] if row.get("mask") else None
        kind = (row.get("defect") or "defect") if label else GOOD
        split = _split(row.get("split") or "test", f"line {number} of {path}")
        items.append(Item(base / row["image"], label, mask, row.get("class") or base.name, kind, split))
    return items
