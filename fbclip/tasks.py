"""Adaptation, calibration and evaluation as functions. They print nothing unless they are given a console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fbclip.bundle import SUFFIX, Bundle, checked_name
from fbclip.data.layouts import open_dataset
from fbclip.errors import ImageError, UsageError, reason
from fbclip.folders import list_images
from fbclip.memory import Memory
from fbclip.runtime import adapt as adapting
from fbclip.runtime import calibrate as calibrating
from fbclip.runtime.adapt import MOST_SHOTS
from fbclip.runtime.align import Align
from fbclip.runtime.calibrate import Scores, references_of
from fbclip.runtime.calibration import MOST_IMAGES, Calibration
from fbclip.runtime.cluster.archive import Item, Reader, is_address, read_content
from fbclip.runtime.cluster.results import Results
from fbclip.runtime.evaluation import evaluate as evaluating
from fbclip.runtime.evaluation.evaluate import Evaluation
from fbclip.runtime.evaluation.few_shot import FewShot
from fbclip.runtime.host import share_cores
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.roi import Roi
from fbclip.runtime.target import Target
from fbclip.runtime.tiles import Tiles
from fbclip.terminal import say

Places = str | Path | Iterable[str | Path]


@dataclass(frozen=True, repr=False)
class Calibrated:
    """What `calibrate` found.

    Attributes:
        bundle: the one that has the calibration now.
        calibration: what is promised: `threshold`, `false_alarm_rate`, `interval`, and of defects `miss_rate`.
        good, defects: scores of the images, and how many were `copies`, `skipped` (unreadable) or `unusable`.
    """

    bundle: Bundle
    calibration: Calibration
    good: calibrating.Scores
    defects: calibrating.Scores

    def __repr__(self) -> str:
        made = self.calibration
        promise = f"threshold={made.threshold:.4f}, false_alarm_rate={made.false_alarm_rate:g}"
        return f"Calibrated({str(self.bundle.path)!r}, {promise}, good={len(self.good.scores)})"


@dataclass(frozen=True, repr=False)
class Adapted:
    """What `adapt` learned.

    Attributes:
        bundle: the one that has the memory now.
        memory: what was learned, for `Predictor.set_memory`; None where it was forgotten.
        odd: names of good parts that stand out among the others: probably defects.
        skipped: images that can't be read or show nothing.
    """

    bundle: Bundle
    memory: Memory | None
    odd: tuple[str, ...] = ()
    skipped: int = 0

    def __repr__(self) -> str:
        learned = self.memory.explain() if self.memory else "no memory"
        return f"Adapted({str(self.bundle.path)!r}, {learned})"


def adapt(
    bundle: str | Path | None,
    good: Places | Iterable[NDArray[np.uint8]] = (),
    *,
    shots: int | None = None,
    mode: str = "whiten",
    orientation: str | None = None,
    positions: int | None = None,
    weight: float | None = None,
    add: bool = False,
    forget: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    roi: Roi | str | Path | Sequence[int] | None = None,
    tiles: Tiles | str | int | None = None,
    align: Align | str | Path | NDArray[np.uint8] | None = None,
    console: Console | None = None,
) -> Adapted:
    """Teach a bundle what good parts of a line look like, and write that into it. Seconds; no torch.

    Args:
        bundle: its path; None for a copy of the embedded one in the working folder.
        good: images, folders or globs of good parts, or frames uint8 (H, W, 3) RGB: two or more, better four to sixteen. A
            folder that `fbclip score` wrote stands for the images that it found good.
        shots: how many of them to take, spread over all; None for all, 64 at most.
        mode: "whiten" (mean and covariance of all patches), "nearest" (the nearest of remembered patches), or "auto": by
            trial on defects drawn on the good parts, positions among what is tried.
        orientation: "fixed" for parts that lie alike, "flips" for their mirror images as well, "any" for turns by 90°, too.
            None: flips, and fixed with positions.
        positions: compare each place with the same one, give or take so many patches (0 to 2): for parts that lie in place.
            One image is enough then. None: places don't count.
        weight: of the zero-shot logit beside the memory's; None for 0.2.
        add: go on from the bundle's memory, by its recipe, without its images.
        forget: remove the memory: the bundle is zero-shot again.
        out: write into a copy of the bundle, NAME.fbclip.
        device, precision, roi, tiles, align: what will inspect, and where, as a `Predictor` takes them.
        console: where to print what is learned and what is left out.

    Raises:
        BundleError, DeviceError, UsageError: no such bundle, device or images, or options that don't go together.
        FBClipError: it can't be written.
    """
    console = console or Console(quiet=True)
    tell = partial(say, console)
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or not 1 <= shots <= MOST_SHOTS):
        raise UsageError(f"a number of good parts is 1 to {MOST_SHOTS}; got {shots!r:.50}", option="shots")
    choice = adapting.Choice(mode, orientation, positions, adapting.WEIGHT if weight is None else weight)
    empty = isinstance(good, (list, tuple)) and not good
    places, frames = ([], []) if empty else _parts(good)
    target = Target.choose(
        "adapt",
        places or (["frames"] if frames else []),
        None if bundle is None else Path(bundle),
        None if out is None else Path(out),
        needs_good=not forget,
    )
    if forget and (add or frames or target.good):
        raise UsageError("to forget takes no good parts and adds none; got both", option="forget")
    if forget:
        target.write(partial(adapting.forget, tell), tell)
        return Adapted(Bundle.load(target.path), None)
    old = target.bundle.memory() if add else None
    if add and old is None:
        raise UsageError(f"{target.path} has no memory to add to: adapt it first", option="add")
    if old and choice != adapting.Choice():
        raise UsageError(
            "what is added is learned as the memory was; leave mode, orientation, positions and weight out",
            option="add",
        )
    listed: list[Path | Stored | NDArray[np.uint8]] = [*frames] or _good_images(target.good, tell)
    taken = adapting.take(listed, shots or MOST_SHOTS)
    images = [_fetched(image) if isinstance(image, Stored) else image for image in taken]
    if len(images) < len(listed):
        tell(f"{len(images)} of {len(listed)} images are taken, spread over them")
    with Predictor(
        target.bundle,
        device=device,
        precision=precision,
        calibrated=False,
        memory=None,
        roi=roi,
        tiles=tiles,
        align=align,
    ) as predictor:
        taught = adapting.teach(predictor, images, choice, old, console)
        adapting.report(taught, console)
        picture = adapting.draw(taught, predictor)
    target.write(partial(adapting.write, taught, picture, tell), tell)
    odd = tuple(each.name for each in taught.memory.about.references if each.odd)
    return Adapted(Bundle.load(target.path), taught.memory, odd, taught.skipped)


def calibrate(
    bundle: str | Path | None,
    good: Places | Iterable[NDArray[np.uint8]],
    *,
    false_alarm_rate: float | None = None,
    defects: Places | None = None,
    device: str = "auto",
    precision: str = "auto",
    roi: Roi | str | Path | Sequence[int] | None = None,
    tiles: Tiles | str | int | None = None,
    align: Align | str | Path | NDArray[np.uint8] | None = None,
    every: int = 1,
    max_frames: int | None = None,
    skip_first: int = 0,
    name: str | None = None,
    console: Console | None = None,
) -> Calibrated:
    """Set a bundle's threshold from good parts alone, with a stated rate of false alarms, and write it into the bundle.

    Args:
        bundle: its path; None for a copy of the embedded one in the working folder.
        good: images, folders, globs, videos or cameras that show good parts; or frames uint8 (H, W, 3) RGB; or a folder
            that `fbclip score` wrote of good parts, whose scores are taken.
        false_alarm_rate: share of good parts that may raise a false alarm: 0.05 needs 19 images, 0.01 needs 99. None:
            0.01, or the lowest that fewer images allow.
        defects: images, folders or globs of defective parts: adds the expected miss rate.
        device, precision: what will inspect, as a `Predictor` takes them.
        roi, tiles, align: where and how frames are inspected, as a `Predictor` takes them.
        every: take each Nth image or frame: neighbours are too alike.
        max_frames: images or frames to take; a camera needs it.
        skip_first: frames to leave out after each connect to a camera.
        name: calibrate a copy of the bundle in the working folder, NAME.fbclip.
        console: where to print what is found and what is left out.

    Raises:
        BundleError, DeviceError, UsageError: no such bundle, device or images, or too few images for the rate.
        FBClipError: it can't be written.
    """
    console = console or Console(quiet=True)
    tell = partial(say, console)
    for option, value, least in (("every", every, 1), ("max_frames", max_frames, 1), ("skip_first", skip_first, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"a number of images or frames is {least} or more; got {value!r:.50}", option=option)
    places, frames = _parts(good)
    if defects is not None:
        defects = _texts(defects, "defects")
    chosen = None if bundle is None else Path(bundle)
    out = None if name is None else Path(f"{checked_name(name)}{SUFFIX}")
    target = Target.choose("calibrate", places or ["frames"], chosen, out)
    places = target.good
    scored = Results.at(places[0]) if len(places) == 1 else None
    images: Any = frames[::every][:max_frames]
    if not (images or scored):
        images = calibrating.good_images(places, every, max_frames, tell, skip_first)
    defective = list_images(defects, tell) if defects else []
    with Predictor(
        target.bundle, device=device, precision=precision, calibrated=False, roi=roi, tiles=tiles, align=align
    ) as predictor:
        if scored:
            images = _scores(scored, predictor, every, max_frames)
            tell(f"{len(images.scores)} scores of {scored.name} are taken as they are")
        made, found, missed = calibrating.calibrate(predictor, images, false_alarm_rate, defective, console)
    calibrating.report(made, found, missed, tell)
    target.write(partial(calibrating.write, made, missed.scores, tell), tell)
    return Calibrated(Bundle.load(target.path), made, found, missed)


def evaluate(
    bundle: str | Path | None,
    data: Places,
    *,
    device: str = "auto",
    precision: str = "auto",
    threshold: float | None = None,
    layout: str | None = None,
    classes: Sequence[str] | None = None,
    batch: int = 1,
    workers: int = 1,
    memory: Memory | str | Path | None = "auto",
    tiles: Tiles | str | int | None = None,
    shots: int | None = None,
    seeds: Sequence[int] = (0,),
    mode: str = "whiten",
    orientation: str | None = None,
    positions: int | None = None,
    weight: float | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure a bundle on the test images of data sets.

    Args:
        bundle: its path; None for the embedded one.
        data: folders of data sets, or their index files.
        device, precision, threshold: as a `Predictor` takes them.
        layout: of the data sets, like "visa"; recognised if None.
        classes: only these.
        batch: images that the model is given at once.
        workers: threads that do so, on a CPU; the cores are shared out among them.
        memory: what good parts taught, as a `Predictor` takes it.
        tiles: as a `Predictor` takes them: maps and masks are compared in the images' own pixels then, otherwise as the
            model sees them.
        shots: few-shot: so many good training images of each class, drawn at random, teach a memory before the class is
            judged; nothing is written into the bundle. None for the bundle as it is, with its own memory if it has one.
        seeds: of the draws; the figures are the mean over them.
        mode, orientation, positions, weight: how the shots are learned, as `adapt` takes them.
        console: where to show the progress and print what is left out.

    Returns:
        The metrics: `evaluation.results[0].mean["image_auroc"]` of the first data set, 0..1, None where undefined;
        its `classes`, each with `values` and the `scores` of its images; `spread()`, mean and deviation over the draws, and
        the `draws` themselves; and `evaluation.skipped`, unreadable images.

    Raises:
        BundleError, DeviceError, UsageError: no such bundle, device or data set, no test images, fewer good training
            images than shots, or a bundle that can't learn.
    """
    wanted = tuple(classes) if classes else None
    choice = adapting.Choice(mode, orientation, positions, adapting.WEIGHT if weight is None else weight)
    if shots is None and (tuple(seeds) != (0,) or choice != adapting.Choice()):
        raise UsageError("seeds, mode, orientation, positions and weight go with shots; got none", option="shots")
    few_shot = None if shots is None else FewShot(shots, tuple(seeds), choice)
    tests = [
        evaluating.to_evaluate(open_dataset(Path(place), layout), wanted, few_shot) for place in _texts(data, "data")
    ]
    with share_cores(workers):
        subject = evaluating.bundle_subject(
            Path(bundle) if bundle else None, device, precision, threshold, batch, few_shot, memory, tiles
        )
    with subject.backend:
        return evaluating.evaluate(subject, tests, batch, console or Console(quiet=True), few_shot, workers)


class Stored(NamedTuple):
    """A picture of a store: its name, and the options that lead there."""

    name: str
    options: str


def _good_images(places: list[str], tell: Callable[[str], None]) -> list[Path | Stored | NDArray[np.uint8]]:
    """Good parts by their paths, or by their names in a store."""
    found: list[Path | Stored | NDArray[np.uint8]] = []
    others: list[str] = []
    for place in places:
        if scored := Results.at(place):
            names, options = scored.good_images(), str((scored.about() or {}).get("store", ""))
            tell(f"{len(names)} images that {scored.name} found good are here to be taken")
            found += [Stored(name, options) if is_address(name) else Path(name) for name in names]
        else:
            others.append(place)
    return [*found, *(list_images(others, tell) if others or not found else [])]


def _fetched(image: Stored) -> NDArray[np.uint8]:
    try:
        return read_content(Reader(image.name.rpartition("/")[0] + image.options).fetch(Item(image.name)))
    except OSError as error:
        raise ImageError(f"{image.name} can't be fetched: {reason(error)}") from error


def _scores(scored: Results, predictor: Predictor, every: int, most: int | None) -> Scores:
    """What an archive's rows say of its good parts, as a calibration takes it."""
    scores, references = Scores(), references_of(predictor)
    for sample in islice(scored.samples(predictor), 0, None, every):
        scores.add(sample, references)
        if len(scores.scores) == (most or MOST_IMAGES + 1):
            break
    if len(scores.scores) > MOST_IMAGES:
        raise UsageError(f"a calibration takes at most {MOST_IMAGES:,} images: take every Nth alone", option="every")
    return scores


def _texts(places: Places, option: str) -> list[str]:
    found = [str(places)] if isinstance(places, (str, Path)) else [str(place) for place in places]
    if not found:
        raise UsageError("there are no images: name files, a folder or a glob", option=option)
    return found


def _parts(good: Places | Iterable[NDArray[np.uint8]]) -> tuple[list[str], list[NDArray[np.uint8]]]:
    """Good parts as places, or as frames."""
    if isinstance(good, (str, Path)):
        return [str(good)], []
    if isinstance(good, np.ndarray) and good.ndim != 4:
        raise UsageError(
            f"frames are a list of uint8 (H, W, 3), or one array (N, H, W, 3); got {good.shape}", option="good"
        )
    parts = list(good)
    frames = [part for part in parts if isinstance(part, np.ndarray)]
    if wrong := [frame for frame in frames if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3]:
        raise UsageError(f"frames are uint8 (H, W, 3); got {wrong[0].dtype} {wrong[0].shape}", option="good")
    if frames and len(frames) != len(parts):
        raise UsageError("good parts are places or frames; got both", option="good")
    return ([], frames) if frames else (_texts(parts, "good"), [])  # type: ignore[arg-type]
