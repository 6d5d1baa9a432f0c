"""Backends: images uint8 (B, H, W, 3) in, of the size and channel order that the manifest names, scores and maps float32 out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from fbclip.backend import Backend, Results
from fbclip.bundle import GRAPHS, STATIC, Bundle
from fbclip.errors import BundleError, DeviceError, FBClipError, reason
from fbclip.runtime.backends.providers import available, driver_fault
from fbclip.runtime.host import Machine

__all__ = ["DEVICES", "Backend", "Results", "candidates", "make_backend", "require_probabilities", "resolve_precision"]

DEVICES = ("cpu", "cuda", "tensorrt", "tensorrt-rtx", "ort-tensorrt")
ENGINES = {"tensorrt": "*.plan", "tensorrt-rtx": "rtx/*.plan"}  # of a bundle, by the device that runs them
ROUNDING = 1e-3  # by which a probability may leave 0..1: the last of half precision's binary digits

logger = logging.getLogger("fbclip")


def require_probabilities(scores: NDArray[np.float32], maps: NDArray[np.float32], names: Sequence[object] = ()) -> None:
    """Insist that a backend's results are what they should be: everything that judges by them asks here first.

    A broken graph, a bad plan or an overflow in half precision gives nan, which is below every threshold, or values
    that are no probabilities: neither says that a part is good.

    Args:
        scores, maps: as `Backend.run` gives them.
        names: of the images, for the message.

    Raises:
        FBClipError: a value is not finite, or outside 0..1 by more than `ROUNDING`.
    """
    for row, (score, anomaly_map) in enumerate(zip(scores, maps, strict=True)):
        low, high = anomaly_map.min(), anomaly_map.max()  # nan where any value is
        wrong = [value for value in (score, low, high) if not -ROUNDING <= value <= 1 + ROUNDING]
        if wrong:
            name = names[row] if names else "an image"
            raise FBClipError(
                f"the model gives {wrong[0]:g} for {name}, and scores and maps are 0 to 1: nothing is known of it; "
                f"see fbclip doctor"
            )


def resolve_precision(bundle: Bundle, device: str, precision: str) -> str:
    """ "auto" is half precision where the bundle has it, except on a CPU; 8 bit is only ever asked for.

    Raises:
        DeviceError: no precision of ours, or 8 bit in the form for CPUs on another device.
    """
    if precision not in ("auto", *GRAPHS):
        raise DeviceError(f"a precision is auto, {', '.join(GRAPHS)}; got {precision!r}", option="precision")
    if precision == "int8" and device != "cpu" and bundle.manifest.int8 != STATIC:
        has = "the dynamic form, for CPUs" if bundle.manifest.int8 else "no 8 bit"
        raise DeviceError(
            f"{device} takes 8 bit with fixed ranges (QuantizeLinear, DequantizeLinear); {bundle.path} has {has}: export it with fbclip export --int8-static, or run it on the cpu"
        )
    if precision != "auto":
        return precision
    return "fp16" if device != "cpu" and "fp16" in bundle.manifest.precisions else "fp32"


def make_backend(bundle: Bundle, device: str = "auto", precision: str = "auto", batch: int = 1) -> tuple[Backend, str]:
    """A backend and the precision it runs.

    Args:
        device: one of `DEVICES`, or "auto": the first of `candidates` that works here. One that is there and does not
            work is told (logger "fbclip"), as what runs is, in `Backend.device`.
        batch: images at once that it will be given.

    Raises:
        DeviceError, BundleError: what was asked for is not there.
    """
    if device not in ("auto", *DEVICES):
        raise DeviceError(f"a device is auto, {', '.join(DEVICES)}; got {device!r}", option="device")
    if device != "auto":
        return _make(bundle, device, precision, batch)
    resolve_precision(bundle, "cpu", precision)  # what is no precision at all is no device's fault
    *better, last = candidates(bundle)
    for choice in better:
        try:
            if choice in ENGINES and (fault := driver_fault()):  # its packages may crash where there is no driver
                raise DeviceError(fault)
            return _make(bundle, choice, precision, batch, named=False)
        except Exception as error:  # of a vendor's package it may be any
            # of a bundle that brings engines for other machines it is no news that one without a GPU can't run them
            level = logging.WARNING if choice == "cuda" or Machine().has_gpu else logging.INFO
            logger.log(level, "%s is not used: %s", choice, reason(error))
    return _make(bundle, last, precision, batch)


def candidates(bundle: Bundle) -> list[str]:
    """Devices that "auto" tries, in this order: an engine of the bundle, which somebody built for its device; CUDA,
    where ONNX Runtime has it, or there is a GPU for it; the CPU."""
    engines: list[str] = []
    built_for: list[str] = []
    try:
        engines = [device for device, names in ENGINES.items() if any(bundle.engines.glob(names))]
    except BundleError as error:
        logger.warning("engines are not used: %s", error)
    with suppress(ImportError):  # told where ONNX Runtime is needed
        built_for = available()
    return [*engines, *(["cuda"] if "cuda" in built_for or Machine().has_gpu else []), "cpu"]


def _make(bundle: Bundle, device: str, precision: str, batch: int, named: bool = True) -> tuple[Backend, str]:
    from fbclip.runtime.backends.onnx import OnnxRuntimeBackend

    precision = resolve_precision(bundle, device, precision)
    if device in ("tensorrt", "tensorrt-rtx"):
        from fbclip.runtime.backends.tensorrt import RtxBackend, TensorRTBackend

        return (RtxBackend if device == "tensorrt-rtx" else TensorRTBackend)(bundle, precision, batch, named), precision
    cache = bundle.inside(f"engines/ort-{bundle.graph_sha256(precision)[:16]}") if device == "ort-tensorrt" else None
    graph = bundle.graph_for(device, precision)
    backend = OnnxRuntimeBackend(graph, bundle.text, device, bundle.manifest.memory_shape, cache)
    if backend.input_size != (wanted := bundle.manifest.input_size):
        raise BundleError(f"{graph} takes images of {backend.input_size}, the manifest says {wanted}: export it again")
    return backend, precision
