"""`fbclip infer`: a list of images to overlays, JSON lines, CSV and maps."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fbclip.errors import ImageError, UsageError
from fbclip.files import replacing
from fbclip.images import note_of_pages
from fbclip.runtime.live.sinks.lines import LineFile, Lines, StandardOutput
from fbclip.runtime.prediction import Prediction
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.sight import EXPLAINED
from fbclip.terminal import cell, say

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
LONGEST_NAME = 255  # bytes, of a file


@dataclass
class Summary:
    """What a run did: (source, prediction without arrays) of each image, (source, reason) of each skipped one, and
    how TensorRT's executions were started, if it ran there."""

    results: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    launches: str | None = None

    @property
    def unusable(self) -> int:
        """Images that could be read and show nothing, see `fbclip.runtime.sight`."""
        return sum(record["unusable"] is not None for _, record in self.results)


@dataclass(frozen=True)
class Outputs:
    """Where results go; None means nowhere. `json` may be "-" for standard output."""

    folder: Path | None = None  # overlays and maps
    save: bool = True
    save_map: bool = False
    map_size: str = "frame"
    json: str | None = None
    csv: Path | None = None


def infer(predictor: Predictor, sources: list[Path], outputs: Outputs, summary: Summary, console: Console) -> None:
    """Score every image; one that can't be read is reported and skipped. Finished results are never lost.

    Args:
        summary: empty; what is in it after an error, or Ctrl-C, is written.

    Raises:
        FBClipError, UsageError: results can't be written, as on a full disk.
    """
    with ExitStack() as stack:
        opened = _open(outputs)
        for lines in opened.values():
            stack.enter_context(closing(lines))
        names = _names(sources)
        _spare_sources(sources, names, outputs)
        quiet = not console.is_terminal or len(sources) < 3
        for source in track(sources, "inspecting", console=console, disable=quiet):
            try:
                prediction = predictor(source)
            except ImageError as error:
                summary.skipped.append((source, str(error)))
                say(console, f"skipped: {error}", "yellow")
                continue
            if note := note_of_pages(source):
                say(console, note, "yellow")
            if prediction.unusable:
                say(console, f"unusable: {source} is {EXPLAINED[prediction.unusable]}", "yellow")
            record = _write(prediction, source, names[source], outputs)
            if predictor.launches:  # beside the timings, which depend on it
                summary.launches = record["launches"] = predictor.launches
            forms = {
                "json": json.dumps(record, allow_nan=False),
                "csv": csv_line(csv_row(record, record["timings_ms"]["model"])),
            }
            for kind, lines in opened.items():
                lines.append(forms[kind])
            summary.results.append((source, record))


def _spare_sources(sources: list[Path], names: dict[Path, str], outputs: Outputs) -> None:
    """Raise UsageError where a picture or map would take the place of a picture that is inspected."""
    if outputs.folder is None or not any(outputs.folder.iterdir()):
        return
    inspected = {os.path.realpath(source) for source in sources}
    for name in names.values():
        for target in (outputs.folder / f"{name}.jpg", outputs.folder / f"{name}.npy"):
            if os.path.realpath(target) in inspected:
                raise UsageError(
                    f"results would replace {target}, which is inspected: choose another --project or --name"
                )


def _open(outputs: Outputs) -> dict[str, Lines]:
    """The files of lines that are asked for."""
    opened: dict[str, Lines] = {}
    if outputs.json is not None:
        opened["json"] = StandardOutput() if outputs.json == "-" else LineFile(Path(outputs.json), fresh=True)
    if outputs.csv is not None:
        opened["csv"] = LineFile(outputs.csv, csv_line(CSV_COLUMNS), fresh=True)
    return opened


def csv_line(values: Sequence[Any]) -> str:
    """A row of a CSV table, without the end of the line."""
    row = io.StringIO()
    csv.writer(row, lineterminator="\r\n").writerow(values)  # both kinds of line ends are quoted in names
    return row.getvalue().removesuffix("\r\n")


def csv_row(record: dict[str, Any], model_ms: float) -> list[Any]:
    """The values of CSV_COLUMNS of a JSON record."""
    regions = record["regions"]
    peak = max((region["peak"] for region in regions), default="")
    verdict = [record[key] for key in ("source", "score", "threshold", "is_anomalous", "verdict")]
    reason = record["unusable"] or record["overruled"] or ""
    return [*verdict, reason, len(regions), any(region["weak"] for region in regions), peak, model_ms]


def _names(sources: list[Path]) -> dict[Path, str]:
    """A file name, without suffix, for each source's results; images of one name in different folders keep apart."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    used: Counter[str] = Counter()
    for source in sources:
        stem = name = _shortened(source.stem)
        used[stem] += 1
        while name in taken:
            used[stem] += 1
            name = f"{stem}-{used[stem]}"
        taken.add(name)
        names[source] = name
    return names


def _shortened(stem: str) -> str:
    """The stem itself where it leaves room for a number and a suffix, else its beginning and a hash of it."""
    room = LONGEST_NAME - len("-1000000.npy")
    if len(os.fsencode(stem)) <= room:
        return stem
    digest = f"-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}"
    while len(os.fsencode(stem)) > room - len(digest):
        stem = stem[:-1]
    return stem + digest


def _write(prediction: Prediction, source: Path, name: str, outputs: Outputs) -> dict[str, Any]:
    """Write pictures and maps; returns the JSON record."""
    written: dict[str, str | None] = {"overlay": None, "map": None}
    if outputs.folder and outputs.save_map:
        array = prediction.anomaly_map if outputs.map_size == "frame" else prediction.model_map
        path = outputs.folder / f"{name}.npy"
        with replacing(path, durable=False) as file:
            np.save(file, array)
        written["map"] = str(path)
    if outputs.folder and outputs.save:
        path = outputs.folder / f"{name}.jpg"
        with replacing(path, durable=False) as file:
            Image.fromarray(prediction.overlay()).save(file, "JPEG", quality=92)
        written["overlay"] = str(path)
    values = prediction.to_dict()
    timings = values.pop("timings_ms")
    return {"source": str(source), **values, **written, "timings_ms": timings}


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
        table.add_row(cell(source.name), verdict, f"{record['score']:.3f}", regions, f"{milliseconds:.0f}")
    if ranked:
        console.print(table)
    if len(ranked) > SHOWN:
        say(console, f"… and {len(ranked) - SHOWN} more with lower scores (all of them: --csv or --json)")
    counts = Counter(record["verdict"] for _, record in ranked)
    unusable = f", {counts['unusable']} unusable" if counts["unusable"] else ""
    skipped = f", {len(summary.skipped)} skipped" if summary.skipped else ""
    say(console, f"{len(ranked)} images: {counts['defect']} with defects, {counts['good']} good{unusable}{skipped}")
    for reason, count in Counter(record["overruled"] for _, record in ranked if record["overruled"]).items():
        say(console, f"good against their score, which reaches the threshold: {count}; {OVERRULED[reason]}", "yellow")
    if summary.launches:
        say(console, f"TensorRT's executions were started by {summary.launches}")
    kinds = [kind for kind, asked in (("pictures", outputs.save), ("maps", outputs.save_map)) if asked]
    if outputs.folder and kinds and ranked:
        say(console, f"{' and '.join(kinds)} are in {outputs.folder}")
