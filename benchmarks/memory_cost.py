"""What a memory of good parts costs: python benchmarks/memory_cost.py BUNDLE [--without OLDER] [--rounds 30] [--json F].

On the CPU, in one process, interleaved: one frame through the graph of BUNDLE without a memory and with one, and through
that of OLDER, the same model exported by a release that had no memory (median, and the median of each round's ratio).
Then the seconds that `fbclip adapt` takes for four good parts, and the milliseconds in which `Predictor.set_memory`
exchanges one memory for another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fbclip.assets import SAMPLES
from fbclip.bundle import Bundle
from fbclip.images import read_image
from fbclip.runtime.adapt import Choice, teach
from fbclip.runtime.predictor import Predictor

SWAPS = 9


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def good_parts(count: int) -> list[NDArray[np.uint8]]:
    """A good sample, each time with grain of its own: what it shows makes no difference to the time."""
    rng = np.random.default_rng(3)
    image = read_image(SAMPLES / "brushed-steel-good.jpg")
    return [(image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="the embedded one if left out")
    parser.add_argument("--without", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, object] = {}
    predictor = Predictor(arguments.bundle, device="cpu", calibrated=False, memory=None)
    parts = good_parts(8)
    learning = [teach(predictor, parts[n : n + 4], Choice(), None, Console(quiet=True)) for n in (0, 4)]
    figures["learning 4 parts, s"] = [round(each.seconds, 2) for each in learning]
    memories = [each.memory for each in learning]
    first = [seconds(lambda memory=memory: predictor.set_memory(memory)) for memory in memories]  # type: ignore[misc]
    again = [seconds(lambda n=n: predictor.set_memory(memories[n % 2])) for n in range(SWAPS)]  # type: ignore[misc]
    figures["first exchange, ms"] = [round(1e3 * each, 1) for each in first]
    figures["exchange, ms"] = round(1e3 * statistics.median(again), 2)
    adapted = Predictor(arguments.bundle, device="cpu", calibrated=False, memory=memories[0])
    predictor.set_memory(None)
    ways: dict[str, Predictor] = {"without a memory": predictor, "with a memory": adapted}
    if arguments.without:
        ways["older graph"] = Predictor(Bundle.load(arguments.without), device="cpu", calibrated=False)
    batch = predictor.prepare(parts[0]).batch
    times: dict[str, list[float]] = {name: [] for name in ways}
    for each in (*ways.values(), *ways.values()):
        each.backend.run(batch)
    for _ in range(arguments.rounds):
        for name, each in ways.items():
            times[name].append(1e3 * seconds(lambda each=each: each.backend.run(batch)))  # type: ignore[misc]
    figures["graph, median ms"] = {name: round(statistics.median(found), 2) for name, found in times.items()}
    if arguments.without:
        older = times.pop("older graph")
        figures["ratio to the older graph"] = {
            name: round(statistics.median(a / b for a, b in zip(found, older, strict=True)), 4)
            for name, found in times.items()
        }
    for name, value in figures.items():
        print(f"{name}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
