"""`fbclip bench`: backends side by side, from the same uint8 frames in host memory to the same float32 scores and maps.

Every subject (a backend, a precision, a batch size) lives in a process of its own (`bench_worker`). Only one runs at a
time, in turns: a round gives each of them a turn, in an order that moves on by one from round to round, and the machine
itself, whose matrix products and copies are timed between them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fbclip.assets import SAMPLES
from fbclip.bundle import Bundle
from fbclip.errors import FBClipError, UsageError
from fbclip.images import read_image
from fbclip.resample import resize
from fbclip.runtime.backends import DEVICES
from fbclip.runtime.bench.limits import least_seconds, product_rate
from fbclip.runtime.bench.meters import Meters
from fbclip.runtime.bench.worker import ON_GPU, Spec, Worker, WorkerFailed
from fbclip.terminal import progress

SCHEMA = "fbclip-bench/1"
TORCH = ("torch-reference", "torch")
SLOW_TO_START = ("torch-compile",)  # compiles for half a minute and more: only where it is named, or with "all"
NAMES = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda", "ort-tensorrt": "onnxruntime-tensorrt"}
BACKENDS = {  # what --backends takes, and the worker's name of it
    **{name: name for name in (*TORCH, *SLOW_TO_START)},
    **{NAMES.get(device, device): device for device in DEVICES},
}
ROUNDS = 10


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        backends: of `BACKENDS`; None for all that run here, except those that compile for long; "all" for those too.
        precisions: of the bundle; None for all it has. Torch runs float32 alone.
        batches: images per run.
        frame_hw: height and width of the frames in memory; None for what the graph takes.
        runs: timed runs of each subject, at least.
        profile: also measure ONNX Runtime's operators.
        checkpoint, clip, clip_weights: that torch runs; the embedded model's if None.
    """

    backends: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    batches: tuple[int, ...] = (1,)
    frame_hw: tuple[int, int] | None = None
    runs: int = 50
    profile: bool = False
    checkpoint: Path | None = None
    clip: str | None = None
    clip_weights: str | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.backends or ()) - BACKENDS.keys() - {"all"}:
            raise UsageError(f"--backends takes {', '.join(BACKENDS)} or all, with commas; got {', '.join(unknown)}")

    @property
    def named(self) -> bool:
        """Whether the backends were asked for one by one, so that none may be left out."""
        return self.backends is not None and "all" not in self.backends


@dataclass(eq=False)
class Contender:
    """A subject in the running, and what was measured of it.

    Attributes:
        name: of the backend as --backends has it.
        rounds: seconds of the timed runs, a list per round.
        wall, cpu, turns: of all turns: seconds, core-seconds, runs with the untimed ones.
        joules: by source, over all turns.
    """

    name: str
    spec: Spec
    worker: Worker
    warmup: dict[str, Any] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0
    turns: int = 0
    joules: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    device_mb: float | None = None
    final: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] | None = None

    @property
    def key(self) -> dict[str, Any]:
        return {"backend": self.name, "precision": self.spec.precision, "batch": self.spec.batch}


def bench(bundle: Bundle, options: Options, console: Console) -> dict[str, Any]:
    """Measure, and return the report that is written as JSON; its fields are described in docs/guides/benchmarks.md.

    Raises:
        UsageError: a backend or precision that was named is not there.
        FBClipError: nothing could be measured.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fbclip-bench-")))
        meters = Meters()
        stack.callback(meters.close)
        bars = stack.enter_context(
            progress(console, TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        )
        task = bars.add_task("counting operations")
        return Bench(bundle, options, folder, meters, bars, task, stack).report()


class Bench:
    """One run of the benchmark; `report` does it all."""

    def __init__(
        self,
        bundle: Bundle,
        options: Options,
        folder: Path,
        meters: Meters,
        progress: Progress,
        task: TaskID,
        stack: ExitStack,
    ) -> None:
        self.bundle, self.options, self.folder, self.meters = bundle, options, folder, meters
        self.progress, self.task, self.stack = progress, task, stack
        self.frames = sample_frames(bundle, options.frame_hw)
        np.save(folder / "frames.npy", self.frames)
        self.rounds = min(ROUNDS, options.runs)
        self.contenders: list[Contender] = []
        self.left_out: list[dict[str, Any]] = []
        self.rates: list[dict[str, float]] = []
        self.order: list[list[int]] = []
        self.clocks: dict[str, list[float]] = defaultdict(list)
        self.slowed: set[str] = set()

    def report(self) -> dict[str, Any]:
        specs = self._specs()
        self.progress.update(self.task, total=len(specs) * (1 + self.rounds) + 1)
        arguments = {"bundle": str(self.bundle.path), "frames": str(self.folder / "frames.npy")}
        counting = self._worker("work", arguments)
        operations: dict[str, int] = counting.ready["operations"]
        counting.close()
        for name, spec in specs:
            self._step(f"starting {name} {spec.precision}")
            self._start(name, spec)
        if not self.contenders:
            reasons = "; ".join(f"{entry['backend']}: {entry['reason']}" for entry in self.left_out)
            raise FBClipError(f"no backend could be measured: {reasons}")
        uses_torch = any(contender.spec.backend.startswith("torch") for contender in self.contenders)
        conditions = self._run_rounds(self._worker("machine", {"use_torch": uses_torch}))
        self._step("comparing results")
        for contender in list(self.contenders):
            self._guarded(contender, partial(self._finish, contender, operations))
        return self._assemble(operations, conditions)

    def _specs(self) -> list[tuple[str, Spec]]:
        """What is to be measured, the slowest backends first."""
        bundle, options = self.bundle, self.options
        there = bundle.manifest.precisions
        if absent := set(options.precisions or ()) - set(there):
            raise UsageError(f"--precision is of {', '.join(there)} in this bundle; got {', '.join(sorted(absent))}")
        if options.named:
            names = [name for name in BACKENDS if name in (options.backends or ())]
        else:
            names = [name for name in BACKENDS if name not in SLOW_TO_START or options.backends]
        specs: list[tuple[str, Spec]] = []
        for name in names:
            torch = BACKENDS[name].startswith("torch")
            if torch and (reason := self._no_torch()):
                if options.named:
                    raise UsageError(f"--backends {name} can't run: {reason}")
                self._leave_out(name, None, None, reason)
                continue
            for precision in ("fp32",) if torch else options.precisions or there:
                for batch in options.batches:
                    specs.append((name, self._spec(name, precision, batch, len(specs))))
        return specs

    def _no_torch(self) -> str | None:
        if find_spec("torch") is None or find_spec("open_clip") is None:
            return "torch is not installed: pip install 'fbclip[train]'"
        embedded = np.array_equal(self.bundle.text, Bundle.load().text)
        if not embedded and self.options.checkpoint is None:
            return "which checkpoint is it? pass the bundle's --checkpoint"
        return None

    def _spec(self, name: str, precision: str, batch: int, number: int) -> Spec:
        options = self.options
        return Spec(
            BACKENDS[name],
            precision,
            batch,
            str(self.bundle.path),
            str(self.folder / "frames.npy"),
            str(self.folder / f"{number}.npz"),
            None if options.checkpoint is None else str(options.checkpoint),
            options.clip,
            options.clip_weights,
        )

    def _worker(self, kind: str, arguments: dict[str, Any]) -> Worker:
        worker = Worker(kind, arguments, self.folder / f"{kind}-{time.perf_counter_ns()}.log")
        self.stack.callback(worker.close)
        return worker

    def _start(self, name: str, spec: Spec) -> None:
        """First result and warm-up."""
        try:
            worker = self._worker("subject", asdict(spec))
            self.contenders.append(Contender(name, spec, worker, worker.ask("warm")))
        except WorkerFailed as error:
            if self.options.named and error.usage:
                raise UsageError(f"--backends {name} can't run: {error}") from error
            self._leave_out(name, spec.precision, spec.batch, str(error))

    def _guarded(self, contender: Contender, work: Callable[[], None]) -> None:
        """Work of one subject; if it fails, that one is out and the others go on."""
        try:
            work()
        except WorkerFailed as error:
            self.contenders.remove(contender)
            self._leave_out(contender.name, contender.spec.precision, contender.spec.batch, str(error))

    def _leave_out(self, name: str, precision: str | None, batch: int | None, reason: str) -> None:
        self.left_out.append({"backend": name, "precision": precision, "batch": batch, "reason": reason})

    def _run_rounds(self, machine: Worker) -> dict[str, Any]:
        """All turns; returns the conditions under which they ran."""
        everyone = tuple(self.contenders)
        start, busy, throttled = time.perf_counter(), self.meters.busy_seconds(), self.meters.throttle_count()
        own = -time.process_time()
        for number in range(self.rounds):
            runs = runs_of_round(self.options.runs, self.rounds, number)
            measured = machine.ask("run")
            self.rates.append(measured["rates"])
            own += measured["cpu_s"]
            order = turn_order(len(everyone), number)
            self.order.append(order)
            for index in order:
                contender = everyone[index]
                self._step(f"round {number + 1} of {self.rounds}: {contender.name} {contender.spec.precision}")
                if contender in self.contenders:
                    self._guarded(contender, partial(self._turn, contender, runs))
        wall, after = time.perf_counter() - start, self.meters.busy_seconds()
        own += time.process_time() + sum(contender.cpu for contender in everyone)
        later = self.meters.throttle_count()
        return {
            "seconds": wall,
            "other_processes_cores": None if not busy or not after else max((after[0] - busy[0] - own) / wall, 0.0),
            "stolen_cores": None if not busy or not after else (after[1] - busy[1]) / wall,
            "cpu_throttled": None if throttled is None or later is None else later - throttled,
            "gpu_throttled": sorted(self.slowed),
            "clocks_mhz": {
                name: {"least": min(found), "median": statistics.median(found), "most": max(found)}
                for name, found in self.clocks.items()
            },
        }

    def _turn(self, contender: Contender, runs: int) -> None:
        before = self.meters.joules()
        answer = contender.worker.ask("run", runs=runs)
        for source, joules in self.meters.joules().items():
            contender.joules[source] += max(joules - before.get(source, joules), 0.0)  # RAPL's counters wrap around
        for name, clock in self.meters.clocks_mhz().items():
            self.clocks[name].append(clock)
        self.slowed.update(self.meters.gpu_throttled())
        contender.rounds.append(answer["seconds"])
        contender.wall += answer["wall_s"]
        contender.cpu += answer["cpu_s"]
        contender.turns += answer["runs"]

    def _finish(self, contender: Contender, operations: dict[str, int]) -> None:
        contender.device_mb = self.meters.device_mb(contender.worker.pid)
        contender.final = contender.worker.ask("finish")
        if self.options.profile:
            self.progress.update(self.task, description=f"profiling {contender.name} {contender.spec.precision}")
            contender.profile = contender.worker.ask("profile", operations=operations) or None

    def _assemble(self, operations: dict[str, int], conditions: dict[str, Any]) -> dict[str, Any]:
        rates = {name: statistics.median(r[name] for r in self.rates) for name in self.rates[0]}
        reference = drift_reference(self.contenders)
        manifest = self.bundle.manifest
        return {
            "schema": SCHEMA,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": self.meters.environment(),
            "bundle": {
                "name": manifest.name,
                "image_size": manifest.image_size,
                "frame_size": manifest.frame_size,
                "graphs": {p: self.bundle.graph_sha256(p) for p in manifest.precisions},
            },
            "frames": {"size": list(self.frames.shape[1:3]), "count": len(self.frames), "source": "sample images"},
            "runs": self.options.runs,
            "order": self.order,
            "conditions": conditions,
            "rates": rates,
            "operations": {"total": sum(operations.values()), "stages": operations},
            "drift_from": None if reference is None else reference.key,
            "results": [self._result(c, rates, sum(operations.values()), reference) for c in self.contenders],
            "left_out": self.left_out,
        }

    def _result(
        self, contender: Contender, rates: dict[str, float], operations: int, reference: Contender | None
    ) -> dict[str, Any]:
        seconds = np.array([s for one in contender.rounds for s in one])
        device, batch = contender.worker.ready["device"], contender.spec.batch
        place = "cuda" if device in ON_GPU else "cpu"
        rate = product_rate(rates, place, contender.spec.precision)
        median, p90, p99 = (float(v) for v in np.percentile(seconds, (50, 90, 99)) * 1e3)
        reads = contender.worker.ready["reads"]
        least = least_seconds(operations * batch, rate, reads, rates.get(f"{place} copy")) * 1e3 if rate else None
        return {
            **contender.key,
            "device": device,
            "rounds_ms": [[round(s * 1e3, 4) for s in one] for one in contender.rounds],
            "median_ms": median,
            "p90_ms": p90,
            "p99_ms": p99,
            "images_per_s": batch * len(seconds) / float(seconds.sum()),
            "cold_start_s": contender.worker.start_seconds,
            "warmup": contender.warmup,
            "cores_used": contender.cpu / contender.wall,
            "peak_host_mb": contender.final["peak_host_mb"],
            "device_mb": contender.device_mb,
            "device_ms": contender.final["device_ms"],
            "joules_per_image": {source: j / (contender.turns * batch) for source, j in contender.joules.items()},
            "gflops": operations * batch / median / 1e6,
            "limit_ms": least,
            "share_of_limit": least / median if least else None,
            "drift": None if reference is None else _drift(contender, reference, len(self.frames)),
            "profile": contender.profile,
        }

    def _step(self, description: str) -> None:
        self.progress.update(self.task, advance=1, description=description)


def runs_of_round(runs: int, rounds: int, number: int) -> int:
    """Timed runs of each subject in a round, so that all rounds together have `runs`."""
    return runs * (number + 1) // rounds - runs * number // rounds


def turn_order(count: int, number: int) -> list[int]:
    """Who runs when in a round: the order moves on by one, so that nobody always follows the same one."""
    return [(index + number) % count for index in range(count)]


def sample_frames(bundle: Bundle, frame_hw: tuple[int, int] | None) -> NDArray[np.uint8]:
    """The sample images as frames uint8 (4, H, W, 3) RGB.

    Raises:
        UsageError: the bundle takes frames of another size.
    """
    manifest = bundle.manifest
    if manifest.frame_size and frame_hw and frame_hw != manifest.frame_size:
        built, wanted = (f"{height}x{width}" for height, width in (manifest.frame_size, frame_hw))
        raise UsageError(f"{bundle.path} takes frames of {built} only; got --frame-size {wanted}: export one for it")
    size = frame_hw or manifest.input_size
    return np.stack([resize(read_image(path), size) for path in sorted(SAMPLES.iterdir())])


def drift_reference(contenders: Sequence[Contender]) -> Contender | None:
    """What the others are compared with: float32 torch, else its literal form, else float32 in ONNX Runtime."""
    for wanted in ("torch", "torch-reference", "onnxruntime"):
        for contender in contenders:
            if contender.name == wanted and contender.spec.precision == "fp32":
                return contender
    return None


def _drift(contender: Contender, reference: Contender, frames: int) -> dict[str, float]:
    """Largest differences of scores and maps, on the frames that both have seen."""
    with np.load(contender.spec.outputs) as found, np.load(reference.spec.outputs) as expected:
        count = min(frames, len(found["scores"]), len(expected["scores"]))
        scores, maps = (np.abs(found[k][:count] - expected[k][:count]) for k in ("scores", "maps"))
    return {
        "frames": count,
        "score_max": float(scores.max()),
        "map_max": float(maps.max()),
        "map_p999": float(np.quantile(maps, 0.999)),
    }
