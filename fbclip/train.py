"""The training loop: the published recipe, and towers trained from scratch for small models."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from fbclip import checkpoint
from fbclip.data.procedural import Sample
from fbclip.errors import CheckpointError, FBClipError
from fbclip.losses import Losses, fbclip_losses
from fbclip.model import FBCLIP


class SampleSet(Protocol):
    """Anything with a length and samples by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the published ones (spec, section 8).

    Attributes:
        epochs: passes over the data.
        batch_size: images per step.
        lr: Adam's learning rate, betas (0.5, 0.999).
        cosine: warm up over the first 5 % of the steps, then decay to 0 along a cosine.
        seed: of the order of the samples.
        save_every: steps between checkpoints.
    """

    epochs: int = 3
    batch_size: int = 4
    lr: float = 5e-5
    cosine: bool = False
    seed: int = 0
    save_every: int = 500

    def lr_at(self, step: int, steps: int) -> float:
        if not self.cosine:
            return self.lr
        warm = max(1, steps // 20)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(model: FBCLIP, data: SampleSet, recipe: Recipe, out: Path, resume: bool = False,
          progress: bool = True, workers: int = 0) -> list[float]:  # fmt: skip
    """Train in place and write `out/checkpoint.safetensors` with `out/optimiser.pt` beside it.

    Args:
        model: what requires a gradient is trained.
        data: samples at the model's input size.
        resume: go on from what `out` holds.

    Returns:
        Total loss of each step taken.

    Raises:
        FBClipError: the loss is no finite number; the last checkpoint stands.
        CheckpointError: nothing to resume, or made by another recipe.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=recipe.lr, betas=(0.5, 0.999))
    batches = list(batch_order(len(data), recipe))
    done = _resume(model, optimiser, recipe, out) if resume else 0
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.config.clip.mean, model.config.clip.std))
    loader = DataLoader(data, batch_sampler=batches[done:], collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
    history = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
               TimeRemainingColumn())  # fmt: skip
    model.eval()  # CLIP is frozen in eval mode, and nothing here has dropout
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("training", total=len(batches), completed=done, loss=math.nan)
        for step, (images, masks) in enumerate(loader, start=done):
            losses = loss_of_batch(model, (images.permute(0, 3, 1, 2) / 255 - mean) / std, masks)
            if not math.isfinite(total := losses.total.item()):
                raise FBClipError(f"the loss of step {step} is {total}; lower --lr (now {recipe.lr}). "
                                  f"The last checkpoint in {out} stands")  # fmt: skip
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr_at(step, len(batches))
            optimiser.zero_grad()
            losses.total.backward()
            optimiser.step()
            history.append(total)
            bar.update(task, completed=step + 1, loss=float(np.mean(history[-50:])))
            if (step + 1) % recipe.save_every == 0 or step + 1 == len(batches):
                _save(model, optimiser, recipe, step + 1, out)
    return history


def loss_of_batch(model: FBCLIP, images: Tensor, masks: Tensor) -> Losses:
    """Losses of normalised images (B, 3, S, S) with masks (B, S, S) of 0 and 1; an image is defective if its mask is."""
    text = model.encode_text()
    visual = model.visual
    projected = visual.suppressed(visual.separated(visual.tower(images)))
    score, patch_map = visual.scores_of_projected(projected, text)
    label = masks.flatten(1).amax(dim=1).float()
    return fbclip_losses(score, patch_map, projected[:, -1, 2], text, label, masks)


def batch_order(samples: int, recipe: Recipe) -> Iterator[list[int]]:
    """Indices of every batch of every epoch, shuffled per epoch from the seed: a resumed run sees the same order."""
    for epoch in range(recipe.epochs):
        order = np.random.Generator(np.random.PCG64([recipe.seed, epoch])).permutation(samples)
        if recipe.cosine:  # a curriculum keeps its order: procedural samples are drawn at random anyway
            order = np.arange(samples)
        for start in range(0, samples, recipe.batch_size):
            yield order[start : start + recipe.batch_size].tolist()


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Samples -> images uint8 (B, S, S, 3), masks uint8 (B, S, S)."""

    def stack(arrays: list[NDArray[np.uint8]]) -> Tensor:
        return torch.from_numpy(np.stack(arrays))

    return stack([s.image for s in samples]), stack([s.mask for s in samples])


def _save(model: FBCLIP, optimiser: torch.optim.Optimizer, recipe: Recipe, step: int, out: Path) -> None:
    checkpoint.save(model, out / "checkpoint.safetensors", {"recipe": asdict(recipe), "step": step})
    state = {"optimiser": optimiser.state_dict(), "step": step, "recipe": asdict(recipe)}
    temporary = out / "optimiser.pt.tmp"
    torch.save(state, temporary)
    os.replace(temporary, out / "optimiser.pt")


def _resume(model: FBCLIP, optimiser: torch.optim.Optimizer, recipe: Recipe, out: Path) -> int:
    """Load what an interrupted run left; returns the steps already taken."""
    path = out / "optimiser.pt"
    if not path.is_file():
        raise CheckpointError(f"--resume needs the optimiser.pt of an interrupted run; {out} has none")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    header = checkpoint.read_header(out / "checkpoint.safetensors")
    if state["recipe"] != asdict(recipe) or header["provenance"]["step"] != state["step"]:
        raise CheckpointError(f"--resume goes on with the same recipe; {out} holds {state['recipe']}")
    checkpoint.restore(model, out / "checkpoint.safetensors")
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])
