"""An evaluation on screen and as JSON, CSV, Markdown and LaTeX; the HTML report has its own file."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fbclip
from fbclip.data.dataset import Dataset, file_digest, parallel_map
from fbclip.data.holdout import Seen
from fbclip.files import write_text
from fbclip.runtime.evaluation.evaluate import VALUES, ClassResult, DataResult, Draw, Evaluation, Spread
from fbclip.terminal import cell, print_table, printable, say, warn

HEADINGS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "aupro_0.3": "AUPRO",
    "aupro_0.05": "AUPRO 5 %",
}
UNDEFINED = "–"
Row = tuple[str, str, int, int, dict[str, Spread]]  # data set, class, images, defective, values


def stamp(evaluation: Evaluation) -> dict[str, Any]:
    """What the figures must be read with: date, model and its hash, data and fingerprint, preprocessing, versions."""
    subject = evaluation.subject
    data = [_describe(result.data, subject.seen) for result in evaluation.results]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": evaluation.complete,
        "model": dict(subject.description),
        "threshold": subject.threshold,
        "threshold_from": subject.threshold_from,
        "data": data,
        "warnings": [line for entry in data for line in _warnings(entry, subject.seen)],
        "preprocessing": {
            "image_size": subject.image_size,
            "resize": "bicubic, aspect ratio not kept; masks bilinear, binarised at 0.5",
            "mean": list(subject.mean),
            "std": list(subject.std),
        },
        "versions": {
            "fbclip": fbclip.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "pillow")},
            subject.package: import_module(subject.package).__version__,  # TensorRT is not always a Python package
        },
    }


def _describe(test: Dataset, seen: Seen | None) -> dict[str, Any]:
    """A data set for the stamp; how many of its images the model has seen is null where that is not recorded."""
    images = [item.image for item in test.items]
    digests = dict(zip(images, parallel_map(file_digest, images), strict=True))
    trained, chosen_by = (None, None) if seen is None else seen.count(digests[image] for image in images)
    return {
        "name": test.name,
        "layout": test.layout,
        "root": str(test.root),
        "images": len(images),
        "fingerprint": test.fingerprint(digests),
        "trained_on": trained,
        "validated_on": chosen_by,
    }


def _warnings(entry: Mapping[str, Any], seen: Seen | None) -> list[str]:
    """What the figures of a data set can't say, because the model has seen its images."""
    images, trained, chosen_by = entry["images"], entry["trained_on"], entry["validated_on"]
    lines = []
    if seen and trained:
        count = f"all {images}" if trained == images else f"{trained} of these {images}"
        least = "" if seen.complete or trained == images else "at least "
        lines.append(f"{entry['name']}: {least}{count} images were trained on: the figures say nothing of new parts")
    if chosen_by:
        lines.append(
            f"{entry['name']}: {chosen_by} of these {images} images chose among the checkpoints, though none was trained "
            f"on them: the figures on them are a little too good"
        )
    return lines


def rows(result: DataResult) -> list[Row]:
    """A row for each class, and the mean over the classes where there are several; images are those of the first draw."""
    found: list[Row] = [
        (result.data.name, c.name, len(c.scores), sum(s.item.label for s in c.scores), result.spread(place))
        for place, c in enumerate(result.classes)
    ]
    if len(found) > 1:
        found.append((result.data.name, "mean", sum(r[2] for r in found), sum(r[3] for r in found), result.spread()))
    return found


def taught(evaluation: Evaluation) -> str | None:
    """What good parts taught before the figures were measured, as a part of a sentence; None of a zero-shot model."""
    about = evaluation.subject.description
    if about.get("few_shot"):
        return evaluation.subject.threshold_from.partition("; threshold")[0]
    return about.get("memory")


def show(evaluation: Evaluation, console: Console, warnings: Sequence[str] = ()) -> None:
    """One table per data set in percent, then why something is undefined, and what the figures can't say."""
    for result in evaluation.results:
        title = ": ".join(filter(None, (result.data.name, taught(evaluation))))
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=cell(title), title_justify="left")
        table.add_column("class", no_wrap=True)
        for heading in ("images", "defects", *(text.replace(" ", "\n", 1) for text in HEADINGS.values())):
            table.add_column(heading, justify="right", no_wrap=True)
        for _, name, images, defective, values in rows(result):
            style = "bold" if name == "mean" and len(result.classes) > 1 else None
            table.add_row(
                cell(name),
                str(images),
                str(defective),
                *(percent(values[v]).replace(" ", "\n", 1) for v in VALUES),
                style=style,
            )
        print_table(console, table)
        for reason in reasons(result):
            say(console, f"{UNDEFINED} {reason}")
    if evaluation.skipped:
        warn(console, f"{len(evaluation.skipped)} images could not be read and are not in the figures")
    for line in warnings:
        warn(console, line)


def reasons(result: DataResult) -> list[str]:
    return [reason for c in result.classes for reason in c.undefined]


def write_results(evaluation: Evaluation, stamped: Mapping[str, Any], folder: Path) -> None:
    """results.json, results.csv, results.md, results.tex and scores.csv in a folder."""
    table = [row for result in evaluation.results for row in rows(result)]
    seed = ("seed",) if evaluation.subject.description.get("few_shot") else ()
    texts = {
        "results.json": json.dumps({**stamped, **to_dict(evaluation)}, indent=1, allow_nan=False) + "\n",
        "results.csv": _csv(
            ("data", "class", *seed, "images", "defective", *VALUES),
            [line for result in evaluation.results for line in _lines(result)],
        ),
        "results.md": _markdown(evaluation, stamped, table),
        "results.tex": _latex(table, stamped["warnings"]),
        "scores.csv": _csv(
            ("data", "class", *seed, "defect", "label", "score", "image"),
            [
                (result.data.name, c.name, *_seed(draw), s.item.defect, s.item.label, s.score, s.item.image)
                for result in evaluation.results
                for draw in result.draws
                for c in draw.classes
                for s in c.scores
            ],
        ),
    }
    for name, text in texts.items():
        write_text(text, folder / name)


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values; undefined ones are null, and `undefined` says why."""
    return {
        "results": [
            {
                "data": result.data.name,
                "classes": {c.name: _entry(result, place) for place, c in enumerate(result.classes)},
                **_spread_entry("mean", result.spread(), result.draws),
            }
            for result in evaluation.results
        ],
        "skipped": [{"image": str(item.image), "reason": reason} for item, reason in evaluation.skipped],
    }


def _entry(result: DataResult, place: int) -> dict[str, Any]:
    """A class; with references its means and deviations over the draws, and each draw by its seed."""
    if result.draws[0].seed is None:
        return _class_entry(result.classes[place])
    spread = result.spread(place)
    return {
        **{name: value.mean for name, value in spread.items()},
        "deviation": {name: value.deviation for name, value in spread.items()},
        "seeds": {
            str(draw.seed): {
                **_class_entry(c := draw.classes[place]),
                "memory": c.memory,
                "references": [str(path) for path in c.references],
                "left_out": [str(item.image) for item in c.left_out],
            }
            for draw in result.draws
        },
    }


def _spread_entry(name: str, spread: Mapping[str, Spread], draws: Sequence[Draw]) -> dict[str, Any]:
    """Means, and where there are references their deviations and each draw's."""
    entry: dict[str, Any] = {name: {value: found.mean for value, found in spread.items()}}
    if draws[0].seed is not None:
        entry["deviation"] = {value: found.deviation for value, found in spread.items()}
        entry["seeds"] = {str(draw.seed): draw.mean for draw in draws}
    return entry


def _class_entry(c: ClassResult) -> dict[str, Any]:
    return {
        **c.values,
        "images": len(c.scores),
        "defective": sum(s.item.label for s in c.scores),
        "found": sum(s.item.label and s.score >= c.threshold for s in c.scores),
        "false_alarms": sum(not s.item.label and s.score >= c.threshold for s in c.scores),
        "image_f1_threshold": c.image.f1_threshold,
        "pixel_f1_threshold": c.pixel.f1_threshold,
        "pixel_error_bound": c.pixel.error_bound,
        "undefined": list(c.undefined),
    }


def _seed(draw: Draw) -> tuple[int, ...]:
    return () if draw.seed is None else (draw.seed,)


def _lines(result: DataResult) -> Iterator[tuple[Any, ...]]:
    """Rows of results.csv: as `rows`; with references one for each seed, then the mean and the deviation."""
    for place, (data, name, images, defective, values) in enumerate(rows(result)):
        counts = (images, defective)
        if result.draws[0].seed is None:
            yield (data, name, *counts, *(value.mean for value in values.values()))
            continue
        for draw in result.draws:
            chosen = draw.classes[place : place + 1] or draw.classes  # the last row is of all of them
            labels = [s.item.label for c in chosen for s in c.scores]
            found = Draw(draw.seed, chosen).mean
            yield (data, name, draw.seed, len(labels), sum(labels), *found.values())
        yield (data, name, "mean", *counts, *(value.mean for value in values.values()))
        yield (data, name, "deviation", *counts, *(value.deviation for value in values.values()))


def percent(value: Spread) -> str:
    """As "91.4", or "91.4 ±0.8" with the deviation over several draws."""
    if value.mean is None:
        return UNDEFINED
    return f"{100 * value.mean:.1f}" + ("" if value.deviation is None else f" ±{100 * value.deviation:.1f}")


def _csv(header: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *lines])
    return text.getvalue()


def _markdown(evaluation: Evaluation, stamped: Mapping[str, Any], table: list[Row]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(printable(text).replace("|", r"\|") for text in cells) + " |"

    lines = [
        line(["data", "class", "images", "defective", *HEADINGS.values()]),
        "| --- | --- |" + " ---: |" * (2 + len(VALUES)),
        *(
            line([data, name, str(images), str(defective), *(percent(values[v]) for v in VALUES)])
            for data, name, images, defective, values in table
        ),
    ]
    notes = [f"- {UNDEFINED} {reason}" for result in evaluation.results for reason in reasons(result)]
    notes += [f"- **{line}**" for line in stamped["warnings"]]
    model, learned = stamped["model"], printable(taught(evaluation) or "")
    source = (
        f"In percent. {model['name']} ({model['precision']}, SHA-256 {model['sha256'][:12]}), "
        f"fbclip {stamped['versions']['fbclip']}, {stamped['date']}."
        + (f" {learned[0].upper()}{learned[1:]}." if learned else "")
    )
    return "\n".join([*lines, "", *notes, *([""] if notes else []), source, ""])


def _latex(table: list[Row], warnings: Sequence[str]) -> str:
    """Rows for a table of ten columns: data set, class, then the figures in percent; warnings as comments."""

    def escaped(text: str) -> str:
        special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
        return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in printable(text))

    def texed(figure: str) -> str:
        return figure.replace(UNDEFINED, "--").replace("±", r"$\pm$ ")

    head = " & ".join(["data", "class", *HEADINGS.values()]).replace("%", r"\%")
    lines = [
        " & ".join([escaped(data), escaped(name), *(texed(percent(values[v])) for v in VALUES)]) + r" \\"
        for data, name, _, _, values in table
    ]
    return "\n".join([*(f"% {line}" for line in warnings), f"% {head}", *lines, ""])
