"""A GPU with CUDA's worst manners, for the stand-ins of PyCUDA, cuda-bindings and TensorRT.

Work waits in its stream until somebody synchronises, as late as CUDA allows it; what has not happened yet reads as
poison (NaN as a float). Memory that is freed, too small or of another context faults and takes its context along.
Two streams that use the same memory without an event between them are an AssertionError, and so is a context that is
destroyed before what was made in it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

POISON = 0xFF
TOTAL_MIB = 4096


class Error(Exception):
    """PyCUDA's exceptions have these names and this order (its src/wrapper/wrap_cudadrv.cpp)."""


class MemoryError(Error):
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


class RuntimeError(Error):
    pass


class _Stacks(threading.local):
    def __init__(self) -> None:
        self.contexts: list[Context] = []


_stacks = _Stacks()
_handles = count(0x55D0_0000_0000, 64)
_next_address = 0x7F00_0000_0000
living: weakref.WeakSet[Context] = weakref.WeakSet()


class Context:
    def __init__(self) -> None:
        self._is_alive = True
        self._fault: str | None = None
        self._memory: dict[int, np.ndarray[Any, Any]] = {}
        self._streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self._pinned: list[weakref.ref[Any]] = []
        self._users: list[weakref.ref[Any]] = []  # TensorRT's objects
        self._graphs: set[object] = set()
        self._claims: dict[object, tuple[int, int]] = {}  # by whom (stream, number) something was used last
        self._done: dict[int, int] = {}  # the last finished number of each stream
        living.add(self)

    def push(self) -> None:
        if not self._is_alive:
            raise LogicError("cuCtxPushCurrent failed: context is destroyed")
        _stacks.contexts.append(self)

    @staticmethod
    def pop() -> None:
        if not _stacks.contexts:
            raise LogicError("context::pop failed: invalid device context - cannot pop non-current context")
        _stacks.contexts.pop()

    def detach(self) -> None:
        assert _stacks.contexts and _stacks.contexts[-1] is self, "a context that isn't current leaks in other threads"
        left = {
            "allocations": len(self._memory),
            "streams": len(self._streams),
            "pinned arrays": sum(ref() is not None for ref in self._pinned),
            "graphs": len(self._graphs),
            "objects of TensorRT": sum(ref() is not None for ref in self._users),
        }
        assert not any(left.values()), f"the context is destroyed before what was made in it: {left}"
        _stacks.contexts.pop()
        self._is_alive = False
        living.discard(self)

    @staticmethod
    def synchronize() -> None:
        for stream in list(current()._streams.values()):
            stream._drain()


def top() -> Context:
    """The current context, whatever its state."""
    if not _stacks.contexts:
        raise LogicError("explicit_context_dependent failed: invalid device context - no currently active context?")
    return _stacks.contexts[-1]


def current() -> Context:
    """The current context, if it works."""
    context = top()
    if context._fault:
        raise LaunchError(context._fault)
    return context


def stack_is_empty() -> bool:
    return not _stacks.contexts


class Device:
    def __init__(self, number: int) -> None:
        if number != 0:
            raise LogicError("cuDeviceGet failed: invalid device ordinal")

    def name(self) -> str:
        return os.environ.get("STANDIN_GPU", "Stand-in Orin (nvgpu)")

    def compute_capability(self) -> tuple[int, int]:
        major, minor = os.environ.get("STANDIN_CAPABILITY", "8.7").split(".")
        return int(major), int(minor)

    def make_context(self, flags: int = 0) -> Context:
        context = Context()
        context.push()
        return context


def init(flags: int = 0) -> None:
    if os.environ.get("STANDIN_GPU") == "":
        raise RuntimeError("cuInit failed: no CUDA-capable device is detected")


def mem_get_info() -> tuple[int, int]:
    used = sum(block.nbytes for block in current()._memory.values())
    free = int(float(os.environ.get("STANDIN_FREE_MIB", TOTAL_MIB)) * 2**20)
    return free - used, TOTAL_MIB * 2**20


class DeviceAllocation:
    def __init__(self, address: int, context: Context) -> None:
        self._address, self._context = address, context

    def __int__(self) -> int:
        return self._address

    __index__ = __int__

    def free(self) -> None:
        if self._address not in self._context._memory:
            raise LogicError("DeviceAllocation.free failed: it is free")
        assert _stacks.contexts and _stacks.contexts[-1] is self._context, "freed in another context"
        del self._context._memory[self._address]


def mem_alloc(bytes: int) -> DeviceAllocation:
    global _next_address
    context = current()
    if bytes < 1:
        raise LogicError("cuMemAlloc failed: invalid argument")
    if bytes > mem_get_info()[0]:
        raise MemoryError("cuMemAlloc failed: out of memory")
    address = _next_address
    _next_address += (bytes + 511) // 256 * 256
    context._memory[address] = np.full(bytes, POISON, np.uint8)
    return DeviceAllocation(address, context)


def at(context: Context, address: object, size: int) -> np.ndarray[Any, Any]:
    """That much of the device's memory, or a fault that the context does not survive."""
    place = int(address)  # type: ignore[call-overload]
    for base, block in context._memory.items():
        if base <= place and place + size <= base + block.nbytes:
            return block[place - base : place - base + size]
    fail(context, "cuStreamSynchronize failed: an illegal memory access was encountered")
    raise AssertionError


def fail(context: Context, message: str) -> None:
    """An error that lasts as long as the context."""
    context._fault = message
    for stream in context._streams.values():
        stream._queue.clear()
    raise LaunchError(message)


def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray[Any, Any]:
    array = np.empty(shape, dtype, order)  # type: ignore[call-overload]
    array.view(np.uint8).fill(POISON)
    current()._pinned.append(weakref.ref(array))
    return array


def _check_pinned(context: Context, array: np.ndarray[Any, Any]) -> None:
    start = array.__array_interface__["data"][0]
    for pinned in (ref() for ref in context._pinned):
        if pinned is not None:
            base = pinned.__array_interface__["data"][0]
            if base <= start and start + array.nbytes <= base + pinned.nbytes:
                return
    raise AssertionError("a copy from or to memory that isn't pinned does not run beside anything")


def _bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)


def memcpy_htod(dest: Any, src: Any) -> None:
    context = current()
    stream, number = context._claims.get(int(dest), (0, 0))
    assert context._done.get(stream, 0) >= number, "a copy under work that uses the memory"
    at(current(), dest, src.nbytes)[:] = _bytes(src)


def memcpy_htod_async(dest: Any, src: Any, stream: Stream | None = None) -> None:
    context = current()
    assert stream is not None
    _check_pinned(context, src)

    def copy() -> None:
        at(context, dest, src.nbytes)[:] = _bytes(src)

    stream._put(copy, int(dest))


def memcpy_dtoh_async(dest: Any, src: Any, stream: Stream | None = None) -> None:
    context = current()
    assert stream is not None
    _check_pinned(context, dest)
    _bytes(dest).fill(POISON)

    def copy() -> None:
        _bytes(dest)[:] = at(context, src, dest.nbytes)

    stream._put(copy, int(src))


class Stream:
    def __init__(self, flags: int = 0) -> None:
        self._context = current()
        self.handle = next(_handles)
        self._context._streams[self.handle] = self
        self._queue: deque[tuple[int, Callable[[], None]]] = deque()
        self._count = 0  # pieces of work so far
        self._happened: dict[int, int] = {}  # how far other streams are, at least, when the next piece runs
        self._capture: list[tuple[Callable[[], None], tuple[object, ...]]] | None = None

    def _put(self, work: Callable[[], None], *uses: object) -> None:
        """Queue work that uses memory (by address) or other things that one stream at a time may use."""
        context = current()
        assert self._context is context, "a stream of another context"
        if self._capture is not None:
            self._capture.append((work, uses))
            return
        self._count += 1
        for thing in uses:
            other, number = context._claims.get(thing, (self.handle, 0))
            so_far = max(context._done.get(other, 0), self._happened.get(other, 0))
            assert other == self.handle or so_far >= number, "two streams use the same thing at once"
            context._claims[thing] = (self.handle, self._count)
        self._queue.append((self._count, work))

    def _drain(self, until: int | None = None) -> None:
        while self._queue and (until is None or self._queue[0][0] <= until):
            number, work = self._queue.popleft()
            work()
            self._context._done[self.handle] = number

    def synchronize(self) -> None:
        current()
        assert self._capture is None, "a capturing stream can't be waited for"
        self._drain()

    def is_done(self) -> bool:
        return not self._queue

    def wait_for_event(self, event: Event) -> None:
        current()
        stream, number = event._stream, event._number
        if stream is None:  # never recorded
            return
        if self._capture is not None:
            raise LogicError("cuStreamWaitEvent failed: dependency created on uncaptured work in another stream")
        self._put(lambda: stream._drain(number))
        for other, happened in (*event._happened.items(), (stream.handle, number)):
            self._happened[other] = max(self._happened.get(other, 0), happened)


class Event:
    def __init__(self, flags: int = 0) -> None:
        current()
        self._stream: Stream | None = None
        self._number = 0
        self._happened: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> Event:
        current()
        assert stream is not None and stream._capture is None
        self._stream, self._number, self._happened = stream, stream._count, dict(stream._happened)
        return self

    def synchronize(self) -> Event:
        current()
        if self._stream is not None:
            self._stream._drain(self._number)
        return self

    def query(self) -> bool:
        return self._stream is None or self._stream._context._done.get(self._stream.handle, 0) >= self._number
