"""`fbclip infer`: images, or one stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from fbclip.commands.config import ELSEWHERE
from fbclip.commands.groups import AreaGroup, BundleGroup, SinkGroup, SourceGroup, VerdictGroup
from fbclip.commands.mount import IMAGES, STREAMS, mounted, option, refuse
from fbclip.errors import UsageError

if TYPE_CHECKING:
    from fbclip.runtime.live.sinks import Saving


class MapSize(str, Enum):
    frame = "frame"
    model = "model"


@dataclass(frozen=True)
class PictureGroup:
    """Pictures and maps of results: in PROJECT/NAME, then NAME2, NAME3, …"""

    PANEL: ClassVar[str] = "Pictures and maps"
    save: Annotated[
        bool | None,
        option(
            "Write pictures with heat maps, or don't: of images all, else those of defects during an alarm, and "
            "of what --alarm-on names. Default: yes, but for cameras and streams."
        ),
    ] = None
    show_tiles: Annotated[bool, option("With --tiles: draw the tiles on the pictures.", "--show-tiles")] = False
    save_map: Annotated[bool, option("Also write anomaly maps, float32 .npy.", "--save-map")] = False
    map_size: Annotated[MapSize, option("Size of saved maps: the frame's or the model's.", metavar="frame|model")] = (
        MapSize.frame
    )
    project: Annotated[Path, option("Folder of the runs.", metavar="PATH")] = Path("runs/infer")
    name: Annotated[str, option("Name of this run's folder; exp2, exp3, … follow.", metavar="NAME")] = "exp"
    exist_ok: Annotated[bool, option("Write into the run's folder if it is there.", "--exist-ok")] = False

    def saving(self, live: bool, in_tiles: bool, aligned: bool) -> Saving | None:
        """What is written of a source, in a folder that is made for it; None for nothing.

        Raises:
            UsageError: tiles to draw, and none, or no pictures of them, or tiles of parts that lie anyhow.
        """
        from fbclip.files import new_run
        from fbclip.runtime.live.sinks import Saving

        overlays = self.save if self.save is not None else not live
        if self.show_tiles and aligned:
            raise UsageError(
                "tiles are drawn where frames are inspected as they lie; got a part to align to", option="align"
            )
        if self.show_tiles and not (overlays and in_tiles):
            got, option = ("no tiles", "tiles") if overlays else ("no pictures", "save")
            raise UsageError(f"tiles are drawn on the pictures of an inspection in tiles; got {got}", option=option)
        if not (overlays or self.save_map):
            return None
        folder = new_run(self.project, self.name, self.exist_ok)
        return Saving(folder, overlays, self.save_map, self.map_size.value, self.show_tiles)


@dataclass(frozen=True)
class ViewGroup:
    """What is seen of a stream, and when it ends."""

    PANEL: ClassVar[str] = SourceGroup.PANEL
    duration: Annotated[float | None, option("End after this long.", metavar="SECONDS", min=0), STREAMS] = None
    show: Annotated[
        bool, option("Show the pictures in a window (needs opencv-python, not headless).", "--show"), STREAMS
    ] = False
    video: Annotated[
        Path | None, option("Write the pictures to this Motion JPEG file (.avi).", metavar="PATH"), STREAMS
    ] = None


@dataclass(frozen=True)
class WorkGroup:
    """How much is inspected, and how much of it at once."""

    PANEL: ClassVar[str] = "Model and device"
    max_frames: Annotated[int | None, option("End after N images or frames.", metavar="N", min=1)] = None
    batch: Annotated[
        int,
        option(
            "Images given to the model at once, of files alone; with --tiles, tiles of one image.", metavar="N", min=1
        ),
    ] = 1


@mounted(first=("bundle", "threshold", "json", "watch", "events"))
def infer(
    context: typer.Context,
    model: BundleGroup,
    work: WorkGroup,
    verdict: VerdictGroup,
    area: AreaGroup,
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
    from fbclip.assets import SAMPLES
    from fbclip.files import require_file
    from fbclip.runtime.live.alarm import Vote, parse_kinds
    from fbclip.runtime.live.pipeline import Limits
    from fbclip.runtime.live.run import Inspection, inspect
    from fbclip.runtime.live.sources import open_source
    from fbclip.terminal import make_console, say

    texts, capture = reading.texts(source), reading.capture
    if not texts and not reading.watch:
        if file := context.meta.get(ELSEWHERE):  # a line's file, meant for another command: no case for samples
            raise UsageError(
                f"no source is given; got {file} without [infer], with other commands' options: name a source"
            )
        texts = [str(SAMPLES)]
    with open_source(texts, capture) as opened:
        refuse(context, IMAGES if opened.still else STREAMS, verdict, reading, view, results)
        console = make_console(stderr=results.json == "-", service=not opened.still)
        with verdict.predictor(model, area, work.batch) as predictor:
            if verdict.threshold == "auto":
                say(console, predictor.explain_threshold())
            say(console, predictor.explain_device(), fields={"kind": "model", **predictor.identity})
            for target in (results.json, results.csv):
                require_file(target)
            sinks = replace(
                results.sinks,
                saving=pictures.saving(opened.live, area.tiles is not None, area.align is not None),
                show=view.show,
                video=view.video,
            )
            limits = Limits(work.max_frames, view.duration)
            vote, alarm_on = Vote.parse(verdict.vote), parse_kinds(verdict.alarm_on)
            inspection = Inspection(texts, capture, sinks, vote, alarm_on, limits, work.batch)
            inspect(predictor, opened, inspection, console)
