"""What a person reads of a run: notices, a status line, a table of images, and what was done."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from heapq import heappush, heappushpop
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fbclip.runtime.live.records import Notice, Record
from fbclip.runtime.live.status import Percents, Status, Summary
from fbclip.runtime.prediction import UNJUDGED
from fbclip.runtime.sight import EXPLAINED
from fbclip.terminal import cell, printable, say

SHOWN = 20  # rows of the table of images
COLOURS = {
    "lost": "red",
    "blind": "red",
    "failing": "red",
    "drifting": "yellow",
    "on": "red",
    "connecting": "yellow",
}
WRONG = ("lost", "blind", "failing", "drifting", "on")  # states of a notice that is a warning
VERDICTS = {"good": "green", "defect": "red", "unusable": "yellow", "absent": "yellow"}
OVERRULED = {
    "min_area": "all regions are smaller than the least area",
    "roi": "what is anomalous lies outside the mask",
}


class NoticeLog:
    """A sink that prints notices; in a thread of its own like any other, since a terminal may be held."""

    name = "console"

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, record: Record) -> None:
        """Records are the status line's."""

    def notify(self, notice: Notice) -> None:
        if notice.kind != "run":
            line = f"{notice.kind} {notice.state} ({notice.subject}): {notice.message}"
            level = logging.WARNING if notice.state in WRONG else logging.INFO
            fields = {name: value for name, value in notice.to_dict().items() if name not in ("time", "message")}
            say(self.console, line, COLOURS.get(notice.state, ""), level=level, when=notice.time, fields=fields)

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class _Row:
    """What the table shows of an image; a record would keep its picture."""

    name: str
    verdict: str
    reason: str | None
    score: float
    regions: str
    ms: float


class ImageTable:
    """A sink for stills: prints what is wrong with them at once, and keeps what the table at the end shows."""

    name = "console"

    def __init__(self, console: Console) -> None:
        self.console = console
        self.overruled: Counter[str] = Counter()
        self._rows: list[tuple[float, int, _Row]] = []  # those with the highest scores, as a heap
        self._number = 0

    def write(self, record: Record) -> None:
        prediction = record.prediction
        if prediction.unusable:
            say(self.console, f"unusable: {record.frame.name} is {EXPLAINED[prediction.unusable]}", "yellow")
        elif prediction.absent:
            say(self.console, f"absent: the part is not in {record.frame.name}", "yellow")
        if prediction.overruled:
            self.overruled[prediction.overruled] += 1
        regions = f"{len(prediction.regions)}{' weak' if any(region.weak for region in prediction.regions) else ''}"
        ms = sum(value for stage, value in record.timings_ms.items() if stage != "wait")
        reason = prediction.unusable or prediction.overruled
        row = _Row(Path(record.frame.name).name, prediction.verdict, reason, prediction.score, regions, ms)
        self._number += 1
        add = heappush if len(self._rows) < SHOWN else heappushpop
        add(self._rows, (row.score, -self._number, row))

    def notify(self, notice: Notice) -> None:
        if notice.kind == "source" and notice.state != "ended":
            say(self.console, notice.message, "yellow")

    def close(self) -> None:
        """Nothing to release; `print` comes after the run."""

    @property
    def has_rows(self) -> bool:
        return bool(self._rows)

    def print(self) -> None:
        """The images with the highest scores, and how many more there are."""
        table = Table(box=None, pad_edge=False)
        for column in ("image", "verdict"):
            table.add_column(column, overflow="fold")
        for column in ("score", "regions", "ms"):
            table.add_column(column, justify="right", overflow="fold")
        for _, _, row in sorted(self._rows, reverse=True):
            colour = "yellow" if row.reason else VERDICTS[row.verdict]
            verdict = Text(f"{row.verdict}{f' ({row.reason})' if row.reason else ''}", colour)
            table.add_row(cell(row.name), verdict, f"{row.score:.3f}", row.regions, f"{row.ms:.0f}")
        if self._rows:
            self.console.print(table)
        if self._number > SHOWN:
            say(
                self.console,
                f"… and {self._number - SHOWN} more with lower scores (all of them: in a CSV or JSON file)",
            )


def status_text(status: Status) -> Text:
    """One line of what a run does: source, rate, age, stages, score, alarm, drift, losses, sinks; of stills how far it is."""
    source = status.source
    parts = [Text.assemble((source.state, COLOURS.get(source.state, "green")), f" {printable(source.name)}")]
    if status.total is not None:
        parts = [Text(f"{status.frames} of {status.total} images"), Text(f"{status.anomalous} with defects")]
    if status.age_ms:
        parts.append(Text(f"{status.fps:.1f}/s"))
        if status.total is None:
            parts += _live_parts(status, status.age_ms)
    if status.drift == "drifting":
        parts.append(Text("drifting", "yellow"))
    losses = {name: count for name, count in source.counters.items() if name != "frames" and count}
    counted = {name: getattr(status, name) for name in ("rejected", "unusable", "absent", "overruled")}
    losses |= {name: count for name, count in counted.items() if count}
    parts += [Text(f"{name.replace('_', '-')} {count}", "yellow") for name, count in losses.items()]
    for name, sink in status.sinks.items():
        if sink.state == "failing" or sink.dropped:
            lost = f", {sink.dropped} dropped" if sink.dropped else ""
            parts.append(Text(f"{name} {sink.state}{lost}", COLOURS.get(sink.state, "yellow")))
    return Text(" · ").join(parts)


def _live_parts(status: Status, age_ms: Percents) -> list[Text]:
    """Ages, stages, the last verdict and the alarm."""
    age = "/".join(f"{age_ms[percent]:.0f}" for percent in ("p50", "p95", "p99"))
    medians = " ".join(f"{stage} {values['p50']:.0f}" for stage, values in status.stages_ms.items() if values)
    score = status.score or 0.0
    judged = f"{score:.3f} {'≥' if score >= status.threshold else '<'} {status.threshold:.3f}"
    return [
        Text(f"age {age} ms"),
        Text(medians, "dim"),
        Text(status.verdict if status.verdict in UNJUDGED else judged),
        Text("ALARM", "bold red") if status.alarm else Text("no alarm"),
    ]


def print_summary(summary: Summary, console: Console) -> None:
    """One line of what was done, and one for each sink that lost something."""
    status = summary.status
    rate = status.frames / summary.seconds if summary.seconds else 0.0
    ages = f"; age {status.age_ms['p50']:.0f} ms, at p99 {status.age_ms['p99']:.0f}" if status.age_ms else ""
    warm_up = status.source.counters.get("warm_up", 0)
    left_out = f", {warm_up} left out to warm up" if warm_up else ""
    counts = {"kind": "summary", "frames": status.frames, "anomalous": status.anomalous, "alarms": status.alarms}
    overruled = f", {status.overruled} good against their score" if status.overruled else ""
    say(
        console,
        f"{status.frames} frames in {summary.seconds:.1f} s ({rate:.1f}/s{ages}): {status.anomalous} anomalous, "
        f"{status.alarms} alarms{_unjudged(status)}{overruled}{left_out}",
        fields=counts,
    )
    print_losses(status, console)


def print_images(status: Status, table: ImageTable, console: Console) -> None:
    """The table of images, and what was done in one line."""
    table.print()
    skipped = status.source.counters.get("garbage", 0) + status.rejected
    good = status.frames - status.anomalous - status.unusable - status.absent
    more = _unjudged(status) + (f", {skipped} skipped" if skipped else "")
    say(console, f"{status.frames} images: {status.anomalous} with defects, {good} good{more}")
    for reason, count in table.overruled.items():
        say(console, f"good against their score, which reaches the threshold: {count}; {OVERRULED[reason]}", "yellow")
    print_losses(status, console)


def _unjudged(status: Status) -> str:
    """How many frames are neither good nor defects, for the end of a list."""
    counts = {"unusable": status.unusable, "absent": status.absent}
    return "".join(f", {count} {kind}" for kind, count in counts.items() if count)


def print_losses(status: Status, console: Console) -> None:
    """A line for each sink that lost something or failed."""
    for name, sink in status.sinks.items():
        if name == NoticeLog.name:
            continue
        if sink.dropped:
            lost = f"{name} lost {sink.dropped} results and notices: {sink.dropped_because}"
            say(console, lost, level=logging.WARNING)
        elif sink.error:
            say(console, f"{name} failed: {sink.error}", level=logging.WARNING)
