"""Replay of enqueued work as a CUDA graph, through cuda-bindings; PyCUDA has no stream capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
