"""Run a command with what Windows lacks taken away: `python windows.py infer …`. An imitation, for Windows isn't here.

Modules and functions of POSIX alone are gone, a file that is open keeps its name, and no signal but an end can be sent.
Other packages are imported before, so that they stay as they are here.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

OTHERS = (
    "cv2 numpy onnxruntime PIL.Image PIL.ImageFont psutil rich.console rich.progress typer multiprocessing tempfile"
)
OTHERS += " subprocess asyncio socket selectors uvicorn fastapi websockets prometheus_client jinja2 matplotlib.pyplot"
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog")
FUNCTIONS = "pread pwrite preadv fork forkpty getuid geteuid getgid getpgid setsid killpg chown fchown mkfifo statvfs"
FUNCTIONS += " sched_getaffinity getloadavg set_blocking O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_CLOEXEC O_SYNC"


def _refusing(function: Any) -> Any:
    """A renaming that refuses a file which this process has open, or one in whose place it would come."""

    def rename(source: Any, target: Any, **options: Any) -> None:
        handles = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
        is_open = {os.path.realpath(handle) for handle in handles if handle.exists() and handle.is_file()}
        for path in (source, target):
            if os.path.realpath(path) in is_open:
                raise PermissionError(13, "another process has it open", str(path))
        if function is os_rename and os.path.exists(target):  # noqa: PTH110
            raise FileExistsError(17, "it is there", str(target))
        function(source, target, **options)

    return rename


def _kill(process: int, number: int) -> None:
    raise SystemExit(f"on Windows os.kill ends process {process} at once, whatever {signal.Signals(number).name} means")


os_rename = os.rename


def pretend() -> None:
    """Make this process as poor as on Windows."""
    for name in OTHERS.split():
        importlib.import_module(name)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in FUNCTIONS.split():
        if hasattr(os, name):
            delattr(os, name)
    os.rename, os.replace, os.kill = _refusing(os.rename), _refusing(os.replace), _kill
    os.O_BINARY = 0  # type: ignore[attr-defined]
    sys.platform = "win32"


if __name__ == "__main__":
    pretend()
    from fbclip.main import main

    main()
