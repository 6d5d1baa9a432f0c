"""What runs a model, whatever it is: the contract of all backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Results = tuple[NDArray[np.float32], NDArray[np.float32]]
Self = TypeVar("Self", bound="Backend")


class Backend(ABC):
    """A model on a device, whatever runs it. Any number of threads may run it; they take turns.

    Attributes:
        device: where it runs.
        launches: how executions are started, where there is a choice: "CUDA graph", or "enqueue" and why.
    """

    device: str
    launches: str | None = None

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
