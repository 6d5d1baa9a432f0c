"""TensorRT, or TensorRT-RTX, which has the same classes; the GPU as PyCUDA and they show it: a CUDA context, what a plan
is bound to, memory, messages; and the replay of enqueued work as a CUDA graph, through cuda-bindings, since PyCUDA has no
stream capture.

These packages are imported when a GPU is asked for, never before.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from traceback import clear_frames
from typing import Any

from fbclip.engines import AMPERE, Platform, RtxPlatform
from fbclip.errors import DeviceError, reason

messages = logging.getLogger("fbclip.tensorrt")
messages.addHandler(logging.NullHandler())  # errors reach the user as exceptions, not also as lines on stderr


def load_module(name: str) -> Any:
    """A package of NVIDIA's or for its GPUs, which may be broken in any way, and may print what is no result of ours.

    Raises:
        ImportError: it is missing, or does anything but load.
    """
    try:
        with redirect_stdout(sys.stderr):
            return import_module(name)
    except (Exception, SystemExit) as error:
        raise ImportError(str(error) if isinstance(error, ImportError | OSError) else reason(error)) from error


class Library:
    """TensorRT, or TensorRT-RTX, which builds plans without a GPU.

    Attributes:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        title: in messages.
        log: the library's logger; `log.errors` are the errors since it was made.

    Raises:
        DeviceError: it is not installed.
    """

    def __init__(self, rtx: bool = False) -> None:
        self.title = RtxPlatform.LIBRARY if rtx else Platform.LIBRARY
        module, package = ("tensorrt_rtx", "tensorrt-rtx-cu13") if rtx else ("tensorrt", "'fbclip[tensorrt]'")
        try:
            self.trt: Any = load_module(module)
            self.log = _logger(self.trt)
        except (ImportError, AttributeError) as error:  # AttributeError: half of it is there
            raise DeviceError(f"{self.title} engines need {module} ({error}): pip install {package}") from error

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that TensorRT-RTX builds our graphs for, like "8.9".

        Turing's 7.5 is not among them: the builder refuses products of float32 there, and every graph of ours has some.
        """
        found = [re.fullmatch(r"SM(\d+)(\d)", name) for name in self.trt.ComputeCapability.__members__]
        numbers = sorted((int(match[1]), int(match[2])) for match in found if match)
        return tuple(f"{major}.{minor}" for major, minor in numbers if (major, minor) >= AMPERE)

    @property
    def platform(self) -> Platform | RtxPlatform:
        """What plans are bound to that are built without a GPU."""
        return RtxPlatform(self.trt.__version__, self.capabilities)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Without a GPU there is nothing to make current."""
        yield

    def error(self) -> str:
        """The first error that was logged, which is the cause of the others, as one line; it names the layer."""
        return " ".join(self.log.errors[0].split()) if self.log.errors else f"{self.title} gave no reason"


class Gpu(Library):
    """A CUDA context on the first GPU (CUDA_VISIBLE_DEVICES chooses); current only inside `with gpu.current():`.

    A context of its own rather than the primary one: an error on the device lives as long as its context, so closing
    this one clears it.

    Attributes:
        cuda: the module `pycuda.driver`.
        name, capability: of the GPU, like "Orin" and "8.7".

    Raises:
        DeviceError: a package is missing, no GPU answers, or TensorRT-RTX has no plans for it.
    """

    def __init__(self, rtx: bool = False) -> None:
        super().__init__(rtx)
        self._rtx = rtx
        try:
            cuda = load_module("pycuda.driver")
        except ImportError as error:
            raise DeviceError(
                f"{self.title} engines run with pycuda ({error}): pip install 'fbclip[{'rtx' if rtx else 'tensorrt'}]' "
                f"on a machine with NVIDIA's driver and CUDA toolkit"
            ) from error
        self.cuda: Any = cuda
        try:
            cuda.init()
            device = cuda.Device(0)
            self.name = device.name()
            self.capability = ".".join(map(str, device.compute_capability()))
            self._require_known()
            self._context = device.make_context()
        except cuda.Error as error:
            raise DeviceError(f"{self.title} engines need an NVIDIA GPU; the driver says: {error}") from error
        cuda.Context.pop()

    def _require_known(self) -> None:
        """Said before anything is built or loaded: TensorRT-RTX itself refuses only when it loads a plan."""
        if self._rtx and self.capability not in (known := self.capabilities):
            raise DeviceError(
                f"TensorRT-RTX runs on GPUs of compute capability {', '.join(known)}; {self.name} has "
                f"{self.capability}: choose the device cuda or tensorrt"
            )

    @property
    def platform(self) -> Platform | RtxPlatform:
        """What plans are bound to here."""
        if self._rtx:
            return RtxPlatform(self.trt.__version__, (self.capability,))
        return Platform(self.name, self.capability, self.trt.__version__)

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
        return load_module("cuda.bindings.driver")
    except ImportError:
        return None


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
