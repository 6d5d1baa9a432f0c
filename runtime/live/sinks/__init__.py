"""Where records go: `make_sinks` opens what `SinkOptions` asks for, each kind in a file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fbclip.errors import UsageError
from fbclip.runtime.live.records import Sink, Source
from fbclip.runtime.live.sinks.lines import Csv, JsonLines, LineFile, StandardOutput, columns_of
from fbclip.runtime.live.sinks.pictures import Pictures, Saving
from fbclip.runtime.live.sources import FileSource

__all__ = ["Saving", "SinkOptions", "make_sinks"]


@dataclass(frozen=True)
class SinkOptions:
    """Where records go; None means nowhere.

    Attributes:
        json: JSON lines, added to this file; "-" is standard output. Of stills results alone, of other sources notices
            too.
        csv: table of the results; rows are added to this file.
        saving: pictures and anomaly maps.
        show: a window with the overlay of each result.
        video: Motion JPEG file (.avi) of the overlays, one frame per result.
        video_fps: frames per second that the video claims.
        mqtt: mqtt://user:password@host:port/prefix, or mqtts:// for TLS.
        webhook: http:// or https:// address that alarms and notices are posted to.
        metrics: host and port where Prometheus fetches its metrics.
        events, events_bytes: folder for the frames around alarms, and how large it may become.
        log_mb: size in MB at which the JSON lines or CSV file of a source without end is put aside as NAME.1, NAME.2, …
        log_keep: how many of these stay.
    """

    json: str | None = None
    csv: Path | None = None
    saving: Saving | None = None
    show: bool = False
    video: Path | None = None
    video_fps: float = 10.0
    mqtt: str | None = None
    webhook: str | None = None
    metrics: tuple[str, int] | None = None
    events: Path | None = None
    events_bytes: int = 10**9
    log_mb: float = 100.0
    log_keep: int = 5


def make_sinks(options: SinkOptions, source: Source) -> list[Sink]:
    """The sinks that are asked for, open and ready.

    Args:
        source: that the records will come from.

    Raises:
        UsageError: a file that can't be written, a malformed address, a package or display that is missing.
    """
    if options.json and options.csv and os.path.realpath(options.json) == os.path.realpath(options.csv):
        raise UsageError(f"JSON lines and a CSV table are two files; got {options.csv} for both", option="csv")
    sinks: list[Sink] = []
    with ExitStack() as opened:  # one that can't be made closes those before it
        for make in _makers(options, source):
            sinks.append(make())
            opened.callback(sinks[-1].close)
        opened.pop_all()
    return sinks


def _makers(options: SinkOptions, source: Source) -> list[Callable[[], Sink]]:
    """What opens each sink. What needs a package or a display is imported where it is asked for."""
    makers: list[Callable[[], Sink]] = []
    if options.show:
        from fbclip.runtime.live.sinks.window import Window

        makers.append(Window)
    if path := options.video:
        from fbclip.runtime.live.sinks.video import Video

        makers.append(lambda: Video(path, options.video_fps))
    if folder := options.events:
        from fbclip.runtime.live.sinks.events import EventRecorder

        makers.append(lambda: EventRecorder(folder, options.events_bytes))
    if target := options.json:
        lines = StandardOutput if target == "-" else lambda: _log(Path(target), options, source)
        makers.append(lambda: JsonLines(lines(), notices=not source.still))
    if table := options.csv:
        columns = columns_of(table)
        makers.append(lambda: Csv(_log(table, options, source, ",".join(columns)), len(columns)))
    if saving := options.saving:
        makers.append(
            lambda: Pictures(saving, source.paths if isinstance(source, FileSource) and source.still else None)
        )
    if broker := options.mqtt:
        from fbclip.runtime.live.sinks.mqtt import Mqtt

        makers.append(lambda: Mqtt(broker))
    if url := options.webhook:
        from fbclip.runtime.live.sinks.webhook import Webhook

        makers.append(lambda: Webhook(url))
    if place := options.metrics:
        from fbclip.runtime.live.sinks.metrics import Prometheus

        makers.append(lambda: Prometheus(lambda: source.counters, place))
    return makers


def _log(path: Path, options: SinkOptions, source: Source, header: str = "") -> LineFile:
    """A list of images ends, and is kept whole."""
    limit = None if source.still else round(options.log_mb * 1e6)
    return LineFile(path, header, limit, options.log_keep)
