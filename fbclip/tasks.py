"""Calibration and evaluation as functions. They print nothing unless they are given a console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fbclip.bundle import Bundle
from fbclip.data.layouts import open_dataset
from fbclip.errors import UsageError
from fbclip.folders import list_images
from fbclip.runtime import calibrate as calibrating
from fbclip.runtime.calibration import Calibration
from fbclip.runtime.evaluation import evaluate as evaluating
from fbclip.runtime.evaluation.evaluate import Evaluation
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.roi import Roi
from fbclip.terminal import say

Places = str | Path | Sequence[str | Path]


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


def calibrate(
    bundle: str | Path | None,
    good: Places | Sequence[NDArray[np.uint8]],
    *,
    false_alarm_rate: float | None = None,
    defects: Places | None = None,
    device: str = "auto",
    precision: str = "auto",
    roi: Roi | str | Path | Sequence[int] | None = None,
    every: int = 1,
    max_frames: int | None = None,
    skip_first: int = 0,
    name: str | None = None,
    console: Console | None = None,
) -> Calibrated:
    """Set a bundle's threshold from good parts alone, with a stated rate of false alarms, and write it into the bundle.

    Args:
        bundle: its path; None for a copy of the embedded one in the working folder.
        good: images, folders, globs, videos or cameras that show good parts; or frames uint8 (H, W, 3) RGB.
        false_alarm_rate: share of good parts that may raise a false alarm: 0.05 needs 19 images, 0.01 needs 99. None:
            0.01, or the lowest that fewer images allow.
        defects: images, folders or globs of defective parts: adds the expected miss rate.
        device, precision: what will inspect, as a `Predictor` takes them.
        roi: where frames are inspected, as a `Predictor` takes it.
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
    frames = [each for each in good if isinstance(each, np.ndarray)] if not isinstance(good, (str, Path)) else []
    places = [] if frames else _texts(good)  # type: ignore[arg-type]
    if frames and len(frames) != len(good):  # type: ignore[arg-type]
        raise UsageError("good parts are places or frames; got both", option="good")
    loaded, path, _ = calibrating.choose_bundle(places or ["frames"], name, None if bundle is None else Path(bundle))
    images = frames[::every][:max_frames] or calibrating.good_images(places, every, max_frames, tell, skip_first)
    defective = list_images(_texts(defects), tell) if defects else []
    with Predictor(loaded, device=device, precision=precision, calibrated=False, roi=roi) as predictor:
        made, found, missed = calibrating.calibrate(predictor, images, false_alarm_rate, defective, console)
    calibrating.report(made, found, missed, tell)
    calibrating.write(made, missed.scores, loaded, path, tell)
    return Calibrated(Bundle.load(path), made, found, missed)


def evaluate(
    bundle: str | Path | None,
    data: str | Path | Sequence[str | Path],
    *,
    device: str = "auto",
    precision: str = "auto",
    threshold: float | None = None,
    layout: str | None = None,
    classes: Sequence[str] | None = None,
    batch: int = 1,
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
        console: where to show the progress and print what is left out.

    Returns:
        The metrics: `evaluation.results[0].mean["image_auroc"]` of the first data set, 0..1, None where undefined;
        its `classes`, each with `values` and the `scores` of its images; and `evaluation.skipped`, unreadable images.

    Raises:
        BundleError, DeviceError, UsageError: no such bundle, device or data set, or no test images.
    """
    wanted = tuple(classes) if classes else None
    tests = [evaluating.to_evaluate(open_dataset(Path(place), layout), wanted) for place in _texts(data)]
    subject = evaluating.bundle_subject(Path(bundle) if bundle else None, device, precision, threshold, batch)
    with subject.backend:
        return evaluating.evaluate(subject, tests, batch, console or Console(quiet=True))


def _texts(places: Places) -> list[str]:
    return [str(places)] if isinstance(places, (str, Path)) else [str(place) for place in places]
