"""A minute of mutated foreign data in every run of the tests; `make fuzz` feeds more (see docs/reference/robustness.md)."""

from __future__ import annotations

import pytest

from helpers import fuzz

COUNTS = {"pictures": 3000, "tables": 1000, "manifests": 1000, "streams": 400, "bodies": 400}


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_nothing_foreign_breaks_it(target: str) -> None:
    with fuzz.quiet():
        taken, refused = fuzz.run(target, COUNTS[target])
    assert taken > COUNTS[target] / 50 and refused > COUNTS[target] / 50, "mutations that all end alike show nothing"
