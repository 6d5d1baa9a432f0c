"""ONNX Runtime's providers: which are there, what they need before their first session, and why one doesn't start."""

from __future__ import annotations

import ctypes
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fbclip.untrusted import one_line

# What ONNX Runtime runs; "tensorrt" is a plan in TensorRT itself.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}
LIBRARIES = {
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
}
DRIVER = "libcuda.so.1"  # comes with the driver, and with nothing else
LIBRARIES_OF_ANY = ("libcurand.so.10", "libcudnn.so.9")  # whichever CUDA's version
FATAL, WARNING = 4, 2  # ONNX Runtime's severities; it warns by default
ON_THE_CPU = "or run it on the cpu"


def available() -> list[str]:
    """Devices that the ONNX Runtime here was built for."""
    if find_spec("onnxruntime") is None:
        return []
    import onnxruntime as ort

    providers: list[Any] = ort.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in providers]


def installation() -> str:
    """What brings the providers for NVIDIA's GPUs, which this ONNX Runtime lacks."""
    again = "pip install --force-reinstall --no-deps onnxruntime-gpu"
    try:
        distribution("onnxruntime-gpu")
    except PackageNotFoundError:
        return f"pip install 'fbclip[gpu]' and then {again}, on a machine with an NVIDIA GPU"
    return f"onnxruntime was installed over onnxruntime-gpu, with which it shares a folder: {again}"


def provider_options(device: str, cache: Path | None, capture: bool = False) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's providers for a device, the wanted one first, with their options.

    Options: https://onnxruntime.ai/docs/execution-providers

    Args:
        cache: folder where the TensorRT provider keeps what it builds.
        capture: whether CUDA graphs are recorded and replayed.
    """
    cuda = {"use_tf32": "0"}  # its 10 bits are what the float32 islands are there to avoid
    if device == "cuda":
        return [(PROVIDERS["cuda"], {**cuda, **({"enable_cuda_graph": "1"} if capture else {})})]
    if device == "cpu":
        return [(PROVIDERS["cpu"], {})]
    caching = {}
    if cache is not None:
        caching = {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(cache),
        }
    return [(PROVIDERS["ort-tensorrt"], caching), (PROVIDERS["cuda"], cuda)]


@cache
def load_cuda() -> None:
    """Load the CUDA libraries of NVIDIA's wheels, which no linker finds; a system's are found without.

    Once, and before the first session. What is missing is told by `why_not`, when a session has failed for it.
    """
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):  # since 1.21
        with suppress(Exception), redirect_stdout(io.StringIO()):  # it prints what it doesn't find
            ort.preload_dlls()


def find_libraries() -> tuple[list[str], list[str]]:
    """The folders that CUDA's libraries for this ONNX Runtime come from, and the names of those that are not found."""
    from onnxruntime.capi.build_and_package_info import cuda_version

    major = cuda_version.partition(".")[0]
    load_cuda()
    missing = []
    for name in (*(f"lib{part}.so.{major}" for part in ("cudart", "cublasLt", "cublas")), *LIBRARIES_OF_ANY):
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.is_file() else ""
    return sorted(set(re.findall(r"(/\S+)/lib(?:cudart|cublas|cudnn|curand)\.so", loaded))), missing


@contextmanager
def quiet() -> Iterator[None]:
    """Within, ONNX Runtime writes nothing on standard error of a provider that it can't load: we tell it."""
    import onnxruntime as ort

    ort.set_default_logger_severity(FATAL)
    try:
        yield
    finally:
        ort.set_default_logger_severity(WARNING)


def why_not(provider: str) -> str:
    """Why ONNX Runtime fell back from a provider of NVIDIA's, with the cure, on one line; not to be asked before it did."""
    import onnxruntime as ort

    library = Path(ort.__file__).parent / "capi" / LIBRARIES[provider]
    try:
        ctypes.CDLL(str(library))  # as it has just done; whoever is the first to load it must be ONNX Runtime
    except OSError as error:
        return explain(one_line(error))
    return driver_fault() or f"nothing says why: check the driver and CUDA's libraries with fbclip doctor, {ON_THE_CPU}"


def words(error: Exception) -> str:
    """What ONNX Runtime says, on one line, without the place in its source that comes first."""
    found = re.search(r"(?:CU\w+ failure|Please install|This session cannot).*?(?= ; GPU=|$)", str(error), re.DOTALL)
    return one_line(found[0] if found else error)


def explain(missing: str) -> str:
    """The cure for what the linker says of a provider's library, after its words."""
    if DRIVER in missing:
        return f"there is no NVIDIA driver here ({missing}): install it, {ON_THE_CPU}"
    if "libnvinfer" in missing or "libnvonnxparser" in missing:
        return (
            f"TensorRT's libraries are not found ({missing}): install TensorRT where the linker finds it, {ON_THE_CPU}"
        )
    return f"CUDA's libraries are not found ({missing}): pip install 'onnxruntime-gpu[cuda,cudnn]', {ON_THE_CPU}"


def driver_fault() -> str | None:
    """What NVIDIA's driver says where it can't be used, with the cure; None where it can."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return explain(one_line(error))
    status = driver.cuInit(0)
    if status == 0:
        return None
    name = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(name))
    called = name.value.decode(errors="replace") if name.value else str(status)
    return f"NVIDIA's driver can't be used ({called}): look at nvidia-smi, {ON_THE_CPU}"
