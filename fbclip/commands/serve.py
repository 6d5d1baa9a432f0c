"""`fbclip serve`: a page to watch a stream, and predictions over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from fbclip.commands.infer import (
    CameraOption,
    CsvOption,
    EventsOption,
    EventsSizeOption,
    EveryOption,
    FpsOption,
    GiveUpOption,
    JsonOption,
    MinAreaOption,
    MqttOption,
    PrecisionOption,
    ResolutionOption,
    SkipFirstOption,
    ThresholdOption,
    VoteOption,
    WatchOption,
    WebhookOption,
    option,
    refuse,
)
from fbclip.commands.options import BundleOption, DeviceOption, RoiOption, make_console, parse_threshold

SERVER = "Server"
OF_STREAMS = (
    "resolution",
    "fps",
    "every",
    "skip_first",
    "give_up",
    "vote",
    "events",
    "events_size",
    "json",
    "csv",
    "mqtt",
    "webhook",
)


def serve(
    context: typer.Context,
    source: Annotated[
        list[str] | None,
        typer.Argument(
            help="A camera's number, /dev/video0, csi://0, a video file, rtsp://…, http://…. If left out, only images "
            "that are sent are inspected."
        ),
    ] = None,
    bundle: BundleOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    threshold: ThresholdOption = "auto",
    roi: RoiOption = None,
    min_area: MinAreaOption = 0,
    host: Annotated[
        str, option(SERVER, "Address to listen on, 0.0.0.0 for all; those that others reach need --token.")
    ] = "127.0.0.1",
    port: Annotated[int, option(SERVER, "0 takes a free one.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        option(SERVER, "Secret that every client must send, 16 characters or more.", "--token", envvar="FBCLIP_TOKEN"),
    ] = None,
    camera: CameraOption = None,
    watch: WatchOption = False,
    resolution: ResolutionOption = None,
    fps: FpsOption = None,
    every: EveryOption = 1,
    skip_first: SkipFirstOption = 0,
    give_up: GiveUpOption = None,
    vote: VoteOption = "1/1",
    events: EventsOption = None,
    events_size: EventsSizeOption = "1GB",
    json: JsonOption = None,
    csv: CsvOption = None,
    mqtt: MqttOption = None,
    webhook: WebhookOption = None,
) -> None:
    """Watch a camera in a browser, and inspect images that are sent."""
    _needs_serve_extra()
    from fbclip.errors import UsageError
    from fbclip.runtime.live.alarm import Vote
    from fbclip.runtime.live.pipeline import Limits
    from fbclip.runtime.live.run import Stream, find_stream, parse_resolution
    from fbclip.runtime.live.sinks import SinkOptions
    from fbclip.runtime.live.sinks.events import parse_size
    from fbclip.runtime.live.sources import CaptureOptions
    from fbclip.runtime.predictor import Predictor
    from fbclip.runtime.roi import Roi
    from fbclip.runtime.serving.run import Address, serve
    from fbclip.terminal import say

    console = make_console(stderr=json == "-")
    stream = find_stream(source or [], camera, watch)
    if source and not stream:
        raise UsageError(f"SOURCE is a camera, stream, video or, with --watch, a folder; got {' '.join(source)}")
    if not stream:
        refuse(context, "left out", OF_STREAMS)
    predictor = Predictor(
        bundle,
        device=device,
        precision=precision,
        threshold=parse_threshold(threshold),
        roi=Roi.parse(roi) if roi else None,
        min_area=min_area,
    )
    setup = stream and Stream(
        stream,
        CaptureOptions(parse_resolution(resolution), fps, every, give_up, watch, skip_first=skip_first),
        SinkOptions(json=json, csv=csv, mqtt=mqtt, webhook=webhook),
        Vote.parse(vote),
        events,
        parse_size(events_size),
        Limits(),
    )
    if threshold == "auto":
        say(console, predictor.explain_threshold())
    serve(predictor, setup or None, Address(host, port, token), console)


def _needs_serve_extra() -> None:
    from importlib.util import find_spec

    from fbclip.errors import UsageError

    if missing := [
        name for name in ("fastapi", "uvicorn", "websockets", "prometheus_client") if find_spec(name) is None
    ]:
        raise UsageError(f"fbclip serve needs {', '.join(missing)}: pip install 'fbclip[serve]'")
