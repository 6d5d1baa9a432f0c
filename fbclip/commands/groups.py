"""The groups of options that several commands have, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fbclip.commands.mount import NOTHING, STREAMS, option
from fbclip.errors import UsageError
from fbclip.parsing import parse_frame_size, parse_layers, parse_place, parse_resolution, parse_threshold

if TYPE_CHECKING:
    from fbclip.runtime.live.sinks import SinkOptions
    from fbclip.runtime.live.sources import CaptureOptions
    from fbclip.runtime.predictor import Predictor
    from fbclip.runtime.tiles import Tiles

BUNDLE = "Bundle to use: a folder NAME.fbclip that export or calibrate wrote. Default: the embedded model."
DEVICE = "Where the model runs: auto (what works here of: an engine of the bundle, cuda, cpu), cpu, cuda, tensorrt or tensorrt-rtx (an engine of the bundle) or ort-tensorrt (TensorRT inside ONNX Runtime)."
PRECISION = "Graph of the bundle to run: auto, fp32, fp16 or int8."
THRESHOLD = (
    "Scores from here on are defects: 0 to 1. auto: the calibrated threshold, or the model's own without calibration."
)
MEMORY = (
    "What good parts taught: auto, the bundle's own where it has one; off, the zero-shot model; or a memory.npz of the same "
    "model."
)
DETAIL = 32  # fbclip.runtime.tiles.DETAIL, which the help doesn't wait for
BATCH_NAMES = ("--batch", "--batch-size")
WARM_UP_NAMES = ("--warm-up", "--skip-first")
WARM_UP = "Leave out N frames after each connect to a camera, until it has found its exposure."

BundleOption = Annotated[Path | None, option(BUNDLE, metavar="PATH", envvar="FBCLIP_BUNDLE")]
MemoryOption = Annotated[str, option(MEMORY, metavar="auto|off|PATH")]
JsonReport = Annotated[str | None, option("Write the report to this file, or - for standard output.", metavar="PATH")]


@dataclass(frozen=True)
class BundleGroup:
    """What inspects."""

    PANEL: ClassVar[str] = "Model and device"
    bundle: BundleOption = None
    device: Annotated[str, option(DEVICE, metavar="NAME")] = "auto"
    precision: Annotated[str, option(PRECISION, metavar="NAME")] = "auto"
    memory: MemoryOption = "auto"


@dataclass(frozen=True)
class TilesGroup:
    """How large pictures are cut."""

    PANEL: ClassVar[str] = "What is inspected of a picture"
    tiles: Annotated[
        str | None,
        option(
            "Small defects in large pictures: look at overlapping tiles, too. 3x4 (rows x columns), a side in pixels, or auto.",
            metavar="RxC|N|auto",
        ),
    ] = None
    overlap: Annotated[float, option("Overlap of neighbouring tiles: a share of their side.", metavar="SHARE")] = 0.25
    detail: Annotated[
        float | None,
        option(
            f"With --tiles auto: pixels of the picture that a patch of the model covers at most; fewer for smaller defects, "
            f"and more time. Default: {DETAIL}.",
            metavar="PIXELS",
        ),
    ] = None

    def cut(self) -> Tiles | None:
        """The tiles; None for none.

        Raises:
            UsageError: what goes with them alone.
        """
        from fbclip.runtime.tiles import OVERLAP, Tiles

        if self.tiles is not None:
            return Tiles.parse(self.tiles, self.overlap, self.detail)
        if self.detail is not None or self.overlap != OVERLAP:
            raise UsageError("an overlap and a detail are of tiles; got none", option="tiles")
        return None


@dataclass(frozen=True)
class AreaGroup(TilesGroup):
    """Which part of a picture is inspected, where it lies, and how it is cut."""

    roi: Annotated[
        str | None,
        option("Inspect only this part of the picture: x0,y0,x1,y1 in pixels, or a mask picture.", metavar="AREA"),
    ] = None
    align: Annotated[
        Path | None,
        option(
            "Parts that move: a picture of the part in place. It is found in each picture; where it isn't, the verdict is "
            "absent. --roi is in this picture's pixels.",
            metavar="PATH",
        ),
    ] = None
    mask: Annotated[
        Path | None,
        option(
            "With --align: a picture of the same size, white where the part is. Nothing else counts.", metavar="PATH"
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """What a `Predictor` and the functions that make one take: roi, tiles and align.

        Raises:
            UsageError: a mask without a part to align to.
        """
        from fbclip.runtime.align import Align
        from fbclip.runtime.roi import Roi

        if self.mask and not self.align:
            raise UsageError("a mask of the part goes with a picture of it; got none", option="align")
        return {
            "roi": Roi.parse(self.roi) if self.roi else None,
            "tiles": self.cut(),
            "align": Align.parse(self.align, self.mask) if self.align else None,
        }


@dataclass(frozen=True)
class DefectGroup:
    """What counts as a defect."""

    PANEL: ClassVar[str] = "Verdict"
    threshold: Annotated[str, option(THRESHOLD, metavar="NUMBER")] = "auto"
    min_area: Annotated[
        float,
        option(
            "Ignore marked regions smaller than N pixels, or mm² with --mm-per-pixel; an image without a larger one is good.",
            metavar="N",
        ),
    ] = 0
    mm_per_pixel: Annotated[
        float | None,
        option(
            "How much of the part a pixel shows, in mm: regions are told in mm, too. With --align a pixel of that picture.",
            metavar="MM",
        ),
    ] = None
    merge: Annotated[
        int, option("Marked regions with fewer pixels than this between them are one.", metavar="PIXELS")
    ] = 0
    max_regions: Annotated[
        int | None,
        option("Report at most N regions, the largest first. Default: all, the highest peak first.", metavar="N"),
    ] = None


@dataclass(frozen=True)
class VerdictGroup(DefectGroup):
    """What counts as a defect, and as an alarm."""

    vote: Annotated[
        str,
        option("Raise an alarm when K of the last N frames have a defect; it ends at K/2 or fewer.", metavar="K/N"),
        STREAMS,
    ] = "1/1"
    alarm_on: Annotated[
        str | None,
        option(
            "Frames of these kinds count for the alarm as defects do: absent (without the part), unusable (black, frozen, …), "
            "or both with a comma. Default: they neither raise nor clear it.",
            metavar="KIND,…",
        ),
        STREAMS,
    ] = None

    def predictor(self, model: BundleGroup, area: AreaGroup, batch: int = 1) -> Predictor:
        from fbclip.runtime.predictor import Predictor

        threshold = parse_threshold(self.threshold)
        return Predictor(
            model.bundle,
            device=model.device,
            precision=model.precision,
            threshold=threshold,
            memory=model.memory,
            min_area=self.min_area,
            mm_per_pixel=self.mm_per_pixel,
            merge=self.merge,
            max_regions=self.max_regions,
            batch=batch,
            **area.settings(),
        )


@dataclass(frozen=True)
class SourceGroup:
    """How a camera, stream, video or watched folder is read."""

    PANEL: ClassVar[str] = "Cameras, streams, videos, watched folders"
    camera: Annotated[
        str | None, option("Another way to give SOURCE: a camera's number or address.", metavar="SOURCE")
    ] = None
    watch: Annotated[bool, option("SOURCE is a folder: inspect images as they arrive.", "--watch")] = False
    resolution: Annotated[
        str | None, option("Width and height to ask the camera for, like 1280x720.", metavar="WxH"), STREAMS
    ] = None
    fps: Annotated[float | None, option("Frames per second to ask the camera for.", metavar="N"), STREAMS] = None
    every: Annotated[int, option("Inspect every Nth frame.", metavar="N", min=1), STREAMS] = 1
    skip_first: Annotated[int, option(WARM_UP, *WARM_UP_NAMES, metavar="N", min=0), STREAMS] = 0
    give_up: Annotated[
        float | None,
        option("Exit with code 1 after this long without a frame. Default: keep trying.", metavar="SECONDS"),
        STREAMS,
    ] = None

    def texts(self, source: list[str] | None) -> list[str]:
        """What `open_source` takes, of the argument and --camera."""
        return [*(source or []), *([self.camera] if self.camera is not None else [])]

    @property
    def capture(self) -> CaptureOptions:
        from fbclip.runtime.live.sources import CaptureOptions

        size_wh = parse_resolution(self.resolution) if self.resolution else None
        return CaptureOptions(size_wh, self.fps, self.every, self.give_up, self.watch, skip_first=self.skip_first)


@dataclass(frozen=True)
class SinkGroup:
    """Where results go."""

    PANEL: ClassVar[str] = "Results"
    json: Annotated[
        str | None,
        option(
            "Add a line of JSON for each image or frame to this file; - for standard output.",
            metavar="PATH",
        ),
    ] = None
    csv: Annotated[
        Path | None,
        option("Add rows to this CSV table.", metavar="PATH"),
    ] = None
    events: Annotated[
        Path | None, option("Save the frames around each alarm in this folder.", metavar="PATH"), STREAMS
    ] = None
    events_size: Annotated[
        str,
        option("Largest size of the events folder; the oldest events are deleted.", metavar="SIZE"),
        STREAMS,
    ] = "1GB"
    mqtt: Annotated[
        str | None,
        option(
            "Publish results to this MQTT broker and topic prefix: mqtt://HOST/PREFIX. One with a password is better "
            "given in the file that FBCLIP_MQTT_FILE names.",
            metavar="URL",
            envvar="FBCLIP_MQTT",
        ),
    ] = None
    webhook: Annotated[
        str | None,
        option(
            "Post alarms and notices to this address; one with a secret is better given in the file that "
            "FBCLIP_WEBHOOK_FILE names.",
            metavar="URL",
            envvar="FBCLIP_WEBHOOK",
        ),
        STREAMS,
    ] = None
    metrics: Annotated[
        str | None,
        option(
            "Offer counters for Prometheus at http://HOST:PORT/metrics, to whoever reaches it. A port alone is for this "
            "machine.",
            "--metrics",
            "--metrics-port",
            metavar="[HOST:]PORT",
        ),
        STREAMS,
        NOTHING,
    ] = None

    @property
    def place(self) -> tuple[str, int] | None:
        """Host and port of the metrics."""
        rule = "metrics are at HOST:PORT, or at a port of this machine, like 9464"
        return None if self.metrics is None else parse_place(self.metrics, rule, "metrics")

    @property
    def sinks(self) -> SinkOptions:
        from fbclip.runtime.live.sinks import SinkOptions
        from fbclip.runtime.live.sinks.events import parse_size

        return SinkOptions(
            json=self.json,
            csv=self.csv,
            mqtt=self.mqtt,
            webhook=self.webhook,
            metrics=self.place,
            events=self.events,
            events_bytes=parse_size(self.events_size),
        )


@dataclass(frozen=True)
class ModelGroup:
    """What torch loads beside a checkpoint of ours, which needs none of it."""

    PANEL: ClassVar[str] = "Models other than fbclip's own checkpoints"
    clip: Annotated[
        str | None,
        option("Name of a CLIP model in open_clip, like ViT-L-14-336, or its configuration (.json).", metavar="NAME"),
    ] = None
    clip_weights: Annotated[
        str | None,
        option("Weights of that CLIP model: a pretrained tag of open_clip, or a file.", metavar="TAG|PATH"),
    ] = None
    image_size: Annotated[
        int | None, option("Side of the model's square input in pixels. Default: the model's own.", metavar="N")
    ] = None
    feature_layers: Annotated[
        str | None, option("Numbers of the vision transformer's layers to use, like 1,6,12,18,24.", metavar="N,…")
    ] = None

    @property
    def layers(self) -> tuple[int, ...] | None:
        return parse_layers(self.feature_layers) if self.feature_layers is not None else None


@dataclass(frozen=True)
class RunGroup:
    """The folder of a run: PROJECT/NAME, then NAME2, NAME3, …"""

    PANEL: ClassVar[str] = "Folder of results"
    project: Annotated[
        Path | None, option("Folder of the runs. Default: runs/ and the command's name.", metavar="PATH")
    ] = None
    name: Annotated[str, option("Name of this run: its folder.", metavar="NAME")] = "exp"
    exist_ok: Annotated[bool, option("Write into the run's folder if it is there.", "--exist-ok")] = False

    def folder(self, command: str) -> Path:
        """The folder of this run, made."""
        from fbclip.files import new_run

        return new_run(self.project or Path("runs", command), self.name, self.exist_ok)


def frame_hw(resolution: str | None, frame_size: str | None) -> tuple[int, int] | None:
    """Height and width in pixels, from `--resolution`, or `--frame-size`, which older releases have, height first."""
    if resolution and frame_size:
        raise UsageError("--frame-size is the older form of --resolution: pass one of them")
    if frame_size is not None:
        return parse_frame_size(frame_size)
    return parse_resolution(resolution)[::-1] if resolution is not None else None
