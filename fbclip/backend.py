"""What runs a model, whatever it is: the contract of all backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fbclip.errors import UsageError
from fbclip.memory import Shape, Tensors

Results = tuple[NDArray[np.float32], NDArray[np.float32]]
Self = TypeVar("Self", bound="Backend")


class Described(NamedTuple):
    """Images as a memory is learned from them: features float32 (B, L, F) of their patches, and zero-shot logits
    float32 (B, 1 + L), the class token's first."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32]


class Backend(ABC):
    """A model on a device, whatever runs it. Any number of threads may run it; they take turns.

    Attributes:
        device: where it runs.
        launches: how executions are started, where there is a choice: "CUDA graph", or "enqueue" or "kernel by kernel" and why.
        memory_shape: of the tensors of a memory that it takes; None where it takes none.
    """

    device: str
    launches: str | None = None
    memory_shape: Shape | None = None

    @abstractmethod
    def run(self, images: NDArray[np.uint8]) -> Results:
        """Images uint8 (B, H, W, 3) -> scores float32 (B,), maps float32 (B, H', W'), both 0..1.

        Raises:
            DeviceError: it is closed.
        """

    def run_each(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[Results]:
        """The results of batch after batch, each as `run` gives it.

        A device with its own memory is given the next batch before the results of the one before are waited for, so
        that it never stands still: for a camera, whose next frame is yet to come, `run` has them sooner.
        """
        return map(self.run, batches)

    def set_memory(self, tensors: Tensors | None) -> None:
        """Exchange the memory of good parts that all later runs use; None is the zero-shot model.

        A copy into buffers that are there, once calls under way are done: no new session, no new engine.

        Raises:
            UsageError: the graph has no inputs for a memory, or the tensors are of another shape or type.
            DeviceError: it is closed.
        """
        if self.memory_shape is not None:
            self._write_memory((tensors or Tensors.neutral(self.memory_shape)).checked(self.memory_shape))
        elif tensors is not None:
            raise self._no_memory()

    def _write_memory(self, tensors: Tensors) -> None:
        """Copy tensors, which fit, to where the graph reads them."""
        raise NotImplementedError

    def describe(self, images: NDArray[np.uint8]) -> Described:
        """Images uint8 (B, H, W, 3) -> what a memory is learned from; the memory that is set makes no difference.

        Raises:
            UsageError: the graph has no inputs for a memory.
            DeviceError: it is closed.
        """
        raise self._no_memory()

    def _no_memory(self) -> UsageError:
        return UsageError(f"what runs on {self.device} has no inputs for a memory: export it again with fbclip export")

    def device_times(self, images: NDArray[np.uint8]) -> dict[str, float] | None:
        """Milliseconds of one run by the device's own events: upload, compute, download. None where it has none."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give everything on the device back, once calls under way are done; safe to call again."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
