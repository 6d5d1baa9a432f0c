"""`fbclip infer`: images, or one stream."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fbclip.commands.options import BundleOption, DeviceOption, RoiOption, make_console, parse_threshold

IMAGES, STREAMS = "Images", "Cameras, streams, videos, watched folders"
OF_IMAGES = ("save_map", "map_size", "project", "name", "exist_ok")
OF_STREAMS = (
    "resolution",
    "fps",
    "every",
    "skip_first",
    "give_up",
    "duration",
    "vote",
    "events",
    "events_size",
    "show",
    "video",
    "mqtt",
    "webhook",
    "metrics_port",
)


class MapSize(str, Enum):
    frame = "frame"
    model = "model"


def option(panel: str, help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


# those that fbclip serve has too
PrecisionOption = Annotated[str, typer.Option(help="auto, fp32, fp16 or int8.")]
ThresholdOption = Annotated[str, typer.Option(help="auto (calibrated, else the bundle's), or 0 to 1.")]
MinAreaOption = Annotated[
    int, typer.Option(min=0, help="Ignore regions of fewer pixels; an image with no others is good.")
]
JsonOption = Annotated[
    str | None,
    typer.Option(help="Write JSON lines to this file (images: anew; streams: at its end), or - for standard output."),
]
CsvOption = Annotated[
    Path | None, typer.Option(help="Write a CSV table to this file (images: anew; streams: at its end).")
]
CameraOption = Annotated[str | None, option(STREAMS, "The same as SOURCE: a camera's number, …")]
WatchOption = Annotated[bool, option(STREAMS, "SOURCE is a folder: inspect images as they arrive.", "--watch")]
ResolutionOption = Annotated[str | None, option(STREAMS, "WIDTHxHEIGHT to ask the camera for.")]
FpsOption = Annotated[float | None, option(STREAMS, "Frames per second to ask the camera for.")]
EveryOption = Annotated[int, option(STREAMS, "Inspect every Nth frame.", min=1)]
SkipFirstOption = Annotated[int, option(STREAMS, "Leave out N frames after each connect to a camera.", min=0)]
GiveUpOption = Annotated[
    float | None, option(STREAMS, "Exit with code 1 after so many seconds without a frame. Default: keep trying.")
]
VoteOption = Annotated[str, option(STREAMS, "K/N: alarm where K of the last N frames are anomalous.")]
EventsOption = Annotated[Path | None, option(STREAMS, "Save the frames around each alarm in this folder.")]
EventsSizeOption = Annotated[str, option(STREAMS, "Largest size of that folder; the oldest events are deleted.")]
MqttOption = Annotated[
    str | None, option(STREAMS, "Publish results to this MQTT broker and topic prefix: mqtt://HOST/PREFIX.")
]
WebhookOption = Annotated[str | None, option(STREAMS, "Address that alarms and notices are posted to.")]


def infer(
    context: typer.Context,
    source: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, folders, globs; or one stream: a camera's number, /dev/video0, csi://0, a video file, "
            "rtsp://…, http://…. The sample images if left out."
        ),
    ] = None,
    bundle: BundleOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    threshold: ThresholdOption = "auto",
    roi: RoiOption = None,
    min_area: MinAreaOption = 0,
    max_frames: Annotated[int | None, typer.Option(min=1, help="End after so many images or frames.")] = None,
    json: JsonOption = None,
    csv: CsvOption = None,
    save: Annotated[bool, option(IMAGES, "Write overlay pictures.")] = True,
    save_map: Annotated[bool, option(IMAGES, "Write anomaly maps, float32 .npy.", "--save-map")] = False,
    map_size: Annotated[MapSize, option(IMAGES, "Size of saved maps: the frame's or the model's.")] = MapSize.frame,
    project: Annotated[Path, option(IMAGES, "Folder of the runs.")] = Path("runs/infer"),
    name: Annotated[str, option(IMAGES, "Name of this run.")] = "exp",
    exist_ok: Annotated[bool, option(IMAGES, "Write into the run's folder if it is there.", "--exist-ok")] = False,
    camera: CameraOption = None,
    watch: WatchOption = False,
    resolution: ResolutionOption = None,
    fps: FpsOption = None,
    every: EveryOption = 1,
    skip_first: SkipFirstOption = 0,
    give_up: GiveUpOption = None,
    duration: Annotated[float | None, option(STREAMS, "End after so many seconds.", min=0)] = None,
    vote: VoteOption = "1/1",
    events: EventsOption = None,
    events_size: EventsSizeOption = "1GB",
    show: Annotated[
        bool, option(STREAMS, "Show the pictures in a window (needs opencv-python, not headless).", "--show")
    ] = False,
    video: Annotated[Path | None, option(STREAMS, "Write the overlays to this Motion JPEG file (.avi).")] = None,
    mqtt: MqttOption = None,
    webhook: WebhookOption = None,
    metrics_port: Annotated[
        int | None, option(STREAMS, "Serve Prometheus metrics on this port of 127.0.0.1.", min=1, max=65535)
    ] = None,
) -> None:
    """Score images, or the frames of a camera, and draw where the defects are."""
    from fbclip.files import new_run, require_file
    from fbclip.folders import list_images
    from fbclip.runtime.live.alarm import Vote
    from fbclip.runtime.live.pipeline import Limits
    from fbclip.runtime.live.run import Stream, find_stream, infer_stream, parse_resolution
    from fbclip.runtime.live.sinks import SinkOptions
    from fbclip.runtime.live.sinks.events import parse_size
    from fbclip.runtime.live.sources import CaptureOptions
    from fbclip.runtime.live.stills import Outputs, Summary, infer, report
    from fbclip.runtime.predictor import Predictor
    from fbclip.runtime.roi import Roi
    from fbclip.terminal import say

    console = make_console(stderr=json == "-")
    stream = find_stream(source or [], camera, watch)
    refuse(context, *(("a stream", OF_IMAGES) if stream else ("images", OF_STREAMS)))
    region = Roi.parse(roi) if roi else None
    predictor = Predictor(
        bundle,
        device=device,
        precision=precision,
        threshold=parse_threshold(threshold),
        roi=region,
        min_area=min_area,
    )
    if threshold == "auto":
        say(console, predictor.explain_threshold())
    if stream:
        setup = Stream(
            stream,
            CaptureOptions(parse_resolution(resolution), fps, every, give_up, watch, skip_first=skip_first),
            SinkOptions(show, video, json=json, csv=csv, mqtt=mqtt, webhook=webhook, metrics_port=metrics_port),
            Vote.parse(vote),
            events,
            parse_size(events_size),
            Limits(max_frames, duration),
        )
        infer_stream(predictor, setup, console)
    else:
        images = list_images(source or [], lambda line: say(console, line, "yellow"))[:max_frames]
        for target in (json, csv):
            require_file(target)
        folder = new_run(project, name, exist_ok) if save or save_map else None
        outputs, summary = Outputs(folder, save, save_map, map_size.value, json, csv), Summary()
        try:
            infer(predictor, images, outputs, summary, console)
        finally:  # also of what was done before a disk was full
            if summary.results or summary.skipped:
                report(summary, outputs, console)
        if summary.skipped or summary.unusable:  # not all that was asked for could be inspected
            raise typer.Exit(2)


def refuse(context: typer.Context, source: str, options: tuple[str, ...]) -> None:
    """Options that this kind of source would ignore."""
    from fbclip.errors import UsageError

    sources = {name: context.get_parameter_source(name) for name in options}
    if given := [name for name, from_ in sources.items() if from_ and from_.name == "COMMANDLINE"]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"SOURCE is {source}, which {names} can't be used with: leave it out, or see fbclip {context.info_name} -h"
        )
