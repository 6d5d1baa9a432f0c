"""A threshold with a stated false-alarm rate, from the scores of good parts alone.

Split conformal prediction: of n good scores and a new one, all exchangeable, each is equally likely to be the m-th
highest of the n + 1 or higher. So a new good part scores above the m-th highest of the n with probability at most
m / (n + 1), whatever the scores' distribution, ties included (Vovk et al., Algorithmic Learning in a Random World, 2005;
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
from fbclip.writing import write_text

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

    def save(self, bundle: Bundle) -> None:
        """Write it into a bundle; an older one is replaced once this one is whole.

        Raises:
            UsageError: the bundle can't be written to.
        """
        write_text(json.dumps(asdict(self), indent=1) + "\n", str(bundle.calibration))


def conformal_threshold(good: Sequence[float], rate: float) -> float:
    """The lowest threshold that a new good value reaches with probability at most `rate`.

    Args:
        good: n values of good parts, as float32 as the model gives them.
        rate: 0 to 1, exclusive.

    Returns:
        The next float32 above the m-th highest value, m = floor(rate (n + 1)): verdicts are `value >= threshold`, and
        a value that ties with the m-th highest must not raise an alarm.

    Raises:
        UsageError: too few values for the rate.
    """
    alarms = expected_alarms(len(good), rate)
    if alarms == 0:
        raise UsageError(
            f"a false-alarm rate of {rate:g} needs at least {needed(rate)} good images; got {len(good)}: "
            f"give more, or ask for a rate of {1 / (len(good) + 1):.2g} or higher"
        )
    # float32 as the maps are, which NumPy compares with a Python float after rounding it
    return float(np.nextafter(np.float32(sorted(good)[-alarms]), np.float32(np.inf)))


def expected_alarms(count: int, rate: float) -> int:
    """m = floor(rate (n + 1)) in exact arithmetic: 0.1 is meant as a tenth.

    Raises:
        UsageError: the rate is none.
    """
    if not 0 < rate < 1:
        raise UsageError(f"--false-alarm-rate is a probability between 0 and 1, both excluded; got {rate:g}")
    return math.floor(Fraction(str(rate)) * (count + 1))


def needed(rate: float) -> int:
    """The fewest good images that a rate can be promised from: 1 / rate - 1, rounded up."""
    return math.ceil(1 / Fraction(str(rate))) - 1


def rate_interval(count: int, rate: float) -> tuple[float, float]:
    """Where the false-alarm rate of a threshold from `count` good values lies with 95 % confidence.

    Over calibrations it is distributed as Beta(m, n + 1 - m), with ties at most as high (Vovk, Conditional validity of
    inductive conformal predictors, 2012, arXiv:1209.2673).
    """
    alarms = expected_alarms(count, rate)
    low, high = (beta_quantile(q, alarms, count + 1 - alarms) for q in TAILS)
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
