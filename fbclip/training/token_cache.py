"""The frozen backbone's tokens on disk. CLIP does not change and the recipe has no augmentation, so every epoch
sees the same tokens: they are computed once and read from then on."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fbclip.data.dataset import Samples, SampleSet
from fbclip.errors import FBClipError, UsageError
from fbclip.files import require_writable, write_error, write_text
from fbclip.model.network import FBCLIP
from fbclip.training.batches import Batch, Entry, ReadableSamples, load

FORMAT = 1
MISSING, STORED, UNREADABLE = 0, 1, 2  # values of state.npy
HALF_MAX = 65504.0  # largest float16

Arrays = dict[str, NDArray[Any]]


class TokenCache(Dataset[Entry]):
    """A folder with one row per sample, memory-mapped.

    `tokens.npy` float16 (n, K, N, C), `masks.npy` uint8 (n, S, S), `state.npy` uint8 (n,): missing, stored or
    unreadable. `cache.json` holds the key of what the tokens depend on: another key means a stale cache, which is
    written anew; missing rows mean an interrupted one, which goes on.

    Args:
        folder: made where it is missing.
        model: whose frozen tower gives the tokens.
        data: samples at the model's input size.
        accelerator: its main process makes the files, the others open them.

    Raises:
        UsageError: the tower is trained, `folder` holds something else, or the disk is too small.
    """

    def __init__(self, folder: Path, model: FBCLIP, data: SampleSet, accelerator: Accelerator) -> None:
        if any(p.requires_grad for p in model.visual.tower.parameters()):
            raise UsageError(
                "a cache of tokens needs a frozen tower; train the tower without it", option="cache_tokens"
            )
        self.folder, self.data = folder, data
        self.key = cache_key(model, data, accelerator.mixed_precision)
        config, tower = model.config, model.visual.tower
        shape = (len(config.feature_layers), 1 + config.grid**2, tower.proj.shape[0])
        self.layout: dict[str, tuple[type, tuple[int, ...]]] = {
            "tokens": (np.float16, (len(data), *shape)),
            "masks": (np.uint8, (len(data), config.image_size, config.image_size)),
            "state": (np.uint8, (len(data),)),
        }
        if accelerator.is_main_process:
            self._make()
        accelerator.wait_for_everyone()
        self.arrays: Arrays = {name: np.load(self._path(name), mmap_mode="r+") for name in self.layout}

    def __getitem__(self, index: int) -> Entry:
        if self.arrays["state"][index] == UNREADABLE:
            return f"sample {index} could not be read when the tokens were cached; delete {self.folder} to try again"
        # rows of the map, which `collate` copies into the batch: no page of a map is ever sent
        tokens, mask = (torch.from_numpy(self.arrays[name][index]) for name in ("tokens", "masks"))
        return index, tokens, mask

    @property
    def missing(self) -> list[int]:
        """Indices of the samples that are still to be stored."""
        return [int(i) for i in np.flatnonzero(self.arrays["state"] == MISSING)]

    def fill(
        self, tokens_of: Callable[[Tensor], Tensor], indices: list[int], batch_size: int, workers: int
    ) -> Iterator[tuple[int, list[str]]]:
        """Store these samples; yields how many are done and what could not be read, after each batch."""
        batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        with closing(load(ReadableSamples(self.data), batches, workers, pin=False)) as loader:
            for wanted, batch in zip(batches, loader, strict=True):
                self._store(wanted, batch, tokens_of)
                yield len(wanted), batch.unreadable
        for name in ("tokens", "masks", "state"):
            self.arrays[name].flush()  # type: ignore[attr-defined]

    def _store(self, wanted: list[int], batch: Batch, tokens_of: Callable[[Tensor], Tensor]) -> None:
        if batch.indices:
            tokens = tokens_of(batch.inputs)
            if not (largest := tokens.abs().max().item()) <= HALF_MAX:
                raise FBClipError(
                    f"tokens up to {largest:g} do not fit float16 (65504); train without a cache", option="cache_tokens"
                )
            self.arrays["tokens"][batch.indices] = tokens.half().cpu().numpy()
            self.arrays["masks"][batch.indices] = batch.masks.numpy()
        # the state last: a run killed before this computes the rows again
        self.arrays["state"][batch.indices] = STORED
        self.arrays["state"][[i for i in wanted if i not in batch.indices]] = UNREADABLE

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _make(self) -> None:
        ours = (self.folder / "cache.json").is_file()
        if not ours and self.folder.is_dir() and any(self.folder.iterdir()):
            raise UsageError(
                f"a cache goes to an empty folder or an earlier cache; {self.folder} is neither", option="cache_tokens"
            )
        if not (ours and self._is_whole()):
            require_writable(self.folder)
            for name in self.layout:
                self._path(name).unlink(missing_ok=True)
            self._require_space(len(self.data))
            self._sign(None)  # ours, but not whole
            for name, (dtype, shape) in self.layout.items():
                open_memmap(self._path(name), mode="w+", dtype=dtype, shape=shape)  # sparse zeros, so all MISSING
        for name in self.layout:
            _reserve(self._path(name))
        self._sign(self.key)

    def _is_whole(self) -> bool:
        """Whether the folder holds the tokens of these samples, all or some of them."""
        try:
            found = json.loads((self.folder / "cache.json").read_text())
            shapes = {name: np.load(self._path(name), mmap_mode="r").shape for name in self.layout}
        except (OSError, ValueError):  # damaged
            return False
        expected = {name: shape for name, (_, shape) in self.layout.items()}
        return bool(found == {"format": FORMAT, "key": self.key}) and shapes == expected

    def _sign(self, key: str | None) -> None:
        write_text(json.dumps({"format": FORMAT, "key": key}, allow_nan=False), self.folder / "cache.json")

    def _require_space(self, missing: int) -> None:
        per_sample = sum(math.prod(shape[1:]) * np.dtype(dtype).itemsize for dtype, shape in self.layout.values())
        needed, free = missing * per_sample, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UsageError(
                f"the cache needs {needed / 1e9:.1f} GB for {missing} images, {self.folder} has {free / 1e9:.1f} GB "
                f"free: name a folder on a larger disk, or leave it out",
                option="cache_tokens",
            )


def _reserve(path: Path) -> None:
    """Take the whole file's room on the disk: writing to a mapped page that finds none would kill the process.

    Raises:
        FBClipError, UsageError: see `fbclip.files.write_error`.
    """
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that can't promise it
            raise write_error(error, path) from error


def cache_key(model: FBCLIP, data: SampleSet, precision: str) -> str:
    """SHA-256 of what the tokens depend on: CLIP and its weights, input size, feature layers, precision, samples.

    Files count by path, size and time of change; three samples also by their pixels, which shows when the reading
    or drawing of samples changes.
    """
    config = model.config.to_dict() | {"noun": None}  # the prompts don't touch the image
    seen = hashlib.sha256(json.dumps([FORMAT, precision, config], sort_keys=True, allow_nan=False).encode())
    for parameter in model.visual.tower.parameters():
        seen.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    if isinstance(data, Samples):
        files = [path for item in data.items for path in (item.image, *item.masks)]
        described: Any = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    else:
        described = [type(data).__name__, vars(data)]
    seen.update(json.dumps([len(data), described], sort_keys=True, default=str, allow_nan=False).encode())
    for index in sorted({0, len(data) // 2, len(data) - 1}):
        entry = ReadableSamples(data)[index]
        for part in [entry.encode()] if isinstance(entry, str) else [t.numpy().tobytes() for t in entry[1:]]:
            seen.update(part)
    return seen.hexdigest()
