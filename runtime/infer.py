"""`fbclip infer`: a list of images to overlays, JSON lines, CSV and maps."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fbclip.errors import ImageError, UsageError
from fbclip.files import replacing
from fbclip.runtime.predictor import Prediction, Predictor
from fbclip.runtime.sight import EXPLAINED

CSV_COLUMNS = (
    "source",
    "score",
    "threshold",
    "is_anomalous",
    "verdict",
    "reason",
    "regions",
    "weak",
    "largest_peak",
    "model_ms",
)
COLOURS = {"good": "green", "defect": "red", "unusable": "yellow"}
OVERRULED = {"min_area": "all regions are smaller than --min-area", "roi": "what is anomalous lies outside the mask"}
SHOWN = 20  # rows of the table on screen


@dataclass
class Summary:
    """What a run did: (source, prediction without arrays) of each image, (source, reason) of each skipped one, and
    how TensorRT's executions were started, if it ran there."""

    results: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    launches: str | None = None


@dataclass(frozen=True)
class Outputs:
    """Where results go; None means nowhere. `json` may be "-" for standard output."""

    folder: Path | None = None  # overlays and maps
    save: bool = True
    save_map: bool = False
    map_size: str = "frame"
    json: str | None = None
    csv: Path | None = None


def infer(predictor: Predictor, sources: list[Path], outputs: Outputs, console: Console) -> Summary:
    """Score every image; one that can't be read is reported and skipped. Finished results are never lost."""
    summary = Summary()
    with ExitStack() as stack:
        lines = stack.enter_context(_text_output(outputs.json))
        rows = stack.enter_context(_text_output(None if outputs.csv is None else str(outputs.csv)))
        table = csv.writer(rows) if rows else None
        if table:
            table.writerow(CSV_COLUMNS)
        names = _names(sources)
        quiet = not console.is_terminal or len(sources) < 3
        for source in track(sources, "inspecting", console=console, disable=quiet):
            try:
                prediction = predictor(source)
            except ImageError as error:
                summary.skipped.append((source, str(error)))
                console.print(f"skipped: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
                continue
            if prediction.unusable:
                text = f"unusable: {source} is {EXPLAINED[prediction.unusable]}"
                console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
            record = _write(prediction, source, names[source], outputs)
            if predictor.launches:  # beside the timings, which depend on it
                summary.launches = record["launches"] = predictor.launches
            summary.results.append((source, record))
            if lines:
                lines.write(json.dumps(record, allow_nan=False) + "\n")
                lines.flush()
            if table and rows:
                table.writerow(csv_row(record, record["timings_ms"]["model"]))
                rows.flush()
    return summary


def csv_row(record: dict[str, Any], model_ms: float) -> list[Any]:
    """The values of CSV_COLUMNS of a JSON record."""
    regions = record["regions"]
    peak = max((region["peak"] for region in regions), default="")
    verdict = [record[key] for key in ("source", "score", "threshold", "is_anomalous", "verdict")]
    reason = record["unusable"] or record["overruled"] or ""
    return [*verdict, reason, len(regions), any(region["weak"] for region in regions), peak, model_ms]


def _names(sources: list[Path]) -> dict[Path, str]:
    """A file name for each source's results; images of one name in different folders keep apart."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for source in sources:
        name, number = source.stem, 2
        while name in taken:
            name, number = f"{source.stem}-{number}", number + 1
        taken.add(name)
        names[source] = name
    return names


def _write(prediction: Prediction, source: Path, name: str, outputs: Outputs) -> dict[str, Any]:
    """Write pictures and maps; returns the JSON record."""
    map_path = None
    if outputs.folder and outputs.save_map:
        map_path = outputs.folder / f"{name}.npy"
        array = prediction.anomaly_map if outputs.map_size == "frame" else prediction.model_map
        with replacing(map_path, durable=False) as temporary:
            np.save(temporary, array)
    if outputs.folder and outputs.save:
        with replacing(outputs.folder / f"{name}.jpg", durable=False) as temporary:
            Image.fromarray(prediction.overlay()).save(temporary, "JPEG", quality=92)
    values = prediction.to_dict()
    timings = values.pop("timings_ms")
    return {"source": str(source), **values, "map": None if map_path is None else str(map_path), "timings_ms": timings}


@contextmanager
def _text_output(target: str | None) -> Iterator[IO[str] | None]:
    if target is None:
        yield None
    elif target == "-":
        yield sys.stdout
    else:
        path = Path(target)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w", newline="")
        except OSError as error:
            raise UsageError(f"can't write {path}: {error}") from error
        with file:
            yield file


def report(summary: Summary, outputs: Outputs, console: Console) -> None:
    """A table of the results, at most twenty, the highest scores first, and one line that sums up."""
    table = Table(box=None, pad_edge=False)
    for column, justify in (
        ("image", "left"),
        ("verdict", "left"),
        ("score", "right"),
        ("regions", "right"),
        ("ms", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    ranked = sorted(summary.results, key=lambda item: item[1]["score"], reverse=True)
    for source, record in ranked[:SHOWN]:
        reason = record["unusable"] or record["overruled"]
        colour = "yellow" if reason else COLOURS[record["verdict"]]
        verdict = f"[{colour}]{record['verdict']}{f' ({reason})' if reason else ''}[/]"
        regions = f"{len(record['regions'])}{' weak' if any(region['weak'] for region in record['regions']) else ''}"
        milliseconds = sum(record["timings_ms"].values())
        table.add_row(source.name, verdict, f"{record['score']:.3f}", regions, f"{milliseconds:.0f}")
    if ranked:
        console.print(table)
    if len(ranked) > SHOWN:
        console.print(f"… and {len(ranked) - SHOWN} more with lower scores")
    counts = Counter(record["verdict"] for _, record in ranked)
    unusable = f", {counts['unusable']} unusable" if counts["unusable"] else ""
    skipped = f", {len(summary.skipped)} skipped" if summary.skipped else ""
    console.print(f"{len(ranked)} images: {counts['defect']} with defects, {counts['good']} good{unusable}{skipped}")
    for reason, count in Counter(record["overruled"] for _, record in ranked if record["overruled"]).items():
        text = f"{count} of the good ones have a score that reaches the threshold: {OVERRULED[reason]}"
        console.print(text, style="yellow", highlight=False, soft_wrap=True)
    if summary.launches:
        console.print(f"TensorRT's executions were started by {summary.launches}", highlight=False)
    if outputs.folder and (outputs.save or outputs.save_map) and ranked:
        console.print(f"pictures and maps are in {outputs.folder}", soft_wrap=True, highlight=False)
