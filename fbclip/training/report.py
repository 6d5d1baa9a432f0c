"""What a training run leaves to look at: a line per step, TensorBoard's event files, a picture per epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from fbclip.data.dataset import Sample, SampleSet
from fbclip.errors import ImageError, UsageError
from fbclip.files import replacing, write_error, write_text
from fbclip.model.network import FBCLIP
from fbclip.resample import upsampling_matrix
from fbclip.training.losses import Losses

SAMPLES_SHOWN = 6  # half of them defective, where the data set has both
SAMPLES_TRIED = 60

Row = dict[str, float]  # step, epoch, the losses, lr, images_per_s; after an epoch the figures of the validation


class StepLog:
    """`metrics.jsonl` in `out`, one flushed line per step, and event files in `out/tensorboard` where wanted.

    Args:
        out: the run's folder.
        done: steps that the run goes on from; lines of later steps, which no checkpoint holds, are dropped.
        tensorboard: write event files too.
    """

    def __init__(self, out: Path, done: int, tensorboard: bool) -> None:
        path = out / "metrics.jsonl"
        self.rows = [row for row in _read_rows(path) if row["step"] <= done]
        write_text("".join(_line(row) for row in self.rows), path)
        self.path, self._file = path, path.open("a")
        self._events = _event_writer(out / "tensorboard", done) if tensorboard else None

    def write(self, row: Row) -> None:
        """
        Raises:
            FBClipError, UsageError: see `fbclip.files.write_error`.
        """
        self.rows.append(row)
        try:
            self._file.write(_line(row))
            self._file.flush()
            if self._events:
                for name, value in row.items():
                    if name != "step":
                        self._events.add_scalar(name, value, int(row["step"]))
        except OSError as error:
            raise write_error(error, self.path) from error

    def close(self) -> None:
        with suppress(OSError):  # told where it was written
            self._file.close()
            if self._events:
                self._events.close()


def _line(row: Row) -> str:
    """A row as JSON, which has no inf: the norm of a gradient that overflowed in half precision is null."""
    values = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _read_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the last line of a run that was killed
            return


def _event_writer(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "event files need the package tensorboard: pip install 'fbclip[train]'", option="tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=done + 1)


@dataclass
class Throughput:
    """What a run took.

    Attributes:
        images: trained on.
        seconds: of all steps; checkpoints and pictures are not counted.
        waiting: seconds of these in which the next batch was not there yet.
    """

    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def add(self, images: int, waiting: float, computing: float) -> None:
        self.images += images
        self.seconds += waiting + computing
        self.waiting += waiting

    def __str__(self) -> str:
        if not self.images:
            return "no step was left to take"
        share = self.waiting / self.seconds
        bound = "loading, so more worker processes may help" if share > 0.5 else "computing"
        return (
            f"{self.images:,} images in {self.seconds:.0f} s, {self.images / self.seconds:.1f} images/s: "
            f"{share:.0%} waiting for data, {1 - share:.0%} computing; bound by {bound}"
        )


def samples_to_show(data: SampleSet, seed: int) -> list[Sample]:
    """Some samples drawn by the seed, defective ones first; the same in every epoch."""
    shown: dict[int, list[Sample]] = {0: [], 1: []}
    for index in np.random.default_rng(seed).permutation(len(data))[:SAMPLES_TRIED]:
        try:
            sample = data[int(index)]
        except ImageError:  # reported where it is trained on
            continue
        shown[sample.label].append(sample)
        if min(map(len, shown.values())) >= SAMPLES_SHOWN // 2:
            break
    defective = shown[1][: max(SAMPLES_SHOWN // 2, SAMPLES_SHOWN - len(shown[0]))]
    return defective + shown[0][: SAMPLES_SHOWN - len(defective)]


@torch.no_grad()
def anomaly_maps(model: FBCLIP, samples: list[Sample]) -> list[tuple[float, NDArray[np.float32]]]:
    """Score and anomaly map float32 (S, S) of each sample, one image at a time."""
    clip, device = model.config.clip, model.visual.scale_weights.device
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (clip.mean, clip.std))
    up = upsampling_matrix(model.config.image_size, model.config.grid)
    text, results = model.encode_text(), []
    for sample in samples:
        image = torch.from_numpy(sample.image.copy()).to(device).permute(2, 0, 1) / 255
        scores = model.visual(((image - mean) / std)[None], text)
        results.append((scores.score.item(), up @ scores.patch_map[0].cpu().numpy() @ up.T))
    return results


def draw_epoch(path: Path, rows: list[Row], epoch: int, model: FBCLIP, samples: list[Sample]) -> None:
    """Write a PNG: the losses so far, and below them images, masks and anomaly maps (fixed scale 0..1)."""
    figure = Figure(figsize=(2.1 * SAMPLES_SHOWN, 9.6), layout="constrained")
    figure.suptitle(f"after epoch {epoch}, step {int(rows[-1]['step'])}")
    curves, pictures = cast("tuple[SubFigure, SubFigure]", figure.subfigures(2, 1, height_ratios=[1, 2]))
    draw_losses(curves.add_subplot(), rows)
    axes = pictures.subplots(3, SAMPLES_SHOWN, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, (sample, (score, anomaly_map)) in zip(
        axes.T, zip(samples, anomaly_maps(model, samples), strict=True), strict=False
    ):
        column[0].imshow(sample.image)
        column[0].set_title("defective" if sample.label else "good", fontsize=10)
        column[1].imshow(sample.mask, cmap="gray", vmin=0, vmax=1)
        column[1].set_title("mask", fontsize=10)
        column[2].imshow(sample.image)
        heat = column[2].imshow(anomaly_map, cmap="turbo", vmin=0, vmax=1, alpha=0.6)
        column[2].set_title(f"map, score {score:.3f}", fontsize=10)
    if samples:
        pictures.colorbar(heat, ax=axes.ravel().tolist(), fraction=0.02)
    with replacing(path, durable=False) as file:
        figure.savefig(file, format="png", dpi=90)


def draw_losses(axis: Axes, rows: list[Row]) -> None:
    """Every loss over the steps, smoothed over a fiftieth of them, the total also as it is."""
    steps = [row["step"] for row in rows]
    window = max(1, len(rows) // 50)
    names = [name for name in ("total", *Losses._fields, "distillation") if name in rows[0]]
    for name in names:
        values = np.array([row[name] for row in rows])
        if name == "total":
            axis.plot(steps, values, color="0.8", linewidth=0.8)
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axis.plot(steps[window - 1 :], smooth, label=name, linewidth=2 if name == "total" else 1.2)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss (mean of {window} steps)" if window > 1 else "loss")
    axis.legend(ncols=len(names), fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axis.grid(alpha=0.3)
