"""`fbclip data`: reads a whole data set once and says whether training and evaluation on it would be right."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fbclip.data.dataset import Dataset, Item, file_digest, parallel_map
from fbclip.errors import ImageError
from fbclip.files import write_text
from fbclip.images import more_pages, read_image, union_of_masks
from fbclip.terminal import cell, print_table, track
from fbclip.terminal import say as print_line

SHAPE_TOLERANCE = 0.02  # relative difference of aspect ratios that rounding to whole pixels explains
SHOWN = 3  # files named on screen per finding; the JSON has all

# What can be found, in the order it is told.
IMAGE_FAULTS = {
    "unreadable": "images can't be read",
    "contradictory": "images are labelled good and defective",
    "listed_twice": "images are listed more than once",
}
LEAKS = {
    "train_in_test": "images of the test split are in the train split too",
}
MASK_FAULTS = {
    "mask_missing": "defective images have no mask",
    "mask_unreadable": "masks can't be read",
    "mask_empty": "masks of defective images mark nothing",
    "mask_of_good": "masks of good images mark a defect",
    "mask_misshapen": "masks have other proportions than their image",
    "mask_stray": "masks belong to no image by their names",
}
HARMLESS = {
    "mask_resized": "masks have another size than their image, in its proportions; they are resized",
    "more_pages": "images have more pages or frames, which are not inspected",
}
FINDINGS = IMAGE_FAULTS | LEAKS | MASK_FAULTS | HARMLESS


@dataclass(frozen=True)
class Facts:
    """What reading one item's files showed. Sizes are (height, width); None where there is nothing to measure."""

    size_hw: tuple[int, int] | None
    digests: dict[Path, str]
    findings: dict[str, str]  # finding to detail


@dataclass
class Report:
    """What a data set is and what is wrong with it.

    Attributes:
        name, layout, root: as `Dataset`.
        fingerprint: of `Dataset.fingerprint`.
        counts: class to {"train good", "train defective", "test good", "test defective"} to images.
        smallest_hw, largest_hw: (height, width) of the readable images with the fewest and the most pixels.
        masks: defective images with a mask.
        findings: of FINDINGS, to the files concerned, relative to the root, with details.
        trainable, image_level, pixel_level: "yes", "yes, but not for" some classes and why, or why not.
        notes: of `Dataset.notes`.
    """

    name: str
    layout: str
    root: str
    fingerprint: str = ""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    smallest_hw: tuple[int, int] | None = None
    largest_hw: tuple[int, int] | None = None
    masks: int = 0
    findings: dict[str, list[str]] = field(default_factory=dict)
    trainable: str = ""
    image_level: str = ""
    pixel_level: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether a use would give wrong figures, or none is possible; not that a data set lacks masks by nature."""
        uses = (self.trainable, self.image_level, self.pixel_level)
        return not any(use.startswith("yes") for use in uses) or any(
            finding not in HARMLESS for finding in self.findings
        )


def inspect(dataset: Dataset, console: Console | None = None) -> Report:
    """Read every file of a data set, in parallel, and report. A file that can't be read is a finding, no exception.

    Args:
        console: told of the progress.
    """
    report = Report(dataset.name, dataset.layout, str(dataset.root), counts=_counts(dataset.items))
    report.notes = list(dataset.notes)
    report.masks = sum(item.label == 1 and item.mask is not None for item in dataset.items)
    facts = parallel_map(look_at, dataset.items)
    digests: dict[Path, str] = {}
    if console:
        facts = track(facts, "reading", console, len(dataset.items))
    for item, seen in zip(dataset.items, facts, strict=True):
        digests.update(seen.digests)
        if seen.size_hw is not None:
            sizes = [size for size in (seen.size_hw, report.smallest_hw, report.largest_hw) if size is not None]
            report.smallest_hw, report.largest_hw = min(sizes, key=_pixels), max(sizes, key=_pixels)
        for finding, detail in seen.findings.items():
            report.findings.setdefault(finding, []).append(f"{dataset.relative(item.image)}{detail}")
    if dataset.strays:
        report.findings["mask_stray"] = [dataset.relative(mask) for mask in dataset.strays]
    elif not report.masks:
        report.findings.pop("mask_missing", None)  # by nature
    _find_duplicates(dataset, digests, report)
    report.findings = {finding: report.findings[finding] for finding in FINDINGS if finding in report.findings}
    report.fingerprint = dataset.fingerprint(digests)
    _judge(dataset, report)
    return report


def look_at(item: Item) -> Facts:
    """Read an item's image and masks."""
    findings: dict[str, str] = {}
    digests = {file: file_digest(file) for file in (item.image, *item.masks)}
    size: tuple[int, int] | None = None
    try:
        height, width = read_image(item.image).shape[:2]
        size = (height, width)
    except ImageError as error:
        findings["unreadable"] = f": {error}"
    else:
        if more := more_pages(item.image):
            findings["more_pages"] = f": {more} more"
    if item.mask is None or not os.path.lexists(item.mask):
        if item.label:
            findings["mask_missing"] = ""
        return Facts(size, digests, findings)
    try:
        mask = union_of_masks(item.masks)
    except ImageError as error:
        findings["mask_unreadable"] = f": {error}"
        return Facts(size, digests, findings)
    if mask.any() != bool(item.label):
        findings["mask_empty" if item.label else "mask_of_good"] = ""
    if size is not None and mask.shape != size:
        ratio = (mask.shape[0] * size[1]) / (mask.shape[1] * size[0])
        alike = abs(ratio - 1) <= SHAPE_TOLERANCE
        findings["mask_resized" if alike else "mask_misshapen"] = f": mask {_size(mask.shape)}, image {_size(size)}"
    return Facts(size, digests, findings)


def _counts(items: Iterable[Item]) -> dict[str, dict[str, int]]:
    columns = [f"{split} {label}" for split in ("train", "test") for label in ("good", "defective")]
    counted = Counter((item.class_name, f"{item.split} {'defective' if item.label else 'good'}") for item in items)
    classes = sorted({class_name for class_name, _ in counted})
    return {name: {column: counted[name, column] for column in columns} for name in classes}


def _find_duplicates(dataset: Dataset, digests: dict[Path, str], report: Report) -> None:
    """Images with the same bytes: across the splits, or with both labels. Files that an index lists again."""
    first: dict[str, Item] = {}
    listed: set[tuple[str, str]] = set()
    trained = {digests[item.image]: item for item in dataset.items if item.split == "train"}
    for item in dataset.items:
        once = (item.split, os.path.normpath(item.image))
        if once in listed:
            report.findings.setdefault("listed_twice", []).append(dataset.relative(item.image))
        listed.add(once)
        digest = digests[item.image]
        if digest == "missing":
            continue
        twins = {"contradictory": first.setdefault(digest, item), "train_in_test": trained.get(digest, item)}
        for finding, twin in twins.items():
            if twin is not item and (item.label != twin.label if finding == "contradictory" else item.split == "test"):
                line = f"{dataset.relative(item.image)} is {dataset.relative(twin.image)}"
                report.findings.setdefault(finding, []).append(line)


def _judge(dataset: Dataset, report: Report) -> None:
    """Fill in what the test split is good for: it is what both training and evaluation take, evaluation by class."""
    test = dataset.select("test").items
    labels = {name: {item.label for item in test if item.class_name == name} for name in dataset.classes}
    marked = {item.class_name for item in test if item.label and item.mask}
    lacking = [_lacking(set().union(*labels.values())), *map(_lacking, labels.values())]
    no_masks = "no defective image has a mask"
    needs_both = f"no: there are no {lacking[0]} images in the test split" if lacking[0] else ""
    needs_masks = "" if marked else f"no: {no_masks}"

    def verdict(reason: str, faults: dict[str, str], unfit: dict[str, str] | None = None) -> str:
        found = [text for name, text in faults.items() if name in report.findings]
        if reason or found:
            return reason or f"wrong: {'; '.join(found)}"
        if not unfit:
            return "yes"
        reasons = "; ".join(f"{name} ({why})" for name, why in unfit.items())
        return f"no: {reasons}" if len(unfit) == len(labels) else f"yes, but not for {reasons}"

    unfit = {
        name: f"no {what} images in the test split" for name, what in zip(labels, lacking[1:], strict=True) if what
    }
    unmarked = {name: no_masks for name in labels if name not in marked}
    report.trainable = verdict(needs_both or needs_masks, IMAGE_FAULTS | MASK_FAULTS)
    report.image_level = verdict(needs_both, IMAGE_FAULTS | LEAKS, unfit)
    report.pixel_level = verdict(needs_masks, IMAGE_FAULTS | LEAKS | MASK_FAULTS, unmarked)


def _lacking(labels: set[int]) -> str:
    return " and ".join(name for label, name in enumerate(("good", "defective")) if label not in labels)


def print_report(report: Report, console: Console) -> None:
    """A table of the classes, what was found with a few of the files, and what the data set is good for."""

    def say(line: str, style: str = "") -> None:
        print_line(console, line, style)

    say(f"{report.name} (layout {report.layout}) in {report.root}")
    table = Table(box=None, pad_edge=False)
    columns = list(next(iter(report.counts.values())))
    table.add_column("class", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in report.counts.items():
        table.add_row(cell(name), *(str(row[column]) for column in columns))
    if len(report.counts) > 1:
        table.add_section()
        totals = (str(sum(row[column] for row in report.counts.values())) for column in columns)
        table.add_row(f"{len(report.counts)} classes", *totals)
    print_table(console, table)
    if report.smallest_hw and report.largest_hw:
        sizes = dict.fromkeys(_size(size) for size in (report.smallest_hw, report.largest_hw))
        say(f"images {' to '.join(sizes)}; {report.masks} masks")
    for note in report.notes:
        say(note, "yellow")
    for finding, files in report.findings.items():
        say(f"{FINDINGS[finding]}: {len(files)}", "yellow" if finding in HARMLESS else "red")
        more = [f"… and {len(files) - SHOWN} more"] if len(files) > SHOWN else []
        for line in files[:SHOWN] + more:
            say(f"  {line}")
    uses = (
        ("training", report.trainable),
        ("image-level evaluation", report.image_level),
        ("pixel-level evaluation", report.pixel_level),
    )
    for use, verdict in uses:
        style = "green" if verdict == "yes" else "yellow" if verdict.startswith("yes") else ""
        say(f"{use}: {verdict}", "red" if verdict.startswith("wrong") else style)
    say(f"fingerprint {report.fingerprint[:16]}")


def write_report(report: Report, target: str) -> None:
    """The report as JSON to a file, which takes its name when it is whole, or to standard output for "-"."""
    write_text(json.dumps({**asdict(report), "wrong": report.wrong}, indent=1, allow_nan=False) + "\n", target)


def _pixels(size_hw: tuple[int, ...]) -> int:
    return size_hw[0] * size_hw[1]


def _size(size_hw: tuple[int, ...]) -> str:
    return f"{size_hw[1]}×{size_hw[0]}"
