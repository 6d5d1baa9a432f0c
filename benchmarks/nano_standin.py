"""A checkpoint on a stand-in for photographs: python benchmarks/nano_standin.py PHOTOGRAPHS CHECKPOINT [--side 96 192] [--json F].

For choosing among recipes of the included model, since the real sets that it is reported on may not choose. The
generator's defects are drawn on crops of photographed surfaces, any folder of JPEG or PNG files; half of the pictures
show a part in front of something else. The same seed draws the same pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from fbclip.data.dataset import Sample
from fbclip.data.procedural import ProceduralDefects, add_defect, camera
from fbclip.data.surfaces import Mask, Pixels, framed, silhouette
from fbclip.images import read_image
from fbclip.metrics import PixelMetrics, image_metrics
from fbclip.model import checkpoint as checkpoints
from fbclip.model.backend import TorchBackend

COUNT, SEED, BATCH = 400, 5, 8


class Photographed(ProceduralDefects):
    """Defects on crops of photographs, as `ProceduralDefects` draws them on surfaces of its own."""

    def __init__(self, photographs: list[Path], image_size: int, length: int, seed: int) -> None:
        super().__init__(image_size, length, seed, variety=2)
        self.photographs = [read_image(path) for path in photographs]

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        clean = self.crop(rng)
        support, behind = np.ones(clean.shape[:2], np.uint8), clean
        if rng.random() < 0.5:
            clean, support, behind = self.part(clean, rng)
        image, mask = clean, np.zeros(support.shape, np.uint8)
        if rng.random() < self.defective_share:
            image, mask = add_defect(image, mask, support, behind, rng, self.variety)
        return Sample(camera(image, rng, 1), mask, int(mask.any()))

    def crop(self, rng: np.random.Generator) -> Pixels:
        """A square of a photograph, turned by quarters, its side between that of the model and the whole picture."""
        photograph = self.photographs[int(rng.integers(len(self.photographs)))]
        most = min(photograph.shape[:2])
        side = int(rng.uniform(min(self.image_size, most), most + 1))
        top, left = (int(rng.integers(0, whole - side + 1)) for whole in photograph.shape[:2])
        cut = np.rot90(photograph[top : top + side, left : left + side], int(rng.integers(4)))
        how = cv2.INTER_AREA if side > self.image_size else cv2.INTER_CUBIC
        small = cv2.resize(np.ascontiguousarray(cut), (self.image_size, self.image_size), interpolation=how)
        return small.astype(np.float32) / np.float32(255)

    def part(self, clean: Pixels, rng: np.random.Generator) -> tuple[Pixels, Mask, Pixels]:
        """The surface as a part before another, darkened one."""
        shape = silhouette if rng.random() < 0.5 else framed
        support, behind = shape(rng, self.image_size), self.crop(rng) * np.float32(rng.choice([0.1, 0.4, 1]))
        edge = cv2.GaussianBlur(support.astype(np.float32), (0, 0), 1)[..., None]
        return (clean * edge + behind * (1 - edge)).astype(np.float32), support, behind


def judge(checkpoint: Path, photographs: list[Path], side: int) -> dict[str, float | None]:
    """Pixel AUROC and AUPRO over all pictures, image AUROC, and the mean pixel AUROC of single defective pictures."""
    data, pixels = Photographed(photographs, side, COUNT, SEED), PixelMetrics()
    backend = TorchBackend(checkpoints.load(checkpoint, image_size=side))
    scores: list[float] = []
    labels: list[int] = []
    single: list[float] = []
    for start in range(0, COUNT, BATCH):
        samples = [data[i] for i in range(start, start + BATCH)]
        found, maps = backend.run(np.stack([sample.image for sample in samples]))
        scores += found.tolist()
        for sample, anomaly_map in zip(samples, maps, strict=True):
            assert sample.mask is not None
            labels.append(sample.label)
            pixels.add(sample.mask, anomaly_map)
            if sample.label:
                own = PixelMetrics()
                own.add(sample.mask, anomaly_map)
                auroc = own.metrics().auroc
                assert auroc is not None  # a defect never fills the picture
                single.append(auroc)
    found_metrics = pixels.metrics()
    return {
        "pixel_auroc": found_metrics.auroc,
        "aupro": found_metrics.aupro[0.3],
        "image_auroc": image_metrics(labels, scores).auroc,
        "pixel_auroc_of_one": float(np.mean(single)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--side", type=int, nargs="+", default=[192], help="of the model's input in px, several")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = sorted(p for p in arguments.photographs.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        raise SystemExit(f"there is no photograph in {arguments.photographs}")
    figures = {}
    for side in arguments.side:
        figures[side] = judge(arguments.checkpoint, found, side)
        shown = {name: value if value is None else round(value, 4) for name, value in figures[side].items()}
        print(f"{len(found)} photographs, {side} px: {shown}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
