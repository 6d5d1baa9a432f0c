"""A held-out part of the data judges the model after each epoch, as `fbclip eval` would, and the best one is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fbclip import checkpoint
from fbclip.data.dataset import Samples
from fbclip.image import upsampling_matrix
from fbclip.loading import Entry, load
from fbclip.metrics import image_metrics
from fbclip.training_step import Trainer, scores_of_tokens

Judged = tuple[int, float, NDArray[np.float32], NDArray[np.uint8]]  # index, score, patch map (g, g), mask as bits


@dataclass(frozen=True)
class Figures:
    """Of the held-out images, 0..1: means over the classes where they are defined, None where they are in none.

    Attributes:
        threshold: of the best balanced accuracy; None where only one kind of image could be read.
    """

    image_auroc: float | None
    pixel_auroc: float | None
    threshold: float | None

    @property
    def merit(self) -> float:
        """What the best checkpoint is chosen by: the mean of the two, so that neither whole images nor places win alone."""
        defined = [value for value in (self.image_auroc, self.pixel_auroc) if value is not None]
        return float(np.mean(defined)) if defined else 0.0

    def __str__(self) -> str:
        values = (("image", self.image_auroc), ("pixel", self.pixel_auroc))
        return ", ".join(f"{name} AUROC " + ("–" if v is None else f"{100 * v:.1f} %") for name, v in values)

    def row(self) -> dict[str, float]:
        """For `metrics.jsonl`, without what is undefined."""
        values = {"validation_image_auroc": self.image_auroc, "validation_pixel_auroc": self.pixel_auroc}
        return {name: value for name, value in values.items() if value is not None}


class Validation:
    """The held-out images, and the best figures on them so far.

    Args:
        data: the images, at the model's input size.
        source: the same samples, or their tokens.
        batch_size: images per forward pass.
        workers: processes that load images.
        best: the checkpoint whose figures have to be passed, where a run goes on.
    """

    def __init__(
        self, data: Samples, source: Dataset[Entry], batch_size: int, workers: int, best: Path | None = None
    ) -> None:
        self.data, self.source, self.batch_size, self.workers = data, source, batch_size, workers
        self.best = -1.0
        if best is not None and best.is_file():
            self.best = float(checkpoint.read_header(best)["provenance"].get("merit", -1.0))

    def judge(self, trainer: Trainer) -> tuple[Figures, list[str]]:
        """Figures of the model as it is, the same on all processes' shares; and what could not be read here."""
        unreadable: list[str] = []
        found: list[Judged] = list(self._run(trainer, unreadable))
        if trainer.accelerator.num_processes > 1:
            found = gather_object(found)
        return self._figures(found, trainer.model.config.grid), unreadable

    def keep_better(self, trainer: Trainer, step: int, figures: Figures) -> bool:
        """Write the checkpoint if it is better than those before; on equal figures the earlier stays."""
        if better := figures.merit > self.best:
            self.best = figures.merit
            found: dict[str, Any] = {"validation": figures.row(), "merit": figures.merit}
            trainer.save_best(step, found | ({} if figures.threshold is None else {"threshold": figures.threshold}))
        return better

    @torch.no_grad()
    def _run(self, trainer: Trainer, unreadable: list[str]) -> Iterator[Judged]:
        """This process's share of the images."""
        accelerator = trainer.accelerator
        mine = list(range(accelerator.process_index, len(self.data), accelerator.num_processes))
        batches = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        text = trainer.model.encode_text()
        with closing(load(self.source, batches, self.workers, pin=accelerator.device.type == "cuda")) as stream:
            for batch in stream:
                unreadable += batch.unreadable
                if batch.indices:
                    with trainer.attention_kernel():
                        tokens = trainer.tokens(batch)
                        scores, maps, _ = scores_of_tokens(trainer.model, tokens, text, accelerator.autocast)
                    masks = np.packbits(batch.masks.numpy(), axis=-1)
                    yield from zip(batch.indices, scores.tolist(), maps.float().cpu().numpy(), masks, strict=True)

    def _figures(self, found: list[Judged], grid: int) -> Figures:
        size, items = self.data.image_size, self.data.items
        up = upsampling_matrix(size, grid)
        images, pixels = [], []
        for name in sorted({item.class_name for item in items}):
            of_class = [judged for judged in found if items[judged[0]].class_name == name]
            if not of_class:
                continue
            masks = np.stack([np.unpackbits(bits, axis=-1, count=size) for *_, bits in of_class])
            maps = np.stack([up @ patch_map @ up.T for _, _, patch_map, _ in of_class])
            images.append(image_metrics([items[i].label for i, *_ in of_class], [s for _, s, *_ in of_class]).auroc)
            pixels.append(image_metrics(masks, maps).auroc)
        labels = np.array([items[i].label for i, *_ in found])
        return Figures(_mean(images), _mean(pixels), best_threshold(labels, np.array([s for _, s, *_ in found])))


def best_threshold(labels: NDArray[np.integer[Any]], scores: NDArray[np.floating[Any]]) -> float | None:
    """Half-way between two scores, where the recalls of good (0) and defective (1) images have the best mean.

    Among several the lowest: rather a false alarm than a miss.
    """
    good, defective = np.sort(scores[labels == 0]), np.sort(scores[labels == 1])
    if not len(good) or not len(defective):
        return None
    distinct = np.unique(scores)
    middles = (distinct[1:] + distinct[:-1]) / 2 if len(distinct) > 1 else distinct
    passed, missed = (np.searchsorted(kind, middles) / len(kind) for kind in (good, defective))
    return float(middles[(passed - missed).argmax()])


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
