"""From predictions to an alarm: a vote over time, and whether scores drift away from what was calibrated.

What makes one frame anomalous is the `Prediction`'s own matter: threshold, region of interest, least area.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fbclip.errors import UsageError
from fbclip.runtime.prediction import UNJUDGED, Prediction

FALSE_DRIFT = 1e-6  # probability that a window of unchanged parts is called drifting, at most
UNLUCKY = 0.01  # share of calibrations that this isn't promised for
STEADY = 0.05  # windows as likely as this are called steady again
EFFECTIVE = 200.0  # independent scores that a window is worth
BLOCK = 500  # scores; what changes more slowly is drift, what changes faster is variety
LONGEST = 20_000  # scores of a window: minutes at full speed, 160 kB
FEWEST = 20  # scores that a distribution is compared by


@dataclass(frozen=True)
class Vote:
    """An alarm goes on where `needed` of the last `of` frames are anomalous, and off where at most half of `needed` are.

    The gap between the two keeps an alarm from flapping: 3/5 goes on at 3 and off at 1. 1/1 follows every frame.
    """

    needed: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.needed <= self.of <= 10_000:
            raise UsageError(
                f"a vote is K/N, K anomalous of the last N frames, with 1 <= K <= N <= 10000; "
                f"got {self.needed}/{self.of}",
                option="vote",
            )

    @classmethod
    def parse(cls, text: str) -> Vote:
        if not (numbers := re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)):
            raise UsageError(f"a vote is K/N, K anomalous of the last N frames, like 3/5; got {text!r}", option="vote")
        return cls(int(numbers[1]), int(numbers[2]))

    @property
    def off(self) -> int:
        """Anomalous frames among the last `of` at which an alarm goes off."""
        return self.needed // 2


def parse_kinds(kinds: str | Collection[str] | None) -> frozenset[str]:
    """Verdicts besides "defect" that raise an alarm: "absent,unusable", or the same as a collection; None for neither.

    Raises:
        UsageError: another verdict, or an empty text.
    """
    given = [kind.strip() for kind in kinds.split(",")] if isinstance(kinds, str) else list(kinds or ())
    if others := [kind for kind in given if kind not in UNJUDGED]:
        raise UsageError(
            f"an alarm is raised by defects, and if asked by {' or '.join(UNJUDGED)} frames, with a comma between both; "
            f"got {others[0]!r:.50}",
            option="alarm_on",
        )
    return frozenset(given)


class Alarm:
    """Keeps the alarm. Frames vote as they are inspected. Those that a live source dropped, and those that are absent or
    unusable, neither raise nor clear it, unless asked.

    Args:
        alarm_on: "absent", "unusable" or both: frames of this verdict vote as defects do.

    Attributes:
        on: whether it is.
        drift: what watches the scores; None without a calibration.
    """

    def __init__(
        self, vote: Vote | None = None, drift: Drift | None = None, alarm_on: Collection[str] | None = None
    ) -> None:
        self.vote, self.drift, self._alarm_on = vote or Vote(), drift, parse_kinds(alarm_on)
        self.on = False
        self._votes: deque[bool] = deque(maxlen=self.vote.of)

    def decide(self, prediction: Prediction) -> bool:
        """Take the next frame's prediction; returns whether the alarm is on now."""
        is_judged, is_for = prediction.verdict not in UNJUDGED, self.is_for(prediction)
        if not (is_judged or is_for):
            return self.on
        self._votes.append(is_for)
        count = sum(self._votes)
        self.on = count > self.vote.off if self.on else count >= self.vote.needed
        if self.drift and is_judged:
            self.drift.add(prediction.score, prediction.threshold)
        return self.on

    def is_for(self, prediction: Prediction) -> bool:
        """Whether a frame votes for an alarm."""
        return prediction.verdict == "defect" or prediction.verdict in self._alarm_on

    def explain(self, prediction: Prediction) -> str:
        """The last verdict in one line."""
        this = f"{prediction.score:.3f} with threshold {prediction.threshold:.3f}"
        if prediction.verdict in UNJUDGED:
            this = prediction.verdict
        return f"{sum(self._votes)} of the last {len(self._votes)} frames anomalous, this one {this}"


class Drift:
    """Compares the scores of frames judged good with those of the calibration's good parts, window by window.

    The statistic is Kolmogorov's and Smirnov's of two samples. Windows share no frame and each is tested once, but all
    with the same calibration, whose luck they share: `chance` therefore bounds the probability for a given calibration,
    all but `UNLUCKY` of them, and windows of unchanged parts are called drifting with a probability of at most
    `FALSE_DRIFT` each. Frames that follow each other resemble each other, which must not count as many witnesses: a
    window is made of blocks until these are worth `EFFECTIVE` independent scores (`effective_size`) or hold `LONGEST`,
    and counts as that many. Scores from the threshold on are left out on both sides.

    Args:
        reference: the calibration's scores of good parts.

    Attributes:
        state: "steady" or "drifting".
        windows: tested so far.
        p_value, shift: of the last one: `chance` of its gap, and its median less the reference's.
    """

    def __init__(self, reference: Sequence[float]) -> None:
        self.reference = np.asarray(reference, float)
        self.state = "steady"
        self.windows = 0
        self.p_value, self.shift = 1.0, 0.0
        self._threshold = math.nan
        self._begin()

    def add(self, score: float, threshold: float) -> None:
        if threshold != self._threshold:  # what counts as good changed
            self._threshold = threshold
            self._begin()
        if score >= threshold:
            return
        self._scores.append(score)
        if len(self._scores) % BLOCK == 0:
            self._size += effective_size(np.array(self._scores[-BLOCK:]))
            if self._size >= EFFECTIVE or len(self._scores) >= LONGEST:
                self._test(np.array(self._scores), self._size)
                self._begin()

    def explain(self) -> str:
        direction = "higher" if self.shift > 0 else "lower"
        if self.state == "drifting":
            return (
                f"scores of good parts have left the calibration's (p < {self.p_value:.0e}, median {abs(self.shift):.3f} "
                f"{direction}): look at lighting, focus and product, or calibrate again"
            )
        return f"scores of good parts are the calibration's again (p = {self.p_value:.2f})"

    def _begin(self) -> None:
        self._scores: list[float] = []
        self._size = 0.0

    def _test(self, scores: NDArray[np.float64], size: float) -> None:
        reference = self.reference[self.reference < self._threshold]
        if min(len(reference), size) < FEWEST:
            return
        self.windows += 1
        self.p_value = chance(largest_gap(scores, reference), size, len(reference))
        self.shift = float(np.median(scores) - np.median(reference))
        if self.p_value < FALSE_DRIFT:
            self.state = "drifting"
        elif self.p_value >= STEADY:
            self.state = "steady"


def largest_gap(sample: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """The two-sample Kolmogorov-Smirnov statistic: how far apart the shares of values up to x get, over all x."""
    at = np.concatenate([sample, reference])
    first, second = (np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (sample, reference))
    return float(np.abs(first - second).max())


def chance(gap: float, size: float, reference: int) -> float:
    """A bound on the probability of such a gap where nothing changed, for all but `UNLUCKY` of references.

    The Dvoretzky-Kiefer-Wolfowitz inequality with Massart's constant (The Tight Constant in the
    Dvoretzky-Kiefer-Wolfowitz Inequality, Annals of Probability 18, 1990): shares of n independent values are further
    than t from the true ones with probability 2 exp(-2 n t^2) at most. The reference is allowed its own t first.
    """
    allowed = math.sqrt(math.log(2 / UNLUCKY) / (2 * reference))
    return min(1.0, 2 * math.exp(-2 * size * max(0.0, gap - allowed) ** 2))


def effective_size(values: NDArray[np.float64]) -> float:
    """How many independent values a stationary series is worth: n / (1 + 2 * sum of its autocorrelations).

    The sum ends before the first that isn't positive, where noise takes over (Geyer, Practical Markov Chain Monte
    Carlo, Statistical Science 7, 1992, section 3.3). A constant series is worth one.
    """
    n = len(values)
    spread = values - values.mean()
    spectrum = np.fft.rfft(spread, 2 * n)  # padded, so that the end doesn't meet the beginning
    covariance = np.fft.irfft(spectrum * spectrum.conj())[:n]
    if covariance[0] <= 1e-12 * n:
        return 1.0
    correlation = covariance[1:] / covariance[0]
    first = np.flatnonzero(correlation <= 0)
    together = correlation[: first[0]] if len(first) else correlation
    return float(n / (1 + 2 * together.sum()))
