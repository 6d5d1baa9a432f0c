"""The machine: its files, its commands, and probes in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

SYSTEM_SITE = "python3 -m venv --system-site-packages .venv  # apt's Python packages are only seen from such a venv"
GSTREAMER = f"pip uninstall -y opencv-python-headless && sudo apt install python3-opencv && {SYSTEM_SITE}"


class ProbeFailed(Exception):
    """A probe or command that did not answer; `missing` is the module or command that is not there."""

    def __init__(self, message: str, missing: str | None = None) -> None:
        super().__init__(message)
        self.missing = missing


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
            ProbeFailed: not there, too slow, or it says that it failed.
        """
        program = shutil.which(command[0], path=self.path)
        if program is None:
            raise ProbeFailed(f"no {command[0]} on PATH", command[0])
        return self._answer(command[0], [program, *command[1:]])

    def probe(self, name: str, *arguments: str) -> dict[str, Any]:
        """What a probe of `probes.py` finds, in a Python like this one.

        Raises:
            ProbeFailed: it raised, crashed or hung.
        """
        program = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from fbclip.runtime.doctor import probes; probes.main(*sys.argv[2:])"
        command = [sys.executable, "-c", program, json.dumps(sys.path, allow_nan=False), name, *arguments]
        answer = json.loads(self._answer(" ".join([name, *arguments]), command))
        if "error" in answer:
            raise ProbeFailed(answer["error"], answer["missing"])
        found: dict[str, Any] = answer["found"]
        return found

    def _answer(self, name: str, command: list[str]) -> str:
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=self.patience,
                text=True,
                errors="replace",
            )
        except subprocess.TimeoutExpired as error:
            raise ProbeFailed(f"{name} did not answer within {self.patience:g} s") from error
        if done.returncode < 0:
            raise ProbeFailed(f"{name} crashed with signal {-done.returncode} (9 is often: out of memory)")
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no word why").splitlines()[-1]
            raise ProbeFailed(f"{name} failed: {last}")
        return done.stdout

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
