"""Waiting for what other threads and processes do, on a machine that may have better to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 60.0  # nothing waits that long when it works
T = TypeVar("T")


def eventually(ask: Callable[[], T]) -> T:
    """Ask until the answer is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := ask()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)  # between two questions
    return answer
