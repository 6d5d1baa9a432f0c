"""Graph to plan: of TensorRT on the device that will run it, of TensorRT-RTX on any machine, without a GPU.

Needs tensorrt and PyCUDA, or tensorrt_rtx; neither torch nor onnx.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fbclip.bundle import Bundle
from fbclip.engines import Engine, EngineOptions, Platform, RtxPlatform
from fbclip.errors import DeviceError, FBClipError, UsageError
from fbclip.files import replacing, require_writable, write_text
from fbclip.parsing import parse_numbers
from fbclip.runtime.backends import resolve_precision
from fbclip.runtime.backends.cuda import Gpu, Library
from fbclip.runtime.host import Machine
from fbclip.terminal import progress, say

MIB = 2**20
MACHINE = Machine()


def parse_batch(text: str) -> tuple[int, int, int]:
    """MIN,OPT,MAX, or one number for all three.

    Raises:
        UsageError: anything else.
    """
    rule = "a batch is MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX, like 1,1,4"
    numbers = parse_numbers(text, rule, "batch")
    if len(numbers) not in (1, 3) or list(numbers) != sorted(numbers):
        raise UsageError(f"{rule}; got {text!r}", option="batch")
    low, usual, high = numbers * 3 if len(numbers) == 1 else numbers
    return low, usual, high


def build_engine(bundle: Bundle, precision: str, options: EngineOptions, console: Console, rtx: bool = False) -> Path:
    """Build a plan from a bundle's graph and put it into the bundle, with its sidecar.

    The network is strongly typed: its precision is the graph's, with every release of TensorRT from 10 on. Stopped or
    failed, the build leaves nothing behind, and an older plan stays as it is.

    Args:
        rtx: a plan of TensorRT-RTX for all kinds of GPU that it has plans for, made without one; else TensorRT's for
            the GPU here.
        precision: "auto" (half where the bundle has it), or of one of the bundle's graphs; of 8 bit the static form.

    Returns:
        The plan's path.

    Raises:
        DeviceError: no library, no GPU for TensorRT, less memory than the build needs at least, or 8 bit in the form
            for CPUs.
        UsageError: a bundle that can't be written to, said before the build, or that lacks the graph.
        FBClipError: TensorRT could not build it; names the layer.
    """
    precision = resolve_precision(bundle, "tensorrt-rtx" if rtx else "tensorrt", precision)
    graph = bundle.graph(precision)
    try:
        require_writable(bundle.engines if bundle.engines.exists() else bundle.path)
    except UsageError as error:
        raise UsageError(f"an engine goes into its bundle: copy the bundle first; {error}") from error
    with nullcontext(Library(rtx)) if rtx else _open_gpu() as library:
        platform, timing_cache = library.platform, None
        name = f"{platform.FOLDER}/{platform.engine_name(precision)}"
        plan_path, _ = (bundle.inside(f"{name}{suffix}") for suffix in (".plan", ".json"))
        if isinstance(platform, Platform):
            timing_cache = bundle.inside(f"{platform.FOLDER}/{platform.timing_cache_name()}")
        plan, timings = _build(library, graph, options, timing_cache, plan_path.name, console)
        plan_sha256 = hashlib.sha256(plan).hexdigest()
        engine = Engine(platform, precision, options, bundle.graph_sha256(precision), plan_sha256)
    _write(plan_path, plan, engine)
    if timing_cache:
        with replacing(timing_cache) as file:
            file.write(timings)
    return plan_path


def build_plan(graph: Path, plan_path: Path, options: EngineOptions, max_batch: int, console: Console) -> None:
    """Build a bare plan, without sidecar, from any typed graph for the GPU here and batches of up to `max_batch`.

    Raises:
        DeviceError, FBClipError: as `build_engine`.
    """
    low, usual, _ = options.batch
    batched = replace(options, batch=(low, usual, max_batch))
    with _open_gpu() as gpu:
        plan, _ = _build(gpu, graph, batched, plan_path.with_suffix(".timing"), plan_path.name, console)
    with replacing(plan_path) as file:
        file.write(plan)


@contextmanager
def _open_gpu() -> Iterator[Gpu]:
    gpu = Gpu()
    try:
        yield gpu
    except BaseException as error:
        gpu.close(error)
        raise
    gpu.close()


def _write(plan_path: Path, plan: memoryview, engine: Engine) -> None:
    """The plan, then its sidecar, without which it does not count."""
    sidecar = plan_path.with_suffix(".json")
    with replacing(plan_path) as file:
        file.write(plan)
        file.flush()
        sidecar.unlink(missing_ok=True)  # the older plan's
    write_text(engine.to_json(), sidecar)


def _check_memory(library: Library, graph: Path, workspace_mib: int | None) -> str:
    """A line that says what the build needs at least against what is free.

    At least: the weights on the GPU, if it takes part, beside the scratch memory that was asked for; on the host the
    parsed graph and the plan. On a Jetson both come out of the same memory.

    Raises:
        DeviceError: it can't fit.
    """
    weights = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
    on_gpu, on_host = weights + (workspace_mib or 0) * MIB, 2 * weights
    host = MACHINE.memory()
    free_gpu = total_gpu = 0
    if isinstance(library, Gpu):
        with library.current():
            free_gpu, total_gpu = library.cuda.mem_get_info()
    if not total_gpu:
        fits = host is None or on_host <= host.available
        needs = decimal(on_host) + (f" of {decimal(host.available)} free" if host else "")
    elif host is None:  # then only the GPU's is known
        fits = on_gpu <= free_gpu
        needs = f"{decimal(on_gpu)} of {decimal(free_gpu)} free on the GPU"
    elif abs(total_gpu - host.total) < 0.05 * total_gpu:
        fits = on_gpu + on_host <= host.available
        needs = f"{decimal(on_gpu + on_host)} of the {decimal(host.available)} that are free for CPU and GPU"
    else:
        fits = on_gpu <= free_gpu and on_host <= host.available
        needs = f"{decimal(on_gpu)} of {decimal(free_gpu)} free on the GPU, {decimal(on_host)} of {decimal(host.available)} on the host"
    if not fits:
        raise DeviceError(
            f"the build needs at least {needs}: stop other programs, add swap, give it a smaller workspace, or build from a "
            f"graph in half precision: fbclip export --fp16"
        )
    return f"memory: at least {needs}"


def _build(
    library: Library, graph: Path, options: EngineOptions, timing_cache: Path | None, name: str, console: Console
) -> tuple[memoryview, memoryview]:
    """Plan and timing cache. TensorRT works in a thread, so that Ctrl-C is heard here and stops it at its next step."""
    say(console, f"building {name} for {library.platform}")
    say(console, _check_memory(library, graph, options.workspace_mib))
    cancelled = Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        progress(console, *columns) as bars,
        ThreadPoolExecutor(1) as thread,
    ):

        def build() -> tuple[memoryview, memoryview]:
            with library.current():
                return _serialise(library, graph, options, timing_cache, _monitor(library.trt, bars, cancelled))

        work = thread.submit(build)
        try:
            return work.result()
        except KeyboardInterrupt:
            cancelled.set()
            raise


def parse(library: Library, graph: Path) -> tuple[Any, Any, Any]:
    """A builder, the network that its parser makes of a graph, and the parser, which owns the network's weights.

    Raises:
        FBClipError: the parser refuses the graph; names the layer and the reason.
    """
    trt = library.trt
    builder = trt.Builder(library.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.log)
    if not parser.parse_from_file(str(graph)):
        raise FBClipError(f"{library.title} can't read {graph.name}: {_parser_error(parser)}")
    return builder, network, parser


class Reading:
    """What NVIDIA's parser says of a graph, as a worker's object: it is done once it is made."""

    def __init__(self, graph: str) -> None:
        self.refused: str | None = None
        self.broken: str | None = None
        try:
            parse(Library(rtx=True), Path(graph))
        except DeviceError as error:
            self.broken = str(error)
        except FBClipError as error:
            self.refused = str(error)
        except AttributeError as error:
            self.broken = str(error)

    def ready(self) -> dict[str, str | None]:
        return {"refused": self.refused, "broken": self.broken}


def _serialise(
    library: Library, graph: Path, options: EngineOptions, timing_cache: Path | None, monitor: Any
) -> tuple[memoryview, memoryview]:
    """Plan and timing cache, which is empty where none is kept: TensorRT-RTX times nothing, and one would need a GPU."""
    builder, network, _parser = parse(library, graph)
    config = _configure(library, builder, options)
    config.progress_monitor = monitor
    _add_profile(builder, network, config, options.batch)
    if timing_cache:
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, False):  # damaged, or of another driver
            config.set_timing_cache(config.create_timing_cache(b""), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise FBClipError(f"{library.title} could not build {graph.name}: {library.error()}")
    timings = config.get_timing_cache().serialize() if timing_cache else b""
    return memoryview(plan), memoryview(timings)


def _configure(library: Library, builder: Any, options: EngineOptions) -> Any:
    """Only what TensorRT 10.3 to 11.4 have in common, and what TensorRT-RTX has besides; precision is the graph's."""
    trt = library.trt
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # its 10 bits are what the float32 islands are there to avoid
    if isinstance(library.platform, RtxPlatform):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # memory made while it runs can't be in a CUDA graph
        config.num_compute_capabilities = len(library.platform.compute_capabilities)
        for index, capability in enumerate(library.platform.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    return config


def _add_profile(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> None:
    """The batch range of every input that has one."""
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if -1 in shape:
            profile.set_shape(tensor.name, *(tuple(n if d == -1 else d for d in shape) for n in batch))
    config.add_optimization_profile(profile)


def _parser_error(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"{error.desc()} (layer {error.node_name()}, {error.node_operator()})" for error in errors]
    return " ".join(lines[0].split()) if lines else "it gave no reason"


def _monitor(trt: Any, bars: Progress, cancelled: Event) -> Any:
    """TensorRT's phases as bars; called from its threads, which no exception may leave."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.tasks: dict[str, TaskID] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.tasks[phase_name] = bars.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.tasks:
                bars.update(self.tasks[phase_name], completed=step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.tasks:
                bars.remove_task(self.tasks.pop(phase_name))

    return Monitor()
