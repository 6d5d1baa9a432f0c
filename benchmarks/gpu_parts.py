"""What `gpu_check.py` asks a GPU: each function is the work of a part, in a process of its own, and yields figures."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "numpy", "open_clip_torch")
CARD = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")  # of nvidia-smi
BATCHES, LARGEST = (1, 8), 8
WARM_UP, RUNS, SECONDS, QUICK_SECONDS = 3, 50, 1.5, 0.3  # of a measurement: runs that don't count, at most, seconds
PRODUCT_SIDE, QUICK_SIDE = 8192, 512  # of the matrices whose product is timed
RECORDED_SIDE, PUBLISHED_SIDE = 154, 518  # pixels, of the recorded configuration and of ViT-L/14
LIMITS = {"fp32": 1e-4, "fp16": 5e-3}  # of the recorded numbers' differences: what an export may deviate by
ENGINES = {"tensorrt": "--engine", "tensorrt-rtx": "--rtx"}  # built by this option of fbclip export
TRAINED = {"default": 64, "large": 4}  # images a step, as fbclip train takes by default
STEPS, QUICK_STEPS = 60, 6
Figures = dict[str, Any]


class Skipped(Exception):
    """What a part needs is not there."""


def card(asked: Namespace) -> Iterator[Figures]:
    """What the figures are of."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    cores = len(os.sched_getaffinity(0))
    yield {**{field: smi(field) for field in CARD}, "cores": cores, "python": platform.python_version(), **versions}


def rates(asked: Namespace) -> Iterator[Figures]:
    """What bounds the models: the card's TFLOP/s of a square product, GB/s read and written in a copy on it, and to and
    from pinned memory; and the 10^9 operations of one image that the method can't do without."""
    import torch
    from vit_large import operations

    from fbclip.model import checkpoint
    from fbclip.model.clip import clip_config
    from fbclip.model.config import default_config

    side, gpu = QUICK_SIDE if asked.quick else PRODUCT_SIDE, asked.device == "cuda"
    precisions = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    matrix = torch.randn(side, side, device=asked.device)
    target, pinned = torch.empty_like(matrix), torch.empty(matrix.shape, pin_memory=gpu)
    found: Figures = {}
    for name in precisions if gpu else ("fp32",):
        typed = matrix.to(precisions[name])
        found[f"product_{name}_tflops"] = 2 * side**3 / seconds_of(asked, lambda a=typed: a @ a, gpu) / 1e12
    found["copy_gb_s"] = 2 * matrix.nbytes / seconds_of(asked, lambda: target.copy_(matrix), gpu) / 1e9
    if gpu:
        found["upload_gb_s"] = (
            matrix.nbytes / seconds_of(asked, lambda: target.copy_(pinned, non_blocking=True), gpu) / 1e9
        )
        found["download_gb_s"] = (
            matrix.nbytes / seconds_of(asked, lambda: pinned.copy_(target, non_blocking=True), gpu) / 1e9
        )
    large = torch_model(asked.quick, "large").config if asked.quick else default_config(clip_config("ViT-L-14-336"))
    models = {"default": checkpoint.load(checkpoint.NANO).config, "large": large}
    yield {**found, **{f"gflop_{name}": operations(config) / 1e9 for name, config in models.items()}}


def export(asked: Namespace, which: str) -> Iterator[Figures]:
    """Write the bundle that the deployed backends run, float32 and float16."""
    if (path := bundle_path(asked, which)).exists():
        raise Skipped(f"{path} is there already")
    from fbclip.export.bundle import Deployment, export_bundle
    from fbclip.export.parity import Proof
    from fbclip.export.report import Steps

    start, steps = time.perf_counter(), Steps()
    _, parities = export_bundle(
        torch_model(asked.quick, which),
        path,
        Proof([picture(asked, which)], (which,)),
        Deployment(which, half=True),
        steps,
    )
    parity = {p.precision: p.to_dict() for p in parities}
    yield {
        "seconds": time.perf_counter() - start,
        "steps": steps.seconds,
        "parity": parity,
        "peak_host_mb": peak_host_mb(),
    }


def correct(asked: Namespace, *kinds: str) -> Iterator[Figures]:
    """How far backends are from the recorded numbers of the reference program, from uint8 image to map."""
    import numpy as np

    with np.load(Path(asked.recorded) / "mini.npz", allow_pickle=False) as recorded:
        expected = [recorded[name] for name in ("raw_image_score", "raw_anomaly_map")]
    for kind in kinds:
        runs = backend_of(asked, "recorded", kind)
        for _ in range(3):  # plainly, captured, replayed
            found = runs.run(picture(asked, "recorded")[None])
        score, map_ = (float(np.abs(f[0] - e).max()) for f, e in zip(found, expected, strict=True))
        precision = kind.split()[1]
        yield {"kind": kind, "score_off": score, "map_off": map_, "launches": runs.launches}
        if not max(score, map_) <= LIMITS[precision]:
            raise ValueError(f"{kind} is {score:.1e} (score) and {map_:.1e} (map) from the recorded numbers")


def times(asked: Namespace, which: str, *kinds: str) -> Iterator[Figures]:
    """Milliseconds from frames in host memory to maps in host memory, of backends written as "NAME PRECISION"."""
    import numpy as np

    for kind in kinds:
        runs = backend_of(asked, which, kind)
        for batch in BATCHES[:1] if asked.quick else BATCHES:
            images = np.repeat(picture(asked, which)[None], batch, axis=0)
            first, first_s = runs.run(images), time.time() - asked.began
            yield {
                "model": which,
                "kind": kind,
                "batch": batch,
                # it waits for the device itself
                "ms_an_image": 1e3
                / batch
                * seconds_of(asked, lambda images=images, runs=runs: runs.run(images), False),
                "off_reference": off_reference(asked, which, kind, first),
                "launches": runs.launches,
                "device_ms": runs.device_times(images),
                "first_result_s": first_s if kind == kinds[0] and batch == 1 else None,
                "peak_host_mb": peak_host_mb(),
                "device_mb": smi("memory.used"),
            }
        runs.close()


def train(asked: Namespace, which: str, side: str, how: str = "as it is") -> Iterator[Figures]:
    """Images a second of whole steps: the default tower at some sides in pixels, or the head of ViT-L/14 on cached tokens;
    "plainly" leaves out CUDA graphs."""
    import torch

    from fbclip.model.capture import Captured
    from fbclip.training.loop import Execution, accelerator_for, train
    from fbclip.training.step import Recipe

    model, steps = torch_model(asked.quick, which, int(side)), QUICK_STEPS if asked.quick else STEPS
    batch = 4 if asked.quick else TRAINED[which]
    model.visual.tower.requires_grad_(which == "default")
    if how == "plainly":
        Captured.__call__ = lambda self, *inputs: self.work(*inputs)  # type: ignore[method-assign]
    out, accelerator = Path(asked.out, f"train-{which}-{side}"), accelerator_for("auto")
    workers = 0 if asked.quick else min(8, len(os.sched_getaffinity(0)) - 1)
    cache = None if which == "default" else Path(asked.out, "tokens")
    execution = Execution(workers=workers, save_every=10**6, cache_tokens=cache, progress=False)
    recipe, data = Recipe(epochs=2, batch_size=batch), Drawn(model.config.image_size, batch * steps // 2)
    took = train(model, data, recipe, out, execution, accelerator=accelerator)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    yield {
        "model": which,
        "side": int(side),
        "how": how,
        "batch": batch,
        "precision": accelerator.mixed_precision,
        "images_a_second": statistics.median(row["images_per_s"] for row in rows[steps // 2 :]),
        "waiting_for_data": took.waiting / took.seconds,
        "peak_device_mb": torch.cuda.max_memory_allocated() / 1e6 if asked.device == "cuda" else None,
        "peak_host_mb": peak_host_mb(),
    }


# What they share


class Drawn:
    """Generated pictures with defects, 32 of them over and over: it is not drawing that is measured."""

    def __init__(self, side: int, length: int) -> None:
        from fbclip.data.procedural import ProceduralDefects

        self.length, self.samples = length, [ProceduralDefects(side, 32)[i] for i in range(min(length, 32))]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.samples[index % len(self.samples)]


@cache
def torch_model(quick: bool, which: str, side: int | None = None) -> Any:
    """The embedded model ("default", at the side it is deployed at or another), ViT-L/14 at 518 px ("large") or the recorded
    configuration, which is also the large one of a quick run."""
    from vit_large import large_model

    from fbclip.model import checkpoint
    from helpers import golden

    if which == "default":
        return checkpoint.load(checkpoint.NANO, image_size=side)
    if which == "large" and not quick:
        return large_model()
    with tempfile.TemporaryDirectory() as folder:
        return golden.model(Path(folder))


def picture(asked: Namespace, which: str) -> Any:
    """uint8 (S, S, 3)."""
    import numpy as np

    from fbclip.bundle import Bundle
    from fbclip.resample import resize

    if which == "recorded" or (which == "large" and asked.quick):
        with np.load(Path(asked.recorded) / "mini.npz", allow_pickle=False) as recorded:
            return resize(recorded["raw_image"], RECORDED_SIDE)
    side = PUBLISHED_SIDE if which == "large" else Bundle.load().manifest.image_size
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def bundle_path(asked: Namespace, which: str) -> Path:
    return asked.bundle if which == "large" and asked.bundle else Path(asked.out, f"{which}.fbclip")


def backend_of(asked: Namespace, which: str, kind: str) -> Any:
    """A deployed backend, or torch's: the model ("torch"), its literal transcription ("torch-reference"), or the model
    replayed as a CUDA graph ("torch-captured"); "fp16" is autocast there."""
    name, precision = kind.split()
    if name.startswith("torch"):
        return torch_backend(asked, which, name, precision)
    from fbclip.bundle import Bundle
    from fbclip.errors import DeviceError
    from fbclip.runtime.backends import make_backend

    path = bundle_path(asked, which)
    bundle = Bundle.load(None if which == "default" and not path.exists() else path)
    if precision not in bundle.manifest.precisions:
        raise Skipped(f"{bundle.path.name} has {', '.join(bundle.manifest.precisions)}")
    try:
        if name in ENGINES and path.exists():  # never into the embedded one
            build_engine(bundle.path, ENGINES[name], precision)
            bundle = Bundle.load(bundle.path)
        return make_backend(bundle, name, precision, LARGEST)[0]
    except DeviceError as error:
        raise Skipped(str(error)) from error


def build_engine(bundle: Path, option: str, precision: str) -> None:
    command = [sys.executable, "-m", "fbclip.cli", "export", "--bundle", str(bundle), option, "--precision", precision]
    built = subprocess.run([*command, "--batch", f"1,1,{LARGEST}"], capture_output=True, text=True, cwd=ROOT)
    if built.returncode:
        last = (built.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Skipped(last) if built.returncode == 2 else RuntimeError(last)


def torch_backend(asked: Namespace, which: str, name: str, precision: str) -> Any:
    import torch

    from fbclip.model import reference
    from fbclip.model.backend import TorchBackend
    from fbclip.model.capture import Captured

    model, half = torch_model(asked.quick, which), torch.float16 if asked.device == "cuda" else torch.bfloat16

    def forward(image: Any, text: Any) -> Sequence[Any]:
        with torch.autocast(asked.device, half, enabled=precision == "fp16"):
            if name == "torch-reference":
                return reference.forward(model.visual, image, text)
            return [result.float() for result in model.visual(image, text)]

    return TorchBackend(model, asked.device, Captured(forward) if name == "torch-captured" else forward)


def off_reference(asked: Namespace, which: str, kind: str, found: Any) -> float | None:
    """Largest difference of score and map from the literal reference, which comes first; None where it did not."""
    import numpy as np

    kept = Path(asked.out, f"reference-{which}.npz")
    if kind == "torch-reference fp32":
        np.savez(kept, scores=found[0][:1], maps=found[1][:1])
    if not kept.is_file():
        return None
    with np.load(kept) as reference:
        return max(float(np.abs(found[n][:1] - reference[name]).max()) for n, name in enumerate(("scores", "maps")))


def seconds_of(asked: Namespace, work: Callable[[], object], gpu: bool) -> float:
    """Median seconds of one run."""
    enough = QUICK_SECONDS if asked.quick else SECONDS
    wait: Callable[[], object] = bool
    if gpu:
        import torch

        wait = torch.cuda.synchronize
    seconds: list[float] = []
    while len(seconds) < WARM_UP + 1 or (len(seconds) < WARM_UP + RUNS and sum(seconds) < enough):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def peak_host_mb() -> float:
    from fbclip.runtime.bench.runner import peak_host_mb

    return peak_host_mb()


def smi(field: str) -> str | None:
    """What nvidia-smi says of the first GPU; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
