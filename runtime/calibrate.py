"""`fbclip calibrate`: images of good parts to a threshold with a stated false-alarm rate, in the bundle."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from fbclip.bundle import Bundle
from fbclip.errors import FBClipError, ImageError, UsageError
from fbclip.reading import SUFFIXES
from fbclip.runtime.calibration import Calibration, binomial_interval, conformal_threshold, percent, rank, rate_interval
from fbclip.runtime.images import list_images
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.sources import CaptureOptions, Source, open_source

GOOD_PIXELS = 0.99  # share of a typical good image that a heat map leaves in the first colour
WARM = 0.6  # where on the colour scale green has become yellow: from there to red are the marked values
ALIKE = 1 / 3  # autocorrelation from which images count less than half

Say = Callable[[str], None]


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
    """

    scores: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    grounds: list[float] = field(default_factory=list)
    digests: dict[str, None] = field(default_factory=dict)
    copies: int = 0
    skipped: int = 0


def choose_bundle(sources: list[str], say: Say) -> tuple[Bundle, list[str]]:
    """The bundle to calibrate and the sources of good images, from the arguments `[BUNDLE] GOOD...`.

    Without a bundle it is a copy of the embedded one in the working folder: what is inside the installed package
    belongs to every project of the machine and is lost with the next upgrade.

    Raises:
        BundleError, UsageError: no such bundle, no good images, or another bundle where the copy goes.
    """
    first = Path(sources[0])
    named = first.suffix == ".fbclip" or (first / "manifest.json").is_file()
    good = sources[1:] if named else sources
    if not good:
        raise UsageError(f"after the bundle come images of good parts; got none: fbclip calibrate {first} GOOD...")
    if named:
        return Bundle.load(first), good
    embedded = Bundle.load()
    path = Path(embedded.path.name)
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            Path(shutil.copytree(embedded.path, Path(folder) / path.name)).rename(path)
        say(f"no bundle named: copied the embedded one to {path}; use it with --bundle {path}")
    bundle = Bundle.load(path)
    if bundle.manifest != embedded.manifest:
        raise UsageError(f"{path} is here and isn't the embedded bundle: fbclip calibrate {path} GOOD... to mean it")
    return bundle, good


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
    capture = CaptureOptions(every=every, skip_first=skip_first)
    pictures = (Path(place).is_dir() or Path(place).suffix.lower() in SUFFIXES for place in places)
    if not skip_first and not any("://" in place for place in places) and all(pictures):
        return list_images(places)[::every][:most]
    sources = [open_source(place, capture) for place in places]
    if most is None and (endless := [source.name for source in sources if source.live]):
        raise UsageError(f"{endless[0]} never ends: pass --max-frames N")
    return islice(_frames(sources, say), most)


def _frames(sources: list[Source], say: Say) -> Iterator[NDArray[np.uint8]]:
    for source in sources:
        with source:
            source.listen(lambda notice: say(notice.message))
            yield from (frame.image for frame in source)


def calibrate(
    predictor: Predictor,
    good: Iterable[Path | NDArray[np.uint8]],
    rate: float,
    defects: Collection[Path],
    console: Console,
) -> tuple[Calibration, Scores, Scores]:
    """Score good parts, and set the threshold so that a new one raises an alarm with probability `rate` at most.

    Args:
        predictor: of the bundle, on the device and in the precision that will inspect.
        good: paths, or frames uint8 (H, W, 3) RGB. Those that can't be read are reported and left out.
        rate: above 0 and below 0.5.
        defects: images of defective parts, which the threshold doesn't depend on.

    Returns:
        The calibration, and the scores of the good and the defective images.

    Raises:
        UsageError: too few good images for the rate.
    """
    rank(len(good) if isinstance(good, Collection) else 1_000_000, rate)  # before hours of work
    found = _score(predictor, good, "good parts", console)
    threshold = conformal_threshold(found.scores, rate)
    if threshold > 1:
        raise UsageError("good parts score 1.0, the highest there is: this model can't tell these parts from defects")
    map_threshold = conformal_threshold(found.peaks, rate)
    ground = median(found.grounds)
    bad = _score(predictor, defects, "defects", console)
    missed = sum(score < threshold for score in bad.scores)
    calibration = Calibration(
        threshold=threshold,
        false_alarm_rate=rate,
        interval=rate_interval(len(found.scores), rate),
        count=len(found.scores),
        scores=tuple(sorted(found.scores)),
        map_threshold=map_threshold,
        map_scale=(ground, ground + (map_threshold - ground) / WARM),
        images_sha256=hashlib.sha256("".join(sorted(found.digests)).encode()).hexdigest(),
        model_sha256=predictor.bundle.model_sha256(predictor.precision),
        precision=predictor.precision,
        device=predictor.backend.device,
        roi=predictor.roi.identity if predictor.roi else None,
        defects=len(bad.scores),
        miss_rate=missed / len(bad.scores) if bad.scores else None,
        miss_interval=binomial_interval(missed, len(bad.scores)) if bad.scores else None,
    )
    return calibration, found, bad


def _score(predictor: Predictor, images: Iterable[Path | NDArray[np.uint8]], what: str, console: Console) -> Scores:
    found = Scores()
    total = len(images) if isinstance(images, Collection) else None
    for image in track(images, what, total=total, console=console, disable=not console.is_terminal, transient=True):
        try:
            prediction = predictor(image)
        except ImageError as error:
            found.skipped += 1
            console.print(f"skipped: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
            continue
        digest = hashlib.sha256(repr(prediction.image.shape).encode() + prediction.image.tobytes()).hexdigest()
        if digest in found.digests:
            found.copies += 1
            continue
        peak = float(prediction.anomaly_map.max())
        if not math.isfinite(prediction.score + peak):
            raise FBClipError(f"the model gives {prediction.score} for {image}: see fbclip doctor")
        found.digests[digest] = None
        found.scores.append(prediction.score)
        found.peaks.append(peak)
        found.grounds.append(float(np.quantile(prediction.model_map, GOOD_PIXELS)))
    return found


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
    left_out = [f"{n} {what}" for n, what in ((good.copies, "copied"), (good.skipped, "unreadable")) if n]
    without = f" ({', '.join(left_out)} left out)" if left_out else ""
    say(f"{c.count} good images{without}: scores {c.scores[0]:.3f} to {c.scores[-1]:.3f}")
    say(f"threshold {c.threshold:.4f}: a new good part raises an alarm with probability {c.false_alarm_rate:g} at most")
    say(f"this threshold's own false-alarm rate is {percent(c.interval)} (95 % confidence; more images narrow it)")
    if alike := weight_of_neighbours(good.scores):
        say(
            f"consecutive images are alike (autocorrelation {alike[0]:.2f}) and weigh as about {alike[1]}: the real rate "
            f"may be higher; take images of more parts, further apart"
        )
    if c.miss_rate is not None and c.miss_interval is not None:
        missed = round(c.miss_rate * c.defects)
        say(
            f"{missed} of {c.defects} defects are missed: the miss rate is {percent(c.miss_interval)} (95 % confidence)"
        )
