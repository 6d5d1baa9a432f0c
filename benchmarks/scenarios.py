"""The recorded speed figures, one command each: python benchmarks/scenarios.py SCENARIO

nano      the embedded model: every backend, batches 1 to 8, profile
sides     a ViT-S/16 of generated weights against the input side, 224 to 896 px
models    sizes of the backbone: nano, ViT-S/16, ViT-B/16+ at 240 px
large     ViT-L/14 at 518 px, generated weights: literal reference, torch, ONNX Runtime, profile
threads   the embedded model on 1 core up to all of them
frames    the embedded model from camera frames, resized by Pillow or in the graph
precision the embedded model's graphs: fp32, fp16 and 8 bit

Writes benchmarks/results/bench_SCENARIO.json: the reports of `fbclip bench` by label, and fitted exponents; with --show
prints the recorded one as Markdown instead. Bundles that have to be made first are kept in runs/. docs/guides/benchmarks.md
explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from vit_large import generated_model

from fbclip.assets import NANO
from fbclip.bundle import Bundle
from fbclip.export.bundle import Deployment, export_bundle
from fbclip.export.parity import Proof
from fbclip.export.precision.int8 import DYNAMIC, Quantization
from fbclip.model import checkpoint
from fbclip.model.clip import ClipConfig, clip_config
from fbclip.model.config import default_config
from fbclip.model.network import FBCLIP
from fbclip.runtime.bench.report import HEADINGS, NOTHING, remarks, rows, show
from fbclip.runtime.bench.results import BenchReport
from fbclip.runtime.bench.run import Options, bench, sample_frames

RUNS = Path("runs/scenarios")
RESULTS = Path(__file__).parent / "results"
VIT_S = ClipConfig(
    "ViT-S-16-generated",
    {
        "embed_dim": 384,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 384, "head_width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 4},
    },
)
SIDES = (224, 320, 448, 640, 896)
BATCHES = (1, 2, 4, 8)
FRAMES = ((480, 640), (720, 1280), (1080, 1920))
DEPLOYED = ("torch", "onnxruntime")
Reports = dict[str, dict[str, Any]]

console = Console()


def measure(bundle: Bundle, options: Options) -> dict[str, Any]:
    report = bench(bundle, replace(options, torch="fbclip.model.backend"), console)
    show(report, console)
    return report.to_dict()


def exported(name: str, make: Callable[[], FBCLIP], **deployment: Any) -> tuple[Bundle, Path]:
    """A bundle in `runs/` and the checkpoint it was made of; made if they are not there."""
    folder, path = RUNS / f"{name}.fbclip", RUNS / f"{name}.safetensors"
    if not (folder / "manifest.json").exists():
        console.print(f"exporting {name}")
        model = make()
        checkpoint.save(model, path)
        size = deployment.get("frame_size") or (model.config.image_size,) * 2
        proof = Proof(list(sample_frames(Bundle.load(), size)[:1]), ("sample",))
        export_bundle(model, folder, proof, Deployment(name, **deployment))
    return Bundle.load(folder), path


def embedded_model() -> FBCLIP:
    return checkpoint.load(NANO, image_size=Bundle.load().manifest.image_size)


def generated(name: str, clip: ClipConfig, side: int | None = None, **options: Any) -> dict[str, Any]:
    """The report of a model of generated weights, which travel in its checkpoint."""
    config = default_config(replace(clip, weights=None), side)
    bundle, path = exported(name, lambda: generated_model(config))
    return measure(bundle, Options(**{"backends": DEPLOYED, "runs": 10, "checkpoint": path, **options}))


def nano() -> Reports:
    return {"nano": measure(Bundle.load(), Options(backends=("all",), batches=BATCHES, profile=True))}


def sides() -> Reports:
    return {str(side): generated(f"vit-s-{side}", VIT_S, side) for side in SIDES}


def models() -> Reports:
    plus = clip_config("ViT-B-16-plus-240")
    return {
        "nano": measure(Bundle.load(), Options(backends=DEPLOYED, runs=10)),
        "ViT-S/16 at 224": generated("vit-s-224", VIT_S, 224),
        "ViT-B/16+ at 240": generated("vit-b-240", plus),
    }


def large() -> Reports:
    backends = ("torch-reference", *DEPLOYED)
    clip = clip_config("ViT-L-14-336", "openai")
    return {"ViT-L/14 at 518": generated("vit-l-518", clip, backends=backends, runs=5, profile=True)}


def threads() -> Reports:
    """Workers inherit the cores that this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    reports = {}
    for count in range(1, len(cores) + 1):
        os.sched_setaffinity(0, cores[:count])
        reports[f"on {count} of {len(cores)} cores"] = measure(Bundle.load(), Options(backends=DEPLOYED))
    return reports


def frames() -> Reports:
    reports = {}
    for height, width in FRAMES:
        label = f"{height}x{width}"
        bundle, _ = exported(f"nano-{label}", embedded_model, frame_size=(height, width))
        options = Options(backends=("onnxruntime",), frame_hw=(height, width))
        reports[f"{label}, resized by Pillow"] = measure(Bundle.load(), options)
        reports[f"{label}, resized in the graph"] = measure(bundle, options)
    return reports


def precision() -> Reports:
    bundle, path = exported("nano-half-int8", embedded_model, half=True, quantization=Quantization(DYNAMIC))
    return {"nano": measure(bundle, Options(backends=DEPLOYED, checkpoint=path))}


SCENARIOS = {scenario.__name__: scenario for scenario in (nano, sides, models, large, threads, frames, precision)}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y against log x by least squares: y grows as x to that power."""
    slope, _ = np.polyfit(np.log(x), np.log(y), 1)
    return round(float(slope), 3)


def fits(reports: Reports) -> dict[str, dict[str, float]]:
    """Exponents of the median time: against the batch within a report, against side and operations across reports of
    one model at several sides."""
    found: dict[str, dict[str, float]] = {}
    for label, report in reports.items():
        points = [(backend_of(r), r["batch"], r["median_ms"]) for r in report["results"]]
        found |= {f"{label}, {name}: ms against batch": fit for name, fit in _fits(points).items()}
    if all(label.isdigit() for label in reports):
        axes = {"side": lambda report: report["bundle"]["image_size"], "operations": lambda r: r["operations"]["total"]}
        for what, x in axes.items():
            points = [
                (backend_of(r), x(report), r["median_ms"]) for report in reports.values() for r in report["results"]
            ]
            found |= {f"{name}: ms against {what}": fit for name, fit in _fits(points).items()}
    return found


def backend_of(result: dict[str, Any]) -> str:
    return f"{result['backend']} {result['precision']}"


def _fits(points: Sequence[tuple[str, float, float]]) -> dict[str, dict[str, float]]:
    """The exponent of each backend's points (name, x, y), if it has three at least."""
    found = {}
    for name in dict.fromkeys(name for name, _, _ in points):
        x, y = zip(*((x, y) for other, x, y in points if other == name), strict=True)
        if len(set(x)) > 2:
            found[name] = {"exponent": exponent(x, y), "from": min(x), "to": max(x)}
    return found


def markdown(result: dict[str, Any]) -> str:
    """Tables of the recorded reports, what they must be read with, and the exponents."""
    lines = [f"`{result['command']}`", ""]
    for label, recorded in result["reports"].items():
        report = BenchReport.from_dict(recorded)
        cells = rows(report)
        used = {k: v.replace("\n", " ") for k, v in HEADINGS.items() if any(row[k] != NOTHING for row in cells)}
        lines += [f"**{label}**", "", "| " + " | ".join(["", *used.values()]) + " |"]
        lines.append("| --- |" + " ---: |" * len(used))
        lines += ["| " + " | ".join([row["subject"], *(row[key] for key in used)]) + " |" for row in cells]
        lines += ["", *(f"- {remark}" for remark in remarks(report)), ""]
    lines += [f"- {what}: exponent {fit['exponent']:.2f}" for what, fit in result["fits"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    name = arguments.scenario
    path = RESULTS / f"bench_{name}.json"
    if arguments.show:
        print(markdown(json.loads(path.read_text())))
        return
    reports = SCENARIOS[name]()
    result = {"command": f"python benchmarks/scenarios.py {name}", "fits": fits(reports), "reports": reports}
    for what, fit in result["fits"].items():
        console.print(f"{what}: exponent {fit['exponent']:.2f}", highlight=False)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
