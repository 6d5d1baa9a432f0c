"""`fbclip train` and `fbclip eval`: their options."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from fbclip.commands.options import (
    BundleOption,
    ClipOption,
    DeviceOption,
    LayersOption,
    SizeOption,
    WeightsOption,
    find_checkpoint,
    make_console,
    need_train_extra,
    parse_layers,
    parse_threshold,
)

OUT = Path("runs/train/exp")


def train(
    source: Annotated[str, typer.Argument(help="A data set (see fbclip data), or 'procedural'.")] = "procedural",
    clip: ClipOption = None,
    clip_weights: WeightsOption = None,
    image_size: SizeOption = None,
    feature_layers: LayersOption = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Fine-tune this fbclip checkpoint: FILE, or nano, the embedded model. Default without --clip.",
        ),
    ] = None,
    train_tower: Annotated[bool, typer.Option("--train-tower", help="Train the vision tower too.")] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass and process.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes that make up a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 5e-5,
    cosine: Annotated[bool, typer.Option("--cosine", help="Warm up, then decay the rate along a cosine.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Procedural images per epoch.")] = 10_000,
    ramp: Annotated[int, typer.Option(min=0, help="Procedural images over which the variety grows.")] = 0,
    variety: Annotated[
        float,
        typer.Option(min=0, max=2, help="Of procedural images: 0 plain, 1 varied, 2 irregular as photographs are."),
    ] = 1.0,
    seed: int = 0,
    validation: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of the images that is held out to choose the best checkpoint: 0.2 of a data set; 0 trains on all, "
            "as published.",
        ),
    ] = None,
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
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, metrics.jsonl and pictures.")] = OUT,
) -> None:
    """Train on a data set with masks, or on procedural defects."""
    need_train_extra()
    from fbclip.data.dataset import Samples, SampleSet
    from fbclip.data.holdout import SHARE, Seen, split
    from fbclip.data.layouts import open_dataset
    from fbclip.data.procedural import ProceduralDefects
    from fbclip.errors import UsageError
    from fbclip.files import require_writable

    # whatever can be wrong is told before torch is imported, which takes seconds
    if clip_weights and not clip and not start:
        raise UsageError(f"--clip-weights are those of a --clip, like ViT-L-14-336; got {clip_weights} alone")
    if clip and not start and not clip_weights and not train_tower:
        raise UsageError(f"a frozen CLIP needs weights: pass --clip-weights TAG or FILE for {clip}, or --train-tower")
    if teacher and (not train_tower or cache_tokens):
        raise UsageError("--teacher teaches the tower: pass --train-tower, and no --cache-tokens")
    procedural = source == "procedural"
    if procedural and validation:
        raise UsageError("--validation holds out images of a data set; procedural ones are drawn anew for each run")
    first = None if clip and not start else find_checkpoint(start or "nano", "--from")
    for file in ("checkpoint.safetensors", "last.safetensors"):
        if not resume and (out / file).exists():
            raise UsageError(f"{out} holds a {file} already: pass --resume, or another --out")
    dataset = None if procedural else open_dataset(Path(source))
    parts = split(dataset, SHARE if validation is None else validation) if dataset else None
    require_writable(out)
    import torch

    from fbclip.model.checkpoint import About, about
    from fbclip.training.loop import Execution, accelerator_for, start_model, train
    from fbclip.training.step import Recipe

    accelerator, console = accelerator_for(amp), make_console()

    def say(line: str) -> None:
        if accelerator.is_main_process:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    with accelerator.local_main_process_first():  # one process of a machine fetches the weights
        torch.manual_seed(seed)  # every process starts from the same weights
        model = start_model(first, clip, clip_weights, image_size, parse_layers(feature_layers), train_tower)
    size = model.config.image_size
    before = about(first) if first else About(model.config.clip.name)
    say(f"starting from {before.name} at {size} px; --image-size sets another side")
    seen = before.seen or Seen()
    data: SampleSet = ProceduralDefects(size, samples, seed, ramp, variety=variety)
    held_out = None
    origin: dict[str, object] = {}
    if parts:
        data, held_out = Samples(parts.trained, size), Samples(parts.held_out, size) if parts.held_out else None
        for line in parts.lines(seen):
            say(line)
        seen, origin = seen | parts.seen, {"data": parts.to_dict()}
    default_name = dataset.root.name if dataset else source
    origin |= {"name": default_name if out == OUT else out.resolve().name, "seen": seen.to_dict()}
    recipe = Recipe(
        epochs, batch_size * accumulate * accelerator.num_processes, lr, cosine, seed, muon_lr, teacher, teacher_weight
    )
    execution = Execution(accumulate, workers, save_every, cache_tokens, tensorboard, console.is_terminal)
    throughput = train(model, data, recipe, out, execution, resume, accelerator, held_out, origin)
    say(f"wrote {out / 'checkpoint.safetensors'}{', the best by the held-out images' if held_out else ''}")
    say(str(throughput))
    accelerator.end_training()


def eval_(
    path: Annotated[list[Path], typer.Argument(help="Data sets: folders, or an index file.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Evaluate a torch model: an fbclip checkpoint, nano, or an official one.")
    ] = None,
    clip: ClipOption = None,
    clip_weights: WeightsOption = None,
    image_size: SizeOption = None,
    feature_layers: LayersOption = None,
    bundle: BundleOption = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or int8; of a bundle.")] = "auto",
    threshold: Annotated[
        str, typer.Option(help="auto (calibrated, else the bundle's; a checkpoint's is 0.5), or 0 to 1.")
    ] = "auto",
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
    from fbclip.files import new_run
    from fbclip.runtime.evaluation.evaluate import bundle_subject, evaluate, to_evaluate
    from fbclip.runtime.evaluation.html import require_report, write_report
    from fbclip.runtime.evaluation.tables import show, stamp, write_results
    from fbclip.terminal import say

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
    if checkpoint:
        checkpoint = find_checkpoint(str(checkpoint), "--checkpoint")
    wanted = tuple(part.strip() for part in classes.split(",")) if classes else None
    tests = [to_evaluate(open_dataset(place, layout), wanted) for place in path]
    if checkpoint:
        need_train_extra()
        from fbclip.training.evaluation import checkpoint_subject

        subject = checkpoint_subject(
            checkpoint, clip, clip_weights, image_size, parse_layers(feature_layers), device, parse_threshold(threshold)
        )
    else:
        subject = bundle_subject(bundle, device, precision, parse_threshold(threshold), batch_size)
    folder = new_run(project, name, exist_ok)
    console = make_console()
    say(console, subject.threshold_from)
    evaluation = evaluate(subject, tests, batch_size, console)
    stamped = stamp(evaluation)
    show(evaluation, console, stamped["warnings"])
    write_results(evaluation, stamped, folder)
    if report:
        write_report(evaluation, stamped, folder / "report.html")
    say(console, f"results are in {folder}")
    if not evaluation.complete:
        raise Interrupted("stopped by Ctrl-C; the results hold the classes that were finished", signal.SIGINT)
    if evaluation.skipped:
        raise typer.Exit(2)
