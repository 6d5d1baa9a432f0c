"""TensorRT plans beside a bundle's graphs: what a plan is bound to, and whether it fits. Needs no TensorRT.

A plan is made after the bundle, most on the device, so the manifest does not list it; its sidecar carries the hashes of
plan and graph.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from fbclip.errors import BundleError
from fbclip.untrusted import Like, Line, Range, build, one_line, one_of, read_json

MOST_SIDECAR = 2**16  # bytes; usual are 400

Precision = Annotated[str, one_of("fp32", "fp16", "int8")]
Version = Annotated[str, Like(r"\d{1,6}(\.\w{1,20}){0,5}", "a version, like 10.3.0")]
Hash = Annotated[str, Like("[0-9a-f]{0,64}", "a SHA-256 in hexadecimal")]  # part of one fits nothing
Batch = Annotated[int, Range(1, 100_000)]

AMPERE = (8, 0)  # the oldest compute capability that hardware-compatible plans run on


@dataclass(frozen=True)
class Platform:
    """What a TensorRT plan is bound to.

    Attributes:
        gpu: its name.
        compute_capability: like "8.7".
        tensorrt: version, like "10.3.0".
    """

    gpu: Line
    compute_capability: Version
    tensorrt: Version

    LIBRARY: ClassVar[str] = "TensorRT"
    FOLDER: ClassVar[str] = "engines"  # of a bundle
    COMMAND: ClassVar[str] = "fbclip export --engine"

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.compute_capability}), TensorRT {self.tensorrt}"

    def engine_name(self, precision: str) -> str:
        """The file name of a plan for this platform, without suffix."""
        return f"{_slug(self.gpu)}-trt{self.tensorrt}-{precision}"

    def timing_cache_name(self) -> str:
        return f"{_slug(self.gpu)}-trt{self.tensorrt}.timing"


@dataclass(frozen=True)
class RtxPlatform:
    """What a TensorRT-RTX plan is bound to: kinds of GPU, rather than one of them.

    Attributes:
        tensorrt_rtx: version, like "1.7.1.116".
        compute_capabilities: of the GPUs that a plan runs on, like "8.9"; where it is to run, the one that is there.
    """

    tensorrt_rtx: Version
    compute_capabilities: Annotated[tuple[Version, ...], Range(1, 100)]

    LIBRARY: ClassVar[str] = "TensorRT-RTX"
    FOLDER: ClassVar[str] = "engines/rtx"
    COMMAND: ClassVar[str] = "fbclip export --rtx"

    def __str__(self) -> str:
        return f"compute capability {', '.join(self.compute_capabilities)}, TensorRT-RTX {self.tensorrt_rtx}"

    def engine_name(self, precision: str) -> str:
        """The file name of a plan, without suffix."""
        return f"{self.tensorrt_rtx}-{precision}"

    def kernels_name(self, gpu: str, plan_sha256: str) -> str:
        """The file name of the kernels that were compiled for a plan on a GPU."""
        return f"{_slug(gpu)}-{self.tensorrt_rtx}-{plan_sha256[:16]}.kernels"


@dataclass(frozen=True)
class EngineOptions:
    """How a plan is built; TensorRT-RTX takes the batch alone.

    Attributes:
        batch: images at once: at least, mostly, at most.
        workspace_mib: limit of the scratch memory of a layer in MiB; None is all there is.
        optimization_level: 0 (quick build) to 5 (quick plan); None is TensorRT's default.
        hardware_compatible: also for other GPUs from Ampere on (not on Jetson), slower.
        version_compatible: also for later releases of the same major version, slower.
    """

    batch: tuple[Batch, Batch, Batch] = (1, 1, 1)
    workspace_mib: Annotated[int, Range(1, 2**40)] | None = None
    optimization_level: Annotated[int, Range(0, 5)] | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False


@dataclass(frozen=True)
class Engine:
    """What the sidecar of a plan says.

    Attributes:
        platform: it was built on, or for.
        precision: of the graph it was built from.
        options: it was built with.
        graph_sha256: of that graph, as `Bundle.graph_sha256`.
        plan_sha256: of the plan's file.
    """

    platform: Platform | RtxPlatform
    precision: Precision
    options: EngineOptions
    graph_sha256: Hash
    plan_sha256: Hash

    KIND: ClassVar[type[Platform | RtxPlatform]] = Platform

    def to_json(self) -> str:
        values = asdict(self)
        return (
            json.dumps({**values.pop("platform"), **values.pop("options"), **values}, indent=1, allow_nan=False) + "\n"
        )

    @classmethod
    def load(cls, sidecar: Path) -> Engine:
        """
        Raises:
            BundleError: no sidecar of this format.
        """
        try:
            values = read_json(sidecar, MOST_SIDECAR)
            if not isinstance(values, dict):
                raise ValueError("it is no object in braces")
            grouped = {"platform": _take(cls.KIND, values), "options": _take(EngineOptions, values)}
            engine = build(cls, {**values, **grouped})
            if list(batch := engine.options.batch) != sorted(batch):
                raise ValueError(f"batch ascends; got {batch}")
            return engine
        except ValueError as error:
            raise BundleError(
                f"{sidecar} is no sidecar of a plan: {one_line(error)}; delete it and build again with "
                f"{cls.KIND.COMMAND}"
            ) from error

    def mismatch(self, here: Platform | RtxPlatform, graph_sha256: str) -> str | None:
        """Why this plan can't run on a platform for a graph, as the middle of a sentence; None if it can."""
        there, options = self.platform, self.options
        if self.graph_sha256 != graph_sha256:
            return "was built from another graph than the bundle has now"
        if isinstance(there, RtxPlatform) or isinstance(here, RtxPlatform):
            return None if _runs(there, here) else f"was built for {there}; here is {here}"
        if options.hardware_compatible:
            if _numbers(here.compute_capability) < AMPERE:
                return f"runs on GPUs from Ampere on; this one is {here}"
        elif (there.gpu, there.compute_capability) != (here.gpu, here.compute_capability):
            return f"was built for {there}; this is {here}"
        if options.version_compatible:
            built, runs = _numbers(there.tensorrt), _numbers(here.tensorrt)
            if built[0] != runs[0] or built > runs:
                return f"runs with TensorRT {there.tensorrt} and later {built[0]}.x; here is {here.tensorrt}"
        elif there.tensorrt != here.tensorrt:
            return f"was built with TensorRT {there.tensorrt}; here is {here.tensorrt}"
        return None


@dataclass(frozen=True)
class RtxEngine(Engine):
    """What the sidecar of a TensorRT-RTX plan says."""

    platform: RtxPlatform

    KIND: ClassVar[type[Platform | RtxPlatform]] = RtxPlatform


def _runs(there: Platform | RtxPlatform, here: Platform | RtxPlatform) -> bool:
    """Whether a TensorRT-RTX plan that was built for `there` runs `here`."""
    if not (isinstance(there, RtxPlatform) and isinstance(here, RtxPlatform)):
        return False
    known = set(here.compute_capabilities) <= set(there.compute_capabilities)
    return known and there.tensorrt_rtx == here.tensorrt_rtx


def _take(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a dataclass out of those of the sidecar, which has them all side by side."""
    return {f.name: values.pop(f.name) for f in fields(cls) if f.name in values}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
