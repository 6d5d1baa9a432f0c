"""Pixel metrics at the size of a large data set: time and memory, and the ratio to 200 thresholds with region properties.

python benchmarks/metrics.py [MAPS] [LITERAL_MAPS] [--out FILE.json]    # 8000 and 6 if left out

Maps and masks are made on the way, seeded, and timed apart. The literal way is that of the reference program, with
scikit-image's `label` and `regionprops` per threshold and image; both are timed on the same maps of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.measure import label, regionprops

from fbclip.metrics import PixelMetrics
from fbclip.resample import upsampling_matrix

SIZE, GRID, THRESHOLDS, LIMIT = 518, 37, 200, 0.3
Pair = tuple[NDArray[np.uint8], NDArray[np.float32]]


def pairs(count: int, seed: int = 0) -> Iterator[Pair]:
    """Masks with up to four blobs, half of them empty, and maps as a model of 37x37 patches gives them."""
    up = upsampling_matrix(SIZE, GRID)
    for index in range(count):
        rng = np.random.Generator(np.random.PCG64([seed, index]))
        mask = np.zeros((SIZE, SIZE), np.uint8)
        for _ in range(int(rng.integers(1, 5)) * (index % 2)):
            centre, axes = rng.integers(20, SIZE - 20, 2).tolist(), rng.integers(3, 60, 2).tolist()
            cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        defect = cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_AREA)
        logits = rng.normal(-3, 1.5, (GRID, GRID)) + 3 * defect
        yield mask, up @ (1 / (1 + np.exp(-logits))).astype(np.float32) @ up.T


def literal(some: list[Pair]) -> float:
    """AUPRO as the reference program has it: equally spaced thresholds, region properties at each."""
    masks, maps = (np.stack(column) for column in zip(*some, strict=True))
    overlaps, rates = [], []
    for threshold in np.linspace(maps.min(), maps.max(), THRESHOLDS, endpoint=False):
        hit = maps > threshold
        found = [
            one[region.coords[:, 0], region.coords[:, 1]].sum() / region.area
            for one, mask in zip(hit, masks, strict=True)
            for region in regionprops(label(mask))
        ]
        overlaps.append(np.mean(found))
        rates.append((hit & (masks == 0)).sum() / (masks == 0).sum())
    fpr, pro = np.array(rates)[::-1], np.array(overlaps)[::-1]
    inside = fpr < LIMIT
    fpr = (fpr[inside] - fpr[inside].min()) / np.ptp(fpr[inside])
    return float(np.trapezoid(pro[inside], fpr))


def streamed(source: Iterator[Pair]) -> tuple[PixelMetrics, float]:
    """The counters and the seconds of counting, without those of making the maps."""
    pixels, seconds = PixelMetrics(), 0.0
    for mask, anomaly_map in source:
        start = time.perf_counter()
        pixels.add(mask, anomaly_map)
        seconds += time.perf_counter() - start
    return pixels, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", nargs="?", type=int, default=8000)
    parser.add_argument("literal_maps", nargs="?", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    few = list(pairs(options.literal_maps))
    start = time.perf_counter()
    few_literal = literal(few)
    literal_seconds = (time.perf_counter() - start) / len(few)
    before_mb = peak_mb()
    pixels, adding = streamed(pairs(options.maps))
    start = time.perf_counter()
    found = pixels.metrics()
    finishing = time.perf_counter() - start
    after_mb = peak_mb()
    few_exact = streamed(iter(few))[0].metrics()
    per_map = (adding + finishing) / options.maps
    result = {
        "maps": options.maps,
        "size": SIZE,
        "pixels": options.maps * SIZE**2,
        "adding_s": round(adding, 2),
        "finishing_s": round(finishing, 2),
        "ms_per_map": round(per_map * 1e3, 3),
        "peak_mb": round(after_mb),
        "peak_before_mb": round(before_mb),
        "error_bound": found.error_bound,
        "auroc": found.auroc,
        "ap": found.ap,
        "f1_max": found.f1_max,
        "aupro": {str(limit): value for limit, value in found.aupro.items()},
        "literal": {
            "maps": len(few),
            "ms_per_map": round(literal_seconds * 1e3, 1),
            "aupro_200_thresholds": few_literal,
            "aupro_exact_same_maps": few_exact.aupro[LIMIT],
        },
        "literal_over_streamed": round(literal_seconds / per_map, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def peak_mb() -> float:
    scale = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


if __name__ == "__main__":
    main()
