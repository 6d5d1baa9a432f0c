"""The machine: its files and commands, cores and memory, cameras, and the video backends of its OpenCV."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from fbclip.errors import FBClipError

SYSTEM_SITE = "python3 -m venv --system-site-packages .venv  # apt's Python packages are only seen from such a venv"
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's
_used: int | None = None  # cores that `use_cores` keeps this process to
GSTREAMER = f"pip uninstall -y opencv-python-headless && sudo apt install python3-opencv && {SYSTEM_SITE}"


class ProcessFailed(FBClipError):
    """A process that gave no answer, or says that it failed.

    Attributes:
        missing: the module or command that is not there, if that was it.
        usage: what was asked for is not there, rather than broken.
    """

    def __init__(self, message: str, missing: str | None = None, usage: bool = False) -> None:
        super().__init__(message)
        self.missing, self.usage = missing, usage


@dataclass(frozen=True)
class Memory:
    """Of a machine, in bytes; `available` is what a program can have without swapping."""

    total: int
    available: int
    swap: int


@dataclass(frozen=True)
class Machine:
    """The machine that is looked at.

    Attributes:
        root: where its /dev, /etc, /proc and /sys are.
        path: where its commands are, as in $PATH.
        patience: seconds that a probe or command may take.
    """

    root: Path = Path("/")
    path: str = os.environ.get("PATH", os.defpath)
    patience: float = 120.0

    def read(self, path: str) -> str:
        """The text of a file below the root; empty where it can't be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip("\0\n ")
        except OSError:
            return ""

    def run(self, *command: str) -> str:
        """The standard output of a command.

        Raises:
            ProcessFailed: not there, too slow, or it says that it failed.
        """
        program = shutil.which(command[0], path=self.path)
        if program is None:
            raise ProcessFailed(f"no {command[0]} on PATH", command[0])
        name = command[0]
        try:
            done = subprocess.run(
                [program, *command[1:]],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=self.patience,
                text=True,
                errors="replace",
            )
        except subprocess.TimeoutExpired as error:
            raise ProcessFailed(f"{name} did not answer within {self.patience:g} s") from error
        if done.returncode < 0:
            raise ProcessFailed(f"{name} crashed with signal {-done.returncode} (9 is often: out of memory)")
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no word why").splitlines()[-1]
            raise ProcessFailed(f"{name} failed: {last}")
        return done.stdout

    def memory(self) -> Memory | None:
        """How much there is; None where the machine does not tell."""
        try:
            with self._procfs() as psutil:
                memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        except (ImportError, OSError):
            return None
        return Memory(memory.total, memory.available, swap.total)

    def busy_seconds(self) -> tuple[float, float] | None:
        """Core-seconds since the start of the machine that any process computed, and that a hypervisor took away;
        None where the machine does not tell."""
        try:
            with self._procfs() as psutil:
                times = psutil.cpu_times()
            return times.user + times.nice + times.system + times.irq + times.softirq, times.steal
        except (ImportError, OSError, AttributeError):  # AttributeError: of Linux alone
            return None

    @contextmanager
    def _procfs(self) -> Iterator[Any]:
        """psutil, which may be broken, reading the /proc of this machine."""
        import psutil

        before, psutil.PROCFS_PATH = getattr(psutil, "PROCFS_PATH", "/proc"), str(self.root / "proc")
        try:
            yield psutil
        finally:
            psutil.PROCFS_PATH = before

    def cameras(self) -> dict[Path, str]:
        """Device and label of each video device, by number; a USB camera mostly has a second one for its metadata."""
        devices = (self.root / "dev").glob("video[0-9]*")
        found = {}
        for device in sorted(devices, key=lambda d: int(re.sub(r"\D", "", d.name))):
            label = self.read(f"sys/class/video4linux/{device.name}/name") or "unnamed"
            if self.read(f"sys/class/video4linux/{device.name}/index") not in ("", "0"):
                label += " (a second node of the same device, mostly its metadata)"
            found[device] = label
        return found

    @cached_property
    def is_jetson(self) -> bool:
        return bool(self.read("etc/nv_tegra_release")) or "jetson" in self.read("proc/device-tree/model").lower()

    @cached_property
    def has_gpu(self) -> bool:
        """Whether there is an NVIDIA GPU, with or without a driver."""
        devices = (self.root / "sys/bus/pci/devices").glob("*")
        return (
            self.is_jetson
            or bool(self.read("proc/driver/nvidia/version"))
            or any(
                self.read(f"sys/bus/pci/devices/{d.name}/vendor") == "0x10de"
                and self.read(f"sys/bus/pci/devices/{d.name}/class").startswith("0x03")
                for d in devices
            )
        )


def use_cores(count: int) -> None:
    """Keep this process to so many cores, whichever these are: one of several that share a machine."""
    global _used
    _used = count
    import_module("cv2").setNumThreads(count)


@contextmanager
def share_cores(workers: int) -> Iterator[None]:
    """Inside, what asks for cores is given its share of them, as one of several."""
    global _used
    before, _used = _used, max(1, cores() // workers)
    try:
        yield
    finally:
        _used = before


def cores() -> int:
    """Cores that this process may use: those that taskset or a container's cpuset leaves it, or `use_cores`."""
    return min(_used or sys.maxsize, _given_cores())


def _given_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowed_cores() -> int:
    """Threads for ONNX Runtime: as many as the cores that this process is kept to, which its own choice would leave;
    0, its own choice, where the process may use all of them."""
    allowed = cores()
    return allowed if allowed < (os.cpu_count() or 1) else 0


def peak_memory() -> int | None:
    """The most memory in bytes that this process has held; None where the kernel does not tell.

    Read from /proc: psutil does not tell it on Linux, and getrusage would count the parent's from before exec.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) << 10 if found else None


def opencv() -> dict[str, Any]:
    """OpenCV's "version", and which of the video "backends" that matter here are in it."""
    cv2 = import_module("cv2")
    registry = cv2.videoio_registry
    registered = {
        registry.getBackendName(backend) for backend in registry.getBackends() if registry.hasBackend(backend)
    }
    built = dict(re.findall(r"^\s*(FFMPEG|GStreamer|v4l/v4l2):\s+(\w+)", cv2.getBuildInformation(), re.MULTILINE))
    places = {"V4L2": "v4l/v4l2", "GSTREAMER": "GStreamer", "FFMPEG": "FFMPEG"}
    return {
        "version": cv2.__version__,
        "backends": [name for name, key in places.items() if name in registered or built.get(key) == "YES"],
    }


def give_back_memory() -> None:
    """Let the C library return what it keeps of memory that was freed; with glibc alone."""
    if TRIM:
        TRIM(0)
