from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbclip.errors import UsageError
from fbclip.runtime.live.alarm import (
    UNLUCKY,
    Alarm,
    Drift,
    Vote,
    chance,
    effective_size,
    largest_gap,
)
from fbclip.runtime.prediction import Prediction
from helpers.predicted import predicted


def prediction(score: float, threshold: float = 0.5) -> Prediction:
    empty = np.zeros((1, 1), np.float32)
    return predicted(score, empty, threshold=threshold)


def literal_alarms(anomalous: list[bool], needed: int, of: int) -> list[bool]:
    """What `--vote` says, frame by frame, from the whole history."""
    alarms: list[bool] = []
    for i in range(len(anomalous)):
        count = anomalous[max(0, i + 1 - of) : i + 1].count(True)
        was_on = bool(alarms) and alarms[-1]
        if count >= needed:
            alarms.append(True)
        elif count <= needed // 2:
            alarms.append(False)
        else:
            alarms.append(was_on)
    return alarms


@settings(deadline=None)
@given(
    st.lists(st.booleans(), max_size=60), st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))
)
def test_the_vote_against_its_words(anomalous: list[bool], vote: tuple[int, int]) -> None:
    alarm = Alarm(Vote(*vote))
    got = [alarm.decide(prediction(0.9 if bad else 0.1)) for bad in anomalous]
    assert got == literal_alarms(anomalous, *vote)


def test_one_of_one_follows_every_frame() -> None:
    alarm = Alarm()
    assert [alarm.decide(prediction(s)) for s in (0.1, 0.5, 0.4, 0.9)] == [False, True, False, True]
    assert "1 of the last 1 frames anomalous" in alarm.explain(prediction(0.9))


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/2", "1/99999"])
def test_votes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="a vote is K/N"):
        Vote.parse(text)
    assert Vote.parse(" 3 / 5 ") == Vote(3, 5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_the_gap_against_its_definition(sample: list[int], reference: list[int]) -> None:
    literal = max(
        abs(sum(v <= x for v in sample) / len(sample) - sum(v <= x for v in reference) / len(reference))
        for x in range(10)
    )
    assert largest_gap(np.array(sample, float), np.array(reference, float)) == pytest.approx(literal)


def test_chance_is_a_bound_for_nearly_every_reference() -> None:
    rng = np.random.default_rng(0)
    above = []
    for _ in range(60):
        reference = rng.random(80)
        p_values = [chance(largest_gap(rng.random(50), reference), 50, 80) for _ in range(100)]
        above.append(np.mean(np.array(p_values) < 0.2) > 0.2 + 3 * math.sqrt(0.2 * 0.8 / 100))
    assert np.mean(above) <= UNLUCKY + 3 * math.sqrt(UNLUCKY / 60)
    assert chance(0.7, 50, 80) < 1e-9


def autoregression(rng: np.random.Generator, count: int, r: float) -> np.ndarray:
    values, noise = np.empty(count), rng.normal(size=count) * math.sqrt(1 - r * r)
    values[0] = rng.normal()
    for i in range(1, count):
        values[i] = r * values[i - 1] + noise[i]
    return values


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_the_effective_size_of_an_autoregression(r: float) -> None:
    values = autoregression(np.random.default_rng(0), 20_000, r)
    assert effective_size(values) == pytest.approx(20_000 * (1 - r) / (1 + r), rel=0.25)
    assert effective_size(np.full(500, 0.3)) == 1


def scores(rng: np.random.Generator, count: int, r: float = 0.0, shift: float = 0.0) -> np.ndarray:
    return 0.3 + 0.05 * autoregression(rng, count, r) + shift


@pytest.mark.parametrize("r", [0.0, 0.9])
def test_unchanged_parts_do_not_drift(r: float) -> None:
    rng = np.random.default_rng(1)
    drift = Drift(scores(rng, 300))
    p_values = []
    for score in scores(rng, 60_000, r):
        before = drift.windows
        drift.add(float(score), 0.5)
        if drift.windows > before:
            p_values.append(drift.p_value)
    assert len(p_values) >= 10
    assert np.mean(np.array(p_values) < 0.05) <= 0.05
    assert drift.state == "steady"


def test_darker_light_drifts_and_comes_back() -> None:
    rng = np.random.default_rng(2)
    drift = Drift(scores(rng, 300))
    states = []
    for shift in (0.0, 0.06, 0.0):
        for score in scores(rng, 2000, 0.5, shift):
            drift.add(float(score), 0.6)
        states.append((drift.state, drift.explain()))
    assert [state for state, _ in states] == ["steady", "drifting", "steady"]
    assert "higher" in states[1][1]


def test_only_frames_judged_good_count() -> None:
    rng = np.random.default_rng(3)
    reference = scores(rng, 400)
    drift = Drift(reference)
    for score in scores(rng, 5000):
        drift.add(float(score), 0.32)  # a third of all parts is called anomalous, on both sides
        drift.add(0.9, 0.32)
    assert drift.windows >= 5
    assert drift.state == "steady"


def test_memory_is_bounded_by_the_longest_window() -> None:
    drift = Drift([0.1 * i for i in range(9)])  # too few to compare with: nothing is tested
    for i in range(50_000):
        drift.add(0.3 + i * 1e-7, 0.5)
    assert drift.windows == 0
    assert len(drift._scores) <= 20_000
