"""A threshold with a stated false-alarm rate, from the scores of good parts alone.

Split conformal prediction: among n good scores and a new one that could have come in any order, the new one is among
the m highest of the n + 1 with probability m / (n + 1), and only then can it be above the m-th highest of the n. That
holds for any distribution of the scores, ties included (Vovk et al., Algorithmic Learning in a Random World, 2005;
Angelopoulos and Bates, A Gentle Introduction to Conformal Prediction, 2021, arXiv:2107.07511, sections 1 and 3.2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction

import numpy as np

from fbclip.bundle import Bundle
from fbclip.errors import BundleError, UsageError
from fbclip.files import write_text

TAILS = (0.025, 0.975)  # of every interval: 95 % confidence


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
        map_scale: map values (low, high) that the first and the last colour of a heat map stand for.
        images_sha256: hash of the good images' pixels, whatever their order.
        model_sha256: `Bundle.model_sha256` of `precision`.
        precision, device: what scored them.
        roi: the region of interest that was scored, or None for all of it.
        defects: defective images that were checked.
        miss_rate: share of them below the threshold; None without defects.
        miss_interval: where the miss rate lies with 95 % confidence (Clopper and Pearson, 1934).
    """

    threshold: float
    false_alarm_rate: float
    interval: tuple[float, float]
    count: int
    scores: tuple[float, ...]
    map_threshold: float
    map_scale: tuple[float, float]
    images_sha256: str
    model_sha256: str
    precision: str
    device: str
    roi: str | None = None
    defects: int = 0
    miss_rate: float | None = None
    miss_interval: tuple[float, float] | None = None

    @classmethod
    def load(cls, bundle: Bundle) -> Calibration | None:
        """The calibration in a bundle, or None where there is none.

        Raises:
            BundleError: damaged, or of another model than the bundle holds now.
        """
        path = bundle.calibration
        if not path.is_file():
            return None
        cure = "run fbclip calibrate again, or delete it"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            tuples = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
            if values.keys() != {f.name for f in fields(cls)}:
                raise ValueError("fields are missing or unknown")
            calibration = cls(**{**values, **tuples})
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise BundleError(f"{path} is no calibration: {error}; {cure}") from error
        if calibration.precision not in bundle.manifest.precisions or (
            calibration.model_sha256 != bundle.model_sha256(calibration.precision)
        ):
            raise BundleError(f"{path} is of another model than {bundle.path} holds now: {cure}")
        return calibration

    def explain(self, bundle: Bundle, precision: str) -> str:
        """One line for a person: what the threshold promises to a bundle that runs in a precision."""
        text = (
            f"threshold {self.threshold:.4g} is calibrated: at most {100 * self.false_alarm_rate:g} % false alarms, "
            f"from {self.count} good images"
        )
        if precision == self.precision:
            return text
        strayed = sum(bundle.manifest.parity[each]["score_max"] for each in (precision, self.precision))
        return (
            f"{text}; they were scored in {self.precision}, and {precision} may differ by {strayed:.0e}, "
            f"as the export measured: calibrate with --precision {precision} for the exact promise"
        )

    def save(self, bundle: Bundle) -> None:
        """Write it into a bundle; an older one is replaced once this one is whole.

        Raises:
            UsageError: the bundle can't be written to.
        """
        write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", str(bundle.calibration))


def checked_threshold(threshold: float) -> float:
    """The threshold itself.

    Raises:
        UsageError: no probability.
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"--threshold is a probability between 0 and 1; got {threshold:g}")
    return threshold


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
    if not 0 < rate < 0.5:
        raise UsageError(f"--false-alarm-rate is a probability above 0 and below 0.5, like 0.01; got {rate:g}")
    exact = Fraction(str(rate))
    if not (m := math.floor(exact * (count + 1))):
        raise UsageError(
            f"a false-alarm rate of {rate:g} needs at least {math.ceil(1 / exact) - 1} good images; got {count}: "
            f"give more, or a higher --false-alarm-rate"
        )
    return m


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
    return "{:.3g} to {:.3g} %".format(*(100 * bound for bound in interval))
