"""The command line. Options and help only; the work is imported inside the commands, so that help is instant."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fbclip.cli_common import BundleOption, DeviceOption, RoiOption, make_console
from fbclip.cli_infer import infer
from fbclip.cli_serve import serve

if TYPE_CHECKING:
    from fbclip.engines import EngineOptions

app = typer.Typer(
    name="fbclip",
    help="Find defects on objects never seen before: FB-CLIP, deployed.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
debug = False


class ChannelOrder(str, Enum):
    rgb = "rgb"
    bgr = "bgr"


ClipOption = Annotated[str | None, typer.Option(help="open_clip model name, or a model configuration (.json).")]
WeightsOption = Annotated[str | None, typer.Option(help="Pretrained tag of that name, or a weights file.")]
LayersOption = Annotated[str | None, typer.Option(help="Blocks whose tokens are used, like 1,6,12,18,24.")]
SizeOption = Annotated[int | None, typer.Option(help="Side of the model's square input in pixels.")]


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug_: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global debug
    debug = debug_
    if debug:
        import logging

        logging.basicConfig(level=logging.INFO)  # TensorRT's messages, among others
    if version:
        import fbclip

        typer.echo(f"fbclip {fbclip.__version__}")
        raise typer.Exit


app.command()(infer)
app.command()(serve)


@app.command()
def export(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Ours or an official one; the embedded model's if left out.")
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
        float | None, typer.Option(help="Scores from here on are anomalous; 0.5, or what the embedded model has.")
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
        _deploy(bundle, triton, precision, options if engine else None)
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
    _needs_train_extra()
    from fbclip.bundle import DYNAMIC, EMBEDDED, STATIC, Bundle
    from fbclip.checkpoint import load
    from fbclip.export.bundle import Deployment, export_bundle
    from fbclip.export.parity import find_calibration, find_proof, read_calibration, read_proof
    from fbclip.export.quantize import Quantization
    from fbclip.export.report import print_parity

    console = make_console()
    frame_hw = _frame_size(frame_size)
    paths, labels = find_proof(parity_images or [])
    calibration_paths = find_calibration(calibration_images or []) if int8_static else []
    path = checkpoint or EMBEDDED.with_suffix(".safetensors")
    if checkpoint is None:  # it is deployed larger than it was trained
        embedded = Bundle.load().manifest
        image_size = image_size or embedded.image_size
        threshold = embedded.threshold if threshold is None else threshold
    console.print(f"loading {path.name}")
    model = load(path, clip, clip_weights, image_size, _layers(feature_layers))
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
        path.stem,
        fp16,
        quantization,
        frame_hw,
        channel_order.value,
        0.5 if threshold is None else threshold,
        {"checkpoint": path.name},
    )
    exported, parities = export_bundle(model, out or Path(f"{path.stem}.fbclip"), proof, deployment, say)
    print_parity(parities, console)
    console.print(f"wrote {exported.path}", soft_wrap=True, highlight=False)
    if engine or triton:
        _deploy(exported.path, triton, precision, options if engine else None)


@app.command()
def data(
    path: Annotated[Path, typer.Argument(help="Folder of a data set, or its index (meta.json, CSV).")],
    layout: Annotated[str | None, typer.Option(help="Published layout, like visa; recognised if left out.")] = None,
    json: Annotated[str | None, typer.Option(help="Write the report to this file, or - for standard output.")] = None,
) -> None:
    """Say what a data set is, and whether training and evaluation on it would be right."""
    from fbclip.data.inspect import inspect, print_report, write_report
    from fbclip.data.layouts import open_dataset

    console = make_console(stderr=json == "-")
    report = inspect(open_dataset(path, layout), console)
    print_report(report, console)
    if json:
        write_report(report, json)
    if report.wrong:
        raise typer.Exit(2)


@app.command()
def train(
    source: Annotated[str, typer.Argument(help="A data set (see fbclip data), or 'procedural'.")] = "procedural",
    clip: ClipOption = None,
    clip_weights: WeightsOption = None,
    image_size: SizeOption = None,
    feature_layers: LayersOption = None,
    train_tower: Annotated[bool, typer.Option("--train-tower", help="Train the vision tower too.")] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass and process.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes that make up a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 5e-5,
    cosine: Annotated[bool, typer.Option("--cosine", help="Warm up, then decay the rate along a cosine.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Procedural images per epoch.")] = 10_000,
    ramp: Annotated[int, typer.Option(min=0, help="Procedural images over which the variety grows.")] = 0,
    seed: int = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 1,
    amp: Annotated[str, typer.Option(help="Mixed precision: no, bf16, fp16 or auto.")] = "no",
    cache_tokens: Annotated[
        Path | None, typer.Option(help="Folder that keeps the frozen backbone's tokens: later epochs skip it.")
    ] = None,
    muon_lr: Annotated[
        float | None, typer.Option(help="Train the tower's matrices with Muon at this rate: quick from scratch.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Also teach the tower this network's features: efficientnet-lite0.")
    ] = None,
    teacher_weight: Annotated[float, typer.Option(help="Of that loss beside the task's.")] = 1.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files to OUT/tensorboard.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what --out holds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, metrics.jsonl and pictures.")] = Path(
        "runs/train/exp"
    ),
) -> None:
    """Train on a data set with masks, or on procedural defects."""
    _needs_train_extra("accelerate", "matplotlib")
    import torch

    from fbclip.checkpoint import DEFAULT_CLIP, DEFAULT_WEIGHTS
    from fbclip.clip import load_clip
    from fbclip.data.dataset import SampleSet
    from fbclip.data.layouts import open_dataset
    from fbclip.data.procedural import ProceduralDefects
    from fbclip.errors import UsageError
    from fbclip.model import FBCLIP, default_config
    from fbclip.train import Execution, accelerator_for, init_from_scratch, train
    from fbclip.training_step import Recipe

    if clip is None:
        clip, clip_weights = DEFAULT_CLIP, clip_weights or DEFAULT_WEIGHTS
    if clip_weights is None and not train_tower:
        raise UsageError(f"a frozen CLIP needs weights: pass --clip-weights TAG or FILE for {clip}, or --train-tower")
    if teacher and (not train_tower or cache_tokens):
        raise UsageError("--teacher teaches the tower: pass --train-tower, and no --cache-tokens")
    if not resume and (out / "checkpoint.safetensors").exists():
        raise UsageError(f"{out} holds a checkpoint already: pass --resume, or another --out")
    accelerator = accelerator_for(amp)
    with accelerator.local_main_process_first():  # one process of a machine fetches the weights
        torch.manual_seed(seed)  # every process starts from the same weights
        loaded, config = load_clip(clip, clip_weights)
    model = FBCLIP(default_config(config, image_size, _layers(feature_layers)), loaded, train_tower)
    if clip_weights is None:
        init_from_scratch(model)
    size = model.config.image_size
    data: SampleSet = (
        ProceduralDefects(size, samples, seed, ramp)
        if source == "procedural"
        else open_dataset(Path(source)).for_training(size)
    )
    console = make_console()
    recipe = Recipe(
        epochs, batch_size * accumulate * accelerator.num_processes, lr, cosine, seed, muon_lr, teacher, teacher_weight
    )
    execution = Execution(accumulate, workers, save_every, cache_tokens, tensorboard, console.is_terminal)
    throughput = train(model, data, recipe, out, execution, resume, accelerator)
    if accelerator.is_main_process:
        console.print(f"wrote {out / 'checkpoint.safetensors'}\n{throughput}", soft_wrap=True, highlight=False)
    accelerator.end_training()


@app.command(name="eval")
def eval_(
    path: Annotated[list[Path], typer.Argument(help="Data sets: folders, or an index file.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Evaluate the torch model: ours or an official one.")] = None,
    clip: ClipOption = None,
    clip_weights: WeightsOption = None,
    image_size: SizeOption = None,
    feature_layers: LayersOption = None,
    bundle: BundleOption = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or int8; of a bundle.")] = "auto",
    layout: Annotated[str | None, typer.Option(help="Layout of the data sets; detected if left out.")] = None,
    classes: Annotated[str | None, typer.Option(help="Only these classes, like bottle,cable.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per call of the model: faster on a GPU, more memory.")
    ] = 1,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    project: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/eval"),
    name: Annotated[str, typer.Option(help="Name of this run.")] = "exp",
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Write into the run's folder if it is there.")] = False,
) -> None:
    """Measure a checkpoint or a deployed bundle on the test splits of data sets."""
    from fbclip.data.layouts import open_dataset
    from fbclip.errors import Interrupted, UsageError
    from fbclip.runtime.evaluate import bundle_subject, evaluate, to_evaluate
    from fbclip.runtime.infer import new_run
    from fbclip.runtime.report import require_report, write_report
    from fbclip.runtime.results import show, stamp, write_results

    if checkpoint and bundle:
        raise UsageError("eval takes a --checkpoint or a --bundle; got both")
    if not checkpoint and (clip or clip_weights or image_size or feature_layers):
        raise UsageError("--clip, --clip-weights, --image-size and --feature-layers go with --checkpoint; got none")
    if checkpoint and precision not in ("auto", "fp32"):
        raise UsageError(
            f"a checkpoint runs in fp32; got --precision {precision}: export it with --fp16, pass --bundle"
        )
    if report:
        require_report()
    wanted = tuple(part.strip() for part in classes.split(",")) if classes else None
    tests = [to_evaluate(open_dataset(place, layout), wanted) for place in path]
    if checkpoint:
        _needs_train_extra()
        from fbclip.export.backend import checkpoint_subject

        subject = checkpoint_subject(checkpoint, clip, clip_weights, image_size, _layers(feature_layers), device)
    else:
        subject = bundle_subject(bundle, device, precision, batch_size)
    folder = new_run(project, name, exist_ok)
    console = make_console()
    evaluation = evaluate(subject, tests, batch_size, console)
    stamped = stamp(evaluation)
    show(evaluation, console)
    write_results(evaluation, stamped, folder)
    if report:
        write_report(evaluation, stamped, folder / "report.html")
    console.print(f"results are in {folder}", soft_wrap=True, highlight=False)
    if not evaluation.complete:
        raise Interrupted("stopped by Ctrl-C; the results hold the classes that were finished", signal.SIGINT)
    if evaluation.skipped:
        raise typer.Exit(2)


@app.command()
def calibrate(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="[BUNDLE] GOOD...",
            help="The bundle, or none to calibrate a copy of the embedded one; then images, folders, globs, videos or "
            "cameras (0, rtsp://…) that show good parts.",
        ),
    ],
    false_alarm_rate: Annotated[
        float, typer.Option(help="Probability that a new good part raises an alarm; 0.01 needs 99 images.")
    ] = 0.01,
    defects: Annotated[
        list[str] | None, typer.Option(help="Images of defective parts: adds the expected miss rate.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Take each Nth image or frame: neighbours are too alike.")] = 1,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Images or frames to take; a camera needs it.")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or int8: what will inspect.")] = "auto",
    roi: RoiOption = None,
) -> None:
    """Set the threshold from good parts alone, with a stated rate of false alarms."""
    from fbclip.runtime.calibrate import calibrate, choose_bundle, good_images, report
    from fbclip.runtime.histogram import write_histogram
    from fbclip.runtime.images import list_images
    from fbclip.runtime.predictor import Predictor
    from fbclip.runtime.roi import Roi

    console = make_console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    bundle, places = choose_bundle(source, say)
    images = good_images(places, every, max_frames, say)
    defective = list_images(defects) if defects else []
    region = Roi.parse(roi) if roi else None
    predictor = Predictor(bundle, device, precision, calibrated=False, roi=region)
    calibration, good, bad = calibrate(predictor, images, false_alarm_rate, defective, console)
    report(calibration, good, bad, say)
    write_histogram(calibration, bad.scores, bundle.path / "calibration.png")
    calibration.save(bundle)
    say(f"wrote {bundle.calibration} and its picture, calibration.png: --threshold auto uses it")
    if good.skipped or bad.skipped:
        raise typer.Exit(2)


@app.command()
def bench(
    bundle: BundleOption = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="With commas: torch-reference, torch, torch-compile, onnxruntime, onnxruntime-cuda, "
            "onnxruntime-tensorrt, tensorrt; all; those that run here, without torch-compile, if left out."
        ),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Of the bundle, with commas; all it has if left out.")] = None,
    batch: Annotated[str, typer.Option(help="Images per run, with commas.")] = "1",
    frame_size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of the frames in memory; resizing is timed, too.")
    ] = None,
    runs: Annotated[int, typer.Option(min=3, help="Timed runs of each, at least.")] = 50,
    profile: Annotated[bool, typer.Option("--profile", help="Also list the costliest operators by stage.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="What torch runs: the bundle's; the embedded model's if left out.")
    ] = None,
    clip: ClipOption = None,
    clip_weights: WeightsOption = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two bench.json, before and after: what changed beyond noise.")
    ] = None,
    fail_over: Annotated[
        str | None, typer.Option(help="With --compare: exit with 1 where something is slower by more, like 5%.")
    ] = None,
    json: Annotated[str | None, typer.Option(help="Also write bench.json here, or - for standard output.")] = None,
    project: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/bench"),
    name: Annotated[str, typer.Option(help="Name of this run.")] = "exp",
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Write into the run's folder if it is there.")] = False,
) -> None:
    """Time backends side by side, with drift and distance to the machine's limit; compare recorded runs."""
    from fbclip.bundle import Bundle
    from fbclip.errors import UsageError
    from fbclip.runtime.bench import Options, bench
    from fbclip.runtime.bench_compare import compare_files
    from fbclip.runtime.bench_report import show, to_json, write_bench
    from fbclip.runtime.infer import new_run
    from fbclip.writing import write_text

    console = make_console(stderr=json == "-")
    if compare:
        raise typer.Exit(compare_files(*compare, fail_over, console))
    if fail_over:
        raise UsageError("--fail-over goes with --compare; got none")
    options = Options(
        _names(backends),
        _names(precision),
        _batches(batch),
        _frame_size(frame_size),
        runs,
        profile,
        checkpoint,
        clip,
        clip_weights,
    )
    loaded = Bundle.load(bundle)
    folder = new_run(project, name, exist_ok)
    report = bench(loaded, options, console)
    show(report, console)
    if missing := write_bench(report, folder):
        console.print(
            f"no chart and page without {' and '.join(missing)}: pip install 'fbclip\\[eval]'", highlight=False
        )
    if json:
        write_text(to_json(report), json)
    console.print(f"results are in {folder}", soft_wrap=True, highlight=False)


@app.command()
def doctor(
    bundle: BundleOption = None,
    json: Annotated[str | None, typer.Option(help="Write the report to this file, or - for standard output.")] = None,
) -> None:
    """Say what works on this machine and what is missing, with the cure."""
    from fbclip.runtime.doctor import examine, print_report, works, write_report

    console = make_console(stderr=json == "-")
    with console.status("looking") as status:
        checks = examine(bundle, say=lambda topic: status.update(f"looking at {topic}"))
    print_report(checks, console)
    if json:
        write_report(checks, json)
    if not works(checks):
        raise typer.Exit(1)


def _deploy(bundle: Path, triton: Path | None, precision: str, options: EngineOptions | None) -> None:
    """From a bundle: a Triton model, whose plan is built with `options`, or else an engine in the bundle."""
    from functools import partial

    from fbclip.bundle import Bundle
    from fbclip.export.engine import build_engine, build_plan

    console = make_console()
    if triton:
        from fbclip.export.triton import MAX_BATCH, write_model  # needs onnx, which an engine does not

        max_batch = options.batch[2] if options and options.batch[2] > 1 else MAX_BATCH
        build = partial(build_plan, options=options, max_batch=max_batch, console=console) if options else None
        folder = write_model(Bundle.load(bundle), triton, precision, build, max_batch)
        console.print(f"wrote {folder}; its README.md says how to serve it", soft_wrap=True, highlight=False)
    elif options:
        plan = build_engine(Bundle.load(bundle), precision, options, console)
        console.print(f"wrote {plan}; use it with --device tensorrt", soft_wrap=True, highlight=False)


def _layers(text: str | None) -> tuple[int, ...] | None:
    from fbclip.errors import UsageError

    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--feature-layers takes numbers with commas, like 1,6,12,18,24; got {text!r}") from error


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _batches(text: str) -> tuple[int, ...]:
    from fbclip.errors import UsageError

    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError:
        batches = (0,)
    if min(batches) < 1:
        raise UsageError(f"--batch takes numbers from 1 with commas, like 1,4; got {text!r}")
    return batches


def _frame_size(text: str | None) -> tuple[int, int] | None:
    import re

    from fbclip.errors import UsageError

    if text is None:
        return None
    if not (sides := re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", text)):
        raise UsageError(f"--frame-size is HEIGHTxWIDTH in pixels, like 1080x1920; got {text!r}")
    return int(sides[1]), int(sides[2])


def _needs_train_extra(*also: str) -> None:
    from importlib.util import find_spec

    from fbclip.errors import UsageError

    if missing := [
        name
        for name in ("torch", "open_clip", "onnx", "onnxscript", "safetensors", "accelerate", "matplotlib")
        if find_spec(name) is None
    ]:
        raise UsageError(
            f"this command needs {', '.join(missing)}, which the runtime does without: "
            f"pip install 'fbclip[train]' on the machine that exports"
        )


def main() -> None:
    """The installed command: errors as one line, exit code 2 for wrong usage or input, 1 for a failure."""
    from fbclip.errors import FBClipError

    try:
        app()
    except FBClipError as error:
        if debug:
            raise
        typer.echo(f"fbclip: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("fbclip: interrupted; what was finished is kept", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
