"""Sources and sinks that tests look into."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.runtime.live.pipeline import Limits, Pipeline
from fbclip.runtime.live.records import Frame, Notice, Record
from helpers.waiting import PATIENCE_S

STRIPE = slice(40, 48)  # rows, darker than the rest of a picture, which would be unusable without


IMAGE = np.full((48, 64, 3), 90, np.uint8)


QUICK = (0.001, 0.01)  # seconds between attempts of a failing sink
PATIENT = Limits(
    close_s=PATIENCE_S, pauses_s=QUICK
)  # for sinks that do take what waits: they are not waited for any longer


class Frames:
    """A source of pictures; a live one may be told to wait after them, as a camera does that shows nothing."""

    name = "pictures"
    total = None

    def __init__(
        self, images: Iterable[NDArray[np.uint8]], live: bool = False, waits: bool = False, still: bool = False
    ) -> None:
        self.images, self.live, self.waits, self.still = images, live, waits, still
        self.taken = 0
        self.closed = threading.Event()
        self.callbacks: list[Callable[[Notice], None]] = []

    @property
    def counters(self) -> dict[str, int]:
        return {"frames": self.taken}

    def __iter__(self) -> Iterator[Frame]:
        for index, image in enumerate(self.images):
            self.taken += 1
            yield Frame(image, f"pictures#{index}", index, time.monotonic(), time.time())
        if self.waits:
            self.closed.wait(PATIENCE_S)

    def listen(self, callback: Callable[[Notice], None]) -> None:
        self.callbacks.append(callback)

    def close(self) -> None:
        self.closed.set()


class Memory:
    """A sink that remembers; `faults` are raised one by one before it takes anything, `gate` holds it."""

    def __init__(self, name: str = "memory", faults: int = 0, error: Exception | None = None) -> None:
        self.name, self.faults, self.error = name, faults, error or OSError(28, "No space left on device")
        self.results: list[Record] = []
        self.notices: list[Notice] = []
        self.threads: set[int] = set()
        self.closed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def write(self, result: Record) -> None:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.faults:
            self.faults -= 1
            raise self.error
        self.results.append(result)

    def notify(self, notice: Notice) -> None:
        self.threads.add(threading.get_ident())
        self.notices.append(notice)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed += 1

    @property
    def indices(self) -> list[int]:
        return [result.frame.index for result in self.results]

    def told(self, kind: str) -> list[tuple[str, str]]:
        return [(notice.subject, notice.state) for notice in self.notices if notice.kind == kind]


class Background:
    """A pipeline running beside the test."""

    def __init__(self, pipeline: Pipeline) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.pool = ThreadPoolExecutor(1, "test")
        self.future = self.pool.submit(pipeline.run)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def result(self) -> Any:
        return self.future.result(PATIENCE_S)

    def settled(self, count: Callable[[], int]) -> int:
        """A count once it has stayed the same for a while."""
        before, same = count(), 0
        while same < 20:
            threading.Event().wait(0.01)
            before, same = count(), same + 1 if count() == before else 0
        return before
