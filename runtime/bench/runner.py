"""One subject of `fbclip bench` in a process of its own, which runs when it is told to (`fbclip.runtime.workers`).

There it has its own peak of memory and its own start; told round by round when to run, it shares the machine's good and
bad moments with the others.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from fbclip.bundle import IMAGE, Bundle
from fbclip.resample import in_order, resize
from fbclip.runtime.backends import DEVICES, Backend, make_backend, require_probabilities
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend
from fbclip.runtime.host import peak_memory
from fbclip.runtime.tiles import Tiles, inspect
from fbclip.untrusted import build

if sys.platform != "win32":
    import resource

Results = tuple[NDArray[np.float32], NDArray[np.float32]]

# Warm-up ends when the last three runs lie within 5 % of their median, or after 20 runs or 10 seconds.
STABLE_RUNS, STABLE_SPREAD = 3, 0.05
WARMUP_RUNS, WARMUP_SECONDS = 20, 10.0
PROFILED_RUNS = 5
ON_GPU = tuple(device for device in DEVICES if device != "cpu")
DEVICE_RUNS = 10
NO_GRAPHS = {"CUDAExecutionProvider": {"enable_cuda_graph": "0"}}
SLOW_SECONDS = 1.0  # a run this long cares little for what others left in the caches


@dataclass(frozen=True)
class Spec:
    """What a runner measures.

    Attributes:
        backend: "torch-reference", "torch", "torch-compile", or a device of `make_backend`.
        precision: "fp32", "fp16", … of the bundle.
        batch: images per run.
        bundle: folder.
        frames: .npy file of uint8 (F, H, W, 3) RGB, which every subject gets.
        outputs: .npz file to write for the comparison.
        memory: file of what good parts taught; None for the zero-shot model.
        tiles: each frame is inspected in these, too, `batch` of its views at once: a run is one frame.
        checkpoint, clip, clip_weights: of the torch backends; the embedded model's if None.
        torch: the module whose `bundle_backend` makes those.
    """

    backend: str
    precision: str
    batch: int
    bundle: str
    frames: str
    outputs: str
    memory: str | None = None
    tiles: Tiles | None = None
    checkpoint: str | None = None
    clip: str | None = None
    clip_weights: str | None = None
    torch: str | None = None

    @property
    def images(self) -> int:
        """Frames of a run."""
        return 1 if self.tiles else self.batch


class Runner:
    """A backend with the same work as every other: from frames in host memory, uint8, to scores and to maps of the
    frames' size in host memory, float32. Resizes where the backend does not."""

    def __init__(self, values: dict[str, Any]) -> None:
        tiles = values.pop("tiles", None)
        self.spec = spec = Spec(**values, tiles=build(Tiles, tiles) if tiles else None)
        self.bundle = bundle = Bundle.load(spec.bundle)
        manifest = bundle.manifest
        order, self.taken_hw = manifest.channel_order, manifest.input_size
        self.memory = bundle.memory(Path(spec.memory)) if spec.memory else None
        self.backend: Backend
        if spec.backend.startswith("torch"):
            path = Path(spec.checkpoint) if spec.checkpoint else None
            make = resolve_name(f"{spec.torch}:bundle_backend")
            self.backend = make(bundle, spec.backend, path, spec.clip, spec.clip_weights)
            order, self.taken_hw = "rgb", (manifest.image_size,) * 2
        else:
            self.backend, _ = make_backend(bundle, spec.backend, spec.precision, spec.batch)
            self.backend.set_memory(self.memory.tensors if self.memory else None)
        frames = in_order(np.load(spec.frames, allow_pickle=False), order)
        self.frame_hw = frames.shape[1:3]
        indices = np.arange(len(frames) * spec.images).reshape(-1, spec.images) % len(frames)
        self.inputs = [np.ascontiguousarray(frames[i]) for i in indices]
        self.outputs: dict[int, Results] = {}
        self.done = 0
        self.last_seconds = 0.0
        self._once()

    def ready(self) -> dict[str, Any]:
        """The first result is there."""
        return {"device": self.backend.device, "reads": self._bytes()}

    def _bytes(self) -> int:
        """What a run has to read and write at least: weights, the memory of good parts, frames, maps."""
        files = self.bundle.manifest.files
        graph = self.bundle.graph(self.spec.precision)
        weights = sum((self.bundle.path / f).stat().st_size for f in files if f.startswith(graph.name))
        shape = self.bundle.manifest.memory_shape
        memory = shape.numbers * 4 if shape else 0
        frame_and_map = math.prod(self.frame_hw) * (3 + 4)
        return weights + memory + self.spec.images * frame_and_map

    def work(self, images: NDArray[np.uint8]) -> Results:
        height, width = self.frame_hw
        if self.spec.tiles and (layout := self.spec.tiles.cut(height, width, self.bundle.manifest.grid)):
            score, anomaly_map = inspect(self.backend, layout.views(images[0], self._taken), layout, self.spec.batch)
            return np.array([score], np.float32), anomaly_map[None]
        scores, maps = self.backend.run(self._taken(images))
        if maps.shape[1:] != self.frame_hw:
            import cv2

            height, width = self.frame_hw
            maps = np.stack([cv2.resize(m, (width, height), interpolation=cv2.INTER_LINEAR) for m in maps])
        return scores, maps

    def _taken(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Frames in the size that the backend takes."""
        if images.shape[1:3] == self.taken_hw:
            return images
        return np.stack([resize(image, self.taken_hw) for image in images])

    def _once(self) -> float:
        """The next run's seconds; the first over all frames is kept for the comparison."""
        index = self.done % len(self.inputs)
        start = time.perf_counter()
        scores, maps = self.work(self.inputs[index])
        self.last_seconds = time.perf_counter() - start
        require_probabilities(scores, maps)  # a broken model has no speed to speak of
        if index == self.done:
            self.outputs[index] = scores, maps
        self.done += 1
        return self.last_seconds

    def warm(self) -> dict[str, Any]:
        """Run until the times are stable."""
        seconds: list[float] = []
        while len(seconds) < WARMUP_RUNS and sum(seconds) < WARMUP_SECONDS and not is_stable(seconds):
            seconds.append(self._once())
        return {"runs": len(seconds), "stable": is_stable(seconds), "seconds": seconds[-1]}

    def run(self, runs: int) -> dict[str, Any]:
        """A turn: one run that is not timed, because others had the caches meanwhile, then `runs` that are."""
        before = time.perf_counter(), time.process_time()
        count = self.done
        if self.last_seconds < SLOW_SECONDS:
            self._once()
        seconds = [self._once() for _ in range(runs)]
        wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        return {"seconds": seconds, "wall_s": wall, "cpu_s": cpu, "runs": self.done - count}

    def finish(self) -> dict[str, Any]:
        """Peak of memory; on a GPU upload, compute and download apart, and how runs are started; results to the file."""
        peak = peak_host_mb()
        order = sorted(self.outputs)
        scores, maps = (np.concatenate([self.outputs[i][k] for i in order]) for k in (0, 1))
        np.savez(self.spec.outputs, scores=scores, maps=maps)
        return {"peak_host_mb": peak, "device_ms": self._device_times(), "launches": self.backend.launches}

    def _device_times(self) -> dict[str, float] | None:
        """Medians of what the backend tells."""
        images = self._taken(self.inputs[0])
        times = [found for _ in range(DEVICE_RUNS) if (found := self.backend.device_times(images))]
        return {name: float(np.median([t[name] for t in times])) for name in times[0]} if times else None

    def profile(self, operations: dict[str, int]) -> dict[str, Any] | None:
        """Where ONNX Runtime spends its time; None for other backends."""
        if not isinstance(self.backend, OnnxRuntimeBackend):
            return None
        from fbclip.runtime.bench.profile import (  # not before: a cold start is measured
            beside_images,
            profile,
            summarise,
        )

        session = self.backend.session
        inputs: dict[str, NDArray[Any]] = {
            IMAGE: self._taken(self.inputs[0]),
            **beside_images(self.bundle, self.memory),
        }
        # a graph is one launch, of which a profile shows nothing
        providers = [
            (name, values | NO_GRAPHS.get(name, {})) for name, values in session.get_provider_options().items()
        ]
        options = session.get_session_options()
        nodes = profile(self.backend.graph, options, providers, inputs, PROFILED_RUNS, self.backend.unwanted)
        return asdict(summarise(nodes, PROFILED_RUNS, operations, self.spec.batch))


def is_stable(seconds: list[float]) -> bool:
    """Whether the last runs took about the same."""
    last = np.array(seconds[-STABLE_RUNS:])
    return len(last) == STABLE_RUNS and bool(np.ptp(last) <= STABLE_SPREAD * np.median(last))


def peak_host_mb() -> float:
    """The largest resident memory so far in MB."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e6
    if (peak := peak_memory()) is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak / 1e6
