"""A held-out part of the data judges the model after each epoch, as `fbclip eval` would, and the best one is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fbclip.data.dataset import Samples
from fbclip.metrics import Metrics, image_metrics
from fbclip.model import checkpoint
from fbclip.resample import upsampling_matrix
from fbclip.training.batches import Entry, load
from fbclip.training.step import Trainer, scores_of_tokens

NONE_YET = -1.0  # below every merit
Judged = tuple[int, float, NDArray[np.float32], NDArray[np.uint8]]  # index, score, patch map (g, g), mask as bits


@dataclass(frozen=True)
class Figures:
    """Of the held-out images, 0..1: means over the classes where they are defined, None where they are in none.

    Attributes:
        threshold: of the best balanced accuracy; None where only one kind of image could be read.
    """

    image_auroc: float | None
    pixel_auroc: float | None
    pixel_ap: float | None
    threshold: float | None

    @property
    def merit(self) -> float | None:
        """What the best checkpoint is chosen by: the mean of image AUROC and pixel AP; None where neither is defined.

        Most pixels are good beyond doubt, so that pixel AUROC hardly moves; AP tells how much of what is marked is defect.
        """
        return _mean([self.image_auroc, self.pixel_ap])

    def __str__(self) -> str:
        values = (("image AUROC", self.image_auroc), ("pixel AUROC", self.pixel_auroc), ("pixel AP", self.pixel_ap))
        return ", ".join(f"{name} " + ("–" if value is None else f"{100 * value:.1f} %") for name, value in values)

    def row(self) -> dict[str, float]:
        """For `metrics.jsonl`, without what is undefined."""
        values = {
            "image_auroc": self.image_auroc,
            "pixel_auroc": self.pixel_auroc,
            "pixel_ap": self.pixel_ap,
            "merit": self.merit,
        }
        return {f"validation_{name}": value for name, value in values.items() if value is not None}


class Validation:
    """The held-out images, and the best figures on them so far.

    Args:
        data: the images, at the model's input size.
        source: the same samples, or their tokens.
        batch_size: images per forward pass.
        workers: processes that load images.
        best: the merit that has to be passed, where a run goes on.
    """

    def __init__(
        self, data: Samples, source: Dataset[Entry], batch_size: int, workers: int, best: float = NONE_YET
    ) -> None:
        self.data, self.source, self.batch_size, self.workers, self.best = data, source, batch_size, workers, best

    def judge(self, trainer: Trainer) -> tuple[Figures, list[str]]:
        """Figures of the model as it is, the same on all processes' shares; and what could not be read here."""
        unreadable: list[str] = []
        found: list[Judged] = list(self._run(trainer, unreadable))
        if trainer.accelerator.num_processes > 1:
            found = gather_object(found)
        return self._figures(found, trainer.model.config.grid), unreadable

    def keep_better(self, trainer: Trainer, step: int, figures: Figures) -> bool:
        """Write the checkpoint if it is better than those before, or if that can't be told; of equal ones the first stays."""
        merit = figures.merit
        if better := merit is None or merit > self.best:
            self.best = self.best if merit is None else merit
            threshold = {} if figures.threshold is None else {"threshold": figures.threshold}
            trainer.save_best(step, {**figures.row(), **threshold})
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
                        tokens = trainer.tokens(batch.inputs)
                        scores, maps, _ = scores_of_tokens(trainer.model, tokens, text, accelerator.autocast)
                    masks = np.packbits(batch.masks.numpy(), axis=-1)
                    yield from zip(batch.indices, scores.tolist(), maps.float().cpu().numpy(), masks, strict=True)

    def _figures(self, found: list[Judged], grid: int) -> Figures:
        size, items = self.data.image_size, self.data.items
        up = upsampling_matrix(size, grid)
        images: list[Metrics] = []
        pixels: list[Metrics] = []
        for name in sorted({item.class_name for item in items}):
            of_class = [judged for judged in found if items[judged[0]].class_name == name]
            if not of_class:
                continue
            masks = np.stack([np.unpackbits(bits, axis=-1, count=size) for *_, bits in of_class])
            maps = np.stack([up @ patch_map @ up.T for _, _, patch_map, _ in of_class])
            images.append(image_metrics([items[i].label for i, *_ in of_class], [s for _, s, *_ in of_class]))
            pixels.append(image_metrics(masks, maps))
        labels, scores = np.array([items[i].label for i, *_ in found]), np.array([s for _, s, *_ in found])
        return Figures(
            _mean([m.auroc for m in images]),
            _mean([m.auroc for m in pixels]),
            _mean([m.ap for m in pixels]),
            best_threshold(labels, scores),
        )


def best_before(rows: Iterable[Mapping[str, float]], best: Path, done: int) -> float:
    """The best merit up to a step: of these lines of `metrics.jsonl`, and of the best checkpoint if it is no later."""
    known = [row["validation_merit"] for row in rows if "validation_merit" in row]
    if best.is_file():
        said = checkpoint.read_header(best)["provenance"]
        if said["step"] <= done and "validation_merit" in said:
            known.append(said["validation_merit"])
    return max(known, default=NONE_YET)


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
