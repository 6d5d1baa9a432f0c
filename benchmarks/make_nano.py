"""Train the embedded default model, choose its threshold and export its bundle: `make nano`. See docs/measurements/nano.md.

Interrupted, the same command goes on. The training is deterministic on one machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parent.parent
ASSETS = REPOSITORY / "fbclip" / "assets"
RUN = REPOSITORY / "runs" / "nano"
IMAGE_SIZE = 192  # trained small for many cheap steps, deployed larger for finer maps
COMMON = (
    "procedural --train-tower --feature-layers 6 --epochs 1 --cosine --amp bf16 --teacher efficientnet-lite0 "
    "--teacher-weight 0.5 --workers 0 --save-every 250"
)
# First what surfaces and defects are, then how irregular surfaces can be: on two processes, half of a batch each.
FIRST = "--samples 120000 --ramp 8000 --batch-size 16 --lr 1e-3 --muon-lr 0.02 --seed 0"
SECOND = "--samples 64000 --variety 2 --batch-size 8 --lr 5e-4 --muon-lr 0.01 --seed 100"
# glibc would give every freed buffer back to the system, only to ask for it again: a sixth of the time.
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "OMP_NUM_THREADS": "1"}
# Held-out procedural images: the threshold is chosen on those of the first seed, as irregular as the second stage's
# are; all figures are of the second seed.
CHOOSE, JUDGE, HELD_OUT, VARIETY = 77, 78, 400, 2


def fbclip(*arguments: object, processes: int = 1) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "fbclip.cli", *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})


def train(recipe: str, out: Path, *start: object, processes: int = 1) -> Path:
    """The checkpoint of a stage, which goes on where an interrupted one stopped."""
    checkpoint = out / "checkpoint.safetensors"
    resume = ["--resume"] if checkpoint.exists() else []
    fbclip("train", *COMMON.split(), *recipe.split(), *start, "--out", out, *resume, processes=processes)
    return checkpoint


def held_out(
    checkpoint: Path, seed: int, variety: float = VARIETY
) -> tuple[NDArray[np.float32], NDArray[np.int64], float | None]:
    """Scores (N,) and labels (N,) of held-out images, and the pixel AUROC of their maps."""
    from fbclip.data.procedural import ProceduralDefects
    from fbclip.metrics import PixelMetrics
    from fbclip.model import checkpoint as checkpoints
    from fbclip.model.backend import TorchBackend

    data, pixels = ProceduralDefects(IMAGE_SIZE, HELD_OUT, seed, variety=variety), PixelMetrics()
    backend = TorchBackend(checkpoints.load(checkpoint, image_size=IMAGE_SIZE))
    scores, labels = [], []
    for start in range(0, HELD_OUT, 8):
        samples = [data[i] for i in range(start, start + 8)]
        found, maps = backend.run(np.stack([sample.image for sample in samples]))
        scores += found.tolist()
        labels += [sample.label for sample in samples]
        for sample, anomaly_map in zip(samples, maps, strict=True):
            assert sample.mask is not None
            pixels.add(sample.mask, anomaly_map)
    return np.array(scores, np.float32), np.array(labels), pixels.metrics().auroc


def balanced_accuracy(scores: NDArray[np.float32], labels: NDArray[np.int64], threshold: float) -> float:
    bad = scores >= threshold
    return float((bad[labels == 1].mean() + 1 - bad[labels == 0].mean()) / 2)


def choose_threshold(checkpoint: Path) -> float:
    """The best balanced accuracy on one set of held-out images; figures on another go to RUN/held_out.json."""
    from fbclip.metrics import image_metrics

    scores, labels, _ = held_out(checkpoint, CHOOSE)
    steps = np.round(np.arange(0.3, 0.701, 0.005), 3)
    threshold = float(max(steps, key=lambda step: balanced_accuracy(scores, labels, step)))
    figures: dict[str, float | dict[str, float | None]] = {"threshold": threshold}
    for variety in (1, VARIETY):
        scores, labels, pixel_auroc = held_out(checkpoint, JUDGE, variety)
        figures[f"variety {variety}"] = {
            "pixel_auroc": pixel_auroc,
            "image_auroc": image_metrics(labels, scores).auroc,
            "balanced_accuracy": balanced_accuracy(scores, labels, threshold),
        }
    (RUN / "held_out.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(figures)
    return threshold


def main() -> None:
    first = train(FIRST, RUN / "1", "--clip", ASSETS / "fbclip-nano.json")
    trained = train(SECOND, RUN / "2", "--from", first, processes=2)
    threshold = choose_threshold(trained)
    bundle = RUN / "fbclip-nano.fbclip"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copyfile(trained, ASSETS / "fbclip-nano.safetensors")  # the bundle is named after it
    checkpoint = ASSETS / "fbclip-nano.safetensors"
    fbclip("export", "--checkpoint", checkpoint, "--image-size", IMAGE_SIZE, "--threshold", threshold, "--out", bundle)
    shutil.rmtree(ASSETS / "fbclip-nano.fbclip", ignore_errors=True)
    shutil.copytree(bundle, ASSETS / "fbclip-nano.fbclip")


if __name__ == "__main__":
    main()
