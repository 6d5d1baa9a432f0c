"""The training loop: the published recipe, and towers trained from scratch for small models."""

from __future__ import annotations

import math
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fbclip.data.dataset import Samples, SampleSet
from fbclip.errors import DeviceError, Interrupted, UsageError
from fbclip.files import require_writable
from fbclip.model import checkpoint
from fbclip.model.clip import load_clip
from fbclip.model.config import default_config
from fbclip.model.network import FBCLIP, HEAD_WIDTH, HEADS
from fbclip.runtime.host import cores
from fbclip.stopping import StopRequest
from fbclip.terminal import progress, say
from fbclip.training.batches import Batch, ReadableSamples, load
from fbclip.training.report import StepLog, Throughput, draw_epoch, samples_to_show
from fbclip.training.step import Recipe, Trainer
from fbclip.training.token_cache import TokenCache
from fbclip.training.validation import NONE_YET, Validation, best_before

GPU_BATCH, MOST_WORKERS = 64, 8


@dataclass(frozen=True)
class Execution:
    """How it is computed and recorded; the result stays the same but for rounding.

    Attributes:
        accumulate: forward passes that make up a step on each process.
        workers: processes that load images, per training process.
        save_every: steps between checkpoints.
        cache_tokens: folder for the frozen backbone's tokens.
        tensorboard: write event files.
        progress: show bars on a terminal, not lines.
    """

    accumulate: int = 1
    workers: int = 0
    save_every: int = 500
    cache_tokens: Path | None = None
    tensorboard: bool = False
    progress: bool = True


def train(
    model: FBCLIP,
    data: SampleSet,
    recipe: Recipe,
    out: Path,
    execution: Execution | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    held_out: Samples | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Throughput:
    """Train in place and write `out/checkpoint.safetensors`, with the optimiser's state and a report beside it.

    Args:
        model: what requires a gradient is trained.
        data: samples at the model's input size.
        resume: go on from what `out` holds.
        accelerator: as `accelerator_for` makes it; float32 on one process if left out.
        held_out: samples that judge the model after each epoch. `checkpoint.safetensors` is the best one by them then,
            and the last one is `last.safetensors`.
        origin: what the checkpoints say of themselves: `name`, `data`, `seen` (see `fbclip.model.checkpoint.about`).

    Raises:
        UsageError: a sample without a mask, a batch of which no image can be read, or `out` can't be written to.
        FBClipError: the loss or its gradient is no finite number, the loss exploded, or the disk is full.
        CheckpointError: nothing to resume, or made by another recipe.
        Interrupted: Ctrl-C or SIGTERM came; the last step is saved.
    """
    accelerator, execution = accelerator or accelerator_for("no"), execution or Execution()
    main = accelerator.is_main_process
    trainer = Trainer(model, data, recipe, out, accelerator, origin, judged=held_out is not None)
    if main:
        require_writable(out)
        trainer.require_space()
    done = trainer.resume() if resume else 0
    log = StepLog(out, done, execution.tensorboard) if main else None
    try:
        with (
            StopRequest("saving after this step" if main else None) as stop,
            _progress(main, execution.progress) as bar,
        ):
            source = _source(data, "", trainer, execution, stop, bar)
            validation = None
            if held_out is not None:
                judges = _source(held_out, "validation", trainer, execution, stop, bar)
                at_once = math.ceil(recipe.batch_size / accelerator.num_processes / execution.accumulate)
                best = best_before(log.rows, trainer.best, done) if log and done else NONE_YET
                validation = Validation(held_out, judges, at_once, execution.workers, best)
            parts = trainer.parts_of_batches(done, execution.accumulate)
            with closing(load(source, parts, execution.workers, pin=accelerator.device.type == "cuda")) as stream:
                return _Steps(trainer, validation, execution, done, log, stop, bar).take(stream)
    except Interrupted as interrupted:
        if not main:  # one process speaks for all
            sys.exit(interrupted.exit_code)
        raise
    finally:
        if log:
            log.close()


def _source(
    data: SampleSet, part: str, trainer: Trainer, execution: Execution, stop: StopRequest, bar: Progress
) -> TokenCache | ReadableSamples:
    """Where batches of these samples come from: their files, or the folder of their tokens, filled first."""
    if not execution.cache_tokens:
        return ReadableSamples(data)
    cache = TokenCache(execution.cache_tokens / part, trainer.model, data, trainer.accelerator)
    _fill(cache, trainer, execution, stop, bar)
    return cache


def _fill(cache: TokenCache, trainer: Trainer, execution: Execution, stop: StopRequest, bar: Progress) -> None:
    """Compute the tokens that are missing, each process its share of them."""
    accelerator, missing = trainer.accelerator, cache.missing
    accelerator.wait_for_everyone()  # all have read the same list
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    task = bar.add_task("caching tokens", total=len(mine), note="", visible=bool(mine))
    with torch.no_grad():
        for count, unreadable in cache.fill(trainer.tokens, mine, trainer.recipe.batch_size, execution.workers):
            for message in unreadable:
                say(bar.console, f"left out: {message}")
            bar.update(task, advance=count)
            if stop.signal:
                raise Interrupted(
                    f"stopped while caching tokens; the same command goes on in {cache.folder}", stop.signal
                )
    accelerator.wait_for_everyone()


class _Steps:
    """The steps that are left of a run, told as they are taken; `log` belongs to the main process."""

    def __init__(
        self,
        trainer: Trainer,
        validation: Validation | None,
        execution: Execution,
        done: int,
        log: StepLog | None,
        stop: StopRequest,
        bar: Progress,
    ) -> None:
        self.trainer, self.validation, self.execution = trainer, validation, execution
        self.done, self.log, self.stop, self.bar = done, log, stop, bar
        self.steps = len(trainer.batches)
        self.per_epoch = math.ceil(len(trainer.data) / trainer.recipe.batch_size)
        self.shown = samples_to_show(trainer.data, trainer.recipe.seed) if log else []
        self.left_out: set[str] = set()
        self.began = 0.0

    def take(self, stream: Iterator[Batch]) -> Throughput:
        """Take them all.

        Raises:
            Interrupted: asked to stop; everything up to the last step is kept.
        """
        trainer, steps, took = self.trainer, self.steps, Throughput()
        self._judge_untrained()
        task = self.bar.add_task("training", total=steps, completed=self.done, note="")
        self.began = time.perf_counter()
        for number in range(self.done + 1, steps + 1):
            start = time.perf_counter()
            parts = [next(stream) for _ in range(self.execution.accumulate)]
            loaded = time.perf_counter()
            row, images, stopping = trainer.step(number, parts, self.stop.signal is not None)
            took.add(images, waiting=loaded - start, computing=time.perf_counter() - loaded)
            self._leave_out(message for part in parts for message in part.unreadable)
            while trainer.notices:
                say(self.bar.console, trainer.notices.pop(0))
            speed = images / (time.perf_counter() - start)
            self.bar.update(task, completed=number, note=f"loss {trainer.usual_loss:.4f}")
            verdict = self._judge(number, row)
            # before the checkpoint: lines that no checkpoint holds are dropped when resuming, missing ones stay missing
            self._record(number, row, speed)
            if number % self.execution.save_every == 0 or number == steps or stopping:
                trainer.save(number)
            self._tell(number, verdict)
            if stopping and number < steps:
                raise Interrupted(
                    f"stopped after step {number} of {steps}; {trainer.out} holds everything up to it: "
                    f"the same run can be resumed",
                    self.stop.signal or signal.SIGTERM,
                )
        return took

    def _leave_out(self, messages: Iterable[str]) -> None:
        for message in dict.fromkeys(messages):
            if message not in self.left_out:
                self.left_out.add(message)
                say(self.bar.console, f"left out: {message}")

    def _judge_untrained(self) -> None:
        if self.log:
            say(self.bar.console, f"training, step {self.done} of {self.steps}")
        if self.validation and not self.done:
            figures, unreadable = self.validation.judge(self.trainer)
            self._leave_out(unreadable)
            if self.log:
                say(self.bar.console, f"before training: validation {figures}")

    def _judge(self, number: int, row: dict[str, Any]) -> str:
        """At the end of an epoch, add the validation's figures to the row of the step; returns words for them."""
        if self.validation is None or number % self.per_epoch:
            return ""
        figures, unreadable = self.validation.judge(self.trainer)
        self._leave_out(unreadable)
        row |= {**figures.row(), "best": self.validation.keep_better(self.trainer, number, figures)}
        return f", validation {figures}" + (", the best so far" if row["best"] else "")

    def _epoch(self, number: int) -> int:
        return math.ceil(number / self.per_epoch)

    def _record(self, number: int, row: dict[str, Any], speed: float) -> None:
        if self.log:
            rate = self.trainer.recipe.lr_at(number - 1, self.steps)
            epoch = self._epoch(number)
            self.log.write({"step": number, "epoch": epoch, **row, "lr": rate, "images_per_s": round(speed, 2)})

    def _tell(self, number: int, verdict: str) -> None:
        """A line and a picture for each epoch."""
        if not self.log:
            return
        trainer, now, epoch = self.trainer, time.perf_counter(), self._epoch(number)
        to_go = (now - self.began) / (number - self.done) * (self.steps - number)
        left = "" if number == self.steps else f"; {_clock(to_go)} left"
        if number % self.per_epoch == 0:
            mean = statistics.fmean(r["total"] for r in self.log.rows if r["epoch"] == epoch)
            say(self.bar.console, f"epoch {epoch} of {trainer.recipe.epochs}: loss {mean:.4f}{verdict}{left}")
            draw_epoch(trainer.out / f"epoch-{epoch:03d}.png", self.log.rows, epoch, trainer.model, self.shown)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _progress(main: bool, bars: bool) -> Progress:
    """Bars of the main process, or lines in their place; the other processes are silent."""
    if not main:
        return Progress(disable=True)
    return progress(
        Console(force_terminal=None if bars else False),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )


def accelerator_for(amp: str) -> Accelerator:
    """Processes and device as `accelerate launch` or torchrun set them up, one process otherwise.

    Args:
        amp: precision of the tower's and the separation attention's products: "no", "bf16", "fp16", or "auto",
            which is bf16 on a CUDA device that has it, fp16 on an older one, and no elsewhere.
    """
    if amp not in ("auto", "no", "bf16", "fp16"):
        raise UsageError(f"mixed precision is auto, no, bf16 or fp16; got {amp!r}", option="amp")
    cuda = torch.cuda.is_available()
    if amp == "auto":
        amp = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "no"
    if amp == "fp16" and not cuda:
        raise DeviceError("fp16 needs a CUDA device and there is none; use no, or bf16", option="amp")
    if not cuda:  # or plain attention in bfloat16 would go through float32
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return Accelerator(mixed_precision=amp, cpu=not torch.accelerator.is_available())


def default_batch(device: str, tower_on_generated: bool) -> int:
    """Images per forward pass: the published number wherever a recipe was published or images are few, since the learning
    rate and the number of steps go with it; towers on generated images, of which there are any number, fill a GPU."""
    return GPU_BATCH if device == "cuda" and tower_on_generated else Recipe().batch_size


def default_workers(device: str, processes: int, cached: bool) -> int:
    """Processes that load images for each of the training processes of a machine: a GPU takes more than one can load.
    Those that read cached tokens only copy, and hold 14 MB an image of ViT-L/14 in shared memory."""
    if device != "cuda":
        return 1
    return 2 if cached else max(1, min(MOST_WORKERS, cores() // processes))


def start_model(
    start: Path | None,
    clip: str | None,
    clip_weights: str | None,
    image_size: int | None,
    feature_layers: tuple[int, ...] | None,
    train_tower: bool,
) -> FBCLIP:
    """What a training begins with: a checkpoint's weights, or a CLIP with new learnt parts; a tower without weights is
    drawn from torch's generator.

    Args:
        start: a checkpoint as `fbclip.model.checkpoint.load` takes it, with `clip` and `clip_weights` where it needs them.
        clip, clip_weights: as `fbclip.model.clip.load_clip` takes them; without a checkpoint `clip` is needed.
        image_size, feature_layers: None for those of the checkpoint, or the published ones.
        train_tower: leave the vision tower trainable.

    Raises:
        CheckpointError: as `fbclip.model.checkpoint.load` and `load_clip`.
    """
    if start is not None:
        model = checkpoint.load(start, clip, clip_weights, image_size, feature_layers)
        model.visual.tower.requires_grad_(train_tower)
        return model
    assert clip is not None
    loaded, config = load_clip(clip, clip_weights)
    model = FBCLIP(default_config(config, image_size, feature_layers), loaded, train_tower)
    if clip_weights is None:
        init_from_scratch(model)
    return model


@torch.no_grad()
def init_from_scratch(model: FBCLIP) -> None:
    """Start a model without pretrained weights where it learns at once. Draws from torch's generator.

    The tower's attention starts the way trained ones look: per head W_q·W_kᵀ near 0.7·(noise + identity), and
    W_v·W_out near 0.4·(noise - identity) (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers",
    ICML 2023). The separation attention starts near the identity: it has no residual connection, so with random
    weights every token leaves it as the same average, and the loss stays on a plateau (measured: pixel AUROC 0.5
    after 120 steps at lr 1e-3, against 0.95 at 5e-4, one run each).
    """
    for block in model.visual.tower.blocks:
        attn = cast(torch.nn.MultiheadAttention, block.attn)
        width, head = attn.embed_dim, attn.head_dim
        identity = torch.eye(width)
        q, k, v = attn.in_proj_weight.chunk(3)
        for h in range(attn.num_heads):
            u, s, vh = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * identity)
            root = s[:head].sqrt()[:, None]
            q[h * head : (h + 1) * head] = root * u.T[:head]
            k[h * head : (h + 1) * head] = root * vh[:head]
        u, s, vh = torch.linalg.svd(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * identity)
        v.copy_(s.sqrt()[:, None] * vh)
        attn.out_proj.weight.copy_(u * s.sqrt())
    for branch in (model.visual.separation.foreground, model.visual.separation.background):
        for h in range(HEADS):
            rows = slice(h * HEAD_WIDTH, (h + 1) * HEAD_WIDTH)
            alike, through = (torch.linalg.qr(torch.randn(branch.to_q.in_features, HEAD_WIDTH))[0].T for _ in range(2))
            branch.to_q.weight[rows] = 2.4 * alike  # each token attends to its like, sharply
            branch.to_k.weight[rows] = 1.2 * alike
            branch.to_v.weight[rows] = through
            branch.to_out.weight[:, rows] = through.T / 4
        branch.to_out.bias.zero_()
    for context in (model.prompts.ctx_pos, model.prompts.ctx_neg):
        context.normal_()  # two prompts that start apart
