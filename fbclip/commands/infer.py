"""`fbclip infer`: images, or one stream."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from fbclip.commands.groups import BundleGroup, SinkGroup, SourceGroup, VerdictGroup
from fbclip.commands.mount import IMAGES, STREAMS, mounted, option, refuse

if TYPE_CHECKING:
    from rich.console import Console

    from fbclip.runtime.predictor import Predictor


class MapSize(str, Enum):
    frame = "frame"
    model = "model"


@dataclass(frozen=True)
class PictureGroup:
    """Where overlays and maps of images go: PROJECT/NAME, then NAME2, NAME3, …"""

    PANEL: ClassVar = "Pictures of images"
    save: Annotated[bool, option("Write no overlay pictures.")] = True
    save_map: Annotated[bool, option("Also write anomaly maps, float32 .npy.", "--save-map"), IMAGES] = False
    map_size: Annotated[
        MapSize, option("Size of saved maps: the frame's or the model's.", metavar="frame|model"), IMAGES
    ] = MapSize.frame
    project: Annotated[Path, option("Folder of the runs.", metavar="PATH"), IMAGES] = Path("runs/infer")
    name: Annotated[str, option("Name of this run: its folder.", metavar="NAME"), IMAGES] = "exp"
    exist_ok: Annotated[bool, option("Write into the run's folder if it is there.", "--exist-ok"), IMAGES] = False


@dataclass(frozen=True)
class ViewGroup:
    """What is seen of a stream, and when it ends."""

    PANEL: ClassVar = "Cameras, streams, videos, watched folders"
    max_frames: Annotated[int | None, option("End after N images or frames.", metavar="N", min=1)] = None
    duration: Annotated[float | None, option("End after this long.", metavar="SECONDS", min=0), STREAMS] = None
    show: Annotated[
        bool, option("Show the pictures in a window (needs opencv-python, not headless).", "--show"), STREAMS
    ] = False
    video: Annotated[
        Path | None, option("Write the pictures to this Motion JPEG file (.avi).", metavar="PATH"), STREAMS
    ] = None


@mounted(first=("bundle", "threshold", "json", "watch", "events"))
def infer(
    context: typer.Context,
    model: BundleGroup,
    verdict: VerdictGroup,
    reading: SourceGroup,
    view: ViewGroup,
    results: SinkGroup,
    pictures: PictureGroup,
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE...]",
            help="Images, folders, globs; or one stream: a camera's number, /dev/video0, csi://0, a video file, "
            "rtsp://…, http://…. Default: the sample images.",
        ),
    ] = None,
) -> None:
    """Find defects in images or in the frames of a camera, and draw where they are."""
    from fbclip.runtime.live.alarm import Vote
    from fbclip.runtime.live.pipeline import Limits
    from fbclip.runtime.live.run import Stream, find_stream, infer_stream
    from fbclip.terminal import make_console, say

    console = make_console(stderr=results.json == "-")
    stream = find_stream(source or [], reading.camera, reading.watch)
    refuse(context, STREAMS if stream else IMAGES, verdict, reading, view, results, pictures)
    predictor = verdict.predictor(model)
    if verdict.threshold == "auto":
        say(console, predictor.explain_threshold())
    if not stream:
        _infer_images(predictor, source or [], view.max_frames, results, pictures, console)
        return
    setup = Stream(
        stream,
        reading.capture,
        results.sinks(view.show, view.video),
        Vote.parse(verdict.vote),
        results.events,
        results.events_bytes,
        Limits(view.max_frames, view.duration),
    )
    infer_stream(predictor, setup, console)


def _infer_images(
    predictor: Predictor,
    source: list[str],
    most: int | None,
    results: SinkGroup,
    pictures: PictureGroup,
    console: Console,
) -> None:
    from fbclip.files import new_run, require_file
    from fbclip.folders import list_images
    from fbclip.runtime.live.stills import Outputs, Summary, infer, report
    from fbclip.terminal import warn

    images = list_images(source, lambda line: warn(console, line))[:most]
    for target in (results.json, results.csv):
        require_file(target)
    wanted = pictures.save or pictures.save_map
    folder = new_run(pictures.project, pictures.name, pictures.exist_ok) if wanted else None
    outputs = Outputs(folder, pictures.save, pictures.save_map, pictures.map_size.value, results.json, results.csv)
    summary = Summary()
    try:
        infer(predictor, images, outputs, summary, console)
    finally:  # also of what was done before a disk was full
        if summary.results or summary.skipped:
            report(summary, outputs, console)
    if summary.skipped or summary.unusable:  # not all that was asked for could be inspected
        raise typer.Exit(2)
