"""FB-CLIP against anomalib's WinCLIP on the same backbone, ViT-B-16-plus-240, random weights, float32 on the CPU.

Interleaved rounds in one process, from a uint8 frame of 240 × 240 to score and map. Needs anomalib, which is no
dependency of this project, in an environment of its own:

python -m venv ENV && ENV/bin/pip install '.[train]' anomalib && ENV/bin/python benchmarks/winclip.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from anomalib.models.image.winclip import torch_model
from numpy.typing import NDArray

from fbclip.export.bundle import Deployment, export_bundle
from fbclip.export.parity import Proof
from fbclip.model.clip import build_clip, clip_config
from fbclip.model.config import default_config
from fbclip.model.network import FBCLIP
from fbclip.runtime.backends import make_backend

BACKBONE, SIDE, ROUNDS = "ViT-B-16-plus-240", 240, 5


def winclip(frame: NDArray[np.uint8]) -> Callable[[], None]:
    """Zero-shot, its text features computed beforehand, as ours are."""
    torch_model.PRETRAINED = None  # random weights: the time does not depend on them
    model = torch_model.WinClipModel(class_name="object").eval()
    mean, std = (np.float32(v) for v in (model._transform.transforms[-1].mean, model._transform.transforms[-1].std))

    @torch.inference_mode()
    def run() -> None:
        pixels = (frame / np.float32(255) - mean) / std
        model(torch.from_numpy(pixels.transpose(2, 0, 1)[None]))

    return run


def fbclip_onnxruntime(frame: NDArray[np.uint8], folder: Path) -> Callable[[], None]:
    config = clip_config(BACKBONE)
    model = FBCLIP(default_config(config), build_clip(config, None)).eval()
    bundle, _ = export_bundle(model, folder / "b16.fbclip", Proof([frame], ("noise",)), Deployment("b16"))
    backend, _ = make_backend(bundle, "cpu")
    return lambda: backend.run(frame[None]) and None


def main() -> None:
    torch.manual_seed(0)
    frame = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        runs = {"winclip": winclip(frame), "fbclip": fbclip_onnxruntime(frame, Path(folder))}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():  # a first round, not timed
            run()
        for _ in range(ROUNDS):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "backbone": BACKBONE,
        "side": SIDE,
        "anomalib": version("anomalib"),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "all": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
        "faster": round(medians["winclip"] / medians["fbclip"], 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
