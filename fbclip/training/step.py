"""One step of training: what is computed, on how many processes and in which precision."""

from __future__ import annotations

import io
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fbclip.data.dataset import Samples, SampleSet
from fbclip.errors import CheckpointError, FBClipError, UsageError
from fbclip.files import replacing
from fbclip.model import checkpoint
from fbclip.model.capture import Captured
from fbclip.model.checkpoint import BEST, LAST
from fbclip.model.network import FBCLIP, background
from fbclip.training.batches import Batch, ReadableSamples, collate
from fbclip.training.distill import Distillation
from fbclip.training.losses import Losses, fbclip_losses
from fbclip.untrusted import one_line

# One focal term can't pass 11.5 (-log of FOCAL_SMOOTH): above this, score and map are sure and wrong in a whole batch.
EXPLODED = 12.0
EXPLODED_RATIO = 10.0  # and so many times the median of the last steps
MEDIAN_OF = 50
ADAM_BETAS, MUON_DECAY = (0.5, 0.999), 0.01


@dataclass(frozen=True)
class Recipe:
    """What is trained; the defaults are the published ones (docs/method.md, section 8). The result depends on nothing else.

    Attributes:
        epochs: passes over the data.
        batch_size: images per step, over all processes and accumulated passes.
        lr: Adam's learning rate, betas (0.5, 0.999).
        cosine: warm up over the first 5 % of the steps, then decay to 0 along a cosine.
        seed: of the order of the samples.
        muon_lr: learning rate of Muon for the matrices of the tower's blocks (Jordan et al., 2024); None leaves all
            to Adam. From scratch it learnt the teacher's features in a tenth of Adam's images.
        teacher: whose features the tower is taught beside the task, one of `distill.TEACHERS`, or None.
        teacher_weight: of that loss.
    """

    epochs: int = 3
    batch_size: int = 4
    lr: float = 5e-5
    cosine: bool = False
    seed: int = 0
    muon_lr: float | None = None
    teacher: str | None = None
    teacher_weight: float = 1.0

    def lr_at(self, step: int, steps: int) -> float:
        """Adam's learning rate at a step, from 0."""
        return self.lr * self.share_at(step, steps)

    def share_at(self, step: int, steps: int) -> float:
        """Share of the learning rates that a step, from 0, uses."""
        if not self.cosine:
            return 1.0
        warm = max(1, steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def scores_of_tokens(
    model: FBCLIP, tokens: Tensor, text: Tensor, mixed: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B,), patch maps (B, g, g) and projected tokens (B, K, 3, N, E) of the tower's tokens float32 (B, K, N, C).

    Args:
        text: features (2, E).
        mixed: wraps what may run in half precision (docs/method.md, section 10).
    """
    visual = model.visual
    views = visual.views(tokens)
    with mixed():
        z = visual.separation(views.flatten(0, 2))
    z = z.float().unflatten(0, views.shape[:3])
    projected = visual.suppressed(z, background(z))
    score, patch_map = visual.probabilities(visual.fused(visual.logits(projected, text)))
    return score, patch_map, projected


def loss_of_tokens(
    model: FBCLIP, tokens: Tensor, masks: Tensor, mixed: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Losses:
    """Losses of what `scores_of_tokens` takes, with masks (B, S, S) of 0 and 1."""
    text = model.encode_text()
    score, patch_map, projected = scores_of_tokens(model, tokens, text, mixed)
    label = masks.flatten(1).amax(dim=1).float()
    return fbclip_losses(score, patch_map, projected[:, -1, 2], text, label, masks)


def batch_order(samples: int, recipe: Recipe, drawn: bool = True) -> Iterator[list[int]]:
    """Indices of every batch of every epoch, shuffled per epoch from the seed: a resumed run sees the same order.

    Args:
        drawn: the samples are drawn at random, in an order that may grow harder; those of a data set are not.
    """
    for epoch in range(recipe.epochs):
        order = np.random.Generator(np.random.PCG64([recipe.seed, epoch])).permutation(samples)
        if recipe.cosine and drawn:  # a curriculum keeps its order
            order = np.arange(samples)
        for start in range(0, samples, recipe.batch_size):
            yield order[start : start + recipe.batch_size].tolist()


def make_optimisers(model: FBCLIP, parameters: list[Tensor], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Adam, and after it Muon for the matrices of the tower's blocks where the recipe has a rate for it."""
    fused = True if parameters[0].is_cuda else None  # a few launches for all parameters, and no step count on the host
    if recipe.muon_lr is None:
        return [torch.optim.Adam(parameters, lr=recipe.lr, betas=ADAM_BETAS, fused=fused)]
    matrices = [p for p in model.visual.tower.blocks.parameters() if p.requires_grad and p.ndim == 2]
    if not matrices or not hasattr(torch.optim, "Muon"):
        raise UsageError(
            "Muon needs a tower that is trained and torch 2.9 or later; leave it out for Adam alone", option="muon_lr"
        )
    taken = set(map(id, matrices))
    others = [p for p in parameters if id(p) not in taken]
    return [
        torch.optim.Adam(others, lr=recipe.lr, betas=ADAM_BETAS, fused=fused),
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=MUON_DECAY),
    ]


class Trainer:
    """A model with its optimiser, on one of several processes that take the same steps.

    Args:
        origin: what the checkpoints say of themselves beside recipe and step; `data` has to be the same to resume.
        judged: whether `checkpoint.safetensors` holds the best step, chosen by `save_best`; the last one is in
            `last.safetensors` then.

    The gradient of a step is the mean over its images wherever they are: each process adds up its parts, weighted by
    their images, and one sum over the processes joins them. That stays exact for a last batch that does not divide
    evenly, and for parts with unreadable images, where averaging the processes' means (as DistributedDataParallel
    does) would not. What is trained is small, so overlapping that sum with the backward pass would gain little.

    Attributes:
        notices: what a user should hear of, to be told and taken away.
    """

    def __init__(
        self,
        model: FBCLIP,
        data: SampleSet,
        recipe: Recipe,
        out: Path,
        accelerator: Accelerator,
        origin: Mapping[str, Any] | None = None,
        judged: bool = False,
    ) -> None:
        # CLIP is frozen in eval mode, and nothing here has dropout: no step draws random numbers
        self.model = model.eval().to(accelerator.device)
        self.data, self.recipe, self.out, self.accelerator = data, recipe, out, accelerator
        self.origin = {**(origin or {}), "recipe": asdict(recipe), "samples": len(data)}
        self.best, self.last = (out / f"{name}.safetensors" for name in (BEST, LAST if judged else BEST))
        self.distillation = None
        if recipe.teacher:
            self.distillation = Distillation(recipe.teacher, model.config, data, recipe.teacher_weight)
            self.distillation.to(accelerator.device)
        trained = [*model.parameters(), *(self.distillation.parameters() if self.distillation else ())]
        self.parameters = [p for p in trained if p.requires_grad]
        self.optimisers = [accelerator.prepare(o) for o in make_optimisers(model, self.parameters, recipe)]
        self.batches = list(batch_order(len(data), recipe, drawn=not isinstance(data, Samples)))
        clip, device = model.config.clip, accelerator.device
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (clip.mean, clip.std))
        self.recent: list[float] = []  # losses of the last steps
        self.notices: list[str] = []
        self.passes: Callable[[Tensor, Tensor], Sequence[Tensor]] = self._losses_and_gradient
        if device.type == "cuda":
            self.passes = Captured(self._losses_and_gradient)

    def parts_of_batches(self, done: int, accumulate: int) -> list[list[int]]:
        """Indices of each forward pass of this process from a step on, `accumulate` to a step."""
        mine, count = self.accelerator.process_index, self.accelerator.num_processes
        return [
            part.tolist()
            for batch in self.batches[done:]
            for part in np.array_split(np.array(batch), count * accumulate)[mine * accumulate : (mine + 1) * accumulate]
        ]

    def tokens(self, inputs: Tensor) -> Tensor:
        """Tokens float32 (B, K, N, C) of the inputs of a `Batch`, images or cached tokens, wherever they are."""
        inputs = inputs.to(self.accelerator.device, non_blocking=True)
        if inputs.dtype == torch.float16:
            return inputs.float()
        with self.accelerator.autocast(), self.attention_kernel():
            tokens = self.model.visual.tower((inputs.permute(0, 3, 1, 2) / 255 - self.mean) / self.std)
        return cast(Tensor, tokens.float())

    def attention_kernel(self) -> AbstractContextManager[Any]:
        """On a CPU, attention as plain products: torch's fused kernel trains small towers in bfloat16 at half the speed."""
        plain = self.accelerator.device.type == "cpu" and self.accelerator.mixed_precision != "no"
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    @property
    def usual_loss(self) -> float:
        """Median of the last steps' losses, infinite before the first."""
        return statistics.median(self.recent) if self.recent else math.inf

    def step(self, number: int, parts: list[Batch], stop: bool) -> tuple[dict[str, float], int, bool]:
        """Take step `number`; returns losses and gradient norm, images used, and whether any process wants to stop."""
        names = [*Losses._fields, *(["distillation"] if self.distillation else [])]
        readable = [batch for batch in parts if batch.indices]
        losses = self._accumulated(readable)
        self._join_gradients()
        used, wishes = self._total([sum(len(batch.indices) for batch in readable), stop])
        if not used:
            raise UsageError(f"none of the images of step {number} can be read; check the data set")
        norm = self._average_gradient(used)
        *values, norm_value = torch.cat([*losses, norm[None]]).tolist()  # the step's only wait for the device
        images = [len(batch.indices) for batch in readable]
        means = [values[n :: len(names)] for n in range(len(names))]  # of each part
        sums = self._total([sum(n * mean for n, mean in zip(images, of_parts, strict=True)) for of_parts in means])
        row = {name: value / used for name, value in zip(names, sums, strict=True)}
        row = {"total": sum(row.values()), **row, "gradient_norm": norm_value}
        self._require_sound(number, row)
        share = self.recipe.share_at(number - 1, len(self.batches))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = optimiser.defaults["lr"] * share
            optimiser.step()
        return row, int(used), wishes > 0

    def _accumulated(self, parts: list[Batch]) -> list[Tensor]:
        """The losses (T,) of each part on the device, their gradients added up.

        What a GPU would take as one launch and does not is computed plainly from then on, and a notice says so.
        """
        captured, device = isinstance(self.passes, Captured), self.accelerator.device
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=not captured)  # a graph writes gradients where it found them
        try:
            return [
                self.passes(*(t.to(device, non_blocking=True) for t in (batch.inputs, batch.masks)))[0]
                for batch in parts
            ]
        except RuntimeError as error:
            if not captured:
                raise
            self.notices.append(f"training without a CUDA graph, which this GPU did not take: {one_line(error)}")
        self.passes = self._losses_and_gradient  # here, where the error holds on to no memory any more
        return self._accumulated(parts)

    def _losses_and_gradient(self, inputs: Tensor, masks: Tensor) -> tuple[Tensor]:
        """A forward and a backward pass: the losses (T,) of a part, whose gradient is added to the parameters', weighted
        by its share of a full batch."""
        tokens = self.tokens(inputs)
        with self.attention_kernel():
            losses = [*loss_of_tokens(self.model, tokens, masks, self.accelerator.autocast)]
        if self.distillation:
            losses.append(self.distillation.loss(inputs, tokens))
        terms = torch.stack(losses)
        self.accelerator.backward(terms.sum() * (len(inputs) / self.recipe.batch_size))
        return (terms.detach(),)

    def _join_gradients(self) -> None:
        """Sum gradients over the processes."""
        if self.accelerator.num_processes == 1:
            return
        for p in self.parameters:
            if p.grad is None:  # this process had no image
                p.grad = torch.zeros_like(p)
        gradients = [cast(Tensor, p.grad) for p in self.parameters]
        flat = cast(Tensor, self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum"))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def _total(self, values: list[float]) -> list[float]:
        """Each value's sum over the processes."""
        if self.accelerator.num_processes == 1:
            return values
        mine = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return cast("list[float]", cast(Tensor, self.accelerator.reduce(mine, "sum")).tolist())

    def _average_gradient(self, images: float) -> Tensor:
        """From the sum over parts, each weighted by the full batch, to the mean over images; returns its norm."""
        self.accelerator.unscale_gradients(self.optimisers)  # of float16's loss scale
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if images != self.recipe.batch_size:
            for gradient in gradients:
                gradient.mul_(self.recipe.batch_size / images)
        return torch.nn.utils.get_total_norm(gradients)

    def _require_sound(self, number: int, row: dict[str, float]) -> None:
        """Raise before a bad step is taken, the images that caused it saved."""
        total, limit = row["total"], max(EXPLODED, EXPLODED_RATIO * self.usual_loss)
        # float16 skips steps whose scaled gradient overflows and lowers its scale: no failure
        gradient_sound = math.isfinite(row["gradient_norm"]) or self.accelerator.scaler is not None
        if math.isfinite(total) and gradient_sound and total <= limit:
            self.recent = [*self.recent[1 - MEDIAN_OF :], total]
            return
        what = f"loss {total:g}" + ("" if gradient_sound else f", gradient norm {row['gradient_norm']}")
        saved = self._save_bad_batch(number)
        whole = self.last.exists()
        raise FBClipError(
            f"step {number} gave {what} on samples {', '.join(map(str, self.batches[number - 1]))}, which are in {saved}: "
            f"look at them, then lower the learning rate (now {self.recipe.lr:g}); "
            + (f"the last checkpoint in {self.out} stands" if whole else "no checkpoint was written yet")
        )

    def _save_bad_batch(self, number: int) -> Path:
        """indices int64 (B,), images uint8 (B, S, S, 3) and masks uint8 (B, S, S) of all processes' share of a step."""
        path, readable = self.out / "bad_batch.npz", ReadableSamples(self.data)
        batch = collate([readable[index] for index in self.batches[number - 1]])
        if self.accelerator.is_main_process:
            with replacing(path) as file:
                np.savez_compressed(
                    file, indices=np.array(batch.indices), images=batch.inputs.numpy(), masks=batch.masks.numpy()
                )
        return path

    def require_space(self) -> None:
        """Raise FBClipError, before any work, where the disk has no room for what is written beside what is there."""
        weights, files = checkpoint.size_bytes(self.model), {self.best, self.last, *self.out.glob("optimiser-*.pt")}
        moments = 2 * 4 * sum(p.numel() for p in self.parameters)  # Adam's, float32; Muon has one
        there = sum(path.stat().st_size for path in files if path.is_file())
        # an older file goes when the new one is whole
        needed = len({self.best, self.last}) * weights + moments + max(weights, moments) - there
        if needed > (free := shutil.disk_usage(self.out).free):
            raise FBClipError(
                f"the disk is full: checkpoints and the optimiser's state take {needed / 1e6:.1f} MB, {self.out} has "
                f"{free / 1e6:.1f} MB free; free some space, or write elsewhere",
                option="out",
            )

    def save(self, step: int) -> None:
        """Checkpoint and optimiser state. Each names its step, so a run killed between the two files can be resumed."""
        if not self.accelerator.is_main_process:
            return
        state: dict[str, Any] = {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}
        if self.distillation:
            state["heads"] = self.distillation.heads.state_dict()
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        content = io.BytesIO()  # torch writes past a full disk and then says something else
        torch.save(state, content)
        with replacing(self._state_path(step)) as file:
            file.write(content.getbuffer())
        checkpoint.save(self.model, self.last, {**self.origin, "step": step})
        for old in set(self.out.glob("optimiser-*.pt")) - {self._state_path(step)}:
            old.unlink()

    def save_best(self, step: int, found: Mapping[str, Any]) -> None:
        """The checkpoint to deploy, with what the held-out images said of it."""
        if self.accelerator.is_main_process:
            checkpoint.save(self.model, self.best, {**self.origin, **found, "step": step})

    def resume(self) -> int:
        """Load what an interrupted run left; returns the steps already taken."""
        path = self.last
        if not path.is_file():
            raise CheckpointError(f"what is resumed has a checkpoint; {self.out} has no {path.name}", option="resume")
        found = checkpoint.read_header(path)["provenance"]
        here = {k: self.origin[k] for k in ("recipe", "samples", "data") if k in self.origin}
        there = {k: found.get(k) for k in here}
        if there != here:
            raise CheckpointError(
                f"what is resumed has the same recipe and data ({here}); {self.out} holds {there}: "
                f"pass the options of that run, or write elsewhere",
                option="resume",
            )
        step = int(found["step"])
        if not self._state_path(step).is_file():
            raise CheckpointError(
                f"what is resumed has {self._state_path(step)} beside its checkpoint; it is missing", option="resume"
            )
        state: dict[str, Any] = torch.load(
            self._state_path(step), weights_only=True, map_location=self.accelerator.device
        )
        checkpoint.restore(self.model, path)
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            for group, of_file in zip(optimiser.param_groups, kept["param_groups"], strict=True):
                if "fused" in group:  # the device's, not the recipe's
                    of_file["fused"] = group["fused"]
            optimiser.load_state_dict(kept)
        if self.distillation:
            self.distillation.heads.load_state_dict(state["heads"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return step

    def _state_path(self, step: int) -> Path:
        return self.out / f"optimiser-{step:06d}.pt"
