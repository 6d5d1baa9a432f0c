"""What `fbclip doctor` says of ONNX Runtime, the GPU, and what computes on it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from fbclip.runtime.doctor.checks import Check, Status, failed, installed, probe, version_of
from fbclip.runtime.host import SYSTEM_SITE, Machine, ProcessFailed

PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider", "TensorRT": "TensorrtExecutionProvider"}
SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader")
JETPACK_6_WHEELS = "https://pypi.jetson-ai-lab.io/jp6/cu126"  # NVIDIA's; PyPI has none for its Python 3.10


def check_onnxruntime(machine: Machine) -> Iterator[Check]:
    topic = "ONNX Runtime"
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed(name)]
    try:
        found = probe(machine, "onnxruntime")
    except ProcessFailed as error:
        package = both[-1] if both else "onnxruntime"
        yield failed(topic, "ONNX Runtime", error, "onnxruntime", f"pip install --force-reinstall {package}")
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
    if PROVIDERS["CUDA"] in found["providers"]:
        yield _cuda_libraries(machine)
    for name, provider in PROVIDERS.items():
        yield _provider(machine, name, provider, provider in found["providers"])


def _cuda_libraries(machine: Machine) -> Check:
    """Those that ONNX Runtime's provider needs, of NVIDIA's wheels or the system."""
    topic, name = "ONNX Runtime", "CUDA libraries"
    cure = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    if machine.is_jetson:
        cure = "sudo apt install nvidia-jetpack  # brings CUDA and cuDNN"
    try:
        found = probe(machine, "cuda_libraries")
    except ProcessFailed as error:
        return failed(topic, name, error, "", cure)
    if found["missing"]:
        status: Status = "missing" if machine.has_gpu else "info"
        return Check(topic, name, status, f"not found: {', '.join(found['missing'])}", cure)
    return Check(topic, name, "ok", f"found in {', '.join(found['places'])}")


def _provider(machine: Machine, name: str, provider: str, built_in: bool) -> Check:
    topic, title = "ONNX Runtime", f"{name} provider"
    if not machine.is_jetson:
        install = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
    elif "R36" in machine.read("etc/nv_tegra_release"):
        install = f"pip uninstall -y onnxruntime && pip install onnxruntime-gpu --index-url {JETPACK_6_WHEELS}"
    else:
        install = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu  # from where, by JetPack: docs/guides/jetson.md"
    if not built_in:
        if machine.has_gpu:
            return Check(topic, title, "missing", "not in this build", install)
        return Check(topic, title, "info", "not in this build, and no NVIDIA GPU here")
    try:
        found = probe(machine, "provider", provider)
    except ProcessFailed as error:
        return failed(topic, title, error, "", install)
    got, why = found["got"], found["why"]
    if got == provider:
        return Check(topic, title, "ok", "a session runs on it")
    cure = install if machine.has_gpu else "fbclip infer --device cpu  # there is no NVIDIA GPU here"
    if name == "TensorRT" and machine.has_gpu and not machine.is_jetson:
        cure = "pip install tensorrt  # its release must fit ONNX Runtime's"
    return Check(topic, title, "broken", f"in this build, but a session fell back to {got}: {why}", cure)


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
    yield _rtx(machine)
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
        version_of,
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
    # "… x86_64 Kernel Module  550.54.15 …", or "… Open Kernel Module for x86_64  580.159.04 …"
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", machine.read("proc/driver/nvidia/version"))
    if not found:
        cure = "sudo apt install nvidia-driver  # Ubuntu: sudo ubuntu-drivers install; then reboot"
        yield Check(topic, "driver", "missing", "an NVIDIA GPU, but its driver is not loaded", cure)
        return
    try:
        for line in machine.run(*SMI).splitlines():
            yield Check(topic, "GPU", "ok", line)
    except ProcessFailed as error:
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
            raise ProcessFailed(f"nvpmodel -q says {' / '.join(lines) or 'nothing'}")
        yield Check(topic, "power mode", "info", f"{named[0]} (ID {lines[-1]})", modes)
    except ProcessFailed as error:
        yield failed(topic, "power mode", error, "nvpmodel", "sudo apt install nvidia-l4t-nvpmodel")
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
    probed: str,
    cure: str,
    describe: Callable[[dict[str, Any]], tuple[Status, str]],
    *arguments: str,
) -> Check:
    """A library that only helps where there is a GPU: without one its absence is no fault."""
    try:
        status, found = describe(probe(machine, probed, *arguments))
    except ProcessFailed as error:
        missing = (error.missing or "").partition(".")[0] == module
        if missing and not machine.has_gpu:
            return Check("NVIDIA", name, "info", "not installed, and no NVIDIA GPU here")
        return failed("NVIDIA", name, error, module, cure)
    if status == "broken" and not machine.has_gpu:
        return Check("NVIDIA", name, "info", f"{found} (no NVIDIA GPU here)")
    return Check("NVIDIA", name, status, found, cure if status == "broken" else "")


def _rtx(machine: Machine) -> Check:
    """TensorRT-RTX builds engines on any machine, for GPUs of some kinds."""
    name, cure = "TensorRT-RTX", "pip install 'fbclip[rtx]'"
    try:
        found = probe(machine, "tensorrt_rtx")
    except ProcessFailed as error:
        if (error.missing or "").partition(".")[0] == "tensorrt_rtx":  # an alternative, which nobody needs
            return Check("NVIDIA", name, "info", "not installed")
        return failed("NVIDIA", name, error, "tensorrt_rtx", cure)
    kinds = found["compute_capabilities"]
    text = f"{found['version']}, builder {found['builder']}, for compute capability {', '.join(kinds)}"
    if found["builder"] != "starts":
        return Check("NVIDIA", name, "broken", text, cure)
    try:
        here = machine.run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    except ProcessFailed:
        return Check("NVIDIA", name, "ok", f"{text}; engines can be built here")
    if here and here[0] not in kinds:
        return Check("NVIDIA", name, "info", f"{text}; this GPU has {here[0]}, and its engines don't run here")
    return Check("NVIDIA", name, "ok", f"{text}; this GPU has {', '.join(here)}")


def _tensorrt(found: dict[str, Any]) -> tuple[Status, str]:
    return "ok" if found["builder"] == "starts" else "broken", f"{found['version']}, builder {found['builder']}"


def _pycuda(found: dict[str, Any]) -> tuple[Status, str]:
    devices = [f"{d['name']}, compute {d['compute_capability']}, {d['memory_mb']} MB" for d in found["devices"]]
    return (
        "ok" if devices else "broken",
        f"{found['version']}, CUDA {found['cuda']}: {'; '.join(devices) or 'no device'}",
    )
