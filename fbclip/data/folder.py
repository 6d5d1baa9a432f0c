"""A folder laid out like MVTec AD: `test/good`, `test/<defect>`, `ground_truth/<defect>/<stem>_mask.png`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.data.dataset import Sample
from fbclip.errors import UsageError
from fbclip.image import resize
from fbclip.reading import SUFFIXES, read_image


class MVTecFolder:
    """The test split of one class, or of all classes below `root`: the supervision of FB-CLIP's training.

    Args:
        root: a class folder (has `test/`), or a folder of such folders.
        image_size: side in pixels that images and masks are resized to.
    """

    def __init__(self, root: Path, image_size: int) -> None:
        classes = [root] if (root / "test").is_dir() else sorted(p.parent for p in root.glob("*/test") if p.is_dir())
        self.image_size = image_size
        self.items: list[tuple[Path, Path | None]] = []
        for folder in classes:
            for image in sorted(p for p in (folder / "test").rglob("*") if p.suffix.lower() in SUFFIXES):
                defect = image.parent.name
                mask = folder / "ground_truth" / defect / f"{image.stem}_mask.png"
                if defect != "good" and not mask.is_file():
                    raise UsageError(f"every defective image needs a mask; {image} has none at {mask}")
                self.items.append((image, None if defect == "good" else mask))
        if not self.items:
            raise UsageError(
                f"training data is laid out like MVTec AD (test/good, test/DEFECT, ground_truth/DEFECT); "
                f"found no images below {root}/test or {root}/*/test"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        image_path, mask_path = self.items[index]
        size = self.image_size
        mask: NDArray[np.uint8] = np.zeros((size, size), np.uint8)
        if mask_path is not None:
            with Image.open(mask_path) as file:
                smooth = file.convert("L").resize((size, size), Image.Resampling.BILINEAR)
            mask = (np.asarray(smooth) > 127).astype(np.uint8)
        return Sample(resize(read_image(image_path), size), mask, int(mask.any()))
