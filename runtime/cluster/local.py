"""Parts in processes of this machine: one that crashes takes its part along, which another does again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

from fbclip.errors import FBClipError, UsageError
from fbclip.runtime.cluster.archive import Part
from fbclip.runtime.cluster.job import Job, checked, receipt_of
from fbclip.runtime.cluster.results import Receipt
from fbclip.runtime.host import ProcessFailed
from fbclip.runtime.workers import Worker

CRASHES = 3  # of workers at one part, before that is not done


class Crew:
    """Workers of this machine.

    Args:
        job: what they do.
        workers: how many.
        cores: of each.
    """

    def __init__(self, job: Job, workers: int, cores: int) -> None:
        self._job, self._cores = job, cores
        self._workers: list[Worker | None] = [None] * workers
        self._done: SimpleQueue[tuple[Part, Receipt] | Exception] = SimpleQueue()
        self._turn = threading.Lock()
        self._closed = False

    def work(self, parts: list[Part]) -> Iterator[tuple[Part, Receipt]]:
        """Parts as they are done, in no order.

        Raises:
            FBClipError: of a worker, or it crashed `CRASHES` times at one part.
        """
        waiting = iter(parts)
        threads = [
            threading.Thread(target=self._serve, args=(place, waiting), name=f"worker-{place}", daemon=True)
            for place in range(min(len(self._workers), len(parts)))
        ]
        for thread in threads:
            thread.start()
        for _ in parts:
            done = self._done.get()
            if isinstance(done, Exception):
                raise done
            yield done

    def close(self) -> None:
        """End all workers at once: what a killed one left half written has no name."""
        with self._turn:
            self._closed = True
            for worker in filter(None, self._workers):
                worker.close()

    def _serve(self, place: int, waiting: Iterator[Part]) -> None:
        try:
            while True:
                with self._turn:
                    part = next(waiting, None)
                if part is None or self._closed:
                    return
                self._done.put((part, self._do(place, part)))
        except Exception as error:
            if not self._closed:
                self._done.put(error)

    def _do(self, place: int, part: Part) -> Receipt:
        for crash in range(1, CRASHES + 1):
            try:
                worker = self._workers[place] or self._start(place)
                return receipt_of(worker.ask("score", part=part.to_json()))
            except ProcessFailed as error:
                self._end(place)
                if self._closed or error.usage:
                    raise UsageError(str(error)) from error
                if crash == CRASHES:
                    first = part.items[0].name if part.items else part.rows and part.rows.table.name
                    raise FBClipError(
                        f"{CRASHES} workers failed at the {len(part)} images from {first} on, the last one: {error}"
                    ) from error
        raise AssertionError

    def _start(self, place: int) -> Worker:
        job = self._job
        arguments: tuple[Any, ...] = (str(job.bundle.path), asdict(job.recipe), job.out, self._cores, job.maps)
        worker = Worker("fbclip.runtime.cluster.scorer:Scorer", *arguments)
        with self._turn:
            self._workers[place] = worker
            if self._closed:
                worker.close()
        checked(job, worker.ready, "a worker")
        return worker

    def _end(self, place: int) -> None:
        worker, self._workers[place] = self._workers[place], None
        if worker:
            with suppress(OSError):
                worker.close()
