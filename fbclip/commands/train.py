"""`fbclip train`: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from fbclip.checkpoints import find_checkpoint, require_training_packages
from fbclip.commands.groups import BATCH_NAMES, ModelGroup
from fbclip.commands.mount import mounted, option
from fbclip.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fbclip.data.holdout import Seen, Split
    from fbclip.model.network import FBCLIP
    from fbclip.training.loop import Execution
    from fbclip.training.step import Recipe

OUT = Path("runs/train/exp")
PROCEDURAL = "procedural"


@dataclass(frozen=True)
class DataGroup:
    """The images."""

    PANEL: ClassVar[str] = "Data"
    validation: Annotated[
        float | None,
        option(
            "Share of the images that is held out to choose the best checkpoint; 0 trains on all, as published. "
            "Default: 0.2 of a data set.",
            metavar="SHARE",
            min=0,
            max=0.9,
        ),
    ] = None
    samples: Annotated[int, option("Generated images per epoch.", metavar="N", min=1)] = 10_000
    ramp: Annotated[
        int, option("Generated images over which --variety rises from 0; 0: at once.", metavar="N", min=0)
    ] = 0
    variety: Annotated[
        float,
        option(
            "How varied generated images are: 0 plain, 1 varied, 2 irregular as photographs are.",
            metavar="NUMBER",
            min=0,
            max=2,
        ),
    ] = 1.0
    workers: Annotated[
        int | None,
        option(
            "Processes that load images. Default: 1; with a GPU one a core, at most 8, and 2 for cached tokens.",
            metavar="N",
            min=0,
        ),
    ] = None


@dataclass(frozen=True)
class ScheduleGroup:
    """The recipe."""

    PANEL: ClassVar[str] = "Schedule"
    epochs: Annotated[int, option("Times that all images are seen.", metavar="N", min=1)] = 3
    batch: Annotated[
        int | None,
        option(
            "Images per forward pass and process. Default: 4, as published; 64 where a GPU trains the image encoder on "
            "generated images.",
            *BATCH_NAMES,
            metavar="N",
            min=1,
        ),
    ] = None
    accumulate: Annotated[int, option("Batches that are added up before the weights change.", metavar="N", min=1)] = 1
    lr: Annotated[float, option("Learning rate of Adam.", metavar="RATE")] = 5e-5
    cosine: Annotated[bool, option("Warm up, then decay the rate along a cosine.", "--cosine")] = False
    train_tower: Annotated[
        bool, option("Also train CLIP's image encoder, which otherwise stays as it is.", "--train-tower")
    ] = False
    muon_lr: Annotated[
        float | None,
        option(
            "Train the image encoder's matrices with the optimiser Muon at this rate, for training from scratch.",
            metavar="RATE",
        ),
    ] = None
    amp: Annotated[str, option("Mixed precision: no, bf16, fp16 or auto.", metavar="NAME")] = "no"
    seed: Annotated[int, option("Seed of the weights, the order and the generated images.", metavar="N")] = 0
    cache_tokens: Annotated[
        Path | None,
        option("Keep the frozen backbone's tokens in this folder: later epochs skip it.", metavar="PATH"),
    ] = None


@dataclass(frozen=True)
class TeacherGroup:
    """A network whose features the tower learns too."""

    PANEL: ClassVar[str] = "Teacher"
    teacher: Annotated[
        str | None,
        option("Also teach the image encoder this network's features: efficientnet-lite0.", metavar="NAME"),
    ] = None
    teacher_weight: Annotated[
        float, option("Weight of the teacher's loss, relative to the task's 1.", metavar="NUMBER")
    ] = 1.0


@dataclass(frozen=True)
class OutputGroup:
    """What is written."""

    PANEL: ClassVar[str] = "Output"
    out: Annotated[Path, option("Folder for the checkpoint, metrics.jsonl and pictures.", metavar="PATH")] = OUT
    resume: Annotated[bool, option("Go on from what --out holds.", "--resume")] = False
    save_every: Annotated[int, option("Steps between checkpoints.", metavar="N", min=1)] = 200
    tensorboard: Annotated[bool, option("Write event files to OUT/tensorboard.", "--tensorboard")] = False


@mounted(first=("start", "epochs", "batch", "out", "resume"))
def train(
    model: ModelGroup,
    data: DataGroup,
    schedule: ScheduleGroup,
    teaching: TeacherGroup,
    output: OutputGroup,
    source: Annotated[
        str,
        typer.Argument(
            metavar="[DATA]",
            help="A data set (see fbclip data), or 'procedural': generated pictures with drawn defects.",
        ),
    ] = PROCEDURAL,
    start: Annotated[
        str | None,
        option(
            "Fine-tune from this fbclip checkpoint: FILE, or nano for the embedded model. Default: nano, unless --clip "
            "names another model.",
            "--from",
            metavar="PATH",
        ),
    ] = None,
) -> None:
    """Train on a data set with masks, or on generated pictures with drawn defects."""
    require_training_packages()
    from fbclip.data.holdout import SHARE, split
    from fbclip.data.layouts import open_dataset
    from fbclip.files import require_writable

    # whatever can be wrong is told before torch is imported, which takes seconds
    _check_model(model, schedule, teaching, start)
    if source == PROCEDURAL and data.validation:
        raise UsageError("--validation holds out images of a data set; procedural ones are drawn anew for each run")
    first = None if model.clip and not start else find_checkpoint(start or "nano", "start")
    for file in ("checkpoint.safetensors", "last.safetensors"):
        if not output.resume and (output.out / file).exists():
            raise UsageError(f"{output.out} holds a {file} already: pass --resume, or another --out")
    dataset = None if source == PROCEDURAL else open_dataset(Path(source))
    parts = split(dataset, SHARE if data.validation is None else data.validation) if dataset else None
    require_writable(output.out)
    own_name = dataset.root.name if dataset else source
    _train(Job(model, data, schedule, teaching, output, first, parts, own_name))


@dataclass(frozen=True)
class Job:
    """A training run that can begin: its options, the checkpoint it starts from, and the parts of its data set."""

    model: ModelGroup
    data: DataGroup
    schedule: ScheduleGroup
    teaching: TeacherGroup
    output: OutputGroup
    first: Path | None
    parts: Split | None
    data_name: str


def _check_model(model: ModelGroup, schedule: ScheduleGroup, teaching: TeacherGroup, start: str | None) -> None:
    """Raise UsageError where the options of the model don't go together."""
    clip, weights = model.clip, model.clip_weights
    if weights and not clip and not start:
        raise UsageError(f"--clip-weights are those of a --clip, like ViT-L-14-336; got {weights} alone")
    if clip and not start and not weights and not schedule.train_tower:
        raise UsageError(f"a frozen CLIP needs weights: pass --clip-weights TAG or FILE for {clip}, or --train-tower")
    if teaching.teacher and (not schedule.train_tower or schedule.cache_tokens):
        raise UsageError("--teacher teaches the tower: pass --train-tower, and no --cache-tokens")


def _train(job: Job) -> None:
    from fbclip.data.dataset import Samples, SampleSet
    from fbclip.data.holdout import Seen
    from fbclip.data.procedural import ProceduralDefects
    from fbclip.model.checkpoint import About, about
    from fbclip.terminal import make_console
    from fbclip.terminal import say as print_line
    from fbclip.training.loop import accelerator_for, train

    accelerator, console = accelerator_for(job.schedule.amp), make_console()

    def say(line: str) -> None:
        if accelerator.is_main_process:
            print_line(console, line)

    model, seed = _start(job, accelerator), job.schedule.seed
    size = model.config.image_size
    before = about(job.first) if job.first else About(model.config.clip.name)
    say(f"starting from {before.name} at {size} px; --image-size sets another side")
    data: SampleSet = ProceduralDefects(size, job.data.samples, seed, job.data.ramp, variety=job.data.variety)
    held_out, seen = None, before.seen or Seen()
    if parts := job.parts:
        data, held_out = Samples(parts.trained, size), Samples(parts.held_out, size) if parts.held_out else None
        for line in parts.lines(seen):
            say(line)
    recipe, execution = _recipe(job, accelerator), _execution(job, accelerator, console.is_terminal)
    say(f"{recipe.batch_size} images a step; --batch sets another number")
    out = job.output.out
    throughput = train(
        model, data, recipe, out, execution, job.output.resume, accelerator, held_out, _origin(job, seen)
    )
    say(f"wrote {out / 'checkpoint.safetensors'}{', the best by the held-out images' if held_out else ''}")
    say(str(throughput))
    accelerator.end_training()


def _start(job: Job, accelerator: Accelerator) -> FBCLIP:
    """The model that training begins with, the same in every process."""
    import torch

    from fbclip.training.loop import start_model

    m = job.model
    with accelerator.local_main_process_first():  # one process of a machine fetches the weights
        torch.manual_seed(job.schedule.seed)
        return start_model(job.first, m.clip, m.clip_weights, m.image_size, m.layers, job.schedule.train_tower)


def _origin(job: Job, seen: Seen) -> dict[str, object]:
    """What the checkpoint tells of itself: its name, its data, and the images that it and its ancestors have seen."""
    out, parts = job.output.out, job.parts
    name = job.data_name if out == OUT else out.resolve().name
    if not parts:
        return {"name": name, "seen": seen.to_dict()}
    return {"data": parts.to_dict(), "name": name, "seen": (seen | parts.seen).to_dict()}


def _recipe(job: Job, accelerator: Accelerator) -> Recipe:
    from fbclip.training.loop import default_batch
    from fbclip.training.step import Recipe

    s, t = job.schedule, job.teaching
    batch = s.batch or default_batch(accelerator.device.type, s.train_tower and job.parts is None)
    batch_size = batch * s.accumulate * accelerator.num_processes
    return Recipe(s.epochs, batch_size, s.lr, s.cosine, s.seed, s.muon_lr, t.teacher, t.teacher_weight)


def _execution(job: Job, accelerator: Accelerator, is_terminal: bool) -> Execution:
    from fbclip.training.loop import Execution, default_workers

    s, o, workers = job.schedule, job.output, job.data.workers
    if workers is None:
        workers = default_workers(accelerator.device.type, accelerator.num_processes, s.cache_tokens is not None)
    return Execution(s.accumulate, workers, o.save_every, s.cache_tokens, o.tensorboard, is_terminal)
