"""ONNX Runtime as a backend, on a CPU, CUDA or its TensorRT provider."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fbclip.backend import Backend, Described, Results
from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT
from fbclip.errors import BundleError, DeviceError
from fbclip.memory import FEATURES, LOGITS, Shape, Tensors
from fbclip.runtime.backends.providers import (
    FATAL,
    PROVIDERS,
    available,
    driver_fault,
    installation,
    load_cuda,
    provider_options,
    quiet,
    why_not,
    words,
)
from fbclip.runtime.host import allowed_cores
from fbclip.untrusted import one_line

# Of ONNX Runtime's optimisations: on a CPU this one's kernel takes twice the time of the additions and norm it replaces.
UNWANTED_FUSIONS = ["SkipLayerNormFusion"]
SPIN_US = 20  # a thread without work waits as long in a loop before it sleeps: waking one takes as long as a small node
SPIN_SINCE = (1, 26)  # the release of ONNX Runtime that takes it; older ones spin for milliseconds or not at all
ERROR = 3  # of ONNX Runtime's severities; its warnings about nodes left on the CPU are checked here
CUDA_GRAPH, KERNEL_BY_KERNEL = "CUDA graph", "kernel by kernel"
GRAPHS_SINCE = (1, 18)  # the release that tells CUDA graphs apart, by gpu_graph_id; before, all shapes would share one
NO_GRAPH = -1  # as the number of a graph: neither record nor replay one
MOST_SHAPES = 4  # that are replayed; each keeps its buffers, and what the driver needs for a graph

T = TypeVar("T")
logger = logging.getLogger(__name__)


class OnnxRuntimeBackend(Backend):
    """A graph in ONNX Runtime. The precision is the graph's; providers are given none of their own.

    On CUDA a shape of images that comes again is recorded as a CUDA graph and replayed, with buffers that are bound for
    good: a run is then one launch instead of hundreds. A graph that ONNX Runtime can't record so runs kernel by kernel.

    Args:
        graph: the ONNX file.
        text: text features float32 (2, E).
        device: "cpu", "cuda" or "ort-tensorrt" (ONNX Runtime's providers of those names).
        memory: of the graph's tensors of a memory; None where it has none.
        cache: folder where the TensorRT provider keeps what it builds; for this graph only, since the names that it
            gives its files say nothing of the weights.

    Attributes:
        device: where the session really runs.
        graph: what it runs.
        unwanted: optimisations of ONNX Runtime that are off.
        input_size: height and width of the images that the graph takes.
        launches: on CUDA "CUDA graph", or "kernel by kernel" and why.

    Raises:
        DeviceError: the device is not there, or does not work.
        BundleError: the graph can't be loaded, or is no bundle's.
    """

    def __init__(
        self,
        graph: Path,
        text: NDArray[np.float32],
        device: str = "cpu",
        memory: Shape | None = None,
        cache: Path | None = None,
    ) -> None:
        if device not in available():
            raise DeviceError(
                f"{device} needs ONNX Runtime's {PROVIDERS[device]}; this one has {', '.join(available()) or 'none'}: "
                f"{installation()}",
                option="device",
            )
        import onnxruntime as ort

        self.device, self.graph, self.memory_shape, self._cache = device, graph, memory, cache
        self.unwanted = UNWANTED_FUSIONS if device == "cpu" else []
        self._place = "cpu" if device == "cpu" else "cuda"
        self._captures = False
        self._shapes: dict[tuple[int, ...], _Buffers | None] = {}  # the first that came; None: once
        self.session: Any = self._start()
        self.input_size = require_signature(self.session, graph, text, memory)
        # Threads take turns: side by side they are hardly faster, as each run has all cores, and each would hold a run's
        # memory of its own. Elsewhere one thread runs all: ONNX Runtime keeps CUDA graphs for the thread that recorded
        # them, and does not allow others.
        self._turn = Lock()
        self._thread = None if device == "cpu" else ThreadPoolExecutor(1, "fbclip-model")
        inputs = {TEXT: text, **(Tensors.neutral(memory).named() if memory else {})}
        # uploaded once; a memory's are written anew where they lie
        self._held = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), self._place, 0)
            for name, value in inputs.items()
        }
        self._binding = self._bound()

    def _start(self) -> Any:
        """A session; on CUDA one that records graphs, where ONNX Runtime can do so with this one."""
        if self.device != "cuda":
            return self._session()
        if _version() < GRAPHS_SINCE:
            self.launches = f"{KERNEL_BY_KERNEL} (ONNX Runtime is older than {'.'.join(map(str, GRAPHS_SINCE))})"
            return self._session()
        try:
            session = self._session(capture=True)
        except DeviceError as error:
            session = self._session()  # which fails as well where graphs were not the reason
            self._give_up_graphs(error)
        else:
            self._captures, self.launches = True, CUDA_GRAPH
        return session

    def _session(self, capture: bool = False) -> Any:
        import onnxruntime as ort

        provider = PROVIDERS[self.device]
        if self.device != "cpu":
            load_cuda()
        try:
            with quiet():
                session = ort.InferenceSession(
                    self.graph,
                    _options(FATAL if capture else ERROR),  # what can't be recorded is told by `launches`
                    providers=provider_options(self.device, self._cache, capture),
                    disabled_optimizers=self.unwanted,
                    enable_fallback=0,  # to another provider, told on standard output, when this one fails
                )
        except Exception as error:  # its classes are those of C++, and their only base is this one
            failed = f"ONNX Runtime can't load {self.graph} on {self.device}: {words(error)}"
            if self.device == "cpu":
                raise BundleError(failed) from error
            fault = driver_fault()
            raise DeviceError(f"{failed}; {fault}" if fault else failed, option="device") from error
        if session.get_providers()[0] != provider:
            raise DeviceError(f"ONNX Runtime could not start {provider}: {why_not(provider)}", option="device")
        return session

    def _bound(self) -> Any:
        """A binding of the session with all inputs but images."""
        binding = self.session.io_binding()
        for name, value in self._held.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _give_up_graphs(self, error: Exception) -> None:
        self._captures, self.launches = False, f"{KERNEL_BY_KERNEL} ({words(error)})"
        logger.warning("runs are not replayed as CUDA graphs: %s", self.launches)

    def run(self, images: NDArray[np.uint8]) -> Results:
        """Images uint8 (B, H, W, 3) -> scores float32 (B,), maps float32 (B, H', W'), both 0..1.

        Raises:
            DeviceError: it is closed.
        """
        return self._in_turn(self._run, images)

    def run_each(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[Results]:
        if self._thread is None:
            yield from map(self.run, batches)
            return
        ahead: Future[Results] | None = None
        for images in batches:
            before, ahead = ahead, self._submit(self._run, images.copy())  # the caller may overwrite them meanwhile
            if before:
                yield before.result()
        if ahead:
            yield ahead.result()

    def describe(self, images: NDArray[np.uint8]) -> Described:
        if self.memory_shape is None:
            raise self._no_memory()
        return Described(*self._in_turn(self._run_once, images, (FEATURES, LOGITS)))

    def run_described(self, images: NDArray[np.uint8]) -> tuple[Results, Described]:
        """What `run` and `describe` give, of one run."""
        names = (SCORE, ANOMALY_MAP, FEATURES, LOGITS)
        scores, maps, *described = self._in_turn(self._run_once, images, names)
        return (scores, maps), Described(*described)

    def device_times(self, images: NDArray[np.uint8]) -> dict[str, float] | None:
        """Milliseconds of one run by the clock: upload, compute, download. None on a CPU."""
        return None if self.device == "cpu" else self._in_turn(self._clocked, images)

    def _in_turn(self, work: Callable[..., T], *arguments: Any) -> T:
        """What work gives, alone on the device."""
        if self._thread:
            return self._submit(work, *arguments).result()
        with self._turn:
            return work(*arguments)

    def _submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        assert self._thread
        try:
            return self._thread.submit(work, *arguments)
        except RuntimeError as error:  # it has ended
            raise _closed() from error

    def _run(self, images: NDArray[np.uint8]) -> Results:
        """Replayed where graphs are recorded and this shape has come before."""
        shape = images.shape
        if self._captures and shape in self._shapes and images.dtype == np.uint8:
            try:
                buffers = self._shapes[shape] = self._shapes[shape] or self._reserve(shape)
                return buffers.run(images)
            except Exception as error:  # ONNX Runtime's have no other base
                self._shapes.clear()
                self.session = self._binding = None  # whose memory the next one needs
                self.session = self._session()
                self._binding = self._bound()
                self._give_up_graphs(error)
        scores, maps = self._run_once(images, (SCORE, ANOMALY_MAP))
        if self._captures and len(self._shapes) < MOST_SHAPES:
            self._shapes.setdefault(shape)
        return scores, maps

    def _run_once(self, images: NDArray[np.uint8], names: Sequence[str]) -> list[NDArray[np.float32]]:
        """Outputs by name, in arrays that ONNX Runtime makes for them."""
        self._require_open()
        self._binding.bind_cpu_input(IMAGE, np.ascontiguousarray(images))
        self._binding.clear_binding_outputs()
        for name in names:  # anew, as their shapes follow the batch
            self._binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(self._binding, _run_options(NO_GRAPH) if self._captures else None)
        outputs: list[NDArray[np.float32]] = self._binding.copy_outputs_to_cpu()
        return outputs

    def _reserve(self, shape: tuple[int, ...], graph: int | None = None) -> _Buffers:
        """Buffers for images of a shape, with a graph of their own or the number of one."""
        self._require_open()
        number = 1 + sum(buffers is not None for buffers in self._shapes.values()) if graph is None else graph
        return _Buffers(self.session, self._bound(), shape, self._place, number)

    def _clocked(self, images: NDArray[np.uint8]) -> dict[str, float]:
        buffers = self._shapes.get(images.shape) or self._reserve(images.shape, NO_GRAPH)
        moments = [time.perf_counter()]
        buffers.upload(images)
        moments.append(time.perf_counter())
        buffers.compute()
        moments.append(time.perf_counter())
        buffers.download()
        moments.append(time.perf_counter())
        upload, compute, download = np.diff(moments) * 1e3
        return {"upload": float(upload), "compute": float(compute), "download": float(download)}

    def _write_memory(self, tensors: Tensors) -> None:
        self._in_turn(self._write, tensors.named())

    def _write(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        self._require_open()
        for name, value in values.items():
            self._held[name].update_inplace(np.ascontiguousarray(value))

    def _require_open(self) -> None:
        if self.session is None:
            raise _closed()

    def close(self) -> None:
        """Free the session and what it holds on the device, once a call under way is done; safe to call again."""
        with suppress(DeviceError):  # it is closed
            self._in_turn(self._free)
        if self._thread:
            self._thread.shutdown()

    def _free(self) -> None:
        self._shapes.clear()
        self.session = self._binding = None
        self._held.clear()


class _Buffers:
    """Images of a shape and their results on the device, at addresses that stay, which recorded graphs insist on.

    Args:
        binding: with all inputs but images.
        shape: of the images, (B, H, W, 3).
        place: "cuda", or "cpu".
        graph: number of the CUDA graph that a first run records and later ones replay; `NO_GRAPH` for none.
    """

    def __init__(self, session: Any, binding: Any, shape: tuple[int, ...], place: str, graph: int) -> None:
        import onnxruntime as ort

        def reserve(shape: tuple[int, ...], dtype: type[np.generic]) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, place, 0)

        self.session, self.binding = session, binding
        self.images = reserve(shape, np.uint8)
        self.results = {SCORE: reserve(shape[:1], np.float32), ANOMALY_MAP: reserve(shape[:3], np.float32)}
        binding.bind_ortvalue_input(IMAGE, self.images)
        for name, value in self.results.items():
            binding.bind_ortvalue_output(name, value)
        self.options = _run_options(graph)

    def run(self, images: NDArray[np.uint8]) -> Results:
        self.upload(images)
        self.compute()
        return self.download()

    def upload(self, images: NDArray[np.uint8]) -> None:
        self.images.update_inplace(np.ascontiguousarray(images))

    def compute(self) -> None:
        """Returns once it is done: ONNX Runtime waits for the device."""
        self.session.run_with_iobinding(self.binding, self.options)

    def download(self) -> Results:
        scores, maps = (value.numpy().copy() for value in self.results.values())  # on a CPU it is the buffer itself
        return scores, maps


def _options(severity: int) -> Any:
    """Of a session, which says on standard error what is as severe."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = severity
    # threads that wait for each other in a loop for long take the cores from what prepares the next frame meanwhile
    spins = _version() >= SPIN_SINCE
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.intra_op_num_threads = allowed_cores()
    return options


def _run_options(graph: int) -> Any:
    """Of a run: which CUDA graph it records or replays."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _version() -> tuple[int, ...]:
    """ONNX Runtime's, like (1, 26)."""
    import onnxruntime as ort

    return tuple(map(int, ort.__version__.split(".")[:2]))


def _closed() -> DeviceError:
    return DeviceError("this Predictor is closed: make a new one")


def require_signature(
    session: Any, graph: Path, text: NDArray[np.float32], memory: Shape | None = None
) -> tuple[int, int]:
    """Height and width of the images that a graph takes.

    Raises:
        BundleError: its inputs and outputs are not those of `fbclip export`, or not for these text features and this shape
            of a memory.
    """
    inputs = [each.name for each in session.get_inputs()]
    found = {each.name: (each.type, list(each.shape)) for each in (*session.get_inputs(), *session.get_outputs())}
    _, shape = found.get(IMAGE, ("", []))
    batch, height, width, _ = shape if len(shape) == 4 else (None, 0, 0, 0)
    expected = {
        IMAGE: ("tensor(uint8)", [batch, height, width, 3]),
        TEXT: ("tensor(float)", list(text.shape)),
        SCORE: ("tensor(float)", [batch]),
        ANOMALY_MAP: ("tensor(float)", [batch, height, width]),
    }
    more = ""
    if memory:
        expected |= {name: ("tensor(float)", list(shape)) for name, shape in memory.shapes().items()}
        patches = memory.grid**2
        expected[FEATURES] = ("tensor(float)", [batch, patches, memory.features])
        expected[LOGITS] = ("tensor(float)", [batch, 1 + patches])
        more = f", and has inputs and outputs for a memory of {memory}"

    def fits(name: str) -> bool:
        (kind, there), (wanted_kind, wanted) = found[name], expected[name]
        open_ended = name not in inputs  # tools that rewrite graphs may forget the sizes of outputs
        return (kind, len(there)) == (wanted_kind, len(wanted)) and all(
            here == side or type(side) is not int or (open_ended and type(here) is not int)
            for here, side in zip(there, wanted, strict=True)
        )

    names = dict.fromkeys((*expected, *found))
    wrong = {name: found.get(name) for name in names if not (name in found and name in expected and fits(name))}
    if wrong or type(height) is not int or type(width) is not int:
        raise BundleError(
            f"a bundle's graph takes {IMAGE} uint8 (N, H, W, 3) and {TEXT} float32 {text.shape} as text.npy has it, and "
            f"gives {SCORE} float32 (N,) and {ANOMALY_MAP} float32 (N, H, W){more}; {graph} has {one_line(wrong or found)}: "
            f"export the bundle again"
        )
    return height, width
