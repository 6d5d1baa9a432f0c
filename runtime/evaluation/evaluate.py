"""`fbclip eval`: a backend over the test splits of data sets. Needs no torch: a device can judge its own bundle."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fbclip.bundle import Bundle
from fbclip.data.dataset import Dataset, Item, Sample, parallel_map, read_sample
from fbclip.data.holdout import Seen
from fbclip.errors import BundleError, ImageError, UsageError
from fbclip.files import sha256
from fbclip.images import encode_image, pixels_sha256
from fbclip.memory import MEMORY_LINE, Memory
from fbclip.metrics import PRO_LIMITS, Metrics, PixelMetrics, image_metrics
from fbclip.resample import in_order, resize
from fbclip.runtime.backends import Backend, Results, require_probabilities
from fbclip.runtime.evaluation.few_shot import FewShot, References, draw, good_training_images, learn, require_enough
from fbclip.runtime.prediction import Prediction
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.regions import find_evidence
from fbclip.runtime.sight import EXPLAINED, find_blindness
from fbclip.runtime.tiles import Tiles
from fbclip.terminal import progress, warn

VALUES = (
    "image_auroc",
    "image_ap",
    "image_f1_max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1_max",
    *(f"aupro_{limit:g}" for limit in PRO_LIMITS),
)
Read = tuple[Item, Sample | ImageError]
PICTURES = 4  # of each kind and class
PICTURE_SIDE = 320  # pixels of each panel


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        backend: that runs it.
        image_size: side S of its input in pixels; maps and masks are compared at this size (docs/method.md, section 1).
        mean, std: of its normalisation.
        threshold: scores from here on count as anomalous.
        threshold_from: where that comes from, one line for a person.
        description: plain values for the stamp: kind, name, sha256, device, precision and what shapes the figures.
        package: the one that runs it: "onnxruntime", "tensorrt", "tensorrt_rtx" or "torch".
        channel_order: of the backend's images, "rgb" or "bgr".
        map_threshold, map_scale: as in a `Predictor`.
        seen: images that the model was trained on; None where that is not recorded.
        predictor: what learns from references; None of a checkpoint.
    """

    backend: Backend
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    threshold: float
    threshold_from: str
    description: Mapping[str, Any]
    package: str
    channel_order: str = "rgb"
    map_threshold: float | None = None
    map_scale: tuple[float, float] = (0.0, 1.0)
    seen: Seen | None = None
    predictor: Predictor | None = field(default=None, repr=False)

    @property
    def in_tiles(self) -> bool:
        """Whether images are inspected in tiles, and maps and masks compared in the images' own pixels."""
        return self.predictor is not None and self.predictor.tiles is not None

    def taught(self, references: References, few_shot: FewShot) -> Subject:
        """The same, judging by what references teach: its backend from now on, its threshold and its heat maps."""
        assert self.predictor is not None
        now, memory = self.predictor, learn(self.predictor, references, few_shot.choice)
        return replace(
            self,
            threshold=now.threshold,
            map_threshold=now.map_threshold,
            map_scale=now.map_scale,
            description={**self.description, "memory": memory.explain()},
        )


def bundle_subject(
    path: Path | None,
    device: str,
    precision: str,
    threshold: float | None = None,
    batch_size: int = 1,
    few_shot: FewShot | None = None,
    memory: Memory | str | Path | None = "auto",
    tiles: Tiles | str | int | None = None,
) -> Subject:
    """A deployed bundle, the embedded one without a path, for that many images at once.

    Its threshold and heat maps are those of a `Predictor` with these arguments. For a few-shot evaluation the bundle's own
    memory and calibration don't count.

    Raises:
        BundleError, DeviceError, UsageError: as `Predictor`; a bundle of whole frames, since data sets have images of
            any size; one that can't learn, for a few-shot evaluation.
    """
    if few_shot and memory != "auto":
        raise UsageError(f"shots teach a memory of their own; got {memory} as well", option="memory")
    bundle = Bundle.load(path)
    manifest = bundle.manifest
    if manifest.frame_size is not None:
        raise BundleError(
            f"evaluation takes images of any size; {bundle.path} takes {manifest.frame_size[0]}x{manifest.frame_size[1]} "
            f"only: evaluate the same checkpoint, exported for no frame size",
            option="bundle",
        )
    recorded = manifest.provenance.get("seen")
    seen = None if recorded is None else Seen.from_dict(recorded, bundle.path)
    if few_shot and manifest.memory_shape is None:
        raise UsageError(
            f"{bundle.path} has no inputs for a memory: export its checkpoint again with this release", option="bundle"
        )
    predictor = Predictor(
        bundle,
        device=device,
        precision=precision,
        threshold=threshold,
        batch=batch_size,
        calibrated=not few_shot,
        memory=None if few_shot else memory,
        tiles=tiles,
    )
    taught, threshold_from = predictor.memory, predictor.explain_threshold()
    if few_shot:
        line = f"threshold {MEMORY_LINE:g} is where they end" if threshold is None else threshold_from
        threshold_from = f"{few_shot.explain()}; {line}"
    description = {
        "kind": "bundle",
        "name": manifest.name,
        "sha256": sha256(bundle.path / "manifest.json"),  # which holds the hash of every other file
        "device": predictor.backend.device,
        "precision": predictor.precision,
        "feature_layers": list(manifest.feature_layers),
        "prompts": list(manifest.prompts),
        "memory": taught.explain(predictor.precision) if taught else None,
        "few_shot": few_shot and few_shot.description,
        **({"tiles": predictor.tiles.identity} if predictor.tiles else {}),
    }
    return Subject(
        predictor.backend,
        manifest.image_size,
        manifest.mean,
        manifest.std,
        MEMORY_LINE if few_shot and threshold is None else predictor.threshold,
        threshold_from,
        description,
        {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}.get(device, "onnxruntime"),
        manifest.channel_order,
        predictor.map_threshold,
        predictor.map_scale,
        seen,
        predictor,
    )


@dataclass(frozen=True)
class Scored:
    """One image of the test split and its score."""

    item: Item
    score: float


@dataclass(frozen=True)
class Example:
    """An image for the report: photograph, mask and overlay side by side, as JPEG."""

    scored: Scored
    jpeg: bytes


@dataclass(frozen=True)
class ClassResult:
    """One class of a data set.

    Attributes:
        name: of the class.
        scores: its images that could be read, in the data set's order.
        image, pixel: the metrics.
        undefined: why metrics are missing, one line each.
        pictures: by "best" (defects with the highest scores), "worst" (good images with the highest scores) and
            "missed" (defects below the threshold, the lowest first).
        threshold: scores from here on counted as anomalous.
        references: what taught its memory, where references were drawn.
        memory: what the memory says of itself; None where there was none.
        left_out: test images that show the same as a reference.
    """

    name: str
    scores: tuple[Scored, ...]
    image: Metrics
    pixel: Metrics
    undefined: tuple[str, ...]
    pictures: Mapping[str, tuple[Example, ...]] = field(repr=False)
    threshold: float
    references: tuple[Path, ...] = ()
    memory: str | None = None
    left_out: tuple[Item, ...] = ()

    @property
    def values(self) -> dict[str, float | None]:
        """The figures by their names in `VALUES`, None where undefined."""
        image, pixel = ((m.auroc, m.ap, m.f1_max) for m in (self.image, self.pixel))
        return dict(zip(VALUES, (*image, *pixel, *(self.pixel.aupro[limit] for limit in PRO_LIMITS)), strict=True))


class Spread(NamedTuple):
    """A figure: its mean over the draws of references and its standard deviation (n - 1). No deviation where there is one
    draw, or none at all; no mean where it is undefined."""

    mean: float | None
    deviation: float | None

    @classmethod
    def of(cls, values: list[float | None]) -> Spread:
        defined = [value for value in values if value is not None]
        deviation = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
        return cls(float(np.mean(defined)) if defined else None, deviation)


@dataclass(frozen=True)
class Draw:
    """All evaluated classes of a data set, by the references of one seed; without references the seed is None."""

    seed: int | None
    classes: tuple[ClassResult, ...]

    @property
    def mean(self) -> dict[str, float | None]:
        """Over the classes where a value is defined."""
        return {name: Spread.of([c.values[name] for c in self.classes]).mean for name in VALUES}


@dataclass(frozen=True)
class DataResult:
    """What was found on a data set: one draw, or one for each seed."""

    data: Dataset
    draws: tuple[Draw, ...]

    @property
    def classes(self) -> tuple[ClassResult, ...]:
        """Of the first draw."""
        return self.draws[0].classes

    @property
    def mean(self) -> dict[str, float | None]:
        """Over the classes where a value is defined, and over the draws."""
        return {name: value.mean for name, value in self.spread().items()}

    def spread(self, place: int | None = None) -> dict[str, Spread]:
        """Over the draws: the figures of the class at this place of `classes`, or of their mean."""
        found = [draw.mean if place is None else draw.classes[place].values for draw in self.draws]
        return {name: Spread.of([values[name] for values in found]) for name in VALUES}


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        results: of each data set, its finished classes.
        skipped: the images that could not be read, with the reason.
        complete: not interrupted before the last class was finished.
    """

    subject: Subject
    results: tuple[DataResult, ...]
    skipped: tuple[tuple[Item, str], ...]
    complete: bool = True

    def __repr__(self) -> str:
        found = (
            f"{result.data.root.name}: "
            + ", ".join(f"{name} {value:.3f}" for name, value in result.mean.items() if value is not None)
            for result in self.results
        )
        return f"Evaluation({'; '.join(found)})"


def to_evaluate(data: Dataset, classes: tuple[str, ...] | None, few_shot: FewShot | None = None) -> Dataset:
    """The test images of a data set, of all classes or those named; and what references are drawn from.

    Raises:
        UsageError: a class that is not there, no test image, or too few to draw from.
    """
    if unknown := set(classes or ()) - set(data.classes):
        raise UsageError(
            f"the classes of {data.root} are {', '.join(data.classes)}; got {sorted(unknown)[0]}", option="classes"
        )
    test = data.select("test")
    if classes:
        test = replace(test, items=tuple(item for item in test.items if item.class_name in classes))
    if not test.items:
        raise UsageError(f"evaluation needs test images; {data.root} ({data.layout}) has none for these classes")
    if few_shot is None:
        return test
    good = {name: good_training_images(data, name) for name in test.classes}
    for name, items in good.items():
        require_enough(data, name, len(items), few_shot.shots)
    return replace(test, items=(*test.items, *(item for items in good.values() for item in items)))


def evaluate(
    subject: Subject,
    tests: list[Dataset],
    batch_size: int,
    console: Console,
    few_shot: FewShot | None = None,
    workers: int = 1,
) -> Evaluation:
    """Run every image of the test splits once, or once for each seed; files that can't be read are reported and left out.

    Ctrl-C ends it with the classes that are finished; it is raised again only where there is none.

    Args:
        tests: as `to_evaluate` gives them.
        batch_size: images per call of the backend.
        few_shot: what to teach before each class; the subject is `bundle_subject`'s of the same.
        workers: calls of the backend at once.
    """
    skipped: list[tuple[Item, str]] = []
    results: list[DataResult] = []
    seeds = few_shot.seeds if few_shot else (None,)
    complete = True
    with progress(console) as bars:
        for data in tests:
            test = data.select("test")
            task = bars.add_task(test.name, total=len(test.items) * len(seeds))
            finished: list[tuple[ClassResult, ...]] = []  # by class, then by seed
            try:
                for name in test.classes:
                    advance = partial(bars.advance, task)
                    found, refused = _judge(subject, data, name, few_shot, (batch_size, workers), console, advance)
                    skipped += refused
                    finished.append(found)
            except KeyboardInterrupt:
                complete = False
            if finished:
                by_seed = zip(seeds, zip(*finished, strict=True), strict=True)
                results.append(DataResult(test, tuple(Draw(seed, classes) for seed, classes in by_seed)))
            if not complete:
                break
    if not results:
        raise KeyboardInterrupt
    return Evaluation(subject, tuple(results), tuple(skipped), complete)


def _judge(
    subject: Subject,
    data: Dataset,
    name: str,
    few_shot: FewShot | None,
    at_once: tuple[int, int],
    console: Console,
    advance: Callable[[int], None],
) -> tuple[tuple[ClassResult, ...], list[tuple[Item, str]]]:
    """A class by each draw of references, or by the subject as it is; and its images that can't be read.

    Args:
        at_once: images per call of the backend, and calls.
    """
    found: list[ClassResult] = []
    skipped: list[tuple[Item, str]] = []
    items = data.select("test", name).items
    for number, seed in enumerate(few_shot.seeds if few_shot else (None,)):
        references, judging = None, subject
        if few_shot and seed is not None:
            references = draw(data, name, few_shot.shots, seed, subject.image_size, console)
            judging = subject.taught(references, few_shot)
        one = _Class(name, items, judging, references)
        # what can't be read is the same in every draw
        refused = one.run_all(*at_once, Console(quiet=True) if number else console, advance)
        skipped = skipped if number else refused
        for item in one.left_out:
            warn(console, f"{item.image} shows the same as a reference: it is left out of the test")
        found.append(one.result())
    return tuple(found), skipped


def _load(items: tuple[Item, ...], image_size: int | None) -> Iterator[Read]:
    """Samples in order, read by threads a little ahead of their use; of their own size without another."""

    def read(item: Item) -> Read:
        try:
            return item, read_sample(item, image_size)
        except ImageError as error:
            return item, error

    return parallel_map(read, items)


def _unusable(batch: list[Read]) -> list[str]:
    """A line for each image of a batch that shows nothing; a data set's figures are of all its images."""
    found = [(item, find_blindness(sample.image[None])) for item, sample in batch if isinstance(sample, Sample)]
    return [f"{item.image} is {EXPLAINED[why]}; it counts in the figures" for item, why in found if why]


def _batches(samples: Iterator[Read], size: int) -> Iterator[list[Read]]:
    while batch := list(islice(samples, size)):
        yield batch


class _Class:
    """One class in the making: scores, pixel counters and the few pictures worth keeping."""

    def __init__(self, name: str, items: tuple[Item, ...], subject: Subject, references: References | None) -> None:
        self.name, self.items, self.subject, self.references = name, items, subject, references
        self.left_out: list[Item] = []
        self.scores: list[Scored] = []
        self.pixels = PixelMetrics()
        self.unmarked = sum(bool(item.label) and item.mask is None for item in items)
        self.pictures: dict[str, list[tuple[float, int, Example]]] = {"best": [], "worst": [], "missed": []}
        self.order = count()

    def run_all(
        self, batch_size: int, workers: int, console: Console, advance: Callable[[int], None]
    ) -> list[tuple[Item, str]]:
        """Score all images; returns those that could not be read, with the reason."""
        skipped: list[tuple[Item, str]] = []
        subject = self.subject
        samples = _load(self.items, None if subject.in_tiles else subject.image_size)
        batches = _batches(samples, 1 if subject.in_tiles else batch_size)
        for batch, judged in (
            parallel_map(self._judged, batches, workers) if workers > 1 else map(self._judged, batches)
        ):
            for item, sample, score, anomaly_map in judged:
                self.add(item, sample, score, anomaly_map)
            refused = [(item, error) for item, error in batch if isinstance(error, ImageError)]
            skipped += [(item, str(error)) for item, error in refused]
            for text in [f"skipped: {error}" for _, error in refused] + _unusable(batch):
                warn(console, text)
            advance(len(batch))
        return skipped

    def _judged(self, batch: list[Read]) -> tuple[list[Read], list[tuple[Item, Sample, float, NDArray[np.float32]]]]:
        """A batch, and what the model says of those that could be read and are no reference."""
        good = [(item, sample) for item, sample in batch if isinstance(sample, Sample)]
        if self.references:
            size = self.subject.image_size  # as the references were
            known = [pixels_sha256(resize(sample.image, size)) in self.references.digests for _, sample in good]
            self.left_out += [item for (item, _), same in zip(good, known, strict=True) if same]
            good = [read for read, same in zip(good, known, strict=True) if not same]
        if not good:
            return batch, []
        scores, maps = self._inspect(good)
        judged = zip(good, scores, maps, strict=True)
        return batch, [(item, sample, float(score), anomaly_map) for (item, sample), score, anomaly_map in judged]

    def _inspect(self, good: list[tuple[Item, Sample]]) -> Results:
        if not self.subject.in_tiles:
            images = in_order(np.stack([sample.image for _, sample in good]), self.subject.channel_order)
            scores, maps = self.subject.backend.run(images)
            require_probabilities(scores, maps, [item.image for item, _ in good])
            return scores, maps
        assert self.subject.predictor is not None
        ((item, sample),) = good
        score, model_map = self.subject.predictor.judge(self.subject.predictor.prepare(sample.image, str(item.image)))
        return np.array([score], np.float32), model_map[None]

    def add(self, item: Item, sample: Sample, score: float, anomaly_map: NDArray[np.float32]) -> None:
        scored = Scored(item, score)
        self.scores.append(scored)
        if not self.unmarked and sample.mask is not None:
            self.pixels.add(sample.mask, anomaly_map)
        if not item.label:
            self._keep("worst", score, scored, sample, anomaly_map)
        else:
            self._keep("best", score, scored, sample, anomaly_map)
            if score < self.subject.threshold:
                self._keep("missed", -score, scored, sample, anomaly_map)

    def _keep(self, kind: str, rank: float, scored: Scored, sample: Sample, anomaly_map: NDArray[np.float32]) -> None:
        """Draw the picture if it is among the first of its kind so far."""
        kept = self.pictures[kind]
        if len(kept) == PICTURES and rank <= kept[0][0]:
            return
        picture = Example(scored, _panels(scored, sample, anomaly_map, self.subject))
        heapq.heappush(kept, (rank, -next(self.order), picture))
        if len(kept) > PICTURES:
            heapq.heappop(kept)

    def result(self) -> ClassResult:
        labels = [scored.item.label for scored in self.scores]
        image = image_metrics(labels, [scored.score for scored in self.scores])
        pixel = self.pixels.metrics()
        reasons = []
        if image.auroc is None:
            reasons.append(f"image metrics need good and defective images; {self.name} has {_kinds(labels)}")
        if self.unmarked:
            reasons.append(f"pixel metrics need masks; {self.unmarked} defective images of {self.name} have none")
        elif pixel.auroc is None:
            reasons.append(f"pixel metrics need good and defective pixels; {self.name} has only one kind")
        pictures = {
            kind: tuple(picture for _, _, picture in sorted(kept, reverse=True, key=lambda entry: entry[:2]))
            for kind, kept in self.pictures.items()
        }
        return ClassResult(
            self.name,
            tuple(self.scores),
            image,
            pixel,
            tuple(reasons),
            pictures,
            self.subject.threshold,
            self.references.paths if self.references else (),
            self.subject.description.get("memory"),
            tuple(self.left_out),
        )


def _kinds(labels: list[int]) -> str:
    return f"{labels.count(0)} good and {len(labels) - labels.count(0)} defective"


def _panels(scored: Scored, sample: Sample, anomaly_map: NDArray[np.float32], subject: Subject) -> bytes:
    """Photograph, mask (black where nobody marked anything) and overlay, square as the model sees them, as JPEG."""
    mask = np.zeros(anomaly_map.shape, np.uint8) if sample.mask is None else sample.mask * np.uint8(255)
    panels = (sample.image, np.repeat(mask[..., None], 3, axis=2), anomaly_map)
    size = (PICTURE_SIDE, PICTURE_SIDE)
    photograph, marked, shrunk = (cv2.resize(panel, size, interpolation=cv2.INTER_AREA) for panel in panels)
    heat: NDArray[np.float32] = shrunk.astype(np.float32)
    marked_from = subject.threshold if subject.map_threshold is None else subject.map_threshold
    regions, _ = find_evidence(heat, None, scored.score >= subject.threshold, marked_from)
    overlay = Prediction(
        score=scored.score,
        threshold=subject.threshold,
        anomaly_map=heat,
        model_map=heat,
        regions=regions,
        timings_ms={},
        image=photograph.astype(np.uint8),
        map_scale=subject.map_scale,
    ).overlay()
    bar = ((len(overlay) - PICTURE_SIDE, 0), (0, 0), (0, 0))  # the overlay's has the verdict
    row = [np.pad(panel, bar, constant_values=128) for panel in (photograph, marked)]
    return encode_image(np.hstack([*row, overlay]).astype(np.uint8))
