"""What a sink's queue says of what it lost."""

from __future__ import annotations

import threading
import time

import pytest

from fbclip.runtime.live import delivery
from fbclip.runtime.live.delivery import Delivery
from fbclip.runtime.live.records import Notice, Record
from helpers.delivered import result
from helpers.waiting import PATIENCE_S, eventually


class Disk:
    """A sink that is full until it has room, or holds whoever writes until then."""

    name = "disk"

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.room, self.entered = threading.Event(), threading.Event()
        self.written: list[int] = []

    def write(self, result: Record) -> None:
        self.entered.set()
        if self.fails and not self.room.is_set():
            raise OSError(28, "No space left on device")
        assert self.room.wait(PATIENCE_S)
        self.written.append(result.frame.index)

    def notify(self, notice: Notice) -> None:
        """Nothing to tell."""

    def close(self) -> None:
        """Nothing to release."""


def test_a_loss_keeps_its_reason_when_the_sink_works_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PAUSES_S", (0.001, 0.01))
    disk = Disk(fails=True)
    queue = Delivery(disk, 4, False, lambda *_: None)
    queue.put(result(0))
    eventually(lambda: queue.failure)
    for index in range(1, 20):
        queue.put(result(index))
    disk.room.set()
    eventually(lambda: queue.failure is None)
    queue.close()
    queue.join(PATIENCE_S)
    assert queue.dropped == 20 - len(disk.written) > 0
    assert queue.dropped_because == "[Errno 28] No space left on device"


def test_only_what_was_too_slow_is_said_to_be() -> None:
    disk = Disk(fails=False)
    queue = Delivery(disk, 4, False, lambda *_: None)
    for index in range(20):
        queue.put(result(index))
    disk.room.set()
    queue.close()
    queue.join(PATIENCE_S)
    assert queue.dropped == 20 - len(disk.written) > 0
    assert queue.dropped_because == "it was too slow"


def test_what_hangs_at_the_end_is_told() -> None:
    disk = Disk(fails=False)
    queue = Delivery(disk, 4, False, lambda *_: None)
    queue.put(result(0))
    assert disk.entered.wait(PATIENCE_S)
    queue.drain(time.monotonic())
    queue.close()
    queue.join(grace=0.01)
    disk.room.set()
    assert (queue.dropped, queue.dropped_because) == (1, "did not close in time")
