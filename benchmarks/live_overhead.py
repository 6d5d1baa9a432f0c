"""What a live run costs beside the model, at 1920x1080 with the default model: everything from the frame to the sinks.

python benchmarks/live_overhead.py    # writes benchmarks/results/live_overhead.json

Frames come from memory, as a camera's driver hands them over, and go to one sink that writes JSON lines. Rounds of the
pipeline and of the model alone take turns. The overhead is the time from one result to the next, less the model's time
alone: stages overlap, so that it is less than their sum; `one_after_the_other_ms` is what `Predictor()` takes for all.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fbclip
from fbclip.runtime.live.pipeline import Pipeline
from fbclip.runtime.live.records import Frame, Notice, Record, Sink
from fbclip.runtime.live.sinks import SinkOptions, make_sinks

ROUNDS, FRAMES, WARM_UP = 5, 60, 10
SIZE = (1920, 1080)
SAMPLES = Path(fbclip.__file__).parent / "assets" / "samples"


class Memory:
    """A source of frames that are there."""

    name, live = "memory", False
    counters: dict[str, int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        pictures = [Image.open(path).convert("RGB").resize(SIZE) for path in sorted(SAMPLES.glob("*.jpg"))]
        self.images = [np.ascontiguousarray(picture) for picture in pictures]

    def __iter__(self) -> Iterator[Frame]:
        for index in range(FRAMES):
            image = self.images[index % len(self.images)]
            yield Frame(image, f"memory#{index}", index, time.monotonic(), time.time())

    def listen(self, callback: Callable[[Notice], None]) -> None:
        """There is nothing to tell."""

    def close(self) -> None:
        """Nor to release."""


class Clock:
    """A sink that notes when results come."""

    name = "clock"

    def __init__(self) -> None:
        self.results: list[Record] = []
        self.times: list[float] = []

    def write(self, result: Record) -> None:
        self.times.append(time.perf_counter())
        self.results.append(result)

    def notify(self, notice: Notice) -> None:
        """Results alone are timed."""

    def close(self) -> None:
        """Nothing to release."""


def milliseconds(call: Callable[[Any], Any], items: list[Any]) -> list[float]:
    spent = []
    for item in items:
        start = time.perf_counter()
        call(item)
        spent.append((time.perf_counter() - start) * 1e3)
    return spent


def p50(values: list[float]) -> float:
    return round(float(np.median(values)), 2)


def main() -> None:
    predictor, memory = fbclip.Predictor(), Memory()
    batches = [predictor.prepare(image).batch for image in memory.images]
    alone: list[float] = []
    together: list[float] = []
    sequential: list[float] = []
    stages: dict[str, list[float]] = {}
    milliseconds(predictor, memory.images * 5)
    for _ in range(ROUNDS):
        alone += milliseconds(predictor.backend.run, batches * (FRAMES // len(batches)))
        sequential += milliseconds(predictor, memory.images * 5)
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            lines = make_sinks(SinkOptions(json=str(Path(folder, "r.jsonl"))))
            sinks: list[Sink] = [*lines, clock]
            Pipeline(memory, predictor, sinks).run()
        together += list(np.diff(clock.times)[WARM_UP:] * 1e3)
        for result in clock.results[WARM_UP:]:
            for stage, value in result.stages_ms.items():
                stages.setdefault(stage, []).append(value)
    overhead = p50(together) - p50(alone)
    result = {
        "size": "{}x{}".format(*SIZE),
        "model": predictor.bundle.manifest.name,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "frames": len(together),
        "model_alone_ms": p50(alone),
        "result_to_result_ms": p50(together),
        "overhead_ms": round(overhead, 2),
        "overhead_share": round(overhead / p50(alone), 3),
        "one_after_the_other_ms": p50(sequential),
        "stages_ms": {stage: p50(values) for stage, values in stages.items()},
    }
    target = Path(__file__).parent / "results" / "live_overhead.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
