"""The subjects of a benchmark in the running: their processes, their turns, and what comes of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fbclip.runtime.bench.meters import METERED_S, Meters
from fbclip.runtime.bench.results import BenchResult, Deviation, Key, Profile, Warmup
from fbclip.runtime.bench.roofline import least_seconds, product_rate
from fbclip.runtime.bench.runner import ON_GPU, Spec
from fbclip.runtime.workers import Worker
from fbclip.untrusted import build


@dataclass(eq=False)
class Contender:
    """A subject in the running, and what was measured of it.

    Attributes:
        name: of the backend as users name it.
        worker: its process, which serves a `Runner`.
        tiles: of a frame that the model is given beside the whole of it; 0 where a run is of images as they are.
        rounds: seconds of the timed runs, a list per round.
        wall, cpu, turns: of all turns: seconds, core-seconds, runs with the untimed ones.
        joules: by source, over `metered` runs.
        device_mb, final, profile: once it is finished.
    """

    name: str
    spec: Spec
    worker: Worker
    warmup: Warmup
    tiles: int = 0
    rounds: list[list[float]] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0
    turns: int = 0
    joules: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    metered: int = 0
    device_mb: float | None = None
    final: dict[str, Any] = field(default_factory=dict)
    profile: Profile | None = None

    @property
    def key(self) -> Key:
        return Key(self.name, self.spec.precision, self.spec.batch)

    def turn(self, runs: int, meters: Meters) -> None:
        """Run, with an eye on the energy."""
        answer = self._metered(runs, meters)
        self.rounds.append(answer["seconds"])
        self.wall += answer["wall_s"]
        self.cpu += answer["cpu_s"]
        self.turns += answer["runs"]

    def _metered(self, runs: int, meters: Meters) -> dict[str, Any]:
        before = meters.joules()
        answer: dict[str, Any] = self.worker.ask("run", runs=runs)
        for source, joules in meters.joules().items():
            self.joules[source] += max(joules - before.get(source, joules), 0.0)  # RAPL's counters wrap around
        self.metered += answer["runs"]
        return answer

    def measure_energy(self, meters: Meters) -> None:
        """Anew in one long turn, where turns were too short for meters that tell a new value ten times a second."""
        seconds = self.wall / self.turns
        if self.joules and self.wall / len(self.rounds) < METERED_S:
            self.joules.clear()
            self.metered = 0
            self._metered(math.ceil(METERED_S / seconds), meters)

    def finish(self, meters: Meters) -> None:
        """Measure energy and memory, and let it write its results for the comparison."""
        self.measure_energy(meters)
        self.device_mb = meters.device_mb(self.worker.pid)
        self.final = self.worker.ask("finish")

    def measure_profile(self, operations: Mapping[str, int]) -> None:
        """Where ONNX Runtime spends its time; nothing of other backends."""
        found = self.worker.ask("profile", operations=operations)
        self.profile = None if found is None else build(Profile, found)

    def result(self, rates: Mapping[str, float], operations: int, deviation: Deviation | None) -> BenchResult:
        """What was measured, once it is finished.

        Args:
            rates: of the machine, medians by name.
            operations: for one image.
        """
        seconds = np.array([s for one in self.rounds for s in one])
        median, p90, p99 = (float(v) for v in np.percentile(seconds, (50, 90, 99)) * 1e3)
        images, operations = self.spec.images, operations * (1 + self.tiles if self.tiles else self.spec.batch)
        least = self._least_ms(rates, operations)
        return BenchResult(
            backend=self.name,
            precision=self.spec.precision,
            batch=self.spec.batch,
            device=self.worker.ready["device"],
            rounds_ms=tuple(tuple(round(s * 1e3, 4) for s in one) for one in self.rounds),
            median_ms=median,
            p90_ms=p90,
            p99_ms=p99,
            images_per_s=images * len(seconds) / float(seconds.sum()),
            cold_start_s=self.worker.start_seconds,
            warmup=self.warmup,
            cores_used=self.cpu / self.wall,
            peak_host_mb=self.final["peak_host_mb"],
            device_mb=self.device_mb,
            device_ms=self.final["device_ms"],
            joules_per_image={s: joules / (self.metered * images) for s, joules in self.joules.items() if joules},
            gflops=operations / median / 1e6,
            limit_ms=least,
            share_of_limit=least / median if least else None,
            deviation=deviation,
            profile=self.profile,
            launches=self.final["launches"],
            too_coarse=tuple(source for source, joules in self.joules.items() if not joules) or None,
        )

    def _least_ms(self, rates: Mapping[str, float], operations: int) -> float | None:
        place = "cuda" if self.worker.ready["device"] in ON_GPU else "cpu"
        rate = product_rate(rates, place, self.spec.precision)
        if rate is None:
            return None
        return least_seconds(operations, rate, self.worker.ready["reads"], rates.get(f"{place} copy")) * 1e3


def deviation_reference(contenders: Sequence[Contender]) -> Contender | None:
    """What the others are compared with: float32 torch, else its literal form, else float32 in ONNX Runtime on the CPU,
    else the first in float32; None where all are in others."""
    exact = [contender for contender in contenders if contender.spec.precision == "fp32"]
    for wanted in ("torch", "torch-reference", "onnxruntime"):
        for contender in exact:
            if contender.name == wanted:
                return contender
    return exact[0] if exact else None


def deviation(found_in: str, expected_in: str, frames: int) -> Deviation:
    """Largest differences of scores and maps in two files of results, on the frames that both have seen."""
    with np.load(found_in) as found, np.load(expected_in) as expected:
        count = min(frames, len(found["scores"]), len(expected["scores"]))
        scores, maps = (np.abs(found[k][:count] - expected[k][:count]) for k in ("scores", "maps"))
    return Deviation(count, float(scores.max()), float(maps.max()), float(np.quantile(maps, 0.999)))
