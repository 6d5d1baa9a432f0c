"""`fbclip export`: its options, and what each combination of them means."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fbclip.commands.options import (
    ClipOption,
    LayersOption,
    SizeOption,
    WeightsOption,
    find_checkpoint,
    make_console,
    need_train_extra,
    parse_frame_size,
    parse_layers,
)

if TYPE_CHECKING:
    from fbclip.engines import EngineOptions


class ChannelOrder(str, Enum):
    rgb = "rgb"
    bgr = "bgr"


def export(
    checkpoint: Annotated[
        Path | None, typer.Option(help="An fbclip checkpoint or an official one; nano, the embedded one, if left out.")
    ] = None,
    clip: ClipOption = None,
    clip_weights: WeightsOption = None,
    image_size: SizeOption = None,
    feature_layers: LayersOption = None,
    object: Annotated[str, typer.Option(help="What the prompts call the inspected thing.")] = "object",
    fp16: Annotated[bool, typer.Option("--fp16", "--half", help="Also write a half-precision graph.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write an 8-bit graph, for CPUs.")] = False,
    int8_static: Annotated[
        bool, typer.Option("--int8-static", help="Also write an 8-bit graph with fixed ranges, for TensorRT.")
    ] = False,
    calibration_images: Annotated[
        list[str] | None,
        typer.Option(help="Good images that --int8-static takes the ranges from, or a data set; else the samples."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Scores from here on are anomalous; the checkpoint's, else 0.5.")
    ] = None,
    frame_size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of the camera's frames: the graph takes them whole and resizes.")
    ] = None,
    channel_order: Annotated[
        ChannelOrder, typer.Option(help="Of the images that the graph takes; OpenCV and most cameras give bgr.")
    ] = ChannelOrder.rgb,
    parity_images: Annotated[
        list[str] | None,
        typer.Option(
            help="For the proof: images, folders, globs, or a data set (see fbclip data); the samples if left out."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the bundle, or with --triton of its model; the checkpoint's or bundle's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Bundle folder to write; NAME.fbclip if left out.")] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Build a TensorRT engine for the GPU here; with --triton as its model.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(help="With --engine or --triton: use this bundle, which needs no torch; exports none."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the engine or the Triton model: auto, fp32, fp16 or int8.")
    ] = "auto",
    batch: Annotated[str, typer.Option(help="Images at once the engine takes: MIN,OPT,MAX.")] = "1,1,1",
    workspace: Annotated[int | None, typer.Option(min=1, help="Limit of the engine's scratch memory in MiB.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds the engine quickly, 5 makes it quick.")
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="An engine for any GPU from Ampere on; not on Jetson.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="An engine for later TensorRT of the same major version, too.")
    ] = False,
    triton: Annotated[
        Path | None, typer.Option(help="Also write the model into this NVIDIA Triton model repository.")
    ] = None,
) -> None:
    """Write a bundle from a checkpoint and prove that it agrees with the model; build engines, write Triton models."""
    from importlib.util import find_spec

    from fbclip.engines import EngineOptions
    from fbclip.errors import UsageError
    from fbclip.export.engine import parse_batch

    options = EngineOptions(parse_batch(batch), workspace, optimization_level, hardware_compatible, version_compatible)
    if bundle:
        if not (engine or triton) or checkpoint or clip or out or fp16 or int8 or int8_static:
            raise UsageError("--bundle goes with --engine or --triton alone: it takes a bundle that is there")
        if name is not None and not triton:
            raise UsageError("--name with --bundle is the name of a Triton model: pass --triton")
        _deploy(bundle, triton, precision, options if engine else None, name)
        return
    if not engine and options != EngineOptions():
        raise UsageError("options of the engine need --engine")
    if not (engine or triton) and precision != "auto":
        raise UsageError(f"--precision is an engine's or a Triton model's: pass --engine or --triton; got {precision}")
    if (engine or triton) and find_spec("torch") is None:
        raise UsageError("without --bundle a bundle is exported first, which needs torch: pass --bundle to use yours")
    if int8 and int8_static:
        raise UsageError("a bundle holds one 8-bit graph: pass --int8 (for CPUs) or --int8-static (for TensorRT)")
    if calibration_images and not int8_static:
        raise UsageError("--calibration-images is for --int8-static; --int8 measures the ranges of each image itself")
    from fbclip.bundle import DYNAMIC, STATIC, SUFFIX, checked_name, require_place
    from fbclip.runtime.calibration import checked_threshold

    if threshold is not None:
        checked_threshold(threshold)
    need_train_extra()
    from fbclip.export.bundle import Deployment, export_bundle
    from fbclip.export.parity import find_calibration, find_proof, read_calibration, read_proof
    from fbclip.export.precision.int8 import Quantization
    from fbclip.export.report import print_parity
    from fbclip.model.checkpoint import about, load

    console = make_console()
    frame_hw = parse_frame_size(frame_size)
    paths, labels = find_proof(parity_images or [])
    calibration_paths = find_calibration(calibration_images or []) if int8_static else []
    path = find_checkpoint(str(checkpoint or "nano"), "--checkpoint")
    known = about(path)
    own_name = known.name if name is None else checked_name(name)
    target = require_place(out or Path(f"{own_name}{SUFFIX}"))  # before the work, not after it
    if threshold is None:
        threshold = 0.5 if known.threshold is None else known.threshold
    console.print(f"loading {path.name}", markup=False)
    model = load(path, clip, clip_weights, image_size, parse_layers(feature_layers))
    model.set_noun(object)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    size = model.config.image_size
    size_hw = frame_hw or (size, size)
    proof = read_proof(paths, labels, size_hw, say)
    quantization = Quantization(DYNAMIC) if int8 else None
    if int8_static:
        quantization = Quantization(STATIC, read_calibration(calibration_paths, size_hw, say))
    deployment = Deployment(
        own_name,
        fp16,
        quantization,
        frame_hw,
        channel_order.value,
        threshold,
        {"checkpoint": path.name} | ({"seen": known.seen.to_dict()} if known.seen else {}),
    )
    was_calibrated = (target / "calibration.json").exists()
    exported, parities = export_bundle(model, target, proof, deployment, say)
    print_parity(parities, console)
    if was_calibrated:
        say(f"the calibration of the bundle that was there is gone with it: fbclip calibrate {exported.path} GOOD...")
    say(f"wrote {exported.path}")
    if engine or triton:
        _deploy(exported.path, triton, precision, options if engine else None, name)


def _deploy(bundle: Path, triton: Path | None, precision: str, options: EngineOptions | None, name: str | None) -> None:
    """From a bundle: a Triton model, whose plan is built with `options`, or else an engine in the bundle."""
    from functools import partial

    from fbclip.bundle import Bundle
    from fbclip.export.engine import build_engine, build_plan
    from fbclip.terminal import say

    console = make_console()
    if triton:
        from fbclip.export.triton import MAX_BATCH, write_model  # needs onnx, which an engine does not

        max_batch = options.batch[2] if options and options.batch[2] > 1 else MAX_BATCH
        build = partial(build_plan, options=options, max_batch=max_batch, console=console) if options else None
        folder = write_model(Bundle.load(bundle), triton, precision, build, max_batch, name)
        say(console, f"wrote {folder}; its README.md says how to serve it")
    elif options:
        plan = build_engine(Bundle.load(bundle), precision, options, console)
        say(console, f"wrote {plan}; use it with --device tensorrt")
