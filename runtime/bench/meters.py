"""What a machine tells about itself while it works: energy, clocks, throttling, memory of the GPU.

Sources, each where it is there: Linux's RAPL counters and cpufreq, NVIDIA's NVML (the optional package nvidia-ml-py),
`tegrastats` on a Jetson. Only the files' side has run on real hardware; the GPU's follows NVIDIA's documentation.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fbclip
from fbclip.runtime.bench.results import Environment
from fbclip.runtime.host import Machine, cores

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that mean slower than could be (nvml.h)
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
TEGRASTATS_MS = 100
METERED_S = 2.0  # of runs whose energy is measured, at least: NVML and tegrastats tell a new value every 0.1 s
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "tensorrt", "tensorrt-rtx-cu13")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Meters:
    """The instruments of a machine; those that are not there measure nothing, and their names are missing.

    Args:
        machine: whose files and commands are read.
    """

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self._nvml, self._gpu = _nvml()
        self._tegrastats: Tegrastats | None = None
        if self.machine.is_jetson:
            with suppress(OSError):
                self._tegrastats = Tegrastats(self.machine.path)

    def joules(self) -> dict[str, float]:
        """Energy since some moment in the past, by source; differences count."""
        found = {}
        for zone in sorted((self.machine.root / "sys/class/powercap").glob("intel-rapl:?")):
            text = self.machine.read(f"sys/class/powercap/{zone.name}/energy_uj")
            if text.isdigit():  # only root may read it on most machines
                found[f"RAPL {self.machine.read(f'sys/class/powercap/{zone.name}/name')}"] = int(text) * 1e-6
        if self._gpu is not None:
            with suppress(self._nvml.NVMLError):
                found["NVML GPU"] = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) * 1e-3
        if self._tegrastats:
            found["tegrastats"] = self._tegrastats.joules
        return found

    def clocks_mhz(self) -> dict[str, float]:
        """The mean clock of the cores now, and the GPU's."""
        found = {}
        cores = (self.machine.root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        speeds = [int(text) for path in cores if (text := self._read(path)).isdigit()]
        if speeds:
            found["cpu"] = sum(speeds) / len(speeds) * 1e-3
        if self._gpu is not None:
            with suppress(self._nvml.NVMLError):
                found["gpu"] = float(self._nvml.nvmlDeviceGetClockInfo(self._gpu, self._nvml.NVML_CLOCK_SM))
        return found

    def throttle_count(self) -> int | None:
        """How often the cores were slowed down for heat since the start of the machine; None where nobody counts."""
        cores = (self.machine.root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        counts = [int(text) for path in cores if (text := self._read(path)).isdigit()]
        return sum(counts) if counts else None

    def gpu_throttled(self) -> list[str]:
        """Why the GPU is slower than it could be at this moment; empty if it is not, or nobody tells."""
        if self._gpu is None:
            return []
        with suppress(self._nvml.NVMLError):
            bits = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu)
            return [reason for bit, reason in THROTTLE_REASONS.items() if bits & bit]
        return []

    def device_mb(self, pid: int) -> float | None:
        """A process's memory on the GPU in MB; None where nobody tells."""
        if self._gpu is None:
            return None
        with suppress(self._nvml.NVMLError):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu):
                if process.pid == pid and process.usedGpuMemory:
                    return float(process.usedGpuMemory) / 1e6
        return None

    def gpu_name(self) -> str | None:
        if self._gpu is None:
            return None
        name = self._nvml.nvmlDeviceGetName(self._gpu)
        return str(name.decode() if isinstance(name, bytes) else name)  # bytes in older releases

    def environment(self) -> Environment:
        """What the figures must be read with."""
        machine = self.machine
        memory = machine.memory()
        versions = {"fbclip": fbclip.__version__, "python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        return Environment(
            processor=processor(machine.read("proc/cpuinfo")) or platform.processor() or platform.machine(),
            device=machine.read("proc/device-tree/model") or None,
            gpu=self.gpu_name(),
            cores=cores(),
            memory_gb=None if memory is None else round(memory.total / 1e9, 1),
            system=platform.platform(),
            governor=machine.read("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
            threads={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
            versions=versions,
        )

    def close(self) -> None:
        if self._tegrastats:
            self._tegrastats.close()

    def _read(self, path: Path) -> str:
        return self.machine.read(str(path.relative_to(self.machine.root)))


class Tegrastats:
    """A Jetson's power, added up in a thread of its own.

    Attributes:
        joules: so far.

    Raises:
        OSError: the command is not there, or says nothing.
    """

    def __init__(self, path: str) -> None:
        self.joules = 0.0
        self._process = subprocess.Popen(
            ["tegrastats", "--interval", str(TEGRASTATS_MS)], stdout=subprocess.PIPE, text=True, env={"PATH": path}
        )
        assert self._process.stdout
        self._lines = self._process.stdout
        if not self._lines.readline():
            raise OSError("tegrastats says nothing")
        self._thread = threading.Thread(target=self._read, args=(time.perf_counter(),), daemon=True)
        self._thread.start()

    def _read(self, before: float) -> None:
        for line in self._lines:
            now = time.perf_counter()
            self.joules += board_watts(line) * (now - before)
            before = now

    def close(self) -> None:
        self._process.terminate()
        self._thread.join()
        self._process.wait()


def board_watts(line: str) -> float:
    """The board's power in a line of tegrastats: its input rail, or all rails together where that is not measured.

    https://docs.nvidia.com/jetson/archives/r36.4/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html
    """
    rails = {name: int(now) for name, now in re.findall(r"([A-Z][A-Z0-9_]+) (\d+)(?:mW)?/\d+(?:mW)?", line)}
    rails.pop("RAM", None)
    rails.pop("SWAP", None)
    total = next((rails[name] for name in ("VDD_IN", "POM_5V_IN") if name in rails), sum(rails.values()))
    return total * 1e-3


def _nvml() -> tuple[Any, Any]:
    """NVML's module and its first GPU; None and None where either is missing."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None, None


def processor(cpuinfo: str) -> str:
    """The name of the processor with its family and model, which virtual machines often leave out of the name."""
    found: dict[str, str] = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", cpuinfo, re.MULTILINE))
    if "model name" not in found:
        return ""
    numbers = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return found["model name"] + numbers
