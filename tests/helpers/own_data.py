"""A data set of one's own, of noise with bright spots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.data.dataset import Dataset
from fbclip.data.layouts import open_dataset


def make_own(root: Path, counts: dict[str, tuple[int, int]], side: int = 40) -> Dataset:
    """MVTec AD's tree of noise with a bright spot as defect: good and defective images of each class."""
    rng = np.random.default_rng(0)
    for name, (good, defective) in counts.items():
        for number in range(good + defective):
            kind = "good" if number < good else "spot"
            image = rng.integers(60, 150, (side, side), np.uint8)
            if kind == "spot":
                mask = np.zeros((side, side), np.uint8)
                mask[side // 4 : side // 2, side // 4 : side // 4 + 4 + number] = 255
                image = np.where(mask > 0, image + 80, image).astype(np.uint8)
                _save(root / name / "ground_truth/spot" / f"{number:03}_mask.png", mask)
            _save(root / name / "test" / kind / f"{number:03}.png", image)
    return open_dataset(root, "mvtec")


def _save(path: Path, array: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
