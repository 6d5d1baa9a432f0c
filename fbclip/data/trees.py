"""Readers of the trees and indexes that data sets are published in.

A reader takes the root and returns what it found, its items in a fixed order; no items where the tree is not laid out
its way. Directories are listed and indexes parsed; of image files only KolektorSDD's masks are opened. Which data set
uses which reader is a table in `layouts.py`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from fbclip.data.dataset import GOOD, Item, parallel_map
from fbclip.errors import ImageError, UsageError, printable
from fbclip.folders import images_below, is_hidden, locate, plain
from fbclip.reading import SUFFIXES, read_mask

GOOD_KINDS = ("good", "ok", "normal")  # folders of the MVTec tree; BTAD says ok
LABELS = {
    **dict.fromkeys(("0", "good", "normal", "ok", "io", "i.o.", "pass", "passed", "no", "false"), 0),
    **dict.fromkeys(("1", "defective", "defect", "bad", "anomaly", "anomalous", "abnormal", "yes", "true"), 1),
    **dict.fromkeys(("ko", "ng", "nok", "nio", "n.i.o.", "fail", "failed"), 1),
}
INDEX_BYTES = 256 << 20  # of a table or JSON: more is none
COLUMNS = {"object": "class", "category": "class", "img_path": "image", "mask_path": "mask"}  # other names in use


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

    def named(self, folder: Path, prefix: str = "") -> list[tuple[Path, str]]:
        """The images below a folder with their names: the path below it without suffix, as `plain` has it."""
        return [(file, name_of(file, folder, prefix)) for file in self.images(folder)]


Reader = Callable[[Path], Found]


class NotOurs(UsageError):
    """A file that can't be understood, and may be another program's: no reason to refuse the tree that it lies in."""


# --- trees ---------------------------------------------------------------------------------------------------------


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
        masks = _pair(found, bad, found.named(folder / "ground_truth"), good)
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
            masks = _pair(found, images, found.named(folder / split / "Label"))
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
                pairs = _pair(found, named, found.named(root / masks))
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
        masks = _pair(found, bad, found.named(folder / "masks") + found.named(folder / "ground_truth"), good)
        found.items += [_item(image, 0, {}, folder.name, GOOD, "test") for image, _ in good]
        for image, _ in bad:
            kind = image.parent.name if image.parent != folder / "defective" else "defect"
            found.items.append(_item(image, 1, masks, folder.name, kind, "test"))
    return found


# --- indexes -------------------------------------------------------------------------------------------------------


def meta_index(root: Path) -> Found:
    """meta.json of AnomalyCLIP and its relatives: {split: {class: [{img_path, mask_path, specie_name, anomaly}]}}.

    Paths are relative to the index; `mask_path` may be empty, null or NaN.
    """
    path = root if root.suffix == ".json" else root / "meta.json"
    content = _json(path)
    if not all(isinstance(classes, dict) for classes in content.values()) or not all(
        isinstance(records, list) for classes in content.values() for records in classes.values()
    ):
        return Found()  # another program's meta.json
    found = Found()
    for name, classes in content.items():
        split = _split(name, path, NotOurs)
        for class_name, records in classes.items():
            where = f"{split}/{class_name} of {path}"
            for record in records:
                if not isinstance(record, dict) or not {"img_path", "anomaly"} <= record.keys():
                    ours = isinstance(record, dict) and {"img_path", "anomaly"} & record.keys()
                    raise (UsageError if ours else NotOurs)(
                        f"an entry of {path} has img_path and anomaly; {printable(where)} holds {_short(record)}"
                    )
                label = _label(record["anomaly"], where)
                kind = _text_of(record, "specie_name", where, needed=False) or "defect"
                found.items.append(
                    Item(
                        locate(path.parent, _text_of(record, "img_path", where)),
                        label,
                        _mask_of(path.parent, _text_of(record, "mask_path", where, needed=False)),
                        _name(class_name, where),
                        kind if label else GOOD,
                        split,
                    )
                )
    return found


def csv_index(root: Path) -> Found:
    """A CSV with the columns image and label, and perhaps mask, class, defect and split; paths relative to the file.

    The root is the file, or a folder with one such file in it.
    """
    if root.suffix.lower() == ".csv":
        return _csv_items(root, root.parent)
    found, unknown = [], []
    for path in sorted(root.glob("*.csv")):
        try:
            if (table := _csv_items(path, root)).items:
                found.append(table)
        except NotOurs as error:
            unknown.append(error)
    if len(found) > 1:
        raise UsageError(f"{root} holds {len(found)} CSV files with columns image and label: pass one of them")
    if unknown and not found:
        raise unknown[0]
    return found[0] if found else Found()


def visa_index(root: Path) -> Found:
    """VisA as published: CLASS/Data/... with its one-class split in split_csv/1cls.csv."""
    return _csv_items(root / "split_csv" / "1cls.csv", root)


def headct_index(root: Path) -> Found:
    """labels.csv (id, hemorrhage) with the images in head_ct/NNN.png, in an archive head_ct/head_ct/NNN.png."""
    folder = next((f for f in (root / "head_ct" / "head_ct", root / "head_ct") if f.is_dir()), root)
    table = read_table(root / "labels.csv", {"id", "hemorrhage"})
    found = Found(notes=list(table.notes))
    if {"id", "hemorrhage"} <= table.columns:
        for line, row in table.rows:
            label = _label(row["hemorrhage"], f"line {line} of {root / 'labels.csv'}")
            image = locate(folder, f"{row['id']:0>3}.png")
            found.items.append(Item(image, label, None, "brain", "hemorrhage" if label else GOOD, "test"))
    return found


def real_iad_index(root: Path) -> Found:
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
    found = Found()
    for path, content in splits.items():
        meta = content.get("meta")
        if not {"meta", "train", "test"} <= content.keys() or not isinstance(meta, dict):
            raise UsageError(
                f"a split of Real-IAD has meta, train and test; {path} has {_short(', '.join(content)) or 'none'}"
            )
        prefix, normal = _text_of(meta, "prefix", f"meta of {path}"), _text_of(meta, "normal_class", f"meta of {path}")
        for split in ("train", "test"):
            where = f"{split} of {path}"
            if not isinstance(content[split], list):
                raise UsageError(f"{where} is a list of images; got {_short(content[split])}")
            for record in content[split]:
                if not isinstance(record, dict):
                    raise UsageError(f"an entry of {where} has image_path and anomaly_class; got {_short(record)}")
                image = _text_of(record, "image_path", where)
                kind = _text_of(record, "anomaly_class", where)
                mask = _text_of(record, "mask_path", where, needed=False)
                good = kind == normal or not mask
                found.items.append(
                    Item(
                        locate(base, f"{prefix.rstrip('/')}/{image}"),
                        int(not good),
                        None if good else locate(base, f"{prefix.rstrip('/')}/{mask}"),
                        _text_of(record, "category", where, needed=False) or path.stem,
                        GOOD if good else kind,
                        split,
                    )
                )
    return found


# --- folders and names ---------------------------------------------------------------------------------------------


def _folders(root: Path, fits: Callable[[Path], bool], deeper: str = "") -> list[Path]:
    """The root if it fits, else those of its subfolders that do, else those that match the pattern `deeper`."""
    if fits(root):
        return [root]
    found = [f for f in _subfolders(root) if fits(f)]
    return found or [f for f in sorted(root.glob(deeper) if deeper else ()) if fits(f)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not is_hidden(f.name)) if folder.is_dir() else []


def name_of(image: Path, folder: Path, prefix: str = "") -> str:
    """What an image and its mask have in common: the path below their folders without suffix, each part `plain`."""
    parts = [*image.relative_to(folder).parent.parts, image.stem]
    return "/".join([prefix] * bool(prefix) + [plain(part) for part in parts])


def _item(image: Path, label: int, masks: dict[Path, list[Path]], class_name: str, defect: str, split: str) -> Item:
    mine = masks.get(image, []) if label else []
    kind = defect if label else GOOD
    return Item(image, label, mine[0] if mine else None, class_name, kind, split, tuple(mine[1:]))


_WORD = "(?:mask|label|segmentation|seg|gt)"
_BEHIND = re.compile(rf"(?P<image>.+?)[-_ .]{_WORD}(?P<number>[-_ .]?\d+)?")  # several masks of an image are numbered
_BEFORE = re.compile(rf"^{_WORD}[-_ .](?=.)")


def _pair(
    found: Found, images: list[tuple[Path, str]], masks: list[tuple[Path, str]], others: Sequence[tuple[Path, str]] = ()
) -> dict[Path, list[Path]]:
    """Which masks belong to which image by their names; those that belong to none become strays.

    In this order: the image's name; with a word behind it (0_mask, and 0_mask_1, 0_mask_2, which are two masks) or
    with its suffix (0.png.png); with a word before it (mask_0); a folder that is called like the image (MVTec LOCO).
    At last a name without a folder, where it is of one image and of one mask only: masks/1 of defective/scratch/1.

    Args:
        images: defective ones with their `name_of`.
        masks: with their `name_of`.
        others: images without defects. A mask that belongs to one of them is no stray.
    """
    ranks: list[defaultdict[str, list[tuple[Path, bool]]]] = [defaultdict(list) for _ in range(4)]
    alone: defaultdict[str, set[Path]] = defaultdict(set)
    for mask, name in masks:
        above, _, stem = name.rpartition("/")
        behind = _BEHIND.fullmatch(stem)
        image = behind["image"] if behind else stem
        for rank, meant in enumerate((stem, image, _BEFORE.sub("", image))):
            meant = PurePath(meant).stem if rank and PurePath(meant).suffix in SUFFIXES else meant
            ranks[rank][f"{above}/{meant}".lstrip("/")].append((mask, rank > 0 and bool(behind and behind["number"])))
            alone[meant].add(mask)
        ranks[3][above].append((mask, True))
    above_of = {mask: name.rpartition("/")[0] for mask, name in masks}
    how_many = Counter(name.rpartition("/")[2] for _, name in (*images, *others))

    pairs: dict[Path, list[Path]] = {}
    for image_file, name in images:
        candidates = next((rank[name] for rank in ranks if name in rank), [])
        candidates = sorted(candidates, key=lambda one: image_file.stem not in one[0].stem)  # A.png before a.png
        one, several = ([mask for mask, counts in candidates if counts is wanted] for wanted in (False, True))
        if one or several:
            pairs[image_file] = one[:1] + several
    taken = {mask for mine in pairs.values() for mask in mine}
    for image_file, name in images:
        above, _, stem = name.rpartition("/")
        free = [mask for mask in alone.get(stem, ()) if mask not in taken and not (above and above_of[mask])]
        if image_file not in pairs and len(free) == 1 and how_many[stem] == 1:
            pairs[image_file] = free
            taken.add(free[0])
    missing = {name.rpartition("/")[2] for image_file, name in images if image_file not in pairs}
    for _, name in others:
        if name.rpartition("/")[2] not in missing:
            taken.update(mask for rank in ranks for mask, _ in rank.get(name, ()))
    found.strays += [mask for mask, _ in masks if mask not in taken]
    return pairs


# --- tables and JSON -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A CSV: its columns by the names that are used here, and the number of each line with its values, "" for none."""

    columns: frozenset[str] = frozenset()
    rows: tuple[tuple[int, dict[str, str]], ...] = ()
    notes: tuple[str, ...] = ()


def read_table(path: Path, needed: set[str]) -> Table:
    """A CSV with commas, semicolons or tabs: with what gives the needed columns, else the most. Empty rows are skipped.

    Raises:
        NotOurs: no text, or no CSV.
    """
    if not path.is_file():
        return Table()
    text, notes = _read_text(path)
    said = re.match(r"sep=([,;\t|])\s*?\n", text, re.IGNORECASE)  # Excel's own first line

    def rows(delimiter: str) -> Iterable[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        for row in reader:
            if any(map(str.strip, row)) and not (said and reader.line_num == 1):
                yield reader.line_num, [cell.strip() for cell in row]

    try:
        headers = {}
        for delimiter in said[1] if said else ",;\t":
            _, names = next(iter(rows(delimiter)), (0, []))
            headers[delimiter] = [COLUMNS.get(name.lower(), name.lower()) for name in names]
        delimiter = max(headers, key=lambda d: (needed <= set(headers[d]), len(headers[d])))
        header = headers[delimiter]
        content = []
        if needed <= set(header):
            for line, row in list(rows(delimiter))[1:]:
                values: dict[str, str] = dict.fromkeys(header, "")
                values.update(reversed(list(zip(header, row, strict=False))))  # of columns of one name the first
                content.append((line, values))
    except csv.Error as error:
        raise NotOurs(f"{path} is no CSV: {error}") from error
    return Table(frozenset(header), tuple(content), notes)


def _csv_items(path: Path, base: Path) -> Found:
    table = read_table(path, {"image", "label"})
    found = Found(notes=list(table.notes))
    for line, row in table.rows:
        where = f"line {line} of {path}"
        if not row["image"]:
            raise UsageError(f"an image is a file's path; {where} has none")
        label = _label(row["label"], where)
        kind = (row.get("defect") or "defect") if label else GOOD
        split = _split(row.get("split") or "test", where)
        mask = _mask_of(base, row.get("mask", ""))
        found.items.append(Item(locate(base, row["image"]), label, mask, row.get("class") or base.name, kind, split))
    return found


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file or it holds something else.

    Raises:
        NotOurs: it is no JSON.
    """
    if not path.is_file():
        return {}
    text, _ = _read_text(path)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise NotOurs(f"{path} is no JSON of ours: its brackets are nested too deep") from error
    except ValueError as error:
        raise NotOurs(f"{path} is no JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _read_text(path: Path) -> tuple[str, tuple[str, ...]]:
    """A file's text, and a note where its encoding had to be assumed.

    UTF-8, UTF-16 by its mark, otherwise Windows-1252, as Excel writes where it isn't told to write Unicode.
    """
    try:
        if path.stat().st_size > INDEX_BYTES:
            raise NotOurs(f"{path} is too long for an index: it has more than {INDEX_BYTES >> 20} MB")
        data = path.read_bytes()
    except OSError as error:
        raise NotOurs(f"{path} can't be read: {error.strerror or error}") from error
    notes: tuple[str, ...] = ()
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
        notes = (f"{printable(path.name)} is not in UTF-8: it was read as Windows-1252",)
    if "\0" in text:
        raise NotOurs(f"{path} is no text: it holds zero bytes")
    return text, notes


def _text_of(record: dict[str, Any], key: str, where: str, needed: bool = True) -> str:
    """A text of a JSON record; "" where it isn't needed and missing, null, or NaN, which pandas writes for nothing."""
    value = record.get(key)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        if needed:
            raise UsageError(f"an entry of {where} has a text as {key}; got {_short(record)}")
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{key} is a text; an entry of {where} has {_short(value)}")
    return _name(value, where)


def _name(text: str, where: str) -> str:
    """A text that can be part of a file's name."""
    if "\0" in text or any("\ud800" <= c <= "\udc7f" or "\udd00" <= c <= "\udfff" for c in text):
        raise UsageError(f"a name is text that a file can have; {where} has {_short(text)}")
    return text


def _mask_of(base: Path, text: str) -> Path | None:
    return locate(base, text) if text else None


def _split(text: str, where: str | Path, error: type[UsageError] = UsageError) -> str:
    if text.lower() not in ("train", "test"):
        raise error(f"a split is train or test; {where} has {_short(text)}")
    return text.lower()


def _label(value: object, where: str | Path) -> int:
    text = str(value).strip().lower()
    try:
        return LABELS[{"0.0": "0", "1.0": "1"}.get(text, text)]
    except KeyError:
        raise UsageError(f"a label is one of {', '.join(LABELS)}; {where} has {_short(value)}") from None


def _short(value: object) -> str:
    """What an index holds, for a message."""
    text = printable(value if isinstance(value, str) else repr(value))
    return f"'{text[:200]}…'" if len(text) > 200 else f"'{text}'"
