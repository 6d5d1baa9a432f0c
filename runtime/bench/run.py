"""`fbclip bench`: backends side by side, from the same uint8 frames in host memory to the same float32 scores and maps.

Every subject (a backend, a precision, a batch size) lives in a process of its own (`Runner`). Only one runs at a
time, in turns: a round gives each of them a turn, in an order that moves on by one from round to round, and the machine
itself, whose matrix products and copies are timed between them.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
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
from fbclip.runtime.bench.contenders import Contender, deviation, deviation_reference
from fbclip.runtime.bench.meters import Meters
from fbclip.runtime.bench.results import (
    SCHEMA,
    BenchReport,
    Clock,
    Conditions,
    Frames,
    Key,
    LeftOut,
    Model,
    Operations,
    Warmup,
)
from fbclip.runtime.bench.runner import ON_GPU, Spec
from fbclip.runtime.host import ProcessFailed
from fbclip.runtime.tiles import Layout, Tiles
from fbclip.runtime.workers import Worker
from fbclip.terminal import progress
from fbclip.untrusted import build

TORCH = ("torch-reference", "torch", "torch-captured")
# These compile for half a minute and more: only where they are named, or with "all".
SLOW_TO_START = ("torch-compile", "onnxruntime-tensorrt")
NAMES = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda", "ort-tensorrt": "onnxruntime-tensorrt"}
BACKENDS = {  # what users name, and the runner's name of it
    **{name: name for name in (*TORCH, "torch-compile")},
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
        tiles: that each frame is inspected in as well; None for none. `batches` are views of a frame then.
        memory: of good parts: "auto" for the bundle's own, "off", or a file.
        checkpoint, clip, clip_weights: that torch runs; the embedded model's if None.
        torch: the module that makes torch backends (`bundle_backend`) and products to time (`matrix_products`), such as
            "fbclip.model.backend": the runtime itself knows no torch. None leaves them out.
    """

    backends: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    batches: tuple[int, ...] = (1,)
    frame_hw: tuple[int, int] | None = None
    runs: int = 50
    profile: bool = False
    memory: str = "auto"
    tiles: Tiles | None = None
    checkpoint: Path | None = None
    clip: str | None = None
    clip_weights: str | None = None
    torch: str | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.backends or ()) - BACKENDS.keys() - {"all"}:
            raise UsageError(
                f"backends are {', '.join(BACKENDS)} or all; got {', '.join(sorted(unknown))}", option="backends"
            )

    @property
    def named(self) -> bool:
        """Whether the backends were asked for one by one, so that none may be left out."""
        return self.backends is not None and "all" not in self.backends


def bench(bundle: Bundle, options: Options, console: Console) -> BenchReport:
    """Measure every subject in turns.

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
        if not console.is_terminal:
            stack.enter_context(regularly(partial(bars.update, task)))
        return Bench(bundle, options, folder, meters, bars, task, stack).run()


@contextmanager
def regularly(tell: Callable[[], None], every_s: float = 1.0) -> Iterator[None]:
    """Within, call `tell` again and again: a step may take long, and a pipe shows no bar that moves meanwhile."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(every_s):
            tell()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work)
        try:
            yield
        finally:
            done.set()


class Bench:
    """One run of the benchmark; `run` does it all."""

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
        chosen = None if options.memory == "auto" else Path(options.memory)
        self.memory = None if options.memory == "off" else bundle.memory(chosen)
        self.memory_file = (chosen or bundle.memory_file) if self.memory else None
        self.progress, self.task, self.stack = progress, task, stack
        self.frames = sample_frames(bundle, options.frame_hw)
        self.layout = self._layout()
        np.save(folder / "frames.npy", self.frames)
        self.rounds = min(ROUNDS, options.runs)
        self.contenders: list[Contender] = []
        self.left_out: list[LeftOut] = []
        self.rates: list[dict[str, float]] = []
        self.order: list[list[int]] = []
        self.clocks: dict[str, list[float]] = defaultdict(list)
        self.slowed: set[str] = set()

    def _layout(self) -> Layout | None:
        """The tiles of the frames.

        Raises:
            UsageError: a bundle that sees no tiles, or a memory that expects others.
        """
        tiles, manifest = self.options.tiles, self.bundle.manifest
        if tiles is None:
            return None
        if self.options.frame_hw is None:
            raise UsageError("tiles are measured on frames of a camera's size: pass a resolution", option="resolution")
        if manifest.frame_size:
            raise UsageError("tiles are for bundles that take pictures of any size", option="tiles")
        if self.memory and self.memory.about.views > 1:
            raise UsageError("where each place has expectations of its own, tiles aren't measured", option="tiles")
        layout = tiles.cut(self.frames.shape[1], self.frames.shape[2], manifest.grid)
        if layout is None:
            raise UsageError(
                f"frames of {self.frames.shape[2]}x{self.frames.shape[1]} (width x height) are no larger than a tile of "
                f"{tiles.identity}: measure with the resolution of the camera",
                option="resolution",
            )
        return layout

    def run(self) -> BenchReport:
        specs = self._specs()
        self.progress.update(self.task, total=len(specs) * (1 + self.rounds) + 1)
        operations = self._count_operations()
        for name, spec in specs:
            self._step(f"starting {name} {spec.precision}")
            self._start(name, spec)
        if not self.contenders:
            reasons = "; ".join(f"{entry.backend}: {entry.reason}" for entry in self.left_out)
            raise FBClipError(f"no backend could be measured: {reasons}")
        uses_torch = any(contender.spec.backend.startswith("torch") for contender in self.contenders)
        on_gpu = any(contender.worker.ready["device"] in ON_GPU for contender in self.contenders)
        machine = self._worker(
            "fbclip.runtime.bench.roofline:Rates", self.options.torch if uses_torch else None, on_gpu
        )
        conditions = self._run_rounds(machine)
        self._step("comparing results")
        for contender in list(self.contenders):
            self._guarded(contender, partial(self._finish, contender, operations))
        return self._assemble(operations, conditions)

    def _count_operations(self) -> dict[str, int]:
        frames = str(self.folder / "frames.npy")
        with Worker("fbclip.runtime.bench.profile:Counting", str(self.bundle.path), frames) as counting:
            operations: dict[str, int] = counting.ready
        return operations

    def _specs(self) -> list[tuple[str, Spec]]:
        """What is to be measured, the slowest backends first."""
        bundle, options = self.bundle, self.options
        there = bundle.manifest.precisions
        if absent := set(options.precisions or ()) - set(there):
            raise UsageError(
                f"precisions are {', '.join(there)} in this bundle; got {', '.join(sorted(absent))}", option="precision"
            )
        if options.named:
            names = [name for name in BACKENDS if name in (options.backends or ())]
        else:
            names = [name for name in BACKENDS if name not in SLOW_TO_START or options.backends]
        specs: list[tuple[str, Spec]] = []
        for name in names:
            torch = BACKENDS[name].startswith("torch")
            if torch and (reason := self._no_torch()):
                if options.named:
                    raise UsageError(f"{name} can't run: {reason}", option="backends")
                self._leave_out(name, None, None, reason)
                continue
            for precision in ("fp32",) if torch else options.precisions or there:
                for batch in options.batches:
                    specs.append((name, self._spec(name, precision, batch, len(specs))))
        return specs

    def _no_torch(self) -> str | None:
        if self.options.torch is None:
            return "no module was given that makes torch backends"
        if self.memory:
            return f"torch has no memory of good parts, and this bundle's is {self.memory.name}: measure without it to compare"
        if find_spec("torch") is None or find_spec("open_clip") is None:
            return "torch is not installed: pip install 'fbclip[train]'"
        embedded = np.array_equal(self.bundle.text, Bundle.load().text)
        if not embedded and self.options.checkpoint is None:
            return "which checkpoint is it? pass the bundle's"
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
            None if self.memory_file is None else str(self.memory_file),
            self.options.tiles,
            None if options.checkpoint is None else str(options.checkpoint),
            options.clip,
            options.clip_weights,
            options.torch,
        )

    def _worker(self, target: str, *arguments: Any) -> Worker:
        worker = Worker(target, *arguments)
        self.stack.callback(worker.close)
        return worker

    def _start(self, name: str, spec: Spec) -> None:
        """First result and warm-up."""
        try:
            worker = self._worker("fbclip.runtime.bench.runner:Runner", asdict(spec))
            warmup = build(Warmup, worker.ask("warm"))
            self.contenders.append(Contender(name, spec, worker, warmup, len(self.layout or ())))
        except ProcessFailed as error:
            if self.options.named and error.usage:
                raise UsageError(f"{name} can't run: {error}", option="backends") from error
            self._leave_out(name, spec.precision, spec.batch, str(error))

    def _guarded(self, contender: Contender, work: Callable[[], None]) -> None:
        """Work of one subject; if it fails, that one is out and the others go on."""
        try:
            work()
        except ProcessFailed as error:
            self.contenders.remove(contender)
            self._leave_out(contender.name, contender.spec.precision, contender.spec.batch, str(error))

    def _leave_out(self, name: str, precision: str | None, batch: int | None, reason: str) -> None:
        self.left_out.append(LeftOut(name, precision, batch, reason))

    def _run_rounds(self, machine: Worker) -> Conditions:
        """All turns; returns the conditions under which they ran."""
        everyone = tuple(self.contenders)
        start, busy, throttled = time.perf_counter(), self.meters.machine.busy_seconds(), self.meters.throttle_count()
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
        wall, after = time.perf_counter() - start, self.meters.machine.busy_seconds()
        own += time.process_time() + sum(contender.cpu for contender in everyone)
        later = self.meters.throttle_count()
        return Conditions(
            seconds=wall,
            other_processes_cores=None if not busy or not after else max((after[0] - busy[0] - own) / wall, 0.0),
            stolen_cores=None if not busy or not after else (after[1] - busy[1]) / wall,
            cpu_throttled=None if throttled is None or later is None else later - throttled,
            gpu_throttled=tuple(sorted(self.slowed)),
            clocks_mhz={
                name: Clock(min(found), statistics.median(found), max(found)) for name, found in self.clocks.items()
            },
        )

    def _turn(self, contender: Contender, runs: int) -> None:
        contender.turn(runs, self.meters)
        for name, clock in self.meters.clocks_mhz().items():
            self.clocks[name].append(clock)
        self.slowed.update(self.meters.gpu_throttled())

    def _finish(self, contender: Contender, operations: dict[str, int]) -> None:
        contender.finish(self.meters)
        if self.options.profile:
            self.progress.update(self.task, description=f"profiling {contender.name} {contender.spec.precision}")
            contender.measure_profile(operations)

    def _assemble(self, operations: dict[str, int], conditions: Conditions) -> BenchReport:
        rates = {name: statistics.median(r[name] for r in self.rates) for name in self.rates[0]}
        total, count = sum(operations.values()), len(self.frames)
        deviation_from, expected = self._reference()
        manifest = self.bundle.manifest
        graphs = {p: self.bundle.graph_sha256(p) for p in manifest.precisions}
        return BenchReport(
            schema=SCHEMA,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment=self.meters.environment(),
            bundle=Model(
                manifest.name,
                manifest.image_size,
                manifest.frame_size,
                graphs,
                self.memory.name if self.memory else None,
            ),
            frames=Frames((self.frames.shape[1], self.frames.shape[2]), count, self._frames_described()),
            runs=self.options.runs,
            order=tuple(map(tuple, self.order)),
            conditions=conditions,
            rates=rates,
            operations=Operations(total, operations),
            deviation_from=deviation_from,
            results=tuple(
                c.result(rates, total, deviation(c.spec.outputs, expected, count) if expected else None)
                for c in self.contenders
            ),
            left_out=tuple(self.left_out),
        )

    def _frames_described(self) -> str:
        tiles = self.options.tiles
        return (
            f"sample images, whole and in {len(self.layout)} tiles ({tiles.identity})"
            if tiles and self.layout
            else "sample images"
        )

    def _reference(self) -> tuple[Key | None, str]:
        """What the others are compared with, and the file of its results: the bundle's float32 graph on the CPU runs for
        this alone where nothing that was measured is in float32."""
        if found := deviation_reference(self.contenders):
            return found.key, found.spec.outputs
        if "fp32" not in self.bundle.manifest.precisions:
            return None, ""
        self.progress.update(self.task, description="float32 on the CPU, to compare with")
        spec = self._spec("onnxruntime", "fp32", 1, -1)
        with Worker("fbclip.runtime.bench.runner:Runner", asdict(spec)) as worker:
            worker.ask("run", runs=len(self.frames))
            worker.ask("finish")
        return Key("onnxruntime", "fp32", 1), spec.outputs

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
        raise UsageError(
            f"{bundle.path} takes frames of {built} only; got {wanted}: export one for it", option="frame_size"
        )
    size = frame_hw or manifest.input_size
    return np.stack([resize(read_image(path), size) for path in sorted(SAMPLES.iterdir())])
