"""What precision costs on the magnetic tiles: python benchmarks/precision_tiles.py [BUNDLE ...] [--json F].

Exports the embedded model twice (float32, float16 and dynamic 8 bit; static 8 bit calibrated on good tiles), each proven
on 64 tiles. Then scores all defective tiles and 300 good ones ($FBCLIP_DATA/magnetic_tile) with every graph: size, AUROC,
deviation from float32. With bundles given, measures their graphs instead of exporting.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fbclip.bundle import GRAPHS, Bundle
from fbclip.data.layouts import open_dataset
from fbclip.files import write_text
from fbclip.metrics import image_metrics
from fbclip.runtime.predictor import Predictor

TILES = Path(os.environ.get("FBCLIP_DATA", "../shared/data")) / "magnetic_tile"
GOOD = 300
EXPORTS = {"dynamic": ["--fp16", "--int8"], "static": ["--int8-static", "--calibration-images", str(TILES)]}
Outputs = tuple[NDArray[np.float32], list[NDArray[np.float32]]]


def export(folder: Path) -> list[Path]:
    """The embedded model in every precision."""
    bundles = [folder / f"{name}.fbclip" for name in EXPORTS]
    for bundle, options in zip(bundles, EXPORTS.values(), strict=True):
        command = [sys.executable, "-m", "fbclip.cli", "export", "--parity-images", str(TILES), "--out", str(bundle)]
        subprocess.run([*command, *options], check=True, stdout=sys.stderr)
    return bundles


def measure(bundles: list[Path]) -> dict[str, dict[str, Any]]:
    """Figures of each graph; float32 is the first bundle's."""
    items = open_dataset(TILES).select("test").items
    good = [item for item in items if not item.label]
    chosen = np.random.default_rng(0).permutation(len(good))[:GOOD]
    tiles = [*(good[i] for i in chosen), *(item for item in items if item.label)]
    labels = [item.label for item in tiles]
    figures: dict[str, dict[str, Any]] = {}
    reference: Outputs | None = None
    for bundle in map(Bundle.load, bundles):
        for precision in bundle.manifest.precisions:
            form = bundle.manifest.int8 if precision == "int8" else None
            name = f"{precision} {form}" if form else precision
            if name in figures:
                continue
            predictor = Predictor(bundle, device="cpu", precision=precision)
            predictions = [predictor(item.image) for item in tiles]
            found = np.array([p.score for p in predictions], np.float32), [p.model_map for p in predictions]
            reference = reference or found
            figures[name] = {
                "MB": round(sum(f.stat().st_size for f in bundle.path.glob(f"{GRAPHS[precision]}*")) / 1e6, 2),
                "islands": bundle.manifest.parity[precision]["islands"],
                **compare(found, reference, labels),
            }
    return figures


def compare(found: Outputs, reference: Outputs, labels: list[int]) -> dict[str, Any]:
    (scores, maps), (expected, expected_maps) = found, reference
    differences = np.abs(np.stack(maps) - np.stack(expected_maps))
    return {
        "AUROC": image_metrics(labels, scores).auroc,
        "score max": float(np.abs(scores - expected).max()),
        "score mean shift": float((scores - expected).mean()),
        "map 99.9 %": float(np.quantile(differences, 0.999)),
        "map max": float(differences.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="*", help="exported anew if left out")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.bundles or export(Path(folder)))
    table = Table(box=None, pad_edge=False)
    for column in ("graph", *next(iter(figures.values()))):
        table.add_column(column)
    for name, values in figures.items():
        table.add_row(name, *(f"{v:.5f}" if isinstance(v, float) else str(v) for v in values.values()))
    Console(width=120).print(table)
    if arguments.json:
        write_text(json.dumps(figures, indent=1) + "\n", arguments.json)


if __name__ == "__main__":
    main()
