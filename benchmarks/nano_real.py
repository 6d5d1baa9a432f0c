"""A bundle on three real sets it was never trained on: python benchmarks/nano_real.py [BUNDLE] [--json F].

Magnetic tiles ($FBCLIP_DATA/magnetic_tile, 300 good ones drawn at random and all defective ones; maps and masks compared
at 256×256), and the packages `elpv-dataset` (800 solar cells, defective from probability 0.5) and `conformal-clip-data`
(textile, 250 per class), which hold image labels only. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.images import read_image
from fbclip.metrics import PixelMetrics, image_metrics
from fbclip.runtime.predictor import Predictor

DATA = Path(os.environ.get("FBCLIP_DATA", "../shared/data"))
DEFECTS = ("blowhole", "break", "crack", "fray", "uneven")
SIDE = 256  # of the compared maps
Figures = dict[str, float | None]


class Scored(Protocol):
    """What is read of a Prediction."""

    @property
    def score(self) -> float: ...
    @property
    def model_map(self) -> NDArray[np.float32]: ...


def drawn(paths: Sequence[Path], count: int) -> list[Path]:
    """The same random `count` of them each time."""
    ordered = sorted(paths)
    return [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))[:count]]


def scores(predictor: Callable[[Path], Scored], paths: Sequence[Path]) -> list[float]:
    return [predictor(path).score for path in paths]


def image_auroc(good: Sequence[float], defective: Sequence[float]) -> float | None:
    return image_metrics([0] * len(good) + [1] * len(defective), [*good, *defective]).auroc


def tiles(predictor: Callable[[Path], Scored], root: Path, good_tiles: int = 300) -> Figures:
    """Image AUROC of each defect against the good tiles, pixel AUROC and AUPRO within its own images."""
    good = scores(predictor, drawn(list((root / "test/good").iterdir()), good_tiles))
    figures: Figures = {}
    defective: list[float] = []
    for defect in DEFECTS:
        pixels, own = PixelMetrics(), []
        for path in sorted((root / "test" / defect).iterdir()):
            prediction = predictor(path)
            own.append(prediction.score)
            mask = cv2.resize(read_image(root / "ground_truth" / defect / f"{path.stem}_mask.png"), (SIDE, SIDE))
            pixels.add((mask[..., 0] > 127).astype(np.uint8), at_side(prediction.model_map))
        found = pixels.metrics()
        figures |= {f"{defect} pixel": found.auroc, f"{defect} AUPRO": found.aupro[0.3]}
        figures[f"{defect} image"] = image_auroc(good, own)
        defective += own
    return figures | {"tiles image": image_auroc(good, defective)}


def at_side(model_map: NDArray[np.float32]) -> NDArray[np.float32]:
    return cv2.resize(model_map, (SIDE, SIDE)).astype(np.float32)


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this benchmark needs the package {name.replace('_', '-')}: pip install it")
    return Path(spec.origin).parent / "data"


def textile(predictor: Predictor) -> Figures:
    root = package_folder("conformal_clip_data") / "textile_images/simulated"
    nominal, local, whole = (
        scores(predictor, drawn(list((root / kind).iterdir()), 250)) for kind in ("nominal", "local", "global")
    )
    return {"textile local": image_auroc(nominal, local), "textile global": image_auroc(nominal, whole)}


def solar(predictor: Predictor) -> Figures:
    root = package_folder("elpv_dataset")
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    probability = {root / name: float(p) for name, p, _ in rows}
    cells = drawn(list(probability), 800)
    return {"elpv": image_metrics([int(probability[p] >= 0.5) for p in cells], scores(predictor, cells)).auroc}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="the embedded default if left out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    predictor = Predictor(arguments.bundle)
    start = time.perf_counter()
    figures = tiles(predictor, DATA / "magnetic_tile") | textile(predictor) | solar(predictor)
    for name, value in figures.items():
        print(f"{name:16} {'undefined' if value is None else f'{value:.3f}'}")
    named = [figures[f"{defect} pixel"] for defect in DEFECTS[:4]]
    print(f"mean pixel AUROC of {', '.join(DEFECTS[:4])}: {np.mean([v for v in named if v is not None]):.3f}")
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.json:
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
        temporary.replace(arguments.json)


if __name__ == "__main__":
    main()
