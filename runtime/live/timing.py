"""Percentiles over the last results, and results per second."""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np

WINDOW = 1000  # values
RATE_WINDOW_S = 5.0


class Percentiles:
    """p50, p95 and p99 of the last `WINDOW` values; any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        with self._lock:
            self._values.append(value)

    def summary(self) -> dict[str, float] | None:
        """The percentiles by name; None without a value."""
        with self._lock:
            values = list(self._values)
        if not values:
            return None
        p50, p95, p99 = (round(float(value), 2) for value in np.percentile(values, (50, 95, 99)))
        return {"p50": p50, "p95": p95, "p99": p99}


class Rate:
    """Results per second over the last five; any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: deque[float] = deque(maxlen=WINDOW)

    def tick(self) -> None:
        with self._lock:
            self._times.append(time.monotonic())

    def per_second(self) -> float:
        now = time.monotonic()
        with self._lock:
            recent = [moment for moment in self._times if now - moment < RATE_WINDOW_S]
        return (len(recent) - 1) / max(recent[-1] - recent[0], 1e-6) if len(recent) > 1 else 0.0
