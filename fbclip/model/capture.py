"""Work on a GPU that is started as one CUDA graph: launching the thousands of kernels of a small model one by one takes
longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Work = Callable[..., Sequence[Tensor]]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]


class Captured:
    """Work that is run plainly at the first call with inputs of some shapes, captured at the second and replayed from then on.

    Args:
        work: of tensors on a CUDA device to tensors, without a look at the host in between. What else it writes, such
            as gradients, has to stay at its address.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self._seen: set[object] = set()
        self._graphs: dict[object, _Graph] = {}
        self._pool: Any = None  # one for all graphs, because no two of them run at once

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The work's results; the caller may keep them."""
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in self._seen:
            self._seen.add(key)
            return self._first(inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        graph = self._graphs[key]
        for buffer, given in zip(graph.inputs, inputs, strict=True):
            buffer.copy_(given)
        graph.graph.replay()
        return tuple(output.clone() for output in graph.outputs)

    def _first(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run plainly, in a stream of its own: nothing that libraries set up lazily may meet a capture, nor may autograd
        tie gradients to the default stream, which can't be captured (docs.pytorch.org/docs/stable/notes/cuda.html)."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            results = tuple(self.work(*inputs))
        here.wait_stream(aside)
        for tensors, used_in in ((inputs, aside), (results, here)):
            for tensor in tensors:
                tensor.record_stream(used_in)
        return results

    def _capture(self, inputs: Sequence[Tensor]) -> _Graph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        buffers, graph = [t.clone() for t in inputs], torch.cuda.CUDAGraph()
        # of this thread alone: the one that pins batches allocates meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = list(self.work(*buffers))
        return _Graph(graph, buffers, outputs)
