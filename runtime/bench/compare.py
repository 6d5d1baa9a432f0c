"""Two recorded benchmarks: what changed beyond noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fbclip.errors import UsageError
from fbclip.runtime.bench.results import SCHEMA, BenchReport, BenchResult
from fbclip.terminal import cell, print_table, say
from fbclip.untrusted import MIB, one_line, read_json

RESAMPLES, CONFIDENCE = 2000, 0.95
LEAST_ROUNDS = 3  # fewer say nothing of noise
MACHINE_CHANGED = 0.05  # of the matrix-product rate, from where on the machine itself is suspected
MOST_BYTES = 64 * MIB  # of a recorded benchmark
Rounds = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Change:
    """A subject in both benchmarks.

    Attributes:
        name: backend, precision, batch.
        before_ms, after_ms: medians.
        ratio: of the medians, after by before; above 1 is slower.
        low, high: its 95 % interval.
    """

    name: str
    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" where the interval excludes 1, else "same"."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"

    def fails(self, limit: float) -> bool:
        """Slower by more than a share `limit`, and beyond noise."""
        return self.verdict == "slower" and self.ratio > 1 + limit


@dataclass(frozen=True)
class Comparison:
    """Changes, subjects that only one of the benchmarks has, and what else differs between the two."""

    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    notes: tuple[str, ...]

    def fails(self, limit: float) -> bool:
        """A subject that is gone fails too: a backend that stopped working is no improvement."""
        return bool(self.gone) or any(change.fails(limit) for change in self.changes)


def ratio_interval(before: Rounds, after: Rounds, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the ratio of medians, after by before, by a percentile bootstrap.

    Whole rounds are drawn (Davison and Hinkley 1997, section 3.8): runs of one round share their moment of the
    machine, and drawn singly they would promise more than they know.
    """
    generator = np.random.default_rng(seed)
    medians = [_resampled_medians(rounds, generator) for rounds in (before, after)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians[1] / medians[0], (tail, 1 - tail))
    return float(low), float(high)


def _resampled_medians(rounds: Rounds, generator: np.random.Generator) -> NDArray[np.float64]:
    padded = np.full((len(rounds), max(map(len, rounds))), np.nan)  # rounds may differ by a run
    for row, one in zip(padded, rounds, strict=True):
        row[: len(one)] = one
    drawn = generator.integers(0, len(rounds), (RESAMPLES, len(rounds)))
    medians: NDArray[np.float64] = np.nanmedian(padded[drawn].reshape(RESAMPLES, -1), axis=1)
    return medians


def compare(before: BenchReport, after: BenchReport) -> Comparison:
    """Two reports of `fbclip.runtime.bench.run.bench`.

    Raises:
        UsageError: they did different work, or have too few rounds.
    """
    for what in ("size", "count"):
        old_work, new_work = (getattr(report.frames, what) for report in (before, after))
        if old_work != new_work:
            raise UsageError(
                f"benchmarks are compared where their frames are the same; {what} is {old_work} and {new_work}: "
                f"run both with frames of the same size",
                option="compare",
            )
    old, new = ({_name(result): result for result in report.results} for report in (before, after))
    changes = []
    for name in (name for name in old if name in new):
        rounds = old[name].rounds_ms, new[name].rounds_ms
        if min(map(len, rounds)) < LEAST_ROUNDS:
            raise UsageError(
                f"a comparison needs {LEAST_ROUNDS} rounds of each; {name} has fewer: run it more often",
                option="compare",
            )
        old_ms, new_ms = (float(np.median(np.concatenate([np.asarray(r) for r in found]))) for found in rounds)
        changes.append(Change(name, old_ms, new_ms, new_ms / old_ms, *ratio_interval(*rounds)))
    gone, added = (tuple(n for n in a if n not in b) for a, b in ((old, new), (new, old)))
    return Comparison(tuple(changes), gone, added, tuple(_notes(before, after)))


def _name(result: BenchResult) -> str:
    return f"{result.backend} {result.precision} batch {result.batch}"


def _notes(before: BenchReport, after: BenchReport) -> list[str]:
    notes = []
    for key in ("processor", "gpu", "cores", "system", "versions", "threads"):
        old, new = getattr(before.environment, key), getattr(after.environment, key)
        if old != new:
            notes.append(f"{key}: {_differing(old, new)}")
    if before.bundle.graphs != after.bundle.graphs:
        notes.append("the graphs are not the same")
    if before.bundle.memory != after.bundle.memory:
        notes.append(f"memory of good parts: {before.bundle.memory or 'none'}, then {after.bundle.memory or 'none'}")
    rates = [max(r for n, r in report.rates.items() if n.startswith("cpu fp32")) for report in (before, after)]
    change = rates[1] / rates[0]
    if abs(change - 1) > MACHINE_CHANGED:
        notes.append(f"the machine itself multiplied matrices {change:.2f} times as quickly as before")
    return notes


def _differing(old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return ", ".join(
            f"{k} {old.get(k)} → {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
        )
    return f"{old} → {new}"


def read_report(path: Path) -> BenchReport:
    """A recorded benchmark.

    Raises:
        UsageError: no JSON, of another schema, or damaged.
    """
    try:
        values = read_json(path, MOST_BYTES)
    except ValueError as error:
        raise UsageError(
            f"a comparison takes the bench.json of two runs; {path} is none: {error}", option="compare"
        ) from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"this fbclip reads {SCHEMA}; {path} has {one_line(schema)}: run fbclip bench again", option="compare"
        )
    try:
        return BenchReport.from_dict(values)
    except ValueError as error:
        raise UsageError(f"{path} is no benchmark: {error}; run fbclip bench again", option="compare") from error


def compare_files(before: Path, after: Path, fail_over: str | None, console: Console) -> int:
    """Compare two bench.json on screen; returns the exit code: 1 where something is slower by more than `fail_over`."""
    limit = None if fail_over is None else parse_share(fail_over)
    comparison = compare(read_report(before), read_report(after))
    show_comparison(comparison, console)
    if limit is None or not comparison.fails(limit):
        return 0
    say(console, f"slower by more than {100 * limit:g} % beyond noise, or gone", "red")
    return 1


def show_comparison(comparison: Comparison, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("subject", no_wrap=True)
    for heading in ("before ms", "after ms", "ratio", "95 % interval", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    colours = {"slower": "red", "faster": "green", "same": ""}
    for change in comparison.changes:
        table.add_row(
            cell(change.name),
            f"{change.before_ms:.2f}",
            f"{change.after_ms:.2f}",
            f"{change.ratio:.3f}",
            f"{change.low:.3f} to {change.high:.3f}",
            change.verdict,
            style=colours[change.verdict],
        )
    print_table(console, table)
    for names, what in ((comparison.gone, "only before"), (comparison.new, "only after")):
        if names:
            say(console, f"{what}: {', '.join(names)}")
    for note in comparison.notes:
        say(console, f"differs: {note}")


def parse_share(text: str) -> float:
    """ "5%" or "5" to 0.05.

    Raises:
        UsageError: no share.
    """
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise UsageError(f"a share is a percentage like 5%; got {text!r}", option="fail_over")
    return share
