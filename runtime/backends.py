"""Backends: images uint8 (B, S, S, 3) in, scores and maps float32 out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT, Bundle
from fbclip.errors import DeviceError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class Backend(Protocol):
    """A model on a device, whatever runs it."""

    device: str

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Images uint8 (B, S, S, 3) -> scores float32 (B,), maps float32 (B, S, S), both 0..1."""
        ...


class OnnxRuntimeBackend:
    """A graph in ONNX Runtime.

    Args:
        graph: the ONNX file.
        text: text features float32 (2, E).
        device: "cpu", "cuda" or "tensorrt" (ONNX Runtime's providers of those names).

    Attributes:
        device: where the session really runs.

    Raises:
        DeviceError: the device is not there, or ONNX Runtime fell back to another.
    """

    def __init__(self, graph: Path, text: NDArray[np.float32], device: str = "cpu") -> None:
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise DeviceError(
                f"--device {device} needs ONNX Runtime's {provider}; this one has {', '.join(available())}: "
                f"pip install 'fbclip[gpu]' on a machine with an NVIDIA GPU"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; warnings about nodes left on the CPU are checked below
        self.session = ort.InferenceSession(graph, options, providers=[provider])
        if self.session.get_providers()[0] != provider:
            raise DeviceError(
                f"ONNX Runtime could not start {provider} and fell back to {self.session.get_providers()[0]}; "
                f"check the driver and CUDA's libraries, or pass --device cpu"
            )
        self.device = device
        self.text = text

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Images uint8 (B, S, S, 3) -> scores float32 (B,), maps float32 (B, S, S), both 0..1."""
        scores, maps = self.session.run([SCORE, ANOMALY_MAP], {IMAGE: images, TEXT: self.text})
        return scores, maps


def available() -> list[str]:
    """Devices that this ONNX Runtime was built for."""
    providers: list[Any] = ort.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in providers]


def make_backend(bundle: Bundle, device: str = "auto", precision: str = "auto") -> tuple[OnnxRuntimeBackend, str]:
    """A backend and the precision it runs: "auto" is CUDA where it is there, and half precision on it where the bundle has it.

    Raises:
        DeviceError, BundleError: what was asked for is not there.
    """
    if device not in ("auto", *PROVIDERS):
        raise DeviceError(f"--device is auto, {', '.join(PROVIDERS)}; got {device!r}")
    if precision not in ("auto", "fp32", "fp16"):
        raise DeviceError(f"--precision is auto, fp32 or fp16; got {precision!r}")
    if device == "auto":
        device = "cuda" if "cuda" in available() else "cpu"
    if precision == "auto":
        precision = "fp16" if device != "cpu" and "fp16" in bundle.manifest.precisions else "fp32"
    return OnnxRuntimeBackend(bundle.graph(precision), bundle.text, device), precision
