"""`fbclip doctor`: what works on this machine and what is missing, with the cure.

Imports nothing that may be broken: third-party libraries are tried in processes of their own (`probes.py`), and a
check that fails itself becomes a line of the report.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fbclip
from fbclip.runtime.probes import reason
from fbclip.writing import write_text

Status = Literal["ok", "missing", "broken", "info"]
STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red", "info": "dim"}
TESTED = ((3, 10), (3, 13))  # versions of Python
PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider", "TensorRT": "TensorrtExecutionProvider"}
BACKENDS = {
    "V4L2": "USB cameras",
    "FFMPEG": "video files, RTSP and HTTP streams",
    "GSTREAMER": "CSI cameras of a Jetson",
}
INFERENCE = "inference"
BUNDLE_COPIES = 3  # weights on disk, ONNX Runtime's own copy, activations: what a run holds, in sizes of the graph
RUNTIME_MB = 300  # of the interpreter and its libraries

SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader")
JETPACK_6_WHEELS = "https://pypi.jetson-ai-lab.io/jp6/cu126"  # NVIDIA's; PyPI has none for its Python 3.10
SWAP = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
SYSTEM_SITE = "python3 -m venv --system-site-packages .venv  # apt's Python packages are only seen from such a venv"


@dataclass(frozen=True)
class Check:
    """A line of the report.

    Attributes:
        topic: under which it stands.
        name: what was looked at.
        status: "ok", "missing" (not there), "broken" (there and unusable) or "info" (neither good nor bad).
        found: what was found.
        cure: a command, with a comment where it needs one; empty where nothing is wrong.
    """

    topic: str
    name: str
    status: Status
    found: str
    cure: str = ""


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
        program = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from fbclip.runtime import probes; probes.main(*sys.argv[2:])"
        command = [sys.executable, "-c", program, json.dumps(sys.path), name, *arguments]
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


def examine(
    bundle: Path | None, machine: Machine | None = None, say: Callable[[str], None] = lambda topic: None
) -> list[Check]:
    """Everything that is looked at, in the order of the report. Never raises.

    Args:
        bundle: a bundle, or None for the embedded default model.
        say: told each topic before it is looked at.
    """
    machine = machine or Machine()
    topics: dict[str, Callable[[], Iterator[Check]]] = {
        "fbclip": lambda: check_python(machine),
        "ONNX Runtime": lambda: check_onnxruntime(machine),
        "NVIDIA": lambda: check_nvidia(machine),
        "Machine": lambda: check_machine(machine),
        "Bundle": lambda: check_bundle(machine, bundle),
        "Video": lambda: check_video(machine),
        "Extras": check_extras,
    }
    checks: list[Check] = []
    for topic, look in topics.items():
        say(topic)
        try:
            checks.extend(look())
        except Exception as error:  # a doctor does not fall ill
            checks.append(Check(topic, "this check", "broken", reason(error), "fbclip --debug doctor  # and report it"))
    return checks


def works(checks: list[Check]) -> bool:
    """Whether a sample image could be scored with the default device and precision."""
    return any(check.name == INFERENCE and check.status == "ok" for check in checks)


def check_python(machine: Machine) -> Iterator[Check]:
    topic, here = "fbclip", sys.version_info[:2]
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    found = f"{platform.python_version()} ({platform.machine()}, {kind}) {sys.executable}"
    if TESTED[0] <= here <= TESTED[1]:
        yield Check(topic, "Python", "ok", found)
    else:
        yield Check(topic, "Python", "info", f"{found}; tried are 3.10 to 3.13")
    yield Check(topic, "fbclip", "ok", f"{fbclip.__version__} {Path(fbclip.__file__).parent}")
    for name, module, package in (("NumPy", "numpy", "numpy"), ("Pillow", "PIL", "pillow")):
        yield _package(machine, topic, name, module, f"pip install --force-reinstall {package}")


def check_onnxruntime(machine: Machine) -> Iterator[Check]:
    topic = "ONNX Runtime"
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    try:
        found = machine.probe("onnxruntime")
    except ProbeFailed as error:
        package = both[-1] if both else "onnxruntime"
        yield _failed(topic, "ONNX Runtime", error, "onnxruntime", f"pip install --force-reinstall {package}")
        return
    yield Check(topic, "ONNX Runtime", "ok", found["version"])
    if len(both) == 2 and PROVIDERS["CUDA"] not in found["providers"]:
        yield Check(
            topic,
            "packages",
            "broken",
            "onnxruntime was installed over onnxruntime-gpu (they share a folder), so CUDA is gone",
            "pip install --force-reinstall --no-deps onnxruntime-gpu",
        )
    for name, provider in PROVIDERS.items():
        yield _provider(machine, name, provider, provider in found["providers"])


def _provider(machine: Machine, name: str, provider: str, built_in: bool) -> Check:
    topic, title = "ONNX Runtime", f"{name} provider"
    if not machine.is_jetson:
        install = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
    elif "R36" in machine.read("etc/nv_tegra_release"):
        install = f"pip uninstall -y onnxruntime && pip install onnxruntime-gpu --index-url {JETPACK_6_WHEELS}"
    else:
        install = (
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu  # from where, by JetPack: docs/jetson.md"
        )
    if not built_in:
        if machine.has_gpu:
            return Check(topic, title, "missing", "not in this build", install)
        return Check(topic, title, "info", "not in this build, and no NVIDIA GPU here")
    try:
        got = machine.probe("provider", provider)["got"]
    except ProbeFailed as error:
        return _failed(topic, title, error, "", install)
    if got == provider:
        return Check(topic, title, "ok", "a session runs on it")
    cure = install if machine.has_gpu else "fbclip infer --device cpu  # there is no NVIDIA GPU here"
    if name == "TensorRT" and machine.has_gpu and not machine.is_jetson:
        cure = "pip install tensorrt  # its release must fit ONNX Runtime's"
    return Check(topic, title, "broken", f"in this build, but a session fell back to {got}", cure)


def check_nvidia(machine: Machine) -> Iterator[Check]:
    topic = "NVIDIA"
    yield from _driver(machine)
    if machine.is_jetson:
        yield from _power(machine)
    tensorrt = (
        f"sudo apt install python3-libnvinfer && {SYSTEM_SITE}"
        if machine.is_jetson
        else "pip install --force-reinstall tensorrt"
    )
    yield _gpu_library(machine, "TensorRT", "tensorrt", "tensorrt", tensorrt, _tensorrt)
    nvcc = shutil.which("nvcc", path=machine.path)
    toolkit = (machine.root / "usr/local/cuda/bin/nvcc").is_file()
    pycuda = "pip install --no-cache-dir --force-reinstall pycuda"
    if toolkit and not nvcc:
        pycuda = f"PATH=/usr/local/cuda/bin:$PATH {pycuda}  # it compiles, and finds CUDA by nvcc"
    elif not nvcc:
        pycuda = f"{pycuda}  # it compiles: install the CUDA toolkit (nvcc), g++ and python3-dev first"
    yield _gpu_library(machine, "PyCUDA", "pycuda", "pycuda", pycuda, _pycuda)
    yield _gpu_library(
        machine,
        "CUDA graphs (cuda-bindings)",
        "cuda",
        "package",
        "pip install cuda-bindings",
        _version,
        "cuda.bindings.driver",
    )
    if machine.has_gpu:
        where = nvcc or ("/usr/local/cuda/bin/nvcc, not on PATH" if toolkit else "")
        yield Check(topic, "nvcc", "info", where or "none: PyCUDA can't be compiled here")


def _driver(machine: Machine) -> Iterator[Check]:
    topic = "NVIDIA"
    if not machine.has_gpu:
        yield Check(topic, "GPU", "info", "none found; inference runs on the CPU")
        return
    if machine.is_jetson:
        release = machine.read("etc/nv_tegra_release").partition(", GCID")[0].lstrip("# ")
        yield Check(
            topic, "Jetson", "ok", f"{machine.read('proc/device-tree/model') or 'Jetson'}; L4T {release or 'unknown'}"
        )
        device = machine.root / "dev/nvmap"
        if device.exists() and not os.access(device, os.R_OK | os.W_OK, effective_ids=True):
            cure = "sudo usermod -aG video,render $USER  # then log in again"
            yield Check(
                topic, "GPU access", "broken", f"no permission to use /{device.relative_to(machine.root)}", cure
            )
        return
    found = re.search(r"Kernel Module\D*([\d.]+)", machine.read("proc/driver/nvidia/version"))
    if not found:
        cure = "sudo apt install nvidia-driver  # Ubuntu: sudo ubuntu-drivers install; then reboot"
        yield Check(topic, "driver", "missing", "an NVIDIA GPU, but its driver is not loaded", cure)
        return
    try:
        for line in machine.run(*SMI).splitlines():
            yield Check(topic, "GPU", "ok", line)
    except ProbeFailed as error:
        cure = "sudo reboot  # driver and library differ after an upgrade; else install the driver again"
        yield Check(topic, "driver", "broken", f"{found[1]}; {error}", cure)
    else:
        yield Check(topic, "driver", "ok", found[1])


def _power(machine: Machine) -> Iterator[Check]:
    """The power mode, and whether jetson_clocks has pinned the clocks: it raises the lower limits to the upper ones."""
    topic = "NVIDIA"
    modes = "nvpmodel -p --verbose  # lists the modes; sudo nvpmodel -m ID sets one"
    try:
        lines = [line.strip() for line in machine.run("nvpmodel", "-q").splitlines() if line.strip()]
        named = [line.partition(":")[2].strip() for line in lines if "Power Mode" in line]
        if not named:
            raise ProbeFailed(f"nvpmodel -q says {' / '.join(lines) or 'nothing'}")
        yield Check(topic, "power mode", "info", f"{named[0]} (ID {lines[-1]})", modes)
    except ProbeFailed as error:
        yield _failed(topic, "power mode", error, "nvpmodel", "sudo apt install nvidia-l4t-nvpmodel")
    limits = [
        (machine.read(f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{end}_freq") for end in ("min", "max")),
        *(
            (machine.read(f"sys/class/devfreq/{gpu.name}/{end}_freq") for end in ("min", "max"))
            for gpu in (machine.root / "sys/class/devfreq").glob("*.gpu")
        ),
    ]
    pinned = [low == high for low, high in limits if low and high]
    if pinned and all(pinned):
        yield Check(topic, "clocks", "ok", "pinned to their maximum")
    elif pinned:
        yield Check(
            topic, "clocks", "info", "vary with the load: latency does too", "sudo jetson_clocks  # until the next boot"
        )


def _gpu_library(
    machine: Machine,
    name: str,
    module: str,
    probe: str,
    cure: str,
    describe: Callable[[dict[str, Any]], tuple[Status, str]],
    *arguments: str,
) -> Check:
    """A library that only helps where there is a GPU: without one its absence is no fault."""
    try:
        status, found = describe(machine.probe(probe, *arguments))
    except ProbeFailed as error:
        missing = (error.missing or "").partition(".")[0] == module
        if missing and not machine.has_gpu:
            return Check("NVIDIA", name, "info", "not installed, and no NVIDIA GPU here")
        return _failed("NVIDIA", name, error, module, cure)
    if status == "broken" and not machine.has_gpu:
        return Check("NVIDIA", name, "info", f"{found} (no NVIDIA GPU here)")
    return Check("NVIDIA", name, status, found, cure if status == "broken" else "")


def _tensorrt(found: dict[str, Any]) -> tuple[Status, str]:
    return "ok" if found["builder"] == "starts" else "broken", f"{found['version']}, builder {found['builder']}"


def _pycuda(found: dict[str, Any]) -> tuple[Status, str]:
    devices = [f"{d['name']}, compute {d['compute_capability']}, {d['memory_mb']} MB" for d in found["devices"]]
    return (
        "ok" if devices else "broken",
        f"{found['version']}, CUDA {found['cuda']}: {'; '.join(devices) or 'no device'}",
    )


def _version(found: dict[str, Any]) -> tuple[Status, str]:
    return "ok", found["version"] or found["place"]


def check_machine(machine: Machine) -> Iterator[Check]:
    topic = "Machine"
    system = machine.read("etc/os-release")
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', system, re.MULTILINE)
    yield Check(topic, "system", "info", f"{name[1] if name else platform.platform()}, {os.cpu_count()} CPU cores")
    memory = _meminfo(machine)
    if memory:
        swap = memory.get("SwapTotal", 0)
        found = f"{memory['MemAvailable']} of {memory['MemTotal']} MB free, swap {swap} MB"
        cure = ""
        if machine.is_jetson and memory["MemTotal"] < 9000 and swap < memory["MemTotal"] // 2:
            cure = f"{SWAP}  # before engines are built or PyCUDA is compiled"
        yield Check(topic, "memory", "info" if cure else "ok", found, cure)
    try:
        free = shutil.disk_usage(Path.cwd()).free >> 20
    except OSError as error:
        yield Check(topic, "disk", "broken", reason(error), "cd ~  # a folder that can be read")
        return
    if free < 1000:
        yield Check(topic, "disk", "broken", f"{free} MB free here", "df -h .  # results and engines need room")
    else:
        yield Check(topic, "disk", "ok", f"{free} MB free here")


def check_bundle(machine: Machine, bundle: Path | None) -> Iterator[Check]:
    topic, path = "Bundle", str(bundle or "")
    shown = f" --bundle {bundle}" if bundle else ""
    try:
        found = machine.probe("bundle", path)
    except ProbeFailed as error:
        yield Check(
            topic, "bundle", "broken", str(error), "fbclip export" if bundle else "pip install --force-reinstall fbclip"
        )
        found = None
    largest = 0
    if found:
        sizes = {precision: size >> 20 for precision, size in found["precisions"].items()}
        largest = max(sizes.values())
        words = f"{found['name']}, {found['image_size']} px, opset {found['opset']}; every hash holds"
        yield Check(topic, "bundle", "ok", words)
        yield Check(topic, "precisions", "ok", ", ".join(f"{p} ({size} MB)" for p, size in sizes.items()))
        yield from _plans(Path(found["path"]))
    try:
        run = machine.probe(INFERENCE, path)
    except ProbeFailed as error:
        cure = f"fbclip --debug infer{shown} --device cpu  # after curing what is listed above"
        yield _failed(topic, INFERENCE, error, "", cure)
        run = {}
    else:
        words = (
            f"{run['device']}, {run['precision']}: a sample image scores {run['score']:.3f} in {run['model_ms']:.0f} ms"
        )
        yield Check(topic, INFERENCE, "ok", words)
    measured = run.get("peak_mb")
    if found or measured:
        yield from _memory_need(machine, measured, largest)


def _plans(bundle: Path) -> Iterator[Check]:
    """TensorRT plans and what their sidecars say they were built for."""
    for plan in sorted(bundle.glob("engines/*.plan")):
        try:
            built_for = json.loads(plan.with_suffix(".json").read_text())
            words = ", ".join(
                f"{key} {value}" for key, value in built_for.items() if isinstance(value, str) and len(value) < 40
            )
            yield Check("Bundle", plan.name, "info", f"built for {words}")
        except (OSError, ValueError, AttributeError) as error:
            cure = f"rm {plan} && fbclip export --engine --bundle {bundle}"
            yield Check(
                "Bundle", plan.name, "broken", f"no sidecar that says what it was built for: {reason(error)}", cure
            )


def _memory_need(machine: Machine, measured: int | None, largest_mb: int) -> Iterator[Check]:
    memory = _meminfo(machine)
    if not memory:
        return
    need = measured or RUNTIME_MB + BUNDLE_COPIES * largest_mb
    how = (
        "measured on that image"
        if measured
        else f"estimated: {RUNTIME_MB} MB and {BUNDLE_COPIES} times the largest graph"
    )
    found = f"needs {need} MB ({how}); {memory['MemAvailable']} MB free"
    if need < memory["MemAvailable"]:
        yield Check("Bundle", "memory", "ok", found)
    else:
        cure = "fbclip infer --precision fp16  # or close other programs; headless: sudo systemctl isolate multi-user"
        yield Check("Bundle", "memory", "broken", found, cure)


def check_video(machine: Machine) -> Iterator[Check]:
    topic = "Video"
    try:
        found = machine.probe("opencv")
    except ProbeFailed as error:
        yield _failed(topic, "OpenCV", error, "cv2", "pip install --force-reinstall opencv-python-headless")
    else:
        yield Check(topic, "OpenCV", "ok", found["version"])
        for backend, use in BACKENDS.items():
            if backend in found["backends"]:
                yield Check(topic, backend, "ok", use)
            elif backend != "GSTREAMER":
                yield Check(
                    topic, backend, "missing", f"not in this OpenCV: no {use}", "pip install opencv-python-headless"
                )
            elif machine.is_jetson:
                cure = f"pip uninstall -y opencv-python-headless && sudo apt install python3-opencv && {SYSTEM_SITE}"
                yield Check(topic, backend, "missing", f"not in this OpenCV: no {use}", cure)
            else:
                yield Check(topic, backend, "info", f"not in this OpenCV: no {use}")
    yield from _cameras(machine)


def _cameras(machine: Machine) -> Iterator[Check]:
    devices = sorted((machine.root / "dev").glob("video[0-9]*"), key=lambda d: int(re.sub(r"\D", "", d.name) or 0))
    if not devices:
        yield Check(
            "Video",
            "cameras",
            "info",
            "none: no /dev/video*",
            "ls -l /dev/video*  # after plugging one in; in Docker: --device /dev/video0",
        )
    for device in devices:
        label = machine.read(f"sys/class/video4linux/{device.name}/name") or "unnamed"
        if machine.read(f"sys/class/video4linux/{device.name}/index") not in ("", "0"):
            label += " (a second node of the same device, mostly its metadata)"
        if os.access(device, os.R_OK | os.W_OK, effective_ids=True):
            yield Check("Video", f"/dev/{device.name}", "ok", label)
        else:
            cure = "sudo usermod -aG video $USER  # then log in again"
            yield Check("Video", f"/dev/{device.name}", "broken", f"{label}: permission denied", cure)


def check_extras() -> Iterator[Check]:
    """Optional parts, by what the installed package says they need; those for a GPU are looked at above."""
    try:
        package = distribution("fbclip")
    except PackageNotFoundError:
        yield Check("Extras", "fbclip", "missing", "runs from its source folder, not installed", "pip install .")
        return
    for extra in package.metadata.get_all("Provides-Extra") or []:
        if extra in ("dev", "gpu", "tensorrt"):
            continue
        wanted = [
            re.split(r"[^A-Za-z0-9._-]", line)[0]
            for line in package.requires or []
            if re.search(rf"extra == ['\"]{extra}['\"]", line)
        ]
        lacking = [name for name in wanted if not _installed(name)]
        if lacking:
            yield Check("Extras", extra, "info", f"lacks {', '.join(lacking)}", f"pip install 'fbclip[{extra}]'")
        else:
            yield Check("Extras", extra, "ok", ", ".join(f"{name} {version(name)}" for name in wanted))


def _package(machine: Machine, topic: str, name: str, module: str, cure: str) -> Check:
    try:
        return Check(topic, name, *_version(machine.probe("package", module)))
    except ProbeFailed as error:
        return _failed(topic, name, error, module, cure)


def _failed(topic: str, name: str, error: ProbeFailed, module: str, cure: str) -> Check:
    """Missing where `module` itself is not there, broken where something else went wrong."""
    if module and (error.missing or "").partition(".")[0] == module:
        return Check(topic, name, "missing", "not installed", cure)
    if "multiarray" in str(error) or "_ARRAY_API" in str(error) or "numpy.dtype size changed" in str(error):
        cure = "pip install 'numpy<2'  # this library was compiled for NumPy 1; or install a newer build of it"
    return Check(topic, name, "broken", str(error), cure)


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _meminfo(machine: Machine) -> dict[str, int]:
    """/proc/meminfo in MB; empty where it lacks what is needed."""
    found = {k: int(v) >> 10 for k, v in re.findall(r"^(\w+):\s+(\d+) kB", machine.read("proc/meminfo"), re.MULTILINE)}
    return found if {"MemTotal", "MemAvailable"} <= found.keys() else {}


def print_report(checks: list[Check], console: Console) -> None:
    """A table by topic, then every cure on lines of its own, so that it can be copied."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    topic = None
    for check in checks:
        if check.topic != topic:
            topic = check.topic
            table.add_row("", f"[bold]{escape(topic)}[/bold]", "")
        style = STYLES[check.status]
        table.add_row(f"[{style}]{check.status}[/{style}]", escape(check.name), escape(check.found))
    console.print(table)
    cures = [check for check in checks if check.cure]
    for status in ("broken", "missing", "info"):
        for check in (c for c in cures if c.status == status):
            style = STYLES[status]
            console.print(f"[{style}]{status}[/{style}] {escape(check.topic)}: {escape(check.name)}", highlight=False)
            console.print(f"  {escape(check.cure)}", soft_wrap=True, highlight=False)
    console.print(
        "inference works" if works(checks) else "[bold red]inference does not work[/bold red]", highlight=False
    )


def write_report(checks: list[Check], target: str) -> None:
    """The report as JSON to a file, or to standard output for "-"."""
    values = {"works": works(checks), "checks": [asdict(check) for check in checks]}
    write_text(json.dumps(values, indent=1) + "\n", target)
