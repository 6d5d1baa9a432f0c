"""`fbclip infer --camera 0`: source, pipeline and sinks put together, a status line, and a clean end."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fbclip.addresses import shown
from fbclip.errors import FBClipError, ImageError, Interrupted, UsageError
from fbclip.runtime.live.alarm import Decider, Drift, Vote
from fbclip.runtime.live.pipeline import Limits, LiveSummary, Pipeline
from fbclip.runtime.live.records import Notice, Result, Sink
from fbclip.runtime.live.sinks import SinkOptions, make_sinks
from fbclip.runtime.live.sinks.events import EventRecorder
from fbclip.runtime.live.sources import CaptureOptions, Source, is_video, open_source, opens_as_video
from fbclip.runtime.predictor import Predictor
from fbclip.stopping import StopRequest
from fbclip.terminal import printable, say

RECORDS = ("json", "csv", "mqtt", "events")  # sinks of which nothing may be missing; the others show what is now
REFRESH_S = 0.25
LOG_S = 60.0  # between lines where there is no terminal
COLOURS = {
    "lost": "red",
    "blind": "red",
    "failing": "red",
    "drifting": "yellow",
    "on": "red",
    "connecting": "yellow",
}


def find_stream(sources: list[str], camera: str | None, watch: bool) -> str | None:
    """What `open_source` is to open; None where the sources are images.

    Raises:
        UsageError: more than one stream, or images beside it.
    """
    given = sources if camera is None else [*sources, camera]
    if not (watch or camera is not None or any(is_stream(text, alone=len(given) == 1) for text in given)):
        return None
    if len(given) != 1:
        what = f"got {', '.join(map(shown, given))}" if given else "got none"
        raise UsageError(f"a camera, stream, video or watched folder is inspected alone; {what}")
    return given[0]


def is_stream(text: str, alone: bool) -> bool:
    """Whether a SOURCE is a camera, an address or a video, and not images.

    Args:
        alone: it is the only one: a file that is no image is to be a video, and beside others only if it is one.
    """
    if "://" in text or text.startswith("/dev/") or re.fullmatch(r"\d{1,3}", text):
        return True
    path = Path(text)
    if not path.exists():
        return shown(text) != text  # an address without its //
    return path.is_file() and is_video(path) and (alone or opens_as_video(path))


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """`WIDTHxHEIGHT` in pixels.

    Raises:
        UsageError: no such size.
    """
    if text is None:
        return None
    if not (sides := re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", text)):
        raise UsageError(f"--resolution is WIDTHxHEIGHT in pixels, like 1280x720; got {text!r}")
    return int(sides[1]), int(sides[2])


class ConsoleLog:
    """A sink that prints notices; in a thread of its own like any other, since a terminal may be held."""

    name = "console"

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, result: Result) -> None:
        """Results are the status line's."""

    def notify(self, notice: Notice) -> None:
        if notice.kind != "run":
            stamp = time.strftime("%H:%M:%S", time.localtime(notice.time))
            line = f"{stamp} {notice.kind} {notice.state} ({notice.subject}): {notice.message}"
            say(self.console, line, COLOURS.get(notice.state, ""))

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class Stream:
    """What to inspect, how, and where results go; `events` None is nowhere."""

    source: str
    capture: CaptureOptions
    sinks: SinkOptions
    vote: Vote
    events: Path | None
    events_bytes: int
    limits: Limits


def infer_stream(predictor: Predictor, stream: Stream, console: Console) -> None:
    """Inspect a stream until it ends, a limit, Ctrl-C or SIGTERM, and say what was done.

    Raises:
        Interrupted: a signal ended it; frames in work were finished, sinks closed.
        FBClipError: of the source or the model; as `insist_on_all`.
    """
    with open_source(stream.source, stream.capture) as source:
        pipeline = make_pipeline(source, predictor, stream, console)
        summary, signal = run(pipeline, console)
    print_summary(summary, console)
    if signal:
        raise Interrupted(f"stopped by {Signals(signal).name}; everything is written", signal)
    insist_on_all(summary)


def insist_on_all(summary: LiveSummary) -> None:
    """Raise ImageError where frames or files could not be inspected, FBClipError where none was, where the source showed
    nothing any more at the end, where a sink failed till the end, or where one that keeps results lost some."""
    source, sinks = summary.status["source"], summary.status["sinks"]
    if summary.unfit:
        raise ImageError(f"{summary.unfit} frames could not be inspected: {summary.misfit}")
    if (unread := source["counters"].get("garbage", 0)) and not source["live"]:
        raise ImageError(f"{unread} images of {source['name']} could not be read; the notices name them")
    if summary.frames == summary.unusable:
        raise FBClipError(f"no image was inspected: {summary.absence}")
    if summary.absence:
        raise FBClipError(f"{source['name']} showed nothing at the end: {summary.absence}")
    if broken := [name for name, sink in sinks.items() if sink["error"]]:
        raise FBClipError(f"results are missing in {', '.join(broken)}, which failed till the end")
    if lossy := [f"{name} ({sinks[name]['dropped']})" for name in RECORDS if name in sinks and sinks[name]["dropped"]]:
        raise FBClipError(f"results are missing in {', '.join(lossy)}: lost while it failed or was too slow")


def make_pipeline(
    source: Source, predictor: Predictor, stream: Stream, console: Console, sinks: Sequence[Sink] = ()
) -> Pipeline:
    """The pipeline of a source that is open, with the sinks that were asked for and more."""
    calibration = predictor.calibration
    decider = Decider(stream.vote, Drift(calibration.scores) if calibration else None)
    recorder = [EventRecorder(stream.events, stream.events_bytes)] if stream.events else []
    asked = make_sinks(stream.sinks, lambda: source.counters)
    return Pipeline(source, predictor, [ConsoleLog(console), *sinks, *recorder, *asked], decider, stream.limits)


def run(pipeline: Pipeline, console: Console) -> tuple[LiveSummary, int | None]:
    """Run a pipeline under a status line; also returns the signal that ended it, if one did."""
    # a thread of its own, so that the main thread, which Python gives the signals, is never held
    with StopRequest(None) as stop, ThreadPoolExecutor(1, "pipeline") as pool:
        running = pool.submit(pipeline.run)
        _watch(running, pipeline, stop, console)
        return running.result(), stop.signal


def _watch(running: Future[LiveSummary], pipeline: Pipeline, stop: StopRequest, console: Console) -> None:
    """Show the status until the run has ended; pass on a request to stop."""
    shown = Live(console=console, refresh_per_second=1 / REFRESH_S) if console.is_terminal else nullcontext()
    next_log = time.monotonic() + LOG_S
    stopping = False
    with shown as live:
        while not _ended(running):
            if stop.signal and not stopping:
                stopping = True
                pipeline.stop()
            if live:
                live.update(status_text(pipeline.status()))
            elif time.monotonic() >= next_log:
                next_log += LOG_S
                with suppress(OSError):  # that nobody can read it is no reason to stop, nor to wait for ever
                    console.print(status_text(pipeline.status()), soft_wrap=True)
        if live:
            live.update(status_text(pipeline.status()))


def _ended(running: Future[LiveSummary]) -> bool:
    try:
        running.exception(REFRESH_S)
        return True
    except NotYet:
        return False


def status_text(status: dict[str, Any]) -> Text:
    """One line of what `Pipeline.status` says: source, rate, age, stages, score, alarm, drift, losses, sinks."""
    source, stages = status["source"], status["stages_ms"]
    state = (source["state"], COLOURS.get(source["state"], "green"))
    parts = [Text.assemble(state, f" {printable(source['name'])}")]
    if status["age_ms"]:
        age = "/".join(f"{status['age_ms'][p]:.0f}" for p in ("p50", "p95", "p99"))
        medians = " ".join(f"{stage} {values['p50']:.0f}" for stage, values in stages.items() if values)
        verdict = (
            f"{status['score']:.3f} {'≥' if status['score'] >= status['threshold'] else '<'} {status['threshold']:.3f}"
        )
        parts += [
            Text(f"{status['fps']:.1f}/s"),
            Text(f"age {age} ms"),
            Text(medians, "dim"),
            Text(verdict),
            Text("ALARM", "bold red") if status["alarm"] else Text("no alarm"),
        ]
    if status["drift"] == "drifting":
        parts.append(Text("drifting", "yellow"))
    losses = {name: count for name, count in source["counters"].items() if name != "frames" and count}
    losses |= {name: status[name] for name in ("unfit", "unusable", "overruled") if status[name]}
    parts += [Text(f"{name} {count}", "yellow") for name, count in losses.items()]
    for name, sink in status["sinks"].items():
        if sink["state"] == "failing" or sink["dropped"]:
            lost = f", {sink['dropped']} dropped" if sink["dropped"] else ""
            parts.append(Text(f"{name} {sink['state']}{lost}", COLOURS.get(sink["state"], "yellow")))
    return Text(" · ").join(parts)


def print_summary(summary: LiveSummary, console: Console) -> None:
    """One line of what was done, and one for each sink that lost something."""
    rate = summary.frames / summary.seconds if summary.seconds else 0.0
    age = summary.status["age_ms"]
    ages = f"; age {age['p50']:.0f} ms, at p99 {age['p99']:.0f}" if age else ""
    unusable = f", {summary.unusable} unusable" if summary.unusable else ""
    overruled = f", {summary.overruled} good against their score" if summary.overruled else ""
    say(
        console,
        f"{summary.frames} frames in {summary.seconds:.1f} s ({rate:.1f}/s{ages}): {summary.anomalous} anomalous, "
        f"{summary.alarms} alarms{unusable}{overruled}",
    )
    for name, sink in summary.status["sinks"].items():
        if sink["dropped"]:
            say(console, f"{name} lost {sink['dropped']} results and notices: {sink['dropped_because']}")
        elif sink["error"]:
            say(console, f"{name} failed: {sink['error']}")
