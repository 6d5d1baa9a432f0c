"""What `--cache-tokens` saves and what float16 storage changes: a frozen ViT of generated weights, with and without.

python benchmarks/token_cache.py    # writes benchmarks/results/token_cache.json

Seconds are of whole epochs, loading included (one worker), medians of the epochs after the first.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fbclip.data.procedural import ProceduralDefects
from fbclip.model.clip import ClipConfig, build_clip
from fbclip.model.config import default_config
from fbclip.model.network import FBCLIP
from fbclip.training.loop import Execution, train
from fbclip.training.step import Recipe

VIT = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 384, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}
SAMPLES, RECIPE = 16, Recipe(epochs=3)


def model() -> FBCLIP:
    torch.manual_seed(0)
    config = ClipConfig("ViT-S-16-generated", VIT)
    return FBCLIP(default_config(config), build_clip(config, None))


def run(out: Path, cache: Path | None) -> dict[str, Any]:
    """Losses of every step and seconds of every epoch, from `metrics.jsonl`."""
    train(model(), ProceduralDefects(224, SAMPLES), RECIPE, out, Execution(workers=1, cache_tokens=cache))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [
        sum(RECIPE.batch_size / row["images_per_s"] for row in rows if row["epoch"] == epoch)
        for epoch in range(1, RECIPE.epochs + 1)
    ]
    return {"losses": np.array([row["total"] for row in rows]), "later": statistics.median(seconds[1:])}


def main() -> None:
    torch.set_num_threads(1)  # so that other work on the machine disturbs both alike
    with tempfile.TemporaryDirectory() as folder:
        plain = run(Path(folder, "plain"), None)
        cached = run(Path(folder, "cached"), Path(folder, "tokens"))
        size = sum(file.stat().st_size for file in Path(folder, "tokens").iterdir())
    change = np.abs(cached["losses"] / plain["losses"] - 1)
    result = {
        "model": "ViT-S/16 at 224 px, generated weights, 5 feature layers",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "images": SAMPLES,
        "epoch_s_plain": round(plain["later"], 2),
        "epoch_s_cached": round(cached["later"], 2),
        "speed_up": round(plain["later"] / cached["later"], 2),
        "cache_mb_per_image": round(size / SAMPLES / 1e6, 3),
        "loss_change_first_step": float(f"{change[0]:.2e}"),
        "loss_change_largest": float(f"{change.max():.2e}"),
        "loss_change_last_epoch_mean": float(f"{change[-(SAMPLES // RECIPE.batch_size) :].mean():.2e}"),
    }
    target = Path(__file__).parent / "results" / "token_cache.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
