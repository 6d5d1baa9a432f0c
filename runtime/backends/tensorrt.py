"""A plan of TensorRT or TensorRT-RTX as a backend: needs either and PyCUDA, neither torch nor ONNX Runtime."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.backend import Backend, Described, Results
from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT, Bundle
from fbclip.engines import Engine, RtxPlatform
from fbclip.errors import BundleError, DeviceError, FBClipError, UsageError
from fbclip.files import replacing
from fbclip.memory import FEATURES, LOGITS, Tensors
from fbclip.runtime.backends.cuda import CaptureError, CudaGraph, Gpu, load_driver
from fbclip.untrusted import read_bytes

SLOTS = 2  # batches in flight: while one computes, the next is uploaded
MOST_KERNELS = 2**29  # bytes of compiled kernels; NVIDIA calls more than 100 MB large
DIGEST = 32  # bytes of a SHA-256

logger = logging.getLogger(__name__)


class TensorRTBackend(Backend):
    """A bundle's engine on the first GPU. Any number of threads may `run` it; they take turns.

    All memory is reserved at the start, for the largest batch. Two batches can be in flight (`run_each`), each in a slot
    with a stream, an execution context and pinned buffers of its own. They compute one after the other, in scratch
    memory that they share, while copies go on.

    Args:
        bundle: with a plan for this device.
        precision: of the plan.
        batch: images at once that it must take.
        named: whether the device was asked for by name; without that no engine runs that holds code for the host.

    Attributes:
        device: "tensorrt", or "tensorrt-rtx".
        plan: the file that runs.
        input_shape: (H, W, 3) of the images it takes.
        launches: how executions are started: "CUDA graph", or "enqueue" and why.

    Raises:
        DeviceError: no GPU, no fitting plan, or not enough memory.
        BundleError: the plan is damaged.
    """

    device = "tensorrt"
    RTX = False

    def __init__(self, bundle: Bundle, precision: str, batch: int = 1, named: bool = True) -> None:
        self._slots: list[_Slot] = []
        self._memory: dict[str, Any] = {}  # of both slots: scratch, constant inputs, what `describe` gives
        self._free: deque[_Slot] = deque()
        self._ahead = Lock()  # of the iteration that leaves a batch in flight
        self._lock = RLock()  # of everything here; a thread that has it may close the backend
        self._engine = self._runtime = None
        self._driver = load_driver()
        self.launches = "CUDA graph" if self._driver else "enqueue (cuda-bindings is not installed)"
        self._gpu: Gpu | None = Gpu(self.RTX)
        try:
            self.plan, sidecar = bundle.engine(precision, self._gpu.platform, batch)
            self._rebuild = self._gpu.platform.COMMAND
            self._low, _, self._high = sidecar.options.batch
            with self._gpu.current():
                self._runtime = self._gpu.trt.Runtime(self._gpu.log)
                # A plan for later versions carries its runtime, which is code; the bundle has checked the file.
                if sidecar.options.version_compatible and not named:
                    raise DeviceError(
                        f"{self.plan.name} brings a runtime of its own, which is code and runs only where it is asked for: "
                        f"choose the device {self.device} if you trust who made the bundle"
                    )
                self._runtime.engine_host_code_allowed = sidecar.options.version_compatible
                self._engine = self._runtime.deserialize_cuda_engine(self.plan.read_bytes())
                if self._engine is None:
                    raise DeviceError(f"{self._gpu.title} can't read {self.plan}: {self._gpu.error()}")
                self.memory_shape = bundle.manifest.memory_shape
                self._prepare(bundle, sidecar)
                self._reserve(bundle.text)
        except BaseException as error:
            self._close(error)
            raise

    def _prepare(self, bundle: Bundle, sidecar: Engine) -> None:
        """What execution contexts need besides the engine."""

    def _context(self) -> Any:
        """An execution context whose scratch memory is ours; None if it can't be made."""
        assert self._gpu and self._engine is not None
        return self._engine.create_execution_context(self._gpu.trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def _reserve(self, text: NDArray[np.float32]) -> None:
        """Check the plan's tensors, upload the text and the memory of nothing, make the slots."""
        assert self._gpu and self._engine is not None
        engine, cuda = self._engine, self._gpu.cuda
        names = sorted(engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        shape = self.memory_shape
        inputs = {TEXT: text, **(Tensors.neutral(shape).named() if shape else {})}
        described = [FEATURES, LOGITS] if shape else []
        if names != sorted((IMAGE, SCORE, ANOMALY_MAP, *inputs, *described)) or any(
            tuple(engine.get_tensor_shape(name)) != value.shape for name, value in inputs.items()
        ):
            raise BundleError(
                f"a plan has the tensors of its graph; {self.plan} has {', '.join(names)}: build it again"
            )
        self.input_shape = tuple(int(n) for n in engine.get_tensor_shape(IMAGE))[1:]
        scratch_bytes = max(int(engine.device_memory_size_v2), 1)
        scratch = self._memory["scratch"] = cuda.mem_alloc(scratch_bytes)
        for name, value in inputs.items():
            self._memory[name] = cuda.mem_alloc(value.nbytes)
            cuda.memcpy_htod(self._memory[name], np.ascontiguousarray(value))
        for name in described:
            patches = [int(n) for n in engine.get_tensor_shape(name)][1:]
            self._memory[name] = cuda.mem_alloc(4 * self._high * int(np.prod(patches)))
        for _ in range(SLOTS):
            slot = _Slot(self._gpu, self._context())
            self._slots.append(slot)
            self._free.append(slot)
            slot.context.set_device_memory(int(scratch), scratch_bytes)
            for name in (*inputs, *described):
                slot.context.set_tensor_address(name, int(self._memory[name]))
            slot.reserve((self._high, *self.input_shape))

    def run(self, images: NDArray[np.uint8]) -> Results:
        """Images uint8 (B, H, W, 3) -> scores float32 (B,), maps float32 (B, H', W'), both 0..1.

        Raises:
            UsageError: images of another shape, type or number than the plan was built for.
            DeviceError: it is closed; or the GPU failed, and then it is closed, and a new one can be made.
        """
        self._require_fit(images)
        with self._on_gpu():
            return self._collect(self._submit(images))

    def run_each(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[Results]:
        """The results of batch after batch: the next is uploaded while one computes, and may then be overwritten.

        One such iteration at a time is ahead of its results, as other threads need the other slot.

        Raises:
            UsageError, DeviceError: as `run`.
        """
        if not self._ahead.acquire(blocking=False):
            yield from map(self.run, batches)
            return
        waiting: _Slot | None = None
        try:
            for images in batches:
                self._require_fit(images)
                with self._on_gpu():
                    before, waiting = waiting, self._submit(images)
                    results = self._collect(before) if before else None
                if results:
                    yield results
            if waiting:
                with self._on_gpu():
                    before, waiting = waiting, None
                    results = self._collect(before)
                yield results
        finally:
            with suppress(DeviceError):
                if waiting:
                    with self._on_gpu():
                        self._collect(waiting)
            self._ahead.release()

    def _require_fit(self, images: NDArray[np.uint8]) -> None:
        if images.shape[1:] != self.input_shape or images.dtype != np.uint8:
            taken = ", ".join(map(str, self.input_shape))
            raise UsageError(f"the engine takes images uint8 (B, {taken}); got {images.dtype} {images.shape}")
        if not self._low <= len(images) <= self._high:
            again = f"{self._rebuild} --batch MIN,OPT,MAX"
            raise UsageError(
                f"{self.plan.name} takes {self._low} to {self._high} images at once, not {len(images)}: "
                f"choose another batch, or build it again with {again}"
            )

    def _submit(self, images: NDArray[np.uint8]) -> _Slot:
        """Start on images in a free slot, without waiting; they may be overwritten once this returns."""
        slot = self._free[0]  # whoever has the lock finds one: `run` leaves none in flight, `run_each` one
        slot.upload(images)
        self._compute(slot)
        slot.download()
        return self._free.popleft()

    def _collect(self, slot: _Slot) -> Results:
        """Wait for a slot's results; it is free then."""
        try:
            slot.done.synchronize()
            count = slot.shape[0]
            return slot.host[SCORE][:count].copy(), slot.host[ANOMALY_MAP][:count].copy()
        finally:  # also after Ctrl-C: what comes next waits in the slot's stream
            self._free.append(slot)

    def _compute(self, slot: _Slot) -> None:
        for other in self._slots:
            if other is not slot:
                slot.stream.wait_for_event(other.computed)  # the scratch memory is its until then
        self._start(slot)
        slot.computed.record(slot.stream)

    def _start(self, slot: _Slot) -> None:
        """Start the execution: a new shape is enqueued (TensorRT adapts to it then), a repeated one is replayed."""
        if slot.graph is None and slot.is_prepared and self._driver:
            try:
                slot.graph = CudaGraph(self._driver, slot.stream.handle, slot.enqueue)
            except CaptureError as error:
                self._driver, self.launches = None, f"enqueue ({error})"
                logger.warning("executions are not replayed as CUDA graphs: %s", self.launches)
        if slot.graph is not None:
            slot.graph.launch()
        elif not slot.enqueue():
            assert self._gpu
            raise DeviceError(f"{self._gpu.title} could not run {self.plan.name}: {self._gpu.error()}")
        slot.is_prepared = True

    def _write_memory(self, tensors: Tensors) -> None:
        with self._on_gpu():
            assert self._gpu
            self._gpu.cuda.Context.synchronize()  # what is in flight reads the one before
            for name, value in tensors.named().items():
                self._gpu.cuda.memcpy_htod(self._memory[name], np.ascontiguousarray(value))

    def describe(self, images: NDArray[np.uint8]) -> Described:
        if self.memory_shape is None:
            raise self._no_memory()
        self._require_fit(images)
        with self._on_gpu():
            assert self._gpu
            slot, cuda = self._free[0], self._gpu.cuda
            slot.upload(images)
            self._compute(slot)
            found = []
            for name in (FEATURES, LOGITS):  # no other run may write them before they are read
                shape = tuple(int(n) for n in slot.context.get_tensor_shape(name))
                found.append(cuda.pagelocked_empty(shape, np.float32))
                cuda.memcpy_dtoh_async(found[-1], self._memory[name], slot.stream)
            slot.done.record(slot.stream)
            slot.done.synchronize()
            return Described(*(values.copy() for values in found))

    def device_times(self, images: NDArray[np.uint8]) -> dict[str, float]:
        """Milliseconds of one run by the GPU's events: upload, compute, download."""
        self._require_fit(images)
        with self._on_gpu():
            assert self._gpu
            slot = self._free[0]
            begin, uploaded, computed, end = (self._gpu.cuda.Event() for _ in range(4))
            begin.record(slot.stream)
            slot.upload(images)
            uploaded.record(slot.stream)
            self._compute(slot)
            computed.record(slot.stream)
            slot.download()
            end.record(slot.stream)
            end.synchronize()
            return {
                "upload": begin.time_till(uploaded),
                "compute": uploaded.time_till(computed),
                "download": computed.time_till(end),
            }

    def close(self) -> None:
        """Give everything on the device back, once a call under way is done; safe to call again."""
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        with self._lock:
            gpu, self._gpu = self._gpu, None
            if gpu is not None:
                self._release(gpu, error)

    def _release(self, gpu: Gpu, error: BaseException | None) -> None:
        self._free.clear()
        with suppress(DeviceError), gpu.current():
            with suppress(gpu.cuda.Error):  # what fails now has failed before
                gpu.cuda.Context.synchronize()
            while self._slots:
                self._slots.pop().free()
            self._finish(error)
            while self._memory:
                self._memory.popitem()[1].free()
            self._engine = self._runtime = None  # after its contexts, before CUDA's
        gpu.close(error)

    def _finish(self, error: BaseException | None) -> None:
        """Let go of what `_prepare` made: after the contexts, before the engine."""

    def __del__(self) -> None:
        if hasattr(self, "_gpu"):
            self.close()

    @contextmanager
    def _on_gpu(self) -> Iterator[None]:
        with self._lock:
            if self._gpu is None:
                raise DeviceError("this Predictor is closed: make a new one")
            try:
                with self._gpu.current():
                    yield
            except (DeviceError, CaptureError) as error:
                self._close(error)
                raise DeviceError(f"{error}; the backend is closed, make a new one") from error


class RtxBackend(TensorRTBackend):
    """A bundle's TensorRT-RTX engine on the first GPU.

    Its kernels are compiled here, when a shape is first run, and kept beside the engine, for this GPU, library and plan.
    """

    device = "tensorrt-rtx"
    RTX = True
    _config: Any = None
    _cache: Any = None

    def _prepare(self, bundle: Bundle, sidecar: Engine) -> None:
        assert self._gpu and self._engine is not None
        trt = self._gpu.trt
        self._config = config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # The kernels for a shape before its first run: those that come later would not be in the CUDA graph.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = config.create_runtime_cache()
        platform = self._gpu.platform
        assert isinstance(platform, RtxPlatform)
        name = platform.kernels_name(self._gpu.name, sidecar.plan_sha256)
        self._kernels = bundle.inside(f"{platform.FOLDER}/{name}")
        self._kept = _read_kernels(self._kernels)
        if self._kept and not self._cache.deserialize(self._kept):
            self._kept = b""  # of another driver
        config.set_runtime_cache(self._cache)

    def _context(self) -> Any:
        assert self._engine is not None
        return self._engine.create_execution_context(self._config)

    def _finish(self, error: BaseException | None) -> None:
        kernels = self._cache.serialize() if self._cache and error is None else None
        # a pipe of that name would wait for ever
        if kernels is not None and os.path.lexists(self._kernels) and not self._kernels.is_file():
            kernels = None
        if kernels is not None and len(self._kept) < kernels.nbytes <= MOST_KERNELS:
            try:
                with replacing(self._kernels) as file:
                    file.write(hashlib.sha256(kernels).digest())
                    file.write(memoryview(kernels))
            except FBClipError as refusal:  # a bundle that can't be written to
                logger.warning("the next start compiles its kernels again: %s", refusal)
        self._config = self._cache = None


def _read_kernels(path: Path) -> bytes:
    """Compiled kernels, checked against the hash before them; nothing where there are none, or damaged ones."""
    try:
        content = read_bytes(path, DIGEST + MOST_KERNELS)
    except ValueError:
        return b""
    kernels = content[DIGEST:]
    return kernels if hashlib.sha256(kernels).digest() == content[:DIGEST] else b""


class _Slot:
    """A batch in flight: stream, execution context, buffers on both sides. Made and used in the current context."""

    def __init__(self, gpu: Gpu, context: Any) -> None:
        cuda = gpu.cuda
        self.context = context
        if self.context is None:
            raise DeviceError(f"{gpu.title} can't make an execution context: {gpu.error()}")
        self.gpu = gpu
        self.stream = cuda.Stream()
        self.computed, self.done = cuda.Event(), cuda.Event()
        self.host: dict[str, NDArray[Any]] = {}
        self.device: dict[str, Any] = {}
        self.graph: CudaGraph | None = None
        self.shape: tuple[int, ...] = ()
        self.is_prepared = False  # TensorRT has run this shape before

    def reserve(self, largest: tuple[int, ...]) -> None:
        """Buffers for the largest batch: pinned memory on the host, and memory on the device that is bound for good."""
        cuda = self.gpu.cuda
        self._set_shape(largest)
        for name, dtype in ((IMAGE, np.uint8), (SCORE, np.float32), (ANOMALY_MAP, np.float32)):
            shape = tuple(int(n) for n in self.context.get_tensor_shape(name))
            self.host[name] = cuda.pagelocked_empty(shape, dtype)
            self.device[name] = cuda.mem_alloc(self.host[name].nbytes)
            self.context.set_tensor_address(name, int(self.device[name]))

    def upload(self, images: NDArray[np.uint8]) -> None:
        count = len(images)
        if images.shape != self.shape:
            self._set_shape(images.shape)
        self.host[IMAGE][:count] = images
        self.gpu.cuda.memcpy_htod_async(self.device[IMAGE], self.host[IMAGE][:count], self.stream)

    def download(self) -> None:
        count = self.shape[0]
        for name in (SCORE, ANOMALY_MAP):
            self.gpu.cuda.memcpy_dtoh_async(self.host[name][:count], self.device[name], self.stream)
        self.done.record(self.stream)

    def enqueue(self) -> bool:
        return bool(self.context.execute_async_v3(self.stream.handle))

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        if not self.context.set_input_shape(IMAGE, shape):
            raise DeviceError(f"{self.gpu.title} refused the shape {shape}: {self.gpu.error()}")
        self.shape, self.is_prepared = shape, False
        self._drop_graph()

    def _drop_graph(self) -> None:
        graph, self.graph = self.graph, None
        if graph is not None:
            graph.free()

    def free(self) -> None:
        with suppress(CaptureError):
            self._drop_graph()
        self.context = None
        for memory in self.device.values():
            memory.free()
        self.host, self.device = {}, {}
        self.stream = self.computed = self.done = None
