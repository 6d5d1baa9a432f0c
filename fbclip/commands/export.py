"""`fbclip export`: its options, and what each combination of them means."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from fbclip.commands.groups import BATCH_NAMES, ModelGroup, frame_hw
from fbclip.commands.mount import mounted, option
from fbclip.errors import UsageError

if TYPE_CHECKING:
    from fbclip.engines import EngineOptions


class ChannelOrder(str, Enum):
    rgb = "rgb"
    bgr = "bgr"


class InputForm(str, Enum):
    uint8_nhwc = "uint8-nhwc"
    float_nchw = "float-nchw"


@dataclass(frozen=True)
class GraphGroup:
    """The graphs that are written, and how they are proven."""

    PANEL: ClassVar[str] = "Graphs of the bundle"
    fp16: Annotated[bool, option("Also write a half-precision graph.", "--fp16", "--half")] = False
    int8: Annotated[bool, option("Also write an 8-bit graph, for CPUs.", "--int8")] = False
    int8_static: Annotated[
        bool, option("Also write an 8-bit graph with fixed ranges, for TensorRT.", "--int8-static")
    ] = False
    calibration_images: Annotated[
        list[str] | None,
        option(
            "Good images that --int8-static takes the ranges from, or a data set. Default: the sample images.",
            metavar="PATH",
        ),
    ] = None
    threshold: Annotated[
        float | None,
        option(
            "Threshold stored in the bundle. Default: the checkpoint's (0.535 for the embedded model), else 0.5.",
            metavar="NUMBER",
        ),
    ] = None
    object: Annotated[
        str,
        option(
            'Word for the inspected thing in the model\'s text prompts, as in "OBJECT with defect".', metavar="NOUN"
        ),
    ] = "object"
    resolution: Annotated[
        str | None,
        option(
            "Width and height of the camera's frames, like 1920x1080: the graph takes them whole and resizes.",
            metavar="WxH",
        ),
    ] = None
    frame_size: Annotated[str | None, option("", metavar="HxW", hidden=True)] = None
    channel_order: Annotated[
        ChannelOrder, option("Colour order of the input images. OpenCV gives bgr.", metavar="rgb|bgr")
    ] = ChannelOrder.rgb
    parity_images: Annotated[
        list[str] | None,
        option(
            "Images that prove the graphs: files, folders, globs, or a data set (see fbclip data). Default: the sample "
            "images.",
            metavar="PATH",
        ),
    ] = None

    @property
    def frame_hw(self) -> tuple[int, int] | None:
        return frame_hw(self.resolution, self.frame_size)


@dataclass(frozen=True)
class PlanGroup:
    """What TensorRT builds."""

    PANEL: ClassVar[str] = "TensorRT engine, Triton model, other programs"
    bundle: Annotated[
        Path | None,
        option(
            "Use this existing bundle for --engine, --rtx, --triton or --standalone instead of exporting a checkpoint; needs no torch.",
            metavar="PATH",
        ),
    ] = None
    engine: Annotated[
        bool,
        option("Build a TensorRT engine for this machine's GPU; with --triton, use it as Triton's model.", "--engine"),
    ] = False
    rtx: Annotated[
        bool,
        option("Build a TensorRT-RTX engine for GPUs from RTX 30 on; needs no GPU here.", "--rtx"),
    ] = False
    triton: Annotated[
        Path | None,
        option(
            "Also write the model into this NVIDIA Triton model repository; if it is there, as its next version.",
            metavar="PATH",
        ),
    ] = None
    standalone: Annotated[
        Path | None,
        option(
            "Also write one graph for other programs into this new folder: images in, text features and memory inside.",
            metavar="PATH",
        ),
    ] = None
    input: Annotated[
        InputForm,
        option(
            "Input of the graph of --standalone: whole pixels, or planes of floats (0 to 255) with a configuration for "
            "DeepStream's nvinfer.",
            metavar="uint8-nhwc|float-nchw",
        ),
    ] = InputForm.uint8_nhwc
    precision: Annotated[
        str, option("Graph for engines, Triton or --standalone: auto, fp32, fp16 or int8.", metavar="NAME")
    ] = "auto"
    batch: Annotated[
        str,
        option("Images at once that the engines take: N, or MIN,OPT,MAX.", *BATCH_NAMES, metavar="N"),
    ] = "1"
    workspace: Annotated[int | None, option("Limit of the engine's scratch memory in MiB.", metavar="N", min=1)] = None
    optimization_level: Annotated[
        int | None, option("0 to 5: higher takes longer to build and may run faster.", metavar="N", min=0, max=5)
    ] = None
    hardware_compatible: Annotated[
        bool, option("Engine also runs on any GPU from Ampere on (not on Jetson).", "--hardware-compatible")
    ] = False
    version_compatible: Annotated[
        bool,
        option("Engine also runs on later TensorRT versions of the same major version.", "--version-compatible"),
    ] = False

    @property
    def deploys(self) -> bool:
        return bool(self.engine or self.rtx or self.triton or self.standalone)

    @property
    def options(self) -> EngineOptions:
        from fbclip.engines import EngineOptions
        from fbclip.export.engine import parse_batch

        batch = parse_batch(self.batch)
        return EngineOptions(
            batch, self.workspace, self.optimization_level, self.hardware_compatible, self.version_compatible
        )


@mounted(first=("checkpoint", "fp16", "int8", "engine", "out"))
def export(
    model: ModelGroup,
    graphs: GraphGroup,
    plan: PlanGroup,
    checkpoint: Annotated[
        Path | None,
        option(
            "Trained weights to export: a file or a run's folder of fbclip train, nano (the embedded model), or a file of the FB-CLIP authors. Default: nano.",
            metavar="PATH",
        ),
    ] = None,
    name: Annotated[
        str | None,
        option(
            "Name of the bundle, or with --triton or --standalone of its model. Default: the checkpoint's or the bundle's.",
            metavar="NAME",
            panel="Graphs of the bundle",
        ),
    ] = None,
    out: Annotated[Path | None, option("Bundle folder to write. Default: NAME.fbclip.", metavar="PATH")] = None,
) -> None:
    """Write a bundle from a checkpoint and prove that it agrees with it; build engines, write Triton models."""
    options = plan.options
    if plan.bundle:
        writes = checkpoint or model.clip or out or graphs.fp16 or graphs.int8 or graphs.int8_static
        if writes or not plan.deploys:
            raise UsageError(
                "--bundle goes with --engine, --rtx, --triton or --standalone alone: it takes a bundle that is there"
            )
        if name is not None and not (plan.triton or plan.standalone):
            raise UsageError("--name with --bundle is the name of a Triton or standalone model: pass one of them")
        _check_plan(plan, options)
        _deploy(plan.bundle, plan, options, name)
        return
    _check(graphs, plan, options)
    path = _export(checkpoint, model, graphs, name, out)
    if plan.deploys:
        _deploy(path, plan, options, name)


def _check(graphs: GraphGroup, plan: PlanGroup, options: EngineOptions) -> None:
    """Raise UsageError where options don't go together."""
    from importlib.util import find_spec

    from fbclip.engines import EngineOptions

    if not (plan.engine or plan.rtx) and options != EngineOptions():
        raise UsageError("options of an engine need --engine or --rtx")
    _check_plan(plan, options)
    if not plan.deploys and plan.precision != "auto":
        raise UsageError(
            f"--precision is an engine's or another program's: pass --engine, --rtx, --triton or --standalone; got {plan.precision}"
        )
    if plan.deploys and find_spec("torch") is None:
        raise UsageError("without --bundle a bundle is exported first, which needs torch: pass --bundle to use yours")
    if graphs.int8 and graphs.int8_static:
        raise UsageError("a bundle holds one 8-bit graph: pass --int8 (for CPUs) or --int8-static (for TensorRT)")
    if graphs.calibration_images and not graphs.int8_static:
        raise UsageError("--calibration-images is for --int8-static; --int8 measures the ranges of each image itself")


def _check_plan(plan: PlanGroup, options: EngineOptions) -> None:
    """Raise UsageError where --rtx is asked for what TensorRT-RTX has not, or options of other programs have none."""
    from importlib.util import find_spec

    from fbclip.engines import EngineOptions

    if plan.rtx and find_spec("tensorrt_rtx") is None:
        raise UsageError("--rtx needs NVIDIA's builder: pip install tensorrt-rtx-cu13")
    if plan.input != InputForm.uint8_nhwc and not plan.standalone:
        raise UsageError("--input is of the graph for other programs: pass --standalone")
    if plan.rtx and plan.triton:
        raise UsageError("Triton runs no TensorRT-RTX engine: pass --engine with --triton, or --rtx without it")
    if plan.rtx and not plan.engine and options != EngineOptions(options.batch):
        raise UsageError("of the options of an engine --rtx takes --batch alone: the others are for --engine")


def _export(
    checkpoint: Path | None, network: ModelGroup, graphs: GraphGroup, name: str | None, out: Path | None
) -> Path:
    """Write a bundle and prove it; returns its folder."""
    from fbclip.export import export
    from fbclip.terminal import make_console

    return export(
        checkpoint or "nano",
        out,
        fp16=graphs.fp16,
        int8=graphs.int8,
        int8_static=graphs.int8_static,
        calibration_images=graphs.calibration_images or (),
        threshold=graphs.threshold,
        frame_size=graphs.frame_hw,
        channel_order=graphs.channel_order.value,
        object=graphs.object,
        clip=network.clip,
        clip_weights=network.clip_weights,
        image_size=network.image_size,
        feature_layers=network.layers,
        parity_images=graphs.parity_images or (),
        name=name,
        console=make_console(),
    ).path


def _deploy(bundle: Path, plan: PlanGroup, options: EngineOptions, name: str | None) -> None:
    """From a bundle: a graph for other programs; a Triton model, whose plan is built with `options`, or else engines in
    the bundle."""
    from fbclip.bundle import Bundle
    from fbclip.engines import EngineOptions
    from fbclip.export.engine import build_engine, build_plan
    from fbclip.terminal import make_console, say

    console = make_console()
    if plan.standalone:
        from fbclip.export.standalone import write_standalone  # needs onnx, which an engine does not

        folder = write_standalone(Bundle.load(bundle), plan.standalone, plan.input.value, plan.precision, name)
        say(console, f"wrote {folder}; model.json says what other programs must know of its graph")
    if plan.triton:
        from fbclip.export.triton import MAX_BATCH, write_model  # needs onnx, which an engine does not

        max_batch = options.batch[2] if plan.engine and options.batch[2] > 1 else MAX_BATCH
        build = partial(build_plan, options=options, max_batch=max_batch, console=console) if plan.engine else None
        folder = write_model(Bundle.load(bundle), plan.triton, plan.precision, build, max_batch, name)
        say(console, f"wrote {folder}; its README.md says how to serve it")
        return
    if plan.engine:
        built = build_engine(Bundle.load(bundle), plan.precision, options, console)
        say(console, f"wrote {built}; use it with --device tensorrt")
    if plan.rtx:
        built = build_engine(Bundle.load(bundle), plan.precision, EngineOptions(options.batch), console, rtx=True)
        say(console, f"wrote {built}; use it with --device tensorrt-rtx")
