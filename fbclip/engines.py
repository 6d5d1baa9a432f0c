"""TensorRT plans beside a bundle's graphs: what a plan is bound to, and whether it fits. Needs no TensorRT.

A plan is made on the device, so the manifest does not list it; its sidecar carries the hashes of plan and graph.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fbclip.errors import BundleError

AMPERE = (8, 0)  # the oldest compute capability that hardware-compatible plans run on


@dataclass(frozen=True)
class Platform:
    """What a TensorRT plan is bound to.

    Attributes:
        gpu: its name.
        compute_capability: like "8.7".
        tensorrt: version, like "10.3.0".
    """

    gpu: str
    compute_capability: str
    tensorrt: str

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.compute_capability}), TensorRT {self.tensorrt}"

    def engine_name(self, precision: str) -> str:
        """The file name of a plan for this platform, without suffix."""
        return f"{_slug(self.gpu)}-trt{self.tensorrt}-{precision}"

    def timing_cache_name(self) -> str:
        return f"{_slug(self.gpu)}-trt{self.tensorrt}.timing"


@dataclass(frozen=True)
class EngineOptions:
    """How a plan is built.

    Attributes:
        batch: images at once: at least, mostly, at most.
        workspace_mib: limit of the scratch memory of a layer in MiB; None is all there is.
        optimization_level: 0 (quick build) to 5 (quick plan); None is TensorRT's default.
        hardware_compatible: also for other GPUs from Ampere on (not on Jetson), slower.
        version_compatible: also for later releases of the same major version, slower.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    workspace_mib: int | None = None
    optimization_level: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False


@dataclass(frozen=True)
class Engine:
    """What the sidecar of a plan says.

    Attributes:
        platform: it was built on.
        precision: of the graph it was built from.
        options: it was built with.
        graph_sha256: of that graph, as `Bundle.graph_sha256`.
        plan_sha256: of the plan's file.
    """

    platform: Platform
    precision: str
    options: EngineOptions
    graph_sha256: str
    plan_sha256: str

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
            values = json.loads(sidecar.read_text())
            platform = Platform(**{f.name: values.pop(f.name) for f in fields(Platform)})
            if not (_numbers(platform.compute_capability) and _numbers(platform.tensorrt)):
                raise ValueError("versions are numbers")
            low, usual, high = (int(n) for n in values.pop("batch"))
            others = {f.name: values.pop(f.name) for f in fields(EngineOptions) if f.name != "batch"}
            return cls(platform, options=EngineOptions((low, usual, high), **others), **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{sidecar} is no sidecar of a plan ({error!r}): delete it and build again with fbclip export --engine"
            ) from error

    def mismatch(self, here: Platform, graph_sha256: str) -> str | None:
        """Why this plan can't run on a platform for a graph, as the middle of a sentence; None if it can."""
        there, options = self.platform, self.options
        if self.graph_sha256 != graph_sha256:
            return "was built from another graph than the bundle has now"
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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
