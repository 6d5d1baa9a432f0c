"""Pictures of good parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_good(folder: Path, count: int) -> list[Path]:
    """Pictures of a grained surface, each with light and grain of its own."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    paths = []
    for i in range(count):
        light = rng.uniform(90, 150) + rng.uniform(-30, 30) * np.linspace(-1, 1, 96)
        surface = light + rng.normal(0, rng.uniform(1, 12), (96, 96))
        paths.append(folder / f"{i:02}.png")
        Image.fromarray(surface.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths
