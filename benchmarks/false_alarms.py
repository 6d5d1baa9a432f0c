"""The false alarms that a calibration promises, and those it gives: python benchmarks/false_alarms.py [BUNDLE] [--json F].

Magnetic tiles in $FBCLIP_DATA/magnetic_tile: `train/good` calibrates, `test/good` is held out, the defective ones give
the miss rate. Then all good tiles are dealt into two such parts 2,000 times at random, which makes them exchangeable
beyond doubt: the mean rate must keep to the target, and the share of held-out parts that raise an alarm must lie in the
interval that beta-binomial counts give in 95 % of them. Needs no torch; SciPy comes with the `dev` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import betabinom

from fbclip.folders import list_images
from fbclip.runtime.calibrate import weight_of_neighbours
from fbclip.runtime.calibration import TAILS, binomial_interval, conformal_threshold, percent, rank, rate_interval
from fbclip.runtime.predictor import Predictor

DATA = Path(os.environ.get("FBCLIP_DATA", "../shared/data"))
DEFECTS = ("blowhole", "break", "crack", "fray", "uneven")
RATES = (0.1, 0.05, 0.01)
DEALS = 2_000
Scores = NDArray[np.float64]  # (N, 2): image score, highest map value


def score(predictor: Predictor, folder: Path) -> Scores:
    predictions = (predictor(path) for path in list_images([str(folder)]))
    return np.array([(p.score, p.anomaly_map.max()) for p in predictions], np.float64)


def held_out(calibrates: Scores, checks: Scores, defective: Scores, rate: float) -> dict[str, Any]:
    """What a threshold from one part does to the others; for image scores, and for maps with any marked region."""
    m, n = rank(len(calibrates), rate), len(calibrates)
    counts = [int(betabinom.ppf(tail, len(checks), m, n + 1 - m)) for tail in TAILS]
    figures: dict[str, Any] = {
        "target": rate,
        "interval": rate_interval(n, rate),
        "interval_of_held_out_share": [count / len(checks) for count in counts],
    }
    for kind, column in (("score", 0), ("map", 1)):
        threshold = conformal_threshold(calibrates[:, column].tolist(), rate)
        missed = int((defective[:, column] < threshold).sum())
        figures[kind] = {
            "threshold": threshold,
            "held_out_alarms": int((checks[:, column] >= threshold).sum()),
            "held_out_share": float((checks[:, column] >= threshold).mean()),
            "miss_rate": missed / len(defective),
            "miss_interval": binomial_interval(missed, len(defective)),
        }
    return figures


def dealt(good: Scores, count: int, rate: float) -> dict[str, float]:
    """Mean held-out share of alarms over random parts, and how often it lies in its 95 % interval."""
    rng = np.random.default_rng(0)
    m, checks = rank(count, rate), len(good) - count
    low, high = (betabinom.ppf(tail, checks, m, count + 1 - m) for tail in TAILS)
    alarms = []
    for _ in range(DEALS):
        shuffled = rng.permutation(good[:, 0])
        alarms.append((shuffled[count:] >= conformal_threshold(shuffled[:count].tolist(), rate)).sum())
    counts = np.array(alarms)
    return {"mean": float(counts.mean() / checks), "inside": float(((low <= counts) & (counts <= high)).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="the embedded default if left out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    predictor = Predictor(arguments.bundle, calibrated=False)
    root = DATA / "magnetic_tile"
    calibrates, checks = score(predictor, root / "train/good"), score(predictor, root / "test/good")
    defective = np.concatenate([score(predictor, root / "test" / defect) for defect in DEFECTS])
    alike = weight_of_neighbours(calibrates[:, 0].tolist())
    results: dict[str, Any] = {
        "model": predictor.bundle.manifest.name,
        "model_sha256": predictor.bundle.model_sha256(predictor.precision),
        "images": {"calibrate": len(calibrates), "held_out": len(checks), "defective": len(defective)},
        "weight_of_neighbours": alike,
        "rates": [
            held_out(calibrates, checks, defective, rate)
            | {"dealt": dealt(np.concatenate([calibrates, checks]), len(calibrates), rate)}
            for rate in RATES
        ],
    }
    show(results)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.json:
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(arguments.json)


def show(results: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    headings = ("target", "rate, 95 %", "share, 95 %", "held out", "maps", "missed", "dealt: mean", "inside")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for r in results["rates"]:
        shares = (r["score"]["held_out_share"], r["map"]["held_out_share"], r["score"]["miss_rate"])
        table.add_row(
            f"{r['target']:.0%}",
            percent(r["interval"]),
            percent(r["interval_of_held_out_share"]),
            *(f"{share:.1%}" for share in shares),
            f"{r['dealt']['mean']:.2%}",
            f"{r['dealt']['inside']:.1%}",
        )
    Console(width=120).print(table)
    images = results["images"]
    print(
        f"{images['calibrate']} good tiles calibrate, {images['held_out']} check, {images['defective']} are defective"
    )
    if alike := results["weight_of_neighbours"]:
        print(f"consecutive tiles are alike: autocorrelation {alike[0]:.2f}, they weigh as {alike[1]}")


if __name__ == "__main__":
    main()
