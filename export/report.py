"""The proof of an export, for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fbclip.export.parity import Parity, Proof, Reference, thumbnail
from fbclip.resample import resize
from fbclip.terminal import print_table, say

SHOWN = 4  # images of the picture
FULL_SCALE = 1e-6  # least difference that the picture's colours are stretched to


class Steps:
    """What an export does: each step is told as it begins, and its seconds once it has ended.

    Args:
        say: told each line.

    Attributes:
        seconds: of each step, in order; of those that were taken more than once, together.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        self.say(step)
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self.seconds[step] = self.seconds.get(step, 0.0) + took
        self.say(f"  {took:.1f} s")


def print_parity(parities: list[Parity], console: Console) -> None:
    """One row per graph: largest differences from the torch model, budgets, size and time."""
    table = Table(box=None, pad_edge=False, title="ONNX Runtime against torch", title_justify="left")
    labelled = any(p.auroc for p in parities)
    columns = ["graph", "images", "score max", "map max", "99.9 %", "flips", "nodes", "MB", "s"]
    for column in [*columns, "AUROC"] if labelled else columns:
        table.add_column(column, justify="left" if column == "graph" else "right", no_wrap=True)
    for p in parities:
        table.add_row(
            p.precision,
            str(p.images),
            f"{p.score.max:.1e}",
            f"{p.map.max:.1e}",
            f"{p.map.p999:.1e}",
            str(len(p.flips)),
            str(p.nodes),
            f"{p.size_bytes / 1e6:.1f}",
            f"{p.seconds:.0f}",
            *([f"{p.auroc[1]:.4f}"] if p.auroc else []),
        )
    print_table(console, table)
    budgets = (
        f"{p.precision} {p.score_budget:g} and {p.map_budget:g}{f', AUROC {p.auroc_budget:.2g}' if p.auroc_budget else ''}"
        for p in parities
    )
    say(console, f"budgets of score and map: {'; '.join(budgets)}")
    for p in parities:
        if p.islands:
            say(console, f"{p.precision} keeps in float32 to stay in its budget: {', '.join(p.islands)}")
        if p.auroc:
            change = f"{p.auroc[1] - p.auroc[0]:+.4f}"
            say(console, f"{p.precision} changes the image AUROC by {change}")
        if p.stages:
            largest = max(p.stages, key=lambda stage: stage.error)
            say(console, f"{p.precision} against fp32 by stages: at most {largest.error:.1e}, in {largest.name}")


def draw_parity(path: Path, proof: Proof, reference: Reference, parities: list[Parity]) -> None:
    """Write a JPEG: the images whose maps differ most, their maps by torch and by each graph, and the differences.

    Args:
        path: of the picture.
        proof, reference: images and what the torch model says of them.
        parities: of the graphs, the one to judge last.
    """
    size_hw = proof.frames[0].shape[:2]
    expected = [thumbnail(reference.map(i, size_hw)) for i in range(len(proof.frames))]
    worst = [_difference(*pair).max() for pair in zip(parities[-1].thumbnails, expected, strict=True)]
    shown = np.argsort(worst)[::-1][:SHOWN]
    columns = 2 + 2 * len(parities)
    aspect = size_hw[0] / size_hw[1]
    figure = Figure(figsize=(2.2 * columns, len(shown) * (2.2 * aspect + 0.3) + 0.4), layout="constrained")
    figure.suptitle("anomaly maps from 0 (blue) to 1 (red), and how far the exported graphs are from torch")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, index in zip(axes, shown, strict=True):
        height, width = expected[index].shape
        row[0].imshow(resize(proof.frames[index], (height, width)))
        row[0].set_title(proof.names[index], fontsize=8)
        row[1].imshow(expected[index], cmap="turbo", vmin=0, vmax=1)
        row[1].set_title(f"torch, score {reference.scores[index]:.3f}", fontsize=8)
    for number, parity in enumerate(parities, start=2):
        differences = [_difference(parity.thumbnails[index], expected[index]) for index in shown]
        scale = max(FULL_SCALE, *(float(difference.max()) for difference in differences))
        for row, index, difference in zip(axes, shown, differences, strict=True):
            row[number].imshow(parity.thumbnails[index], cmap="turbo", vmin=0, vmax=1)
            row[number].set_title(parity.precision, fontsize=8)
            row[number + len(parities)].imshow(difference, cmap="gray", vmin=0, vmax=scale)
            row[number + len(parities)].set_title(f"|{parity.precision} - torch|, white {scale:.1e}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, format="jpeg", dpi=90, pil_kwargs={"quality": 85})


def _difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    difference: NDArray[np.float32] = np.nan_to_num(np.abs(found - expected), nan=1.0)
    return difference
