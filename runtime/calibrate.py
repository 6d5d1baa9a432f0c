"""`fbclip calibrate`: images of good parts to a threshold with a stated false-alarm rate, in the bundle."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fbclip.bundle import Bundle
from fbclip.errors import BundleError, ImageError, UsageError
from fbclip.folders import list_images
from fbclip.images import SUFFIXES, pixels_sha256
from fbclip.memory import MEMORY_LINE, Memory, probability
from fbclip.runtime.calibration import (
    JACKKNIFE,
    MOST_IMAGES,
    SPLIT,
    Calibration,
    conformal_threshold,
    derived,
    lowest_rate,
    percent,
    rank,
)
from fbclip.runtime.histogram import write_histogram
from fbclip.runtime.inputs import as_frame
from fbclip.runtime.live.sources import BaseSource, CaptureOptions, open_source
from fbclip.runtime.prediction import Prediction
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.sight import EXPLAINED, Look, Usual, look
from fbclip.runtime.target import Say
from fbclip.terminal import printable, track, warn
from fbclip.terminal import say as print_line

USUAL_RATE, USUAL_COUNT = 0.01, 99  # of false alarms where none is asked for, and the images that it needs
GOOD_PIXELS = 0.99  # share of a typical good image that a heat map leaves in the first colour
SAMPLED = 1 << 20  # pixels of a map; smaller ones are looked at whole
HOPELESS = 0.5  # share of the defects from which a model that misses them can't inspect the part
ALIKE = 1 / 3  # autocorrelation from which images count less than half


class Sample(NamedTuple):
    """What a calibration takes of an image.

    Attributes:
        name: of the image.
        score: the image's.
        peak: the highest value of its map.
        ground: what 99 % of the pixels of its map stay below.
        sha256: of its pixels.
        look: what was looked at.
    """

    name: str
    score: float
    peak: float
    ground: float
    sha256: str
    look: Look

    @classmethod
    def of(cls, prediction: Prediction, seen: Look) -> Sample:
        peak = float(prediction.anomaly_map.max())
        # beside a mask the model's map may be higher than what is looked at
        ground = min(float(np.quantile(_thinned(prediction.model_map), GOOD_PIXELS)), peak)
        return cls(prediction.name, prediction.score, peak, ground, pixels_sha256(prediction.image), seen)


@dataclass
class Scores:
    """What a model says of some images, in their order; copies are left out.

    Attributes:
        scores: image scores.
        peaks: the highest value of each map.
        grounds: what 99 % of the pixels of each map stay below.
        digests: SHA-256 of each image's pixels.
        copies: images left out because another has the same pixels.
        skipped: images left out because they can't be read.
        unusable: images left out because they show nothing.
        absent: images left out because the part isn't in them.
        learned: images left out because the memory was learned from them.
        names: of the images.
        looks: of each image; where the memory was learned from all of them, of these.
    """

    scores: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    grounds: list[float] = field(default_factory=list)
    digests: dict[str, None] = field(default_factory=dict)
    copies: int = 0
    skipped: int = 0
    unusable: int = 0
    absent: int = 0
    learned: int = 0
    looks: list[Look] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _of_memory: dict[str, Sample] = field(default_factory=dict, repr=False)

    def add(self, sample: Sample, references: Collection[str] = ()) -> None:
        """Take an image, unless it is a copy, or one of those that the memory was learned from.

        Args:
            references: hashes of the pixels of these.
        """
        if sample.sha256 in self.digests or sample.sha256 in self._of_memory:
            self.copies += 1
            return
        if sample.sha256 in references:
            self.learned += 1
            self._of_memory[sample.sha256] = sample
            return
        self.digests[sample.sha256] = None
        self.scores.append(sample.score)
        self.peaks.append(sample.peak)
        self.grounds.append(sample.ground)
        self.looks.append(sample.look)
        self.names.append(sample.name)

    def settled(self) -> Scores:
        """Itself; where the memory was learned from all of them, with how these look."""
        if not self.scores:
            self.grounds = [sample.ground for sample in self._of_memory.values()]
            self.looks = [sample.look for sample in self._of_memory.values()]
        return self


def references_of(predictor: Predictor) -> set[str]:
    """The hashes of the images that a predictor's memory was learned from."""
    return {each.sha256 for each in predictor.memory.about.references} if predictor.memory else set()


def write(calibration: Calibration, defects: Collection[float], say: Say, bundle: Bundle) -> None:
    """Write a calibration and its picture into a bundle, for `Target.write`.

    Args:
        defects: scores of defective images.

    Raises:
        FBClipError, UsageError: it can't be written; see `fbclip.files.write_error`.
    """
    with suppress(BundleError):  # one that is damaged, or of another model, is no loss
        if old := Calibration.load(bundle):
            say(f"replaces the calibration from {old.count} good images, threshold {old.threshold:.4g}")
    write_histogram(calibration, list(defects), bundle.inside("calibration.png"))
    calibration.save(bundle)


def good_images(
    places: list[str], every: int, most: int | None, say: Say, skip_first: int = 0
) -> Iterable[Path | NDArray[np.uint8]]:
    """The images of good parts: paths where there are pictures only, otherwise frames uint8 (H, W, 3) RGB.

    Args:
        places: images, folders, globs, videos, cameras or streams.
        every: take each Nth.
        most: how many to take; None is all.
        say: told of what can't be read and of cameras that come and go.
        skip_first: frames to leave out after each connect to a camera or stream.

    Raises:
        UsageError: one that is none of these; a camera or stream, which never ends, without `most`; `skip_first` of
            what is none.
    """
    pictures = (os.path.isdir(place) or Path(place).suffix.lower() in SUFFIXES for place in places)  # noqa: PTH112
    if not skip_first and not any("://" in place for place in places) and all(pictures):
        images = list_images(places, say)[::every][:most]
        if len(images) > MOST_IMAGES:
            raise UsageError(
                f"a calibration takes at most {MOST_IMAGES:,} images; got {len(images):,}: take every Nth alone",
                option="every",
            )
        return images
    sources = [open_source(place, CaptureOptions(every=every, skip_first=skip_first)) for place in places]
    if most is None and (endless := [source.name for source in sources if source.live]):
        raise UsageError(f"{endless[0]} never ends: say how many frames to take", option="max_frames")
    return islice(_frames(sources, say), min(most or MOST_IMAGES, MOST_IMAGES))


def _frames(sources: list[BaseSource], say: Say) -> Iterator[NDArray[np.uint8]]:
    for source in sources:
        with source:
            source.listen(lambda notice: say(notice.message))
            yield from (frame.image for frame in source)


def calibrate(
    predictor: Predictor,
    good: Iterable[Path | NDArray[np.uint8]] | Scores,
    rate: float | None,
    defects: Collection[Path],
    console: Console,
) -> tuple[Calibration, Scores, Scores]:
    """Score good parts, and set the threshold so that a new one raises an alarm with probability `rate` at most.

    Nothing is written.

    Args:
        predictor: of the bundle, on the device and in the precision that will inspect.
        good: paths, or frames uint8 (H, W, 3) RGB; those that can't be read are reported and left out. Or what this
            predictor has already said of them.
        rate: above 0 and below 0.5; None for 0.01, or for the lowest that the images allow where they are fewer.
        defects: images of defective parts, which the threshold doesn't depend on.

    Returns:
        The calibration, and the scores of the good and the defective images.

    Raises:
        UsageError: too few good images for the rate.
    """
    if rate is not None:  # before hours of work
        images = good.scores if isinstance(good, Scores) else good
        rank(len(images) if isinstance(images, Collection) else MOST_IMAGES, rate)
    found = good.settled() if isinstance(good, Scores) else _score(predictor, good, "good parts", console)
    for place, fault in Usual.find_odd(found.looks).items() if found.names else ():
        warn(
            console,
            f"{found.names[place]} is {fault} against the other good images, and counts like them: look whether it is one",
        )
    method = SPLIT
    if found.learned and not found.scores and predictor.memory:
        method = JACKKNIFE
        _leave_one_out(found, predictor.memory)
        highest = max(predictor.memory.about.references, key=lambda each: each.score)
        if max(found.scores) >= MEMORY_LINE:
            warn(
                console,
                f"{highest.name} scores {max(found.scores):.3f} and sets the threshold: look whether it is good",
            )
    rate = _affordable(rate, len(found.scores), console)
    threshold = conformal_threshold(found.scores, rate)
    if threshold > 1:
        raise UsageError("good parts score 1.0, the highest there is: this model can't tell these parts from defects")
    bad = _score(predictor, defects, "defects", console)
    calibration = Calibration(
        **derived(
            found.scores,
            rate,
            ground=median(found.grounds),
            map_threshold=(map_threshold := conformal_threshold(found.peaks, rate)),
            defects=len(bad.scores),
            missed=sum(score < threshold for score in bad.scores),
        ),
        false_alarm_rate=rate,
        map_threshold=map_threshold,
        images_sha256=hashlib.sha256("".join(sorted(found.digests)).encode()).hexdigest(),
        model_sha256=predictor.bundle.model_sha256(predictor.precision),
        precision=predictor.precision,
        device=predictor.backend.device,
        **predictor.view.place._asdict(),
        memory=predictor.memory.sha256 if predictor.memory else None,
        method=method,
        defects=len(bad.scores),
        usual=Usual.learn(found.looks),
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return calibration, found, bad


def _affordable(rate: float | None, count: int, console: Console) -> float:
    """The rate that was asked for; else the usual one, or the lowest that so many images allow."""
    if rate is not None:
        return rate
    if count < 2:
        raise UsageError(f"a calibration takes two good images or more, and thirty to be of use; got {count}")
    if count >= USUAL_COUNT:
        return USUAL_RATE
    rate = lowest_rate(count)
    chosen = f"{count} images allow a false-alarm rate of {rate:g} at best, which is taken"
    print_line(console, f"{chosen}; {USUAL_RATE:g} needs {USUAL_COUNT}")
    return rate


def _leave_one_out(found: Scores, memory: Memory) -> None:
    """Take the memory's own references for good parts: each with the score that it has where the others alone taught it.

    Their scores aren't those of new parts, which all of them taught: "jackknife", without the promise of new parts
    (Barber, Candès, Ramdas, Tibshirani, Predictive inference with the jackknife+, Annals of Statistics 2021,
    arXiv:1905.02928). With the memories of all but one asked in turn (jackknife+) twice the rate is the most; asking one
    memory comes to the same only as far as one part more or less doesn't change it.

    Raises:
        UsageError: one of them stands out, probably with a defect.
    """
    about = memory.about
    if odd := [each.name for each in about.references if each.odd]:
        raise UsageError(
            f"the memory's own references calibrate it where none stands out; {odd[0]} does: adapt again without it, or "
            f"calibrate with other good parts"
        )
    for reference in about.references:
        found.digests[reference.sha256] = None
        found.scores.append(float(np.float32(probability(reference.score - about.score_line))))
        found.peaks.append(float(np.float32(probability(reference.peak - about.map_line))))


def _score(predictor: Predictor, images: Iterable[Path | NDArray[np.uint8]], what: str, console: Console) -> Scores:
    found = Scores()
    references = references_of(predictor)
    total = len(images) if isinstance(images, Collection) else None
    for image in track(images, what, console, total):
        try:
            shown = predictor.prepare(as_frame(image, "rgb"))
            (score,), (model_map,) = predictor.run([shown])
            prediction = predictor.conclude(shown, float(score), model_map, {})
        except ImageError as error:
            found.skipped += 1
            warn(console, f"skipped: {error}")
            continue
        if prediction.unusable:
            found.unusable += 1
            if isinstance(image, Path):  # of a camera's there may be thousands, which are counted
                warn(console, f"left out: {image} is {EXPLAINED[prediction.unusable]}")
            continue
        if prediction.absent:
            found.absent += 1
            if isinstance(image, Path):
                warn(console, f"left out: {image} shows no part that it can be aligned to")
            continue
        sample = Sample.of(prediction, look(shown.shown))
        name = printable(image) if isinstance(image, Path) else f"frame {len(found.scores) + 1}"
        found.add(sample._replace(name=name), references)
    return found.settled()


def _thinned(model_map: NDArray[np.float32]) -> NDArray[np.float32]:
    """Enough of a map's pixels for its quantiles: of a large one they take seconds."""
    step = max(1, math.isqrt(model_map.size // SAMPLED))
    return model_map[::step, ::step]


def weight_of_neighbours(scores: list[float]) -> tuple[float, int] | None:
    """Whether consecutive images are so alike that they count less than half, as frames of one part do.

    Returns:
        The autocorrelation r of consecutive scores and how many independent ones n of them weigh as,
        n (1 - r) / (1 + r) as in a first-order autoregression; None where r is below a third, or no more than chance
        gives (three standard deviations of 1 / sqrt(n)).
    """
    centred = np.asarray(scores) - np.mean(scores)
    power = float(centred @ centred)
    r = float(centred[:-1] @ centred[1:]) / power if power else 0.0
    if r < max(ALIKE, 3 / math.sqrt(len(scores))):
        return None
    return r, max(1, round(len(scores) * (1 - r) / (1 + r)))


def report(calibration: Calibration, good: Scores, bad: Scores, say: Say) -> None:
    """What was found, promised and is doubtful, in a few lines."""
    c = calibration
    without_use = (
        (good.copies, "copied"),
        (good.skipped, "unreadable"),
        (good.unusable, "unusable"),
        (good.absent, "without the part"),
        (good.learned if c.method == SPLIT else 0, "in the memory, which a promise needs other parts for"),
    )
    left_out = [f"{n} {what}" for n, what in without_use if n]
    without = f" ({', '.join(left_out)} left out)" if left_out else ""
    of_memory = " of the memory, each scored where the others alone taught it" if c.method == JACKKNIFE else ""
    say(f"{c.count} good images{of_memory}{without}: scores {c.scores[0]:.3f} to {c.scores[-1]:.3f}")
    if c.method == JACKKNIFE:
        say(f"threshold {c.threshold:.4f}: {c.promise}")
        say("good parts that the memory hasn't seen would give a promise: calibrate with others")
        report_defects(c, bad, say)
        return
    say(
        f"threshold {c.threshold:.4f}: at most {100 * c.false_alarm_rate:.3g} % of good parts raise a false alarm, "
        f"on average over calibrations like this one"
    )
    say(
        f"this one had {c.count} images to learn from, so its own rate is anywhere from {percent(c.interval)} (95 % "
        f"confidence): more images narrow that"
    )
    if alike := weight_of_neighbours(good.scores):
        say(
            f"consecutive images are alike (autocorrelation {alike[0]:.2f}) and weigh as about {alike[1]}: the real rate "
            f"may be higher; take images of more parts, further apart"
        )
    report_defects(c, bad, say)


def report_defects(calibration: Calibration, bad: Scores, say: Say) -> None:
    """What the threshold does to defective images, if there are any, and what that means."""
    c = calibration
    if c.miss_interval is None:
        return
    say(f"{c.missed} of {c.defects} defects are missed: the miss rate is {percent(c.miss_interval)} (95 % confidence)")
    found = c.defects - c.missed
    unmarked = sum(s >= c.threshold and p < c.map_threshold for s, p in zip(bad.scores, bad.peaks, strict=True))
    if unmarked:
        say(
            f"{unmarked} of {found} found defects have no region at the map's line ({c.map_threshold:.4f}): infer marks "
            f"their peak as weak"
        )
    if c.missed >= HOPELESS * c.defects:
        say(
            "this model can't inspect this part: it passes most of these defects as good. Look only where defects can be, "
            "teach it good parts (fbclip adapt), or train a model for it (docs/guides/training.md)"
        )
