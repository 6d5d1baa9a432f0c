"""The GPU as PyCUDA and TensorRT show it: a CUDA context, what a plan is bound to, memory, messages; and the replay of
enqueued work as a CUDA graph, through cuda-bindings, since PyCUDA has no stream capture.

These packages are imported when a GPU is asked for, never before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from traceback import clear_frames
from typing import Any

from fbclip.engines import Platform
from fbclip.errors import DeviceError

messages = logging.getLogger("fbclip.tensorrt")
messages.addHandler(logging.NullHandler())  # errors reach the user as exceptions, not also as lines on stderr


class Gpu:
    """A CUDA context on the first GPU (CUDA_VISIBLE_DEVICES chooses); current only inside `with gpu.current():`.

    A context of its own rather than the primary one: an error on the device lives as long as its context, so closing
    this one clears it.

    Attributes:
        cuda, trt: the modules `pycuda.driver` and `tensorrt`.
        platform: what plans are bound to here.
        log: TensorRT's logger; `log.errors` are the errors since it was made.

    Raises:
        DeviceError: a package is missing, or no GPU answers.
    """

    def __init__(self) -> None:
        try:
            import pycuda.driver as cuda
            import tensorrt as trt
        except (ImportError, OSError) as error:  # OSError: TensorRT's own libraries are not there
            raise DeviceError(
                f"TensorRT engines need tensorrt and pycuda ({error}): pip install 'fbclip[tensorrt]' on a machine "
                f"with NVIDIA's driver and CUDA toolkit"
            ) from error
        self.cuda: Any = cuda
        self.trt: Any = trt
        try:
            cuda.init()
            device = cuda.Device(0)
            self._context = device.make_context()
        except cuda.Error as error:
            raise DeviceError(f"TensorRT engines need an NVIDIA GPU; the driver says: {error}") from error
        cuda.Context.pop()
        capability = ".".join(map(str, device.compute_capability()))
        self.platform = Platform(device.name(), capability, trt.__version__)
        self.log = _logger(trt)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current for the calling thread, one at a time, and CUDA's errors DeviceErrors."""
        try:
            self._context.push()
            try:
                yield
            finally:
                self.cuda.Context.pop()
        except self.cuda.Error as error:
            raise DeviceError(f"the GPU failed: {' '.join(str(error).split())}") from error

    def error(self) -> str:
        """The first error TensorRT logged, which is the cause of the others, as one line; it names the layer."""
        return " ".join(self.log.errors[0].split()) if self.log.errors else "TensorRT gave no reason"

    def close(self, error: BaseException | None = None) -> None:
        """Destroy the context; whatever was made in it must be gone.

        Args:
            error: on its way; what its frames still hold goes too, while that is possible.
        """
        with suppress(self.cuda.Error):
            self._context.push()  # only a current context can be destroyed from any thread
            while error is not None:
                clear_frames(error.__traceback__)
                error = error.__cause__ or error.__context__
            self._context.detach()


def _logger(trt: Any) -> Any:
    severities = trt.ILogger.Severity
    levels = {
        severities.INTERNAL_ERROR: logging.CRITICAL,
        severities.ERROR: logging.ERROR,
        severities.WARNING: logging.WARNING,
        severities.INFO: logging.INFO,
        severities.VERBOSE: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            messages.log(levels[severity], msg)
            if levels[severity] >= logging.ERROR:
                self.errors.append(msg)

    return Logger()


class CaptureError(Exception):
    """The work can't be captured; it has to be enqueued each time."""


def load_driver() -> Any | None:
    """The module `cuda.bindings.driver`, or None where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


class CudaGraph:
    """What `enqueue` puts on a stream, as one launch.

    Args:
        driver: of `load_driver`.
        stream: the address of the stream.
        enqueue: puts the work on that stream; tells whether it could.

    Raises:
        CaptureError: the work can't be captured; the stream is usable as before.
    """

    def __init__(self, driver: Any, stream: int, enqueue: Callable[[], bool]) -> None:
        self._driver = driver
        self._stream = driver.CUstream(stream)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL  # other threads may use the GPU meanwhile
        self._call(driver.cuStreamBeginCapture, self._stream, mode)
        enqueued = enqueue()
        graph = self._call(driver.cuStreamEndCapture, self._stream)
        try:
            if not enqueued:
                raise CaptureError("TensorRT refused to enqueue while capturing")
            self._executable = self._call(driver.cuGraphInstantiate, graph, 0)
        finally:
            self._call(driver.cuGraphDestroy, graph)

    def launch(self) -> None:
        self._call(self._driver.cuGraphLaunch, self._executable, self._stream)

    def free(self) -> None:
        self._call(self._driver.cuGraphExecDestroy, self._executable)

    @staticmethod
    def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        result, *values = function(*arguments)
        if int(result) != 0:  # CUDA_SUCCESS
            raise CaptureError(f"{function.__name__}: {result.name}")
        return values[0] if values else None
