"""Samples to batches of tensors. A file that can't be read becomes a message in the batch, so that one broken
image among a thousand costs one image and no worker process dies of it."""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fbclip.data.dataset import SampleSet
from fbclip.errors import ImageError, UsageError

Entry = tuple[int, Tensor, Tensor] | str  # index, input and mask, or why there is none


class Batch(NamedTuple):
    """indices of the samples; inputs: images uint8 (B, S, S, 3) or tokens float16 (B, K, N, C); masks uint8 (B, S, S)
    of 0 and 1; unreadable: a message for each sample that is missing."""

    indices: list[int]
    inputs: Tensor
    masks: Tensor
    unreadable: list[str]


class ReadableSamples(Dataset[Entry]):
    """Samples as tensors: their index, image uint8 (S, S, 3) and mask uint8 (S, S)."""

    def __init__(self, data: SampleSet) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Entry:
        try:
            sample = self.data[index]
        except ImageError as error:
            return str(error)
        if sample.mask is None:
            raise UsageError(f"training needs a mask for every defective image; sample {index} has none")
        return index, torch.from_numpy(sample.image.copy()), torch.from_numpy(sample.mask.copy())


def load(
    dataset: Dataset[Entry], batches: Sequence[list[int]], workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """A `Batch` for each list of indices; an empty list gives an empty batch. Close it to end the worker processes:
    whatever else still holds a reference (matplotlib keeps the frames of its callers alive), they must not outlive it.
    """
    yield from DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
    )


def collate(entries: Sequence[Entry]) -> Batch:
    good = [entry for entry in entries if not isinstance(entry, str)]
    unreadable = [entry for entry in entries if isinstance(entry, str)]
    if not good:
        return Batch([], torch.empty(0), torch.empty(0), unreadable)
    indices, inputs, masks = zip(*good, strict=True)
    # in a worker it stacks into shared memory, so that nothing is copied once more to be sent
    return Batch(list(indices), default_collate(list(inputs)), default_collate(list(masks)), unreadable)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the workers serve on until the parent has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
