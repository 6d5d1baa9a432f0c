"""What tiles find that the whole frame doesn't, and what they cost: rendered surfaces of 4000 x 3000 pixels.

    python benchmarks/tiles.py accuracy [--json results/tiles.json]     # about 20 minutes on two cores
    python benchmarks/tiles.py alarms                                   # scores of good frames by the number of tiles
    python benchmarks/tiles.py picture                                  # docs/pictures/tiles.jpg
    python benchmarks/tiles.py cost                                     # time beside tiles x the model's, and memory at 100 MP

Accuracy: for each surface four good frames teach the included model (`fbclip adapt`), then four good frames and nine
with one defect of 8 to 40 pixels are inspected. "Found" are defects that the map marks at a line which none of the four
good frames reaches anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fbclip
from fbclip.data.procedural import add_defect
from fbclip.data.surfaces import brushed, grain, noise, speckle, weave
from fbclip.images import encode_image
from fbclip.metrics import PixelMetrics, image_metrics
from fbclip.runtime.host import peak_memory
from fbclip.runtime.tiles import Tiles

HEIGHT, WIDTH, SIDE = 3000, 4000, 1100
SURFACES = {"grain": grain, "brushed": brushed, "weave": weave, "speckle": speckle}
SIZES = ((8, 12), (13, 20), (21, 40))  # pixels of a defect's longer side
CUTS = {"whole": None, "detail 32": 32.0, "detail 16": 16.0}
TAUGHT, GOOD, DEFECTS = 4, 4, 3  # frames; the last for each size
Frame = NDArray[np.uint8]


def surface(name: str, number: int) -> tuple[np.random.Generator, NDArray[np.float32]]:
    """A frame float32 (3000, 4000, 3), 0..1, of one material: each shows another piece of it, in another light."""
    place = sorted(SURFACES).index(name)
    field = SURFACES[name](np.random.default_rng(place), SIDE)
    field = 0.45 + 0.06 * (field - field.mean()) / max(float(field.std()), 0.02)
    field = np.concatenate([field, field[:, ::-1]], axis=1)  # without an edge where it repeats
    field = np.concatenate([field, field[::-1]], axis=0)
    rng = np.random.default_rng([place, number])
    field = np.roll(field, rng.integers(0, 2 * SIDE, 2), (0, 1))
    large = np.tile(field, (2, 2))[:HEIGHT, :WIDTH] * (1 + 0.15 * (noise(rng, WIDTH, 3)[:HEIGHT] - 0.5))
    return rng, np.repeat(large[..., None], 3, axis=2).astype(np.float32)


def frame(name: str, number: int, size: tuple[int, int] | None = None) -> tuple[Frame, NDArray[np.uint8]]:
    """A frame, with a defect whose longer side has so many pixels; and where that is."""
    rng, image = surface(name, number)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    while size and not mask.any():
        side = int(rng.uniform(2, 4) * size[1])
        y, x = int(rng.integers(0, HEIGHT - side)), int(rng.integers(0, WIDTH - side))
        window = image[y : y + side, x : x + side]
        nothing, all_of_it = np.zeros((side, side), np.uint8), np.ones((side, side), np.uint8)
        drawn, where = add_defect(window.copy(), nothing, all_of_it, 0.2 * window, rng, 1.0)
        rows, columns = np.nonzero(where)
        if len(rows) and size[0] <= 1 + max(np.ptp(rows), np.ptp(columns)) <= size[1]:
            image[y : y + side, x : x + side], mask[y : y + side, x : x + side] = drawn, where
    image += 0.01 * rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32)
    return (image.clip(0, 1) * 255).astype(np.uint8), mask


def accuracy(asked: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in asked.surfaces:
        for cut in asked.cuts:
            rows.append(judge(name, cut))
            print(json.dumps(rows[-1]), flush=True)
    for cut in asked.cuts:
        of_cut = [row for row in rows if row["cut"] == cut]
        mean = {key: float(np.mean([row[key] for row in of_cut])) for key in of_cut[0] if key not in ("surface", "cut")}
        rows.append({"surface": "mean", "cut": cut, **mean})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def judge(name: str, cut: str) -> dict[str, Any]:
    """A surface by one way to cut it."""
    tiles = None if CUTS[cut] is None else Tiles.parse("auto", detail=CUTS[cut])
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "line.fbclip"
        start = time.perf_counter()
        good = [frame(name, number)[0] for number in range(TAUGHT)]
        rendered = time.perf_counter()
        fbclip.adapt(None, good, tiles=tiles, out=bundle)
        taught = time.perf_counter() - rendered
        del good, start
        with fbclip.Predictor(bundle, tiles=tiles) as predict:
            labels, scores, seconds, peaks = [], [], [], []
            pixels = PixelMetrics()
            highest: dict[tuple[int, int], list[float]] = {size: [] for size in SIZES}
            cases = [(100 + number, None) for number in range(GOOD)]
            cases += [
                (200 + 100 * place + number, size) for place, size in enumerate(SIZES) for number in range(DEFECTS)
            ]
            for number, size in cases:
                image, mask = frame(name, number, size)
                start = time.perf_counter()
                found = predict(image)
                seconds.append(time.perf_counter() - start)
                labels.append(int(size is not None))
                scores.append(found.score)
                pixels.add(mask, found.anomaly_map)
                if size is None:
                    peaks.append(float(found.anomaly_map.max()))
                else:
                    highest[size].append(float(found.anomaly_map[mask > 0].max()))
    line = max(peaks)
    recall = {f"found of {a} to {b} px": float(np.mean([peak > line for peak in highest[a, b]])) for a, b in SIZES}
    metrics = pixels.metrics()
    return {
        "surface": name,
        "cut": cut,
        "image AUROC": image_metrics(labels, scores).auroc,
        "AUPRO 0.3": metrics.aupro[0.3],
        "AUPRO 0.05": metrics.aupro[0.05],
        **recall,
        "seconds a frame": float(np.median(seconds)),
        "seconds to teach": taught,
    }


def alarms(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Scores of good frames of the zero-shot model, by the mean of odds and by the highest, for more and more tiles."""
    from fbclip.runtime.tiles import combined

    rows = []
    with fbclip.Predictor(memory=None, tiles=Tiles.parse("2x2")) as predict:
        for cut in ("2x2", "4x4", "8x8"):
            by_rule: dict[str, list[float]] = {"mean of odds": [], "highest": []}
            for name in asked.surfaces:
                for number in range(3):
                    image = np.ascontiguousarray(frame(name, number)[0][:1536, :2048])
                    layout = Tiles.parse(cut).cut(1536, 2048, predict.bundle.manifest.grid)
                    prepared = predict.prepare(image)._replace(layout=layout)
                    scores = np.array([predict.backend.run(view)[0][0] for view in predict.views(prepared)])
                    by_rule["mean of odds"].append(combined(scores))
                    by_rule["highest"].append(float(scores.max()))
            rows.append(
                {
                    "tiles": cut,
                    "good frames": len(by_rule["highest"]),
                    **{
                        f"{rule}: {what}": float(value(scores))
                        for rule, scores in by_rule.items()
                        for what, value in (
                            ("mean", np.mean),
                            ("share of alarms at 0.5", lambda s: np.mean(np.array(s) >= 0.5)),
                        )
                    },
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def cost(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of a frame against its views' in the model alone, in turns; and the peak of memory of a line scan."""
    image, _ = frame("grain", 0)
    rows = []
    with fbclip.Predictor(memory=None, tiles=Tiles.parse("auto", detail=32.0)) as predict:
        prepared = predict.prepare(image)
        views = list(predict.views(prepared))
        whole, model = [], []
        for _ in range(5):
            start = time.perf_counter()
            predict(image)
            middle = time.perf_counter()
            for view in views:
                predict.backend.run(view)
            whole.append(middle - start)
            model.append(time.perf_counter() - middle)
        rows.append(
            {
                "frame": f"{WIDTH}x{HEIGHT}",
                "views": len(views),
                "seconds": float(np.median(whole)),
                "of the model alone": float(np.median(model)),
                "ratio": float(np.median(np.array(whole) / np.array(model))),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    del views, prepared
    with fbclip.Predictor(memory=None) as predict:
        predict(image)
    before = peak_memory() or 0
    scan = np.tile(image[:2500, :4000], (2, 5, 1))
    with fbclip.Predictor(memory=None, tiles=Tiles.parse("auto", detail=128.0)) as predict:
        found = predict(scan)
    rows.append(
        {
            "frame": f"{scan.shape[1]}x{scan.shape[0]}",
            "tiles": len(found.tiles),
            "MB above the model's own peak, the frame's own bytes included": round(
                ((peak_memory() or 0) - before) / 1e6
            ),
            "the frame's own MB": round(scan.nbytes / 1e6),
        }
    )
    print(json.dumps(rows[-1]), flush=True)
    return rows


def picture(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The frame of docs/guides/large-pictures.md, at whole and in tiles, side by side."""
    name, shown = asked.surfaces[0], []
    image, mask = frame(name, 401, SIZES[-1])
    for cut in ("whole", "detail 16"):
        tiles = None if CUTS[cut] is None else Tiles.parse("auto", detail=CUTS[cut])
        with TemporaryDirectory() as folder:
            bundle = Path(folder) / "line.fbclip"
            fbclip.adapt(None, [frame(name, number)[0] for number in range(TAUGHT)], tiles=tiles, out=bundle)
            with fbclip.Predictor(bundle, tiles=tiles) as predict:
                found = predict(image)
        print(cut, found.verdict, found.score, float(found.anomaly_map[mask > 0].max()), found.regions[:3])
        shown.append(found.overlay(900, zoom=True))
    height = max(len(each) for each in shown)
    padded = [np.pad(each, ((0, height - len(each)), (0, 8), (0, 0)), constant_values=255) for each in shown]
    Path("docs/pictures/tiles.jpg").write_bytes(encode_image(np.hstack(padded)[:, :-8]))
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("accuracy", "alarms", "picture", "cost"))
    parser.add_argument("--surfaces", nargs="*", default=list(SURFACES), choices=list(SURFACES))
    parser.add_argument("--cuts", nargs="*", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = globals()[asked.part](asked)
    if asked.json:
        asked.json.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
