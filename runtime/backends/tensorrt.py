"""A TensorRT plan as a backend: needs tensorrt and PyCUDA, neither torch nor ONNX Runtime."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import RLock, get_ident
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT, Bundle
from fbclip.errors import BundleError, DeviceError, UsageError
from fbclip.runtime.backends.cuda import CaptureError, CudaGraph, Gpu, load_driver

Results = tuple[NDArray[np.float32], NDArray[np.float32]]
BATCHES = 2  # in flight: while one computes, the next is uploaded

logger = logging.getLogger(__name__)


class TensorRTBackend:
    """A bundle's engine on the first GPU. Any number of threads may `run` it; they take turns.

    All memory is reserved at the start, for the largest batch. Two batches can be in flight, each with a stream, an
    execution context and pinned buffers of its own: `submit` the next frame, then `collect` the one before. They
    compute one after the other, in scratch memory that they share, while copies go on. What is in flight belongs to
    the thread that submitted it: until it has collected that, other threads are refused, as one of them would get
    another's results.

    Args:
        bundle: with a plan for this device.
        precision: of the plan.
        batch: images at once that it must take.

    Attributes:
        device: "tensorrt".
        plan: the file that runs.
        input_shape: (H, W, 3) of the images it takes.
        launches: how executions are started: "CUDA graph", or "enqueue" and why.

    Raises:
        DeviceError: no GPU, no fitting plan, or not enough memory.
        BundleError: the plan is damaged.
    """

    device = "tensorrt"

    def __init__(self, bundle: Bundle, precision: str, batch: int = 1) -> None:
        self._slots: list[_Slot] = []
        self._memory: list[Any] = []
        self._pending: deque[_Slot] = deque()
        self._owner = 0  # the thread whose batches are pending
        self._lock = RLock()  # of everything here; a thread that has it may close the backend
        self._turn = 0
        self._engine = self._runtime = None
        self._driver = load_driver()
        self.launches = "CUDA graph" if self._driver else "enqueue (cuda-bindings is not installed)"
        self._gpu: Gpu | None = Gpu()
        try:
            self.plan, sidecar = bundle.engine(precision, self._gpu.platform, batch)
            self._low, _, self._high = sidecar.options.batch
            with self._gpu.current():
                self._runtime = self._gpu.trt.Runtime(self._gpu.log)
                # A plan for later versions carries its runtime, which is code; the bundle has checked the file.
                self._runtime.engine_host_code_allowed = sidecar.options.version_compatible
                self._engine = self._runtime.deserialize_cuda_engine(self.plan.read_bytes())
                if self._engine is None:
                    raise DeviceError(f"TensorRT can't read {self.plan}: {self._gpu.error()}")
                self._reserve(bundle.text)
        except BaseException as error:
            self._close(error)
            raise

    def _reserve(self, text: NDArray[np.float32]) -> None:
        """Check the plan's tensors, upload the text, make the slots."""
        assert self._gpu and self._engine is not None
        engine, cuda = self._engine, self._gpu.cuda
        names = sorted(engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        if names != sorted((IMAGE, TEXT, SCORE, ANOMALY_MAP)):
            raise BundleError(
                f"a plan has the tensors of its graph; {self.plan} has {', '.join(names)}: build it again"
            )
        self.input_shape = tuple(int(n) for n in engine.get_tensor_shape(IMAGE))[1:]
        scratch_bytes = max(int(engine.device_memory_size_v2), 1)
        scratch = cuda.mem_alloc(scratch_bytes)
        device_text = cuda.mem_alloc(text.nbytes)
        self._memory = [scratch, device_text]
        cuda.memcpy_htod(device_text, np.ascontiguousarray(text))
        for _ in range(BATCHES):
            slot = _Slot(self._gpu, engine)
            self._slots.append(slot)
            slot.context.set_device_memory(int(scratch), scratch_bytes)
            slot.context.set_tensor_address(TEXT, int(device_text))
            slot.reserve((self._high, *self.input_shape))

    def run(self, images: NDArray[np.uint8]) -> Results:
        """Images uint8 (B, H, W, 3) -> scores float32 (B,), maps float32 (B, H', W'), both 0..1.

        Raises:
            DeviceError, UsageError: as `submit`.
        """
        with self._lock:
            self._require_own()
            if self._pending:
                raise RuntimeError("collect() what was submitted before run()")
            self.submit(images)
            return self.collect()

    def submit(self, images: NDArray[np.uint8]) -> None:
        """Start on images uint8 (B, H, W, 3) without waiting; they may be overwritten once this returns.

        Raises:
            UsageError: images of another shape, type or number than the plan was built for.
            DeviceError: batches of another thread are in flight. Or the GPU failed; then the backend is closed, and a
                new one can be made.
        """
        if images.shape[1:] != self.input_shape or images.dtype != np.uint8:
            taken = ", ".join(map(str, self.input_shape))
            raise UsageError(f"the engine takes images uint8 (B, {taken}); got {images.dtype} {images.shape}")
        if not self._low <= len(images) <= self._high:
            raise UsageError(
                f"{self.plan.name} takes {self._low} to {self._high} images at once, not {len(images)}: "
                f"choose another batch, or build it again with fbclip export --engine --batch MIN,OPT,MAX"
            )
        with self._on_gpu():
            if len(self._pending) == BATCHES:
                raise RuntimeError(f"{BATCHES} batches are in flight: collect() one before the next submit()")
            slot, other = self._slots[self._turn], self._slots[self._turn - 1]
            slot.upload(images)
            slot.stream.wait_for_event(other.computed)  # the scratch memory is its until then
            self._start(slot)
            slot.computed.record(slot.stream)
            slot.download()
            self._turn = (self._turn + 1) % BATCHES
            self._pending.append(slot)
            self._owner = get_ident()

    def collect(self) -> Results:
        """Wait for the oldest submitted batch: scores float32 (B,), maps float32 (B, H', W').

        Raises:
            DeviceError: as `submit`.
        """
        with self._on_gpu():
            if not self._pending:
                raise RuntimeError("collect() needs a submitted batch")
            slot = self._pending.popleft()
            slot.done.synchronize()
            count = slot.shape[0]
            return slot.host[SCORE][:count].copy(), slot.host[ANOMALY_MAP][:count].copy()

    def _require_own(self) -> None:
        """Refuse a thread while another has batches in flight."""
        if self._pending and self._owner != get_ident():
            raise DeviceError(
                "the engine has batches in flight that another thread submitted, and they are that thread's to "
                "collect(); to share an engine between threads, call run()"
            )

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
            raise DeviceError(f"TensorRT could not run {self.plan.name}: {self._gpu.error()}")
        slot.is_prepared = True

    def device_times(self, images: NDArray[np.uint8]) -> dict[str, float]:
        """Milliseconds of one run by the GPU's events: upload, compute, download. Nothing may be in flight."""
        with self._on_gpu():
            assert self._gpu and not self._pending
            slot = self._slots[self._turn]
            begin, uploaded, computed, end = (self._gpu.cuda.Event() for _ in range(4))
            begin.record(slot.stream)
            slot.upload(images)
            uploaded.record(slot.stream)
            self._start(slot)
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
        """Give everything on the device back; safe to call again. Results that were not collected are lost."""
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        with self._lock:
            gpu, self._gpu = self._gpu, None
            if gpu is not None:
                self._release(gpu, error)

    def _release(self, gpu: Gpu, error: BaseException | None) -> None:
        self._pending.clear()
        with suppress(DeviceError), gpu.current():
            with suppress(gpu.cuda.Error):  # what fails now has failed before
                gpu.cuda.Context.synchronize()
            while self._slots:
                self._slots.pop().free()
            while self._memory:
                self._memory.pop().free()
            self._engine = self._runtime = None  # after its contexts, before CUDA's
        gpu.close(error)

    def __enter__(self) -> TensorRTBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_gpu"):
            self.close()

    @contextmanager
    def _on_gpu(self) -> Iterator[None]:
        with self._lock:
            if self._gpu is None:
                raise DeviceError("this TensorRT backend is closed: make a new one")
            self._require_own()
            try:
                with self._gpu.current():
                    yield
            except (DeviceError, CaptureError) as error:
                self._close(error)
                raise DeviceError(f"{error}; the backend is closed, make a new one") from error


class _Slot:
    """A batch in flight: stream, execution context, buffers on both sides. Made and used in the current context."""

    def __init__(self, gpu: Gpu, engine: Any) -> None:
        cuda, trt = gpu.cuda, gpu.trt
        self.context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.context is None:
            raise DeviceError(f"TensorRT can't make an execution context: {gpu.error()}")
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
            raise DeviceError(f"TensorRT refused the shape {shape}: {self.gpu.error()}")
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
