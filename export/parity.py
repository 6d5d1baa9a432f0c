"""The parity gate: an exported graph against the torch model it came from, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.backend import Described, Results
from fbclip.data.dataset import Dataset
from fbclip.data.layouts import open_dataset
from fbclip.errors import ImageError, ParityError, UsageError
from fbclip.export.stages import Stage, first_diverging
from fbclip.folders import list_images
from fbclip.images import read_image
from fbclip.learning import add_up, squared_distance, together
from fbclip.memory import FIXED, NEAREST_ZERO, SLOPE, WHITEN, Recipe, Shape, Tensors, Weight, prepare
from fbclip.metrics import image_metrics
from fbclip.model.backend import TorchBackend
from fbclip.model.config import Config
from fbclip.resample import bilinear_matrix, resize
from fbclip.runtime.backends import Backend, require_probabilities
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend

Array = NDArray[np.float32]
Say = Callable[[str], None]

# Largest difference allowed: of any score, and of the maps (the worst pixel in float32, else the 99.9th percentile).
BUDGETS = {"fp32": (1e-4, 1e-4), "fp16": (2e-3, 5e-3), "int8": (2e-2, 5e-2)}
AUROC_BUDGET = 5e-3  # of 8 bit, where the images have labels
MOST_IMAGES = 64  # of a folder; spread over it
MEMORY_IMAGES = 2  # of the proof, that a memory is made of; the first is run with it
SAMPLE_OPERATIONS = 10**12  # of one forward pass of the torch model on each sample; ViT-L/14 at 518 px takes 0.8
MEMORY_WEIGHT = 0.1  # of the zero-shot logits beside it
PANEL = 256  # pixels, width of the maps kept for the picture


@dataclass(frozen=True)
class Proof:
    """The images of the proof.

    Attributes:
        frames: uint8 (H, W, 3) RGB, of any size.
        names: of their files.
        labels: 0 good or 1 defective; None where nobody said.
    """

    frames: Sequence[NDArray[np.uint8]]
    names: tuple[str, ...]
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.frames:
            raise UsageError("the proof needs an image that can be read; got none: pass others", option="parity_images")

    def part(self, indices: Sequence[int]) -> Proof:
        """Some of the images."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in indices)
        return Proof([self.frames[i] for i in indices], tuple(self.names[i] for i in indices), labels)


def find_proof(sources: list[str]) -> tuple[list[Path], list[int] | None]:
    """Images for the proof, at most 64 and spread over their folder, and labels if it is a labelled data set.

    Args:
        sources: a data set that `fbclip data` recognises, or images, folders and globs; the samples if empty.
    """
    if len(sources) == 1 and (data := _labelled(Path(sources[0]))):
        items = _spread(data.select("test").items or data.items)
        return [item.image for item in items], [item.label for item in items]
    return list(_spread(list_images(sources))), None


def _labelled(path: Path) -> Dataset | None:
    try:
        return open_dataset(path) if path.is_dir() else None
    except UsageError:
        return None


def _spread(items: Sequence[Any]) -> list[Any]:
    indices = np.linspace(0, len(items) - 1, min(MOST_IMAGES, len(items))).round().astype(int)
    return [items[i] for i in indices]


def read_proof(paths: list[Path], labels: list[int] | None, size_hw: tuple[int, int], say: Say) -> Proof:
    """Read the images at the size that the graph takes; those that can't be read are reported and left out."""
    read = read_frames(paths, size_hw, say)
    chosen = tuple(labels[i] for i in read) if labels else None
    return Proof(list(read.values()), tuple(paths[i].name for i in read), chosen)


def find_calibration(sources: list[str]) -> list[Path]:
    """Good images whose ranges an 8-bit graph takes over, at most 64, spread over their folder.

    Args:
        sources: a data set, whose good images for training are taken (those of the test where it has no others), or
            images, folders and globs; the samples if empty.
    """
    if len(sources) == 1 and (data := _labelled(Path(sources[0]))):
        good = [item for item in data.items if item.label == 0]
        return _spread([item.image for item in good if item.split == "train"] or [item.image for item in good])
    return _spread(list_images(sources))


def read_calibration(paths: list[Path], size_hw: tuple[int, int], say: Say) -> list[NDArray[np.uint8]]:
    """Read the images for calibration; those that can't be read are reported and left out."""
    frames = list(read_frames(paths, size_hw, say).values())
    if not frames:
        raise UsageError(
            "calibration needs a good image that can be read; got none: pass others", option="calibration_images"
        )
    return frames


def read_frames(paths: list[Path], size_hw: tuple[int, int], say: Say) -> dict[int, NDArray[np.uint8]]:
    """Images at a size, uint8 (H, W, 3) RGB, by their place in the list; those that can't be read are left out."""
    frames = {}
    for index, path in enumerate(paths):
        try:
            frames[index] = resize(read_image(path), size_hw)
        except ImageError as error:
            say(f"skipped: {error}")
    return frames


def affordable_samples(config: Config) -> int:
    """How many images a proof takes where nobody named any: a large model's is of few, so that an export stays short.

    Counts the products of the blocks and of their attention, two operations each (docs/method.md, section 2).
    """
    tokens, width = config.grid**2 + 1, config.clip.width
    operations = max(config.feature_layers) * tokens * (24 * width**2 + 4 * tokens * width)
    return max(1, SAMPLE_OPERATIONS // operations)


@dataclass(frozen=True)
class Reference:
    """What the torch model says of the proof: scores (n,) and maps (n, S, S)."""

    scores: Array
    maps: Array

    def part(self, indices: Sequence[int]) -> Reference:
        """Of some of the images."""
        return Reference(self.scores[list(indices)], self.maps[list(indices)])

    def map(self, index: int, size_hw: tuple[int, int]) -> Array:
        """One map at a frame's size, float32 (H, W)."""
        anomaly_map: Array = self.maps[index]
        size = anomaly_map.shape[0]
        if size_hw == (size, size):
            return anomaly_map
        rows, cols = (bilinear_matrix(side, size) for side in size_hw)
        return (rows @ anomaly_map @ cols.T).astype(np.float32)


@dataclass(frozen=True)
class Taught:
    """What the torch model says of the first image of the proof with a memory that was made of the first few.

    Attributes:
        memory: the tensors.
        features: of the image, float32 (1, L, F).
        results: its score and map with the memory.
    """

    memory: Tensors
    features: Array
    results: Reference


def proof_memory(shape: Shape, features: Array) -> Tensors:
    """A memory of features (n, L, F) that whitens; its lines are where their own logits are, since differences show most
    there."""
    recipe = Recipe(WHITEN, FIXED, 0, MEMORY_WEIGHT)
    made = prepare(recipe, shape, together(recipe, shape, [add_up(recipe, shape, each[None]) for each in features]))
    squared = np.stack([squared_distance(shape, made, each) for each in features])
    levels = SLOPE * np.log(np.maximum(squared, NEAREST_ZERO))
    made.weights[Weight.MAP_OFFSET] = -np.median(levels)
    made.weights[Weight.SCORE_OFFSET] = np.median(levels) - np.sort(levels)[:, -shape.top :].mean()
    return made


def run_reference(trained: TorchBackend, proof: Proof, image_size: int) -> tuple[Reference, Taught]:
    """Run the torch model on the proof, resized by Pillow, one image at a time, and with a memory of its first images.

    Raises:
        FBClipError: it gives what is no probability, which no graph can be compared with.
    """
    assert trained.memory_shape
    square = (image_size, image_size)
    results: list[Results] = []
    described: list[Described] = []
    for frame in proof.frames:
        found = trained.describe(resize(frame, square)[None])
        results.append(trained.recall(found, None))
        described = [*described, found][:MEMORY_IMAGES]
    scores, maps = (np.concatenate(part) for part in zip(*results, strict=True))
    require_probabilities(scores, maps, proof.names)
    memory = proof_memory(trained.memory_shape, np.concatenate([each.features for each in described]))
    taught = Taught(memory, described[0].features, Reference(*trained.recall(described[0], memory)))
    return Reference(scores, maps), taught


@dataclass(frozen=True)
class Deviation:
    """Differences of probabilities, 0..1: the largest, and quantiles over all images (and pixels)."""

    max: float
    p50: float
    p99: float
    p999: float


class Differences:
    """A growing set of differences of probabilities, in the memory of a histogram; what is no number counts as 1.

    Bins are the float32 values without their last 12 bits, so a quantile is up to 0.05 % too large.
    """

    BITS = 12

    def __init__(self) -> None:
        self.counts = np.zeros(1 << (31 - self.BITS), np.int64)  # differences have no sign bit
        self.max = 0.0

    def add(self, found: Array, expected: Array) -> Array:
        """Take in the differences, and return them: float32, of the same shape."""
        difference: Array = np.nan_to_num(np.abs(found - expected), nan=1.0).astype(np.float32)
        keys = difference.ravel().view(np.uint32) >> self.BITS
        self.counts += np.bincount(keys, minlength=len(self.counts))
        self.max = max(self.max, float(difference.max()))
        return difference

    def quantile(self, q: float) -> float:
        total = self.counts.cumsum()
        key = np.searchsorted(total, q * total[-1])
        if key == 0:  # the bin of 0
            return 0.0
        upper_edge = np.array((key + 1) << self.BITS, np.uint32).view(np.float32)
        return min(float(upper_edge), self.max)

    def deviation(self) -> Deviation:
        return Deviation(self.max, *(self.quantile(q) for q in (0.5, 0.99, 0.999)))


def overrun(precision: str, score_deviation: float, map_deviation: float) -> float:
    """Deviation in budgets: up to 1 it is within."""
    return max(
        deviation / budget
        for deviation, budget in zip((score_deviation, map_deviation), BUDGETS[precision], strict=True)
    )


@dataclass(frozen=True)
class MemoryParity:
    """How far a graph with a memory is from the torch model with the same memory.

    Attributes:
        images: how many.
        score_max, map_max, map_p999: largest differences, and the 99.9th percentile of the maps'.
        features: root mean square of the features' difference, over that of the features.
    """

    images: int
    score_max: float
    map_max: float
    map_p999: float
    features: float

    def overrun(self, precision: str) -> float:
        """The deviation in the budgets of results without a memory."""
        return overrun(precision, self.score_max, self.map_max if precision == "fp32" else self.map_p999)


def compare_taught(
    backend: OnnxRuntimeBackend, image: NDArray[np.uint8], taught: Taught, mirrored: bool = False
) -> MemoryParity:
    """Run a graph with the memory of the proof; afterwards it has none.

    Args:
        image: the proof's first, as the graph takes it.
        mirrored: in a batch of two, with its own mirror image, which must make no difference.
    """
    scores, maps = Differences(), Differences()
    backend.set_memory(taught.memory)
    batch = [image, image[:, ::-1]] if mirrored else [image]
    (found, anomaly_maps), described = backend.run_described(np.stack(batch))
    backend.set_memory(None)
    scores.add(found[:1], taught.results.scores)
    maps.add(anomaly_maps[0], taught.results.map(0, image.shape[:2]))
    off = np.square(described.features[:1] - taught.features, dtype=np.float64).sum()
    error = np.sqrt(off / np.square(taught.features, dtype=np.float64).sum())
    error = float(error) if np.isfinite(error) else 1.0
    return MemoryParity(1, scores.max, maps.max, maps.quantile(0.999), error)


@dataclass(frozen=True)
class Parity:
    """How far an exported graph is from the torch model on the same images.

    Attributes:
        precision: of the graph.
        images: how many.
        score, map: differences.
        score_budget, map_budget: what is allowed.
        flips: images whose verdict at the threshold changed.
        auroc: of the images by the torch model and by the graph; None without labels of both kinds.
        worst_image: the one whose map differs most.
        by_deviation: indices of the images, that one first.
        auroc_budget: how far it may change; None where only the differences count.
        memory: the differences with a memory.
        islands: parts that had to stay float32 although others are of lower precision.
        stages: of the worst image against the float32 graph; empty for that graph itself.
        nodes, size_bytes, seconds: of the graph and of writing it.
        thumbnails: the graph's maps, small, for the picture.
    """

    precision: str
    images: int
    score: Deviation
    map: Deviation
    score_budget: float
    map_budget: float
    flips: tuple[str, ...]
    auroc: tuple[float, float] | None
    worst_image: str
    by_deviation: tuple[int, ...]
    auroc_budget: float | None = None
    memory: MemoryParity | None = None
    islands: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    nodes: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    thumbnails: tuple[Array, ...] = field(default=(), repr=False)

    @property
    def map_deviation(self) -> float:
        """What the budget is about: the worst pixel in float32, the 99.9th percentile in lower precision."""
        return self.map.max if self.precision == "fp32" else self.map.p999

    @property
    def overrun(self) -> float:
        """The deviation in budgets: up to 1 it is within."""
        deviation = overrun(self.precision, self.score.max, self.map_deviation)
        if self.memory and self.precision != "int8":  # whose features differ so much that it must learn from its own
            deviation = max(deviation, self.memory.overrun(self.precision))
        if self.auroc is None or self.auroc_budget is None:
            return deviation
        before, after = self.auroc
        return max(deviation, abs(after - before) / self.auroc_budget)

    @property
    def diverges_first(self) -> str | None:
        """The stage to look at first."""
        return first_diverging(self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `parity.json`."""
        values = {key: value for key, value in asdict(self).items() if key not in ("thumbnails", "by_deviation")}
        stages = {stage.name: stage.error if np.isfinite(stage.error) else None for stage in self.stages}
        return {**values, "stages": stages, "diverges_first": self.diverges_first, "within": self.overrun <= 1}

    def summary(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "images": self.images,
            "score_max": self.score.max,
            "map_max": self.map.max,
            "map_p999": self.map.p999,
            "flips": len(self.flips),
            "auroc": self.auroc,
            "islands": self.islands,
        }


def compare(
    precision: str,
    backend: Backend,
    proof: Proof,
    inputs: Sequence[NDArray[np.uint8]],
    reference: Reference,
    threshold: float,
) -> Parity:
    """Run a graph on the proof, one image at a time and two at once, against the torch model.

    Args:
        inputs: the proof's frames as the graph takes them.
        threshold: of the verdicts.

    Raises:
        ParityError: a batch of two that gives other scores than its images alone.
    """
    scores, maps, worst, thumbnails = [], Differences(), [], []
    for index, image in enumerate(inputs):
        score, anomaly_map = backend.run(image[None])
        scores.append(score[0])
        difference = maps.add(anomaly_map[0], reference.map(index, image.shape[:2]))
        worst.append(float(np.quantile(difference, 0.999)))
        thumbnails.append(thumbnail(anomaly_map[0]))
    found, budgets = np.array(scores), BUDGETS[precision]
    score_differences = Differences()
    score_differences.add(found, reference.scores)
    if len(inputs) > 1 and np.isfinite(found).all():  # a dynamic batch that only works for one is none
        pair, _ = backend.run(np.stack(inputs[:2]))
        if (deviation := np.abs(pair - found[:2]).max()) > budgets[0]:
            raise ParityError(
                f"a batch of two must score like its images alone; {precision} differs by {deviation:.2g}"
            )
    flipped = (found >= threshold) != (reference.scores >= threshold)
    auroc = _auroc(proof, reference.scores, found)
    by_deviation = tuple(int(i) for i in np.argsort(worst)[::-1])
    return Parity(
        precision,
        len(found),
        score_differences.deviation(),
        maps.deviation(),
        *budgets,
        tuple(name for name, flip in zip(proof.names, flipped, strict=True) if flip),
        auroc,
        proof.names[by_deviation[0]],
        by_deviation,
        auroc_budget(proof.labels) if precision == "int8" and auroc and proof.labels else None,
        thumbnails=tuple(thumbnails),
    )


def auroc_budget(labels: Sequence[int]) -> float:
    """How far the AUROC may change by labels of both kinds: as one pair that swaps does, where that is more."""
    pairs = sum(labels) * (len(labels) - sum(labels))
    return max(AUROC_BUDGET, 1 / pairs)


def _auroc(proof: Proof, expected: Array, found: Array) -> tuple[float, float] | None:
    if proof.labels is None or not np.isfinite(found).all():
        return None
    before, after = (image_metrics(proof.labels, scores).auroc for scores in (expected, found))
    return None if before is None or after is None else (before, after)


def thumbnail(anomaly_map: Array) -> Array:
    """A map at the width of the picture's panels."""
    height, width = anomaly_map.shape
    size = (PANEL, max(1, round(PANEL * height / width)))
    return np.asarray(cv2.resize(anomaly_map, size, interpolation=cv2.INTER_AREA))
