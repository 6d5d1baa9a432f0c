"""A benchmark on screen and as JSON, CSV, one chart and one self-contained HTML page."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fbclip.files import replacing, write_text
from fbclip.runtime.bench.meters import METERED_S
from fbclip.runtime.bench.results import BenchReport, BenchResult, LeftOut, Profile
from fbclip.runtime.html import INK, chart, missing_packages, write_page
from fbclip.terminal import cell, print_table, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CSV_COLUMNS = (
    "backend",
    "precision",
    "batch",
    "device",
    "median_ms",
    "p90_ms",
    "p99_ms",
    "images_per_s",
    "cold_start_s",
    "cores_used",
    "peak_host_mb",
    "device_mb",
    "gflops",
    "limit_ms",
    "share_of_limit",
)
DEVIATION_COLUMNS = ("score_max", "map_max", "map_p999")
HEADINGS = {
    "median": "median\nms",
    "p90": "p90",
    "p99": "p99",
    "images": "img/s",
    "cold": "cold\ns",
    "memory": "peak\nMB",
    "cores": "cores",
    "energy": "J /\nimage",
    "share": "of\nlimit",
    "score": "score\ndev.",
    "map": "map\ndev.",
}
NOTHING = "–"
OPERATORS_SHOWN = 12
BUSY = 0.1  # cores that other processes took, from where on it is a warning


def rows(report: BenchReport) -> list[dict[str, str]]:
    """The table's cells, by `HEADINGS` and "subject", for the screen and the page."""
    found = []
    for result in report.results:
        energy, deviation, share = result.joules_per_image, result.deviation, result.share_of_limit
        device = "" if result.device_mb is None else f" + {result.device_mb:.0f}"
        found.append(
            {
                "subject": _subject(result),
                "median": f"{result.median_ms:.1f}",
                "p90": f"{result.p90_ms:.1f}",
                "p99": f"{result.p99_ms:.1f}",
                "images": f"{result.images_per_s:.3g}",
                "cold": f"{result.cold_start_s:.2f}",
                "memory": f"{result.peak_host_mb:.0f}{device}",
                "cores": f"{result.cores_used:.1f}",
                "energy": ", ".join(f"{joules:.2f}" for joules in energy.values()) or NOTHING,
                "share": NOTHING if share is None else f"{share:.0%}",
                "score": NOTHING if deviation is None else f"{deviation.score_max:.0e}",
                "map": NOTHING if deviation is None else f"{deviation.map_max:.0e}",
            }
        )
    return found


def _subject(result: BenchResult | LeftOut) -> str:
    batch = "" if result.batch == 1 else f" ×{result.batch}"
    return f"{result.backend} {result.precision}{batch}"


def left_out(report: BenchReport) -> list[tuple[str, str]]:
    """Backends or subjects, and why; a backend whose subjects all have the same reason is named once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in report.left_out:
        name = entry.backend if entry.precision is None else _subject(entry)
        reasons.setdefault((entry.backend, entry.reason), []).append(name)
    return [(names[0] if len(names) == 1 else backend, reason) for (backend, reason), names in reasons.items()]


def show(report: BenchReport, console: Console) -> None:
    """The table, then what it must be read with."""
    cells = rows(report)
    used = {k: v for k, v in HEADINGS.items() if any(row[k] != NOTHING for row in cells)}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("subject", no_wrap=True)
    for heading in used.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in cells:
        table.add_row(cell(row["subject"]), *(row[key] for key in used))
    print_table(console, table)
    for line in remarks(report):
        say(console, line)
    for name, reason in left_out(report):
        say(console, f"left out: {name}: {reason}", "dim")
    for result in report.results:
        if result.profile:
            print_table(console, _profile_table(result, result.profile))


def _profile_table(result: BenchResult, profile: Profile) -> Table:
    nodes = ", ".join(f"{count} nodes on {provider}" for provider, count in (profile.nodes or {}).items())
    title = f"where {_subject(result)} spends its time" + (f": {nodes}" if nodes else "")
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for heading, justify in (("stage", "left"), ("operator", "left"), ("nodes", "right"), ("ms", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("share", justify="right")
    table.add_column("GFLOP/s", justify="right")
    for stage in profile.stages:
        rate = f"{stage.gflops:.0f}"
        table.add_row(stage.stage, "", "", f"{stage.ms:.2f}", f"{stage.share:.0%}", rate, style="bold")
    for entry in profile.operators[:OPERATORS_SHOWN]:
        share = f"{entry.share:.0%}"
        table.add_row(entry.stage, entry.operator, str(entry.nodes), f"{entry.ms:.2f}", share, "")
    return table


def remarks(report: BenchReport) -> list[str]:
    """Sentences on what was measured and under which conditions."""
    height, width = report.frames.size
    environment, conditions, rates = report.environment, report.conditions, report.rates
    place = environment.gpu or environment.device or environment.processor
    lines = [
        f"{report.bundle.name}, frames {height}x{width} ({report.frames.source}), {report.operations.total / 1e9:.3g} GFLOP per "
        f"image; at least {report.runs} runs each, in {len(report.order)} rounds; {place}, "
        f"{environment.cores} core{'s' * (environment.cores > 1)}"
    ]
    if report.bundle.memory:
        lines.append(f"with memory {report.bundle.memory} of good parts; torch, which has none, is left out")
    products = ", ".join(f"{n} {r / 1e9:.0f}" for n, r in rates.items() if not n.endswith("copy"))
    copies = ", ".join(f"{n} {r / 1e9:.1f}" for n, r in rates.items() if n.endswith("copy"))
    lines.append(f"in the same run: matrix products, GFLOP/s: {products}; GB/s: {copies}")
    if reference := report.deviation_from:
        lines.append(
            f"dev.: deviation, the largest difference from {reference.backend} {reference.precision}, same frames"
        )
    if started := [f"{_subject(r)}: {r.launches}" for r in report.results if r.launches]:
        lines.append(f"launches: {'; '.join(started)}")
    if coarse := sorted({source for result in report.results for source in result.too_coarse or ()}):
        lines.append(
            f"energy: {', '.join(coarse)} showed nothing in {METERED_S:g} s of runs, and is too coarse to tell"
        )
    others, stolen = conditions.other_processes_cores, conditions.stolen_cores
    if others is not None and others > BUSY:
        lines.append(f"careful: other processes kept {others:.1f} cores busy meanwhile")
    if stolen is not None and stolen > BUSY:
        lines.append(f"careful: the hypervisor took {stolen:.1f} cores away meanwhile")
    if conditions.cpu_throttled:
        lines.append(f"careful: the cores were slowed down for heat {conditions.cpu_throttled} times meanwhile")
    if conditions.gpu_throttled:
        lines.append(f"careful: the GPU was slowed down meanwhile: {', '.join(conditions.gpu_throttled)}")
    for name, clock in conditions.clocks_mhz.items():
        lines.append(f"{name} clock: {clock.least:.0f} to {clock.most:.0f} MHz")
    if unstable := [_subject(r) for r in report.results if not r.warmup.stable]:
        lines.append(f"careful: not stable when its warm-up ended: {', '.join(unstable)}")
    return lines


def to_json(report: BenchReport) -> str:
    return json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"


def to_csv(report: BenchReport) -> str:
    """A row for each subject; empty where nobody tells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *DEVIATION_COLUMNS])
    for result in report.results:
        measured = [getattr(result, column) for column in CSV_COLUMNS]
        writer.writerow([*measured, *(getattr(result.deviation, column, None) for column in DEVIATION_COLUMNS)])
    return text.getvalue()


def write_bench(report: BenchReport, folder: Path) -> list[str]:
    """bench.json and bench.csv in a folder, and where their packages are installed bench.png and bench.html.

    Returns:
        The packages that are missing for the latter.
    """
    for name, text in (("bench.json", to_json(report)), ("bench.csv", to_csv(report))):
        write_text(text, folder / name)
    missing = missing_packages()
    if not missing:
        size = (8.0, 1.4 + 0.45 * len(report.results))
        _write_png(report, folder / "bench.png", size)
        write_page(
            "bench.html",
            folder / "bench.html",
            report=report,
            environment=asdict(report.environment),
            rows=rows(report),
            headings=HEADINGS,
            remarks=remarks(report),
            chart=chart(lambda axes: draw(axes, report), size),
            subject=_subject,
            left_out=left_out(report),
            operators=OPERATORS_SHOWN,
        )
    return missing


def _write_png(report: BenchReport, path: Path, size: tuple[float, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, report)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw(axes: Axes, report: BenchReport) -> None:
    """Milliseconds per image: bars to the median, a line to the 99th percentile, a mark at the machine's limit."""
    results = report.results
    scale = [1 / result.images for result in results]
    medians = [result.median_ms * s for result, s in zip(results, scale, strict=True)]
    beyond = [(r.p99_ms - r.median_ms) * s for r, s in zip(results, scale, strict=True)]
    places = range(len(results))
    error = {"ecolor": INK, "elinewidth": 1, "capsize": 3}
    axes.barh(places, medians, 0.6, color="#4c78a8", xerr=[[0.0] * len(results), beyond], error_kw=error)
    limits = [(r.limit_ms * s, p) for r, s, p in zip(results, scale, places, strict=True) if r.limit_ms]
    for number, (limit, place) in enumerate(limits):
        label = "the machine's limit" if number == 0 else None
        axes.plot([limit, limit], [place - 0.36, place + 0.36], color="#e45756", linewidth=2, label=label)
    for place, median, further in zip(places, medians, beyond, strict=True):
        axes.annotate(
            f"{median:.3g}", (median + further, place), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(list(places), [_subject(result) for result in results])
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds per image: median, line to the 99th percentile")
    if limits:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
