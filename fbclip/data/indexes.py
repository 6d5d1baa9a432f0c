"""Readers of data sets that list their files: CSV and JSON, as these and other programs write them.

As in `trees.py` a reader takes the root and returns what it found; no items where there is no such index.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbclip.data.dataset import GOOD, Item
from fbclip.data.trees import Found
from fbclip.errors import UsageError
from fbclip.folders import locate
from fbclip.terminal import printable

LABELS = {
    **dict.fromkeys(("0", "good", "normal", "ok", "io", "i.o.", "pass", "passed", "no", "false"), 0),
    **dict.fromkeys(("1", "defective", "defect", "bad", "anomaly", "anomalous", "abnormal", "yes", "true"), 1),
    **dict.fromkeys(("ko", "ng", "nok", "nio", "n.i.o.", "fail", "failed"), 1),
}
INDEX_BYTES = 256 << 20  # of a table or JSON: more is none
COLUMNS = {"object": "class", "category": "class", "img_path": "image", "mask_path": "mask"}  # other names in use


class NotOurs(UsageError):
    """A file that can't be understood, and may be another program's: no reason to refuse the tree that it lies in."""


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
