"""Work in Python processes of their own: a library that crashes, hangs or takes all memory takes only its process along.

A worker makes one object, answers with that object's `ready()`, then calls the methods that it is asked for. Requests
and answers are lines of JSON over pipes; the worker ends when its input does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pkgutil import resolve_name
from typing import IO, Any

from fbclip.errors import UsageError, reason
from fbclip.runtime.host import ProcessFailed

PROGRAM = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from fbclip.runtime.workers import serve; serve(sys.argv[2])"


class Worker:
    """A process that serves one object, from the side of the one that asks, until it is closed.

    Args:
        target: what makes the object, as "module:name".
        arguments: of `target`, plain values.
        patience: seconds that an answer may take; None for any time.

    Attributes:
        pid: of the process.
        ready: its first answer.
        start_seconds: from the start of the process to that answer.

    Raises:
        ProcessFailed: the object could not be made, or the process crashed or hung.
    """

    def __init__(self, target: str, *arguments: Any, patience: float | None = None) -> None:
        self._patience, self._is_late = patience, False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        path = json.dumps(sys.path, allow_nan=False)
        command = [sys.executable, "-c", PROGRAM, path, target]
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self.pid = self._process.pid
        try:
            with suppress(BrokenPipeError):  # then there is no answer, which says why
                _send(self._process.stdin, arguments)  # everybody can read a command line, and there may be secrets
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start

    def ask(self, method: str, **values: Any) -> Any:
        """Call a method of the object, and wait for what it returns.

        Raises:
            ProcessFailed: it raised, or the process has gone.
        """
        with suppress(BrokenPipeError):  # then there is no answer, which says why
            _send(self._process.stdin, {"call": method, "with": values})
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        late = threading.Timer(self._patience or 0.0, self._give_up)
        if self._patience is not None:
            late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            raise ProcessFailed(self._why_it_ended())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ProcessFailed(answer["error"], answer["missing"], answer["usage"])
        return answer["found"]

    def _give_up(self) -> None:
        self._is_late = True
        self._process.kill()

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if self._is_late:
            return f"did not answer within {self._patience:g} s"
        if code < 0:
            return f"crashed with signal {-code} (9 is often: out of memory)"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"failed: {lines[-1] if lines else 'no word why'}"

    def close(self) -> None:
        """End the process at once, without the libraries' own clean-up, which is where broken drivers crash."""
        self._process.kill()
        self._process.wait()
        self._said.close()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if pipe:
                    pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(target: str) -> None:
    """The worker's side: serve until the input ends. Ctrl-C reaches the whole process group; the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # libraries print to standard output, natively too
    try:
        served = resolve_name(target)(*json.loads(requests.readline()))
        _send(answers, {"found": served.ready()})
        while line := requests.readline():
            request = json.loads(line)
            _send(answers, {"found": getattr(served, request["call"])(**request["with"])})
    except BaseException as error:  # an import may call sys.exit
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        usage = isinstance(error, UsageError | ImportError)
        _send(answers, {"error": reason(error), "missing": missing, "usage": usage})
        sys.stderr.flush()
        os._exit(0)


def _send(channel: IO[str] | None, values: Any) -> None:
    assert channel
    channel.write(json.dumps(values, allow_nan=False) + "\n")
    channel.flush()
