"""A threshold with a stated false-alarm rate, from the scores of good parts alone.

Split conformal prediction: among n good scores and a new one that could have come in any order, the new one is among
the m highest of the n + 1 with probability m / (n + 1), and only then can it be above the m-th highest of the n. That
holds for any distribution of the scores, ties included (Vovk et al., Algorithmic Learning in a Random World, 2005;
Angelopoulos and Bates, A Gentle Introduction to Conformal Prediction, 2021, arXiv:2107.07511, sections 1 and 3.2).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from fbclip.bundle import SUFFIX, Bundle
from fbclip.engines import Precision
from fbclip.errors import BundleError, UsageError
from fbclip.files import write_text
from fbclip.memory import Memory
from fbclip.runtime.sight import Usual
from fbclip.untrusted import MIB, Like, Line, Probability, Range, Sha256, build, one_line, one_of, read_json

SPLIT, JACKKNIFE = "split", "jackknife"
ADDED = {
    "memory": None,
    "method": SPLIT,
    "tiles": None,
    "align": None,
    "usual": None,
    "made": None,
}  # fields that files of older releases lack, and what they mean
OPTIONAL = ("tiles", "align", "usual", "made")  # left out of the file where there is none, as older releases write it
TAILS = (0.025, 0.975)  # of every interval: 95 % confidence
LOWEST_RATE = 1e-6  # which needs a million images
MOST_IMAGES = 500_000
MOST_BYTES = 16 * MIB  # of calibration.json: the scores of so many images take 11 of them
WARM = 0.6  # where on the colour scale green has become yellow: from there to red are the marked values
MOMENT = Like(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)", "a time like 2026-11-27T08:30:00+00:00")
SAME = 1e-9  # relative difference of what two machines compute from the same scores; float32 has steps of 6e-8


@dataclass(frozen=True)
class Calibration:
    """What good parts taught about a bundle: its `calibration.json`.

    Attributes:
        threshold: scores from here on are anomalous, 0..1.
        false_alarm_rate: what was asked for: the most that a new good part raises an alarm with, as a probability.
        interval: where this threshold's own false-alarm rate lies with 95 % confidence.
        count: good images, copies counted once.
        scores: theirs, sorted.
        map_threshold: map values from here on are marked; good parts have any with probability `false_alarm_rate`.
        map_scale: map values (low, high) that the first and the last colour of a heat map stand for; between them the
            map's threshold is at `WARM`.
        images_sha256: hash of the good images' pixels, whatever their order.
        model_sha256: `Bundle.model_sha256` of `precision`.
        precision, device: what scored them.
        roi: the region of interest that was scored, or None for all of it.
        tiles, align: the tiles that were scored, and the part that frames were aligned to, or None (see
            `fbclip.runtime.view.Place`).
        memory: `Memory.sha256` of what good parts had taught, or None of the zero-shot model.
        method: "split", from good parts that the memory hasn't seen; "jackknife", from its own references.
        defects: defective images that were checked.
        miss_rate: share of them below the threshold; None without defects.
        miss_interval: where the miss rate lies with 95 % confidence (Clopper and Pearson, 1934).
        usual: light and sharpness of the good images; None where they are too few.
        made: when, ISO 8601 in UTC; None of one that an older release made.
    """

    threshold: Probability
    false_alarm_rate: Annotated[float, Range(LOWEST_RATE, 0.5)]
    interval: tuple[Probability, Probability]
    count: Annotated[int, Range(1, MOST_IMAGES)]
    scores: tuple[Probability, ...]
    map_threshold: Annotated[float, Range(0, 1.001)]  # just above 1 where good parts reach it
    map_scale: tuple[float, float]
    images_sha256: Sha256
    model_sha256: Sha256
    precision: Precision
    device: Line
    roi: Line | None = None
    memory: Sha256 | None = None
    method: Annotated[str, one_of(SPLIT, JACKKNIFE)] = SPLIT
    defects: Annotated[int, Range(0, MOST_IMAGES)] = 0
    miss_rate: Probability | None = None
    miss_interval: tuple[Probability, Probability] | None = None
    tiles: Line | None = None
    align: Line | None = None
    usual: Usual | None = None
    made: Annotated[str, MOMENT] | None = field(default=None, compare=False)

    @classmethod
    def load(cls, bundle: Bundle) -> Calibration | None:
        """The calibration in a bundle, or None where there is none.

        Raises:
            BundleError: damaged, altered, or of another model than the bundle holds now.
        """
        path = bundle.calibration
        if not os.path.lexists(path):
            return None
        cure = "run fbclip calibrate again, or delete it"
        try:
            calibration = build(cls, _complete(read_json(path, MOST_BYTES)))
            calibration._require_sense()
        except ValueError as error:
            raise BundleError(f"{path} is no calibration: {one_line(error)}; {cure}") from error
        if calibration.precision not in bundle.manifest.precisions or (
            calibration.model_sha256 != bundle.model_sha256(calibration.precision)
        ):
            raise BundleError(f"{path} is of another model than {bundle.path} holds now: {cure}")
        return calibration

    def _require_sense(self) -> None:
        """Raise ValueError unless everything that follows from something else in it does."""
        ground = self.map_scale[0]
        if not 0 <= ground < self.map_threshold:
            raise ValueError(f"map_scale begins between 0 and map_threshold; got {ground:g}")
        known = self.scores, self.false_alarm_rate, ground, self.map_threshold, self.defects, self.missed
        for name, right in derived(*known).items():
            if not _same(found := getattr(self, name), right):
                raise ValueError(f"{name} is {found}, but from the rest of it follows {right}")

    @property
    def missed(self) -> int:
        """Defective images below the threshold."""
        return round((self.miss_rate or 0) * self.defects)

    def is_of(self, memory: Memory | None) -> bool:
        """Whether it was made with this memory of good parts, or without one."""
        return self.memory == (memory.sha256 if memory else None)

    @property
    def place(self) -> tuple[str | None, str | None, str | None]:
        """The fields of `fbclip.runtime.view.Place`."""
        return self.roi, self.tiles, self.align

    @property
    def promise(self) -> str:
        """What is promised, as a part of a sentence."""
        if self.method == JACKKNIFE:
            return (
                f"{100 * self.false_alarm_rate:.3g} % false alarms by leaving out one of its own references at a time, at "
                f"most {200 * self.false_alarm_rate:.3g} % where one part more or less hardly changes the memory"
            )
        return f"at most {100 * self.false_alarm_rate:.3g} % false alarms on average, {percent(self.interval)} for this one"

    def explain(self, bundle: Bundle, precision: str) -> str:
        """One line for a person: what the threshold promises to a bundle that runs in a precision."""
        text = f"threshold {self.threshold:.4g} is calibrated from {self.count} good images: {self.promise}"
        if precision == self.precision:
            return text
        strayed: list[Any] = [
            bundle.manifest.parity.get(each, {}).get("score_max") for each in (precision, self.precision)
        ]
        measured = (
            f" by {sum(strayed):.0e}, as the export measured"
            if all(isinstance(drift, float) for drift in strayed)
            else ""
        )
        return (
            f"{text}; they were scored in {self.precision}, and {precision} may differ{measured}: "
            f"calibrate in {precision} for the exact promise"
        )

    def save(self, bundle: Bundle) -> None:
        """Write it into a bundle; an older one is replaced once this one is whole.

        Raises:
            UsageError: the bundle can't be written to.
        """
        values = {name: value for name, value in asdict(self).items() if name not in OPTIONAL or value is not None}
        write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", str(bundle.calibration))


def derived(
    scores: Sequence[float], rate: float, ground: float, map_threshold: float, defects: int, missed: int
) -> dict[str, Any]:
    """The fields of a calibration that follow from others.

    Args:
        scores: of the good images, in any order.
        rate: the false-alarm rate.
        ground: map value of the first colour.
        defects, missed: defective images, and how many of them the threshold misses.

    Raises:
        UsageError: see `conformal_threshold`.
    """
    return {
        "scores": tuple(sorted(scores)),
        "count": len(scores),
        "threshold": conformal_threshold(scores, rate),
        "interval": rate_interval(len(scores), rate),
        "map_scale": (ground, ground + (map_threshold - ground) / WARM),
        "miss_rate": missed / defects if defects else None,
        "miss_interval": binomial_interval(missed, defects) if defects else None,
    }


def _complete(values: Any) -> Any:
    """The values of a file with the fields that older releases don't write."""
    return {**ADDED, **values} if isinstance(values, dict) else values


def _same(found: Any, computed: Any) -> bool:
    if found is None or computed is None:
        return found is computed
    return np.shape(found) == np.shape(computed) and np.allclose(found, computed, rtol=SAME, atol=0)


def calibrated_bundles(folder: Path) -> list[Path]:
    """The bundles in a folder that have a calibration; nothing is read of them."""
    try:
        return sorted(path for path in folder.glob(f"*{SUFFIX}") if (path / "calibration.json").is_file())
    except OSError:
        return []


def checked_threshold(threshold: float) -> float:
    """The threshold itself.

    Raises:
        UsageError: no probability.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)) or not 0 <= threshold <= 1:
        raise UsageError(f"a threshold is a probability between 0 and 1; got {threshold!r:.50}", option="threshold")
    return float(threshold)


def conformal_threshold(good: Sequence[float], rate: float) -> float:
    """The lowest threshold that a new good value reaches with probability at most `rate`.

    Args:
        good: n values of good parts, as float32 as the model gives them.
        rate: above 0 and below 0.5.

    Returns:
        The next float32 above the m-th highest value, m = floor(rate (n + 1)): verdicts are `value >= threshold`, and
        a value that ties with the m-th highest must not raise an alarm.

    Raises:
        UsageError: too few values for the rate, or a rate that is none.
    """
    # float32 as the maps are, which NumPy compares with a Python float after rounding it
    return float(np.nextafter(np.float32(sorted(good)[-rank(len(good), rate)]), np.float32(np.inf)))


def rank(count: int, rate: float) -> int:
    """m = floor(rate (n + 1)), in exact arithmetic: 0.1 means a tenth.

    Raises:
        UsageError: fewer than 1 / rate - 1 values, or a rate that is none.
    """
    if not LOWEST_RATE <= rate < 0.5:
        raise UsageError(
            f"a false-alarm rate is above 0 and below 0.5, like 0.01, and {LOWEST_RATE:f} at least; got {rate:g}",
            option="false_alarm_rate",
        )
    exact = Fraction(str(rate))
    if not (m := math.floor(exact * (count + 1))):
        lowest = f"{count} images allow {lowest_rate(count):g} at best: choose {lowest_rate(count, 2):g}"
        raise UsageError(
            f"a false-alarm rate of {rate:g} needs at least {math.ceil(1 / exact) - 1} good images; got {count}: "
            f"give more" + (f" ({lowest})" if count > 1 else ""),
            option="false_alarm_rate",
        )
    return m


def lowest_rate(count: int, digits: int = 3) -> float:
    """The lowest false-alarm rate that so many images allow, 1 / (count + 1), rounded up to so many digits."""
    exact = Fraction(1, count + 1)
    unit = Fraction(10) ** (math.floor(math.log10(exact)) - digits + 1)
    return float(math.ceil(exact / unit) * unit)


def rate_interval(count: int, rate: float) -> tuple[float, float]:
    """Where the false-alarm rate of a threshold from `count` good values lies with 95 % confidence.

    Over calibrations it is distributed as Beta(m, n + 1 - m), with ties at most as high (Vovk, Conditional validity of
    inductive conformal predictors, 2012, arXiv:1209.2673).
    """
    m = rank(count, rate)
    low, high = (beta_quantile(q, m, count + 1 - m) for q in TAILS)
    return low, high


def binomial_interval(hits: int, count: int) -> tuple[float, float]:
    """The exact 95 % interval of a share, from `hits` of `count` (Clopper and Pearson, 1934)."""
    low = 0.0 if hits == 0 else beta_quantile(TAILS[0], hits, count - hits + 1)
    high = 1.0 if hits == count else beta_quantile(TAILS[1], hits + 1, count - hits)
    return low, high


def beta_quantile(q: float, a: int, b: int) -> float:
    """The x with I_x(a, b) = q, for whole a and b from 1 on.

    I_x(a, b) is the probability that of a + b - 1 trials of probability x at least a succeed
    (https://dlmf.nist.gov/8.17.E5), which grows with x: bisection down to neighbouring floats.
    """
    trials = a + b - 1
    log_factorial = np.array([math.lgamma(i + 1) for i in range(trials + 1)])
    hits = np.arange(a, trials + 1)
    log_ways = log_factorial[trials] - log_factorial[hits] - log_factorial[trials - hits]
    low, high = 0.0, 1.0
    while low < (x := (low + high) / 2) < high:
        reached = np.exp(log_ways + hits * math.log(x) + (trials - hits) * math.log1p(-x)).sum()
        low, high = (x, high) if reached < q else (low, x)
    return x


def percent(interval: tuple[float, float]) -> str:
    """An interval of shares for a person, in as many digits as it is worth: "0.1 to 12 %"."""
    return "{} to {} %".format(
        *(f"{100 * bound:.{0 if bound >= 0.0995 else 1}f}".removesuffix(".0") for bound in interval)
    )
