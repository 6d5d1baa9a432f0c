"""A run from a source to its sinks: put together, watched by a person, ended cleanly."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from signal import Signals

from rich.console import Console
from rich.live import Live

from fbclip.errors import FBClipError, ImageError, Interrupted, UsageError
from fbclip.runtime.live.alarm import Alarm, Drift, Vote
from fbclip.runtime.live.console import ImageTable, NoticeLog, print_images, print_summary, status_text
from fbclip.runtime.live.pipeline import Limits, Pipeline
from fbclip.runtime.live.records import Sink, Source
from fbclip.runtime.live.sinks import SinkOptions, make_sinks
from fbclip.runtime.live.sinks.metrics import Prometheus
from fbclip.runtime.live.sinks.pictures import Pictures
from fbclip.runtime.live.sources import CaptureOptions, WatchSource
from fbclip.runtime.live.status import Status, Summary
from fbclip.runtime.predictor import Predictor
from fbclip.stopping import StopRequest
from fbclip.terminal import say

KEEPERS = ("json", "csv", "pictures", "mqtt", "events")  # sinks that may lose nothing; the others show what is now
REFRESH_S = 0.25
LOG_S, LOG_STILLS_S = 60.0, 10.0  # between lines where there is no terminal
FEW = 3  # images that need no progress


@dataclass(frozen=True)
class Inspection:
    """What to inspect, how, and where records go.

    Attributes:
        source: as `open_source` takes it.
        alarm_on: see `Alarm`.
        batch: images that the model is given at once, of files alone.
    """

    source: str | Sequence[str]
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    sinks: SinkOptions = field(default_factory=SinkOptions)
    vote: Vote = field(default_factory=Vote)
    alarm_on: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    batch: int = 1


def inspect(predictor: Predictor, source: Source, inspection: Inspection, console: Console) -> None:
    """Inspect an open source until it ends, a limit, Ctrl-C or SIGTERM, and say what was done.

    Raises:
        Interrupted: a signal ended it; frames in work were finished, sinks closed.
        FBClipError: of the source or the model; as `insist_on_all`.
    """
    view = ImageTable(console) if source.still else NoticeLog(console)
    pipeline = make_pipeline(source, predictor, inspection, view)
    try:
        summary, signal = run(pipeline, console)
    except FBClipError:
        if isinstance(view, ImageTable) and view.has_rows:  # what was done before
            print_images(pipeline.status(), view, console)
        raise
    left = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    if summary.failure == str(left):  # the reader of our output, who needs no word of it
        raise left
    if isinstance(view, ImageTable):
        print_images(summary.status, view, console)
    else:
        print_summary(summary, console)
    if launches := predictor.launches:
        say(console, f"launches: {launches}")
    saving = inspection.sinks.saving
    if saving and any(saving.folder.iterdir()):
        kinds = [kind for kind, asked in (("pictures", saving.overlays), ("maps", saving.maps)) if asked]
        say(console, f"{' and '.join(kinds)} are in {saving.folder}")
    if signal:
        raise Interrupted(f"stopped by {Signals(signal).name}; what was inspected is written", signal)
    insist_on_all(summary)


def insist_on_all(summary: Summary) -> None:
    """Raise where less was done than was asked for.

    Raises:
        ImageError: frames or files that could not be inspected; of stills those that show nothing or no part, too.
        FBClipError: nothing was inspected, the source showed nothing any more at the end, a sink failed till the end, or
            one that keeps results lost some.
    """
    status, source, sinks = summary.status, summary.status.source, summary.status.sinks
    if summary.failure:
        raise FBClipError(summary.failure)
    unread = 0 if source.live else source.counters.get("garbage", 0)
    if source.still and (failed := unread + status.rejected + status.unusable + status.absent):
        without = f"; the part is not in {status.absent} of these" if status.absent else ""
        raise ImageError(
            f"{failed} of {status.frames + unread + status.rejected} images could not be inspected{without}"
        )
    if status.rejected:
        raise ImageError(f"{status.rejected} frames could not be inspected: {summary.rejection}")
    if unread:
        raise ImageError(f"{unread} images of {source.name} could not be read; the notices name them")
    if status.frames == status.unusable + status.absent:
        raise FBClipError(f"no image was inspected: {summary.absence}")
    if summary.absence:
        raise FBClipError(f"{source.name} showed nothing at the end: {summary.absence}")
    if broken := [name for name, sink in sinks.items() if sink.error]:
        raise FBClipError(f"results are missing in {', '.join(broken)}, which failed till the end")
    if lossy := [f"{name} ({sinks[name].dropped})" for name in KEEPERS if name in sinks and sinks[name].dropped]:
        raise FBClipError(f"results are missing in {', '.join(lossy)}: lost while it failed or was too slow")


def make_pipeline(source: Source, predictor: Predictor, inspection: Inspection, *sinks: Sink) -> Pipeline:
    """The pipeline of a source that is open, with the sinks that were asked for and these."""
    if inspection.batch > 1 and not predictor.view.tiles and (source.live or isinstance(source, WatchSource)):
        raise UsageError(
            f"several images at once are for files; {source.name} gives one after the other, which would wait",
            option="batch",
        )
    calibration = predictor.calibration
    alarm = Alarm(inspection.vote, Drift(calibration.scores) if calibration else None, inspection.alarm_on)
    asked = make_sinks(inspection.sinks, source)
    pictures = next((sink for sink in asked if isinstance(sink, Pictures)), None)
    pipeline = Pipeline(
        source,
        predictor,
        [*sinks, *asked],
        alarm,
        inspection.limits,
        predictor.frames_at_once,
        pictures.name_files if pictures else None,
    )
    for sink in (*sinks, *asked):
        if isinstance(sink, Prometheus):
            sink.describe(predictor, pipeline.status)
    return pipeline


def run(pipeline: Pipeline, console: Console, log_s: float | None = None) -> tuple[Summary, int | None]:
    """Run a pipeline under a status line; also returns the signal that ended it, if one did.

    Args:
        log_s: seconds between two lines of status where there is no terminal; None for 60, and 10 for stills.
    """
    log_s = log_s if log_s is not None else LOG_S if pipeline.source.total is None else LOG_STILLS_S
    # a thread of its own, so that the main thread, which Python gives the signals, is never held
    with StopRequest(None) as stop, ThreadPoolExecutor(1, "pipeline") as pool:
        running = pool.submit(pipeline.run)
        _watch(running, pipeline, stop, console, log_s)
        return running.result(), stop.signal


def _watch(running: Future[Summary], pipeline: Pipeline, stop: StopRequest, console: Console, log_s: float) -> None:
    """Show the status until the run has ended; pass on a request to stop."""
    total = pipeline.source.total
    with_status = console.is_terminal and (total is None or total >= FEW)
    shown = Live(console=console, refresh_per_second=1 / REFRESH_S, transient=total is not None)
    next_log = time.monotonic() + log_s
    stopping = False
    with shown if with_status else nullcontext() as live:
        while not _ended(running):
            if stop.signal and not stopping:
                stopping = True
                pipeline.stop()
            if live:
                live.update(status_text(pipeline.status()))
            elif time.monotonic() >= next_log:
                next_log += log_s
                with suppress(OSError):  # that nobody can read it is no reason to stop, nor to wait for ever
                    _say_status(pipeline.status(), console)
        if live:
            live.update(status_text(pipeline.status()))


def _say_status(status: Status, console: Console) -> None:
    fields = {"frames": status.frames, "anomalous": status.anomalous, "fps": status.fps, "alarm": status.alarm}
    say(console, status_text(status), fields={"kind": "status", "source": status.source.name, **fields})


def _ended(running: Future[Summary]) -> bool:
    try:
        running.exception(REFRESH_S)
        return True
    except NotYet:
        return False
