"""Everything that a GPU can be asked, in one run on a bare machine: correctness, times, training, memory.

python benchmarks/gpu_check.py                          # runs/gpu_check/gpu_check.json and a table, in under 7 minutes
python benchmarks/gpu_check.py --quick --device cpu     # tiny models: whether the script itself works
python benchmarks/gpu_check.py --parts times,train --bundle large.fbclip    # parts whose names begin so; an exported ViT-L/14

Nothing is fetched: the repository is imported from where this file is, packages that are missing come from a folder of wheels
(--wheels). Each part is a process of its own with its own time limit; one that fails is reported and left out. The JSON is
written after each part, so that an interrupted run leaves what it had. A bundle that --out has already isn't written again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gpu_parts import ROOT, Figures, Skipped, card, correct, export, rates, times, train

MARK, SKIPPED = "figures: ", 77  # before a line of figures; the exit code of a part that lacks something
PR_SET_PDEATHSIG = 1  # linux/prctl.h
QUICK_PATIENCE = 4  # times the limits: two busy cores are no GPU machine


class Part(NamedTuple):
    """`run(asked, *arguments)` yields figures, each of which is kept even if a later one fails."""

    name: str
    seconds: float
    run: Callable[..., Iterator[Figures]]
    arguments: tuple[str, ...] = ()


def all_parts(asked: Namespace) -> list[Part]:
    """In the order of their worth, should time run out."""
    from fbclip.runtime.backends import DEVICES

    gpu = asked.device == "cuda"
    captured = ("torch-captured fp32", "torch-captured fp16") if gpu else ()
    torch_kinds = ("torch-reference fp32", "torch fp32", "torch fp16", *captured)
    deployed = [f"{device} {precision}" for device in DEVICES for precision in ("fp32", "fp16")]
    timed = [kind for kind in deployed if kind.startswith("cpu") != gpu]
    return [
        Part("card", 20, card),
        Part("rates", 40, rates),
        Part("export recorded", 60, export, ("recorded",)),
        Part("correct torch", 40, correct, (*torch_kinds[:2], *captured[:1])),
        *(Part(f"correct {kind}", 60, correct, (kind,)) for kind in deployed),
        *([] if asked.quick else [Part("export default", 60, export, ("default",))]),
        Part("times default torch", 45, times, ("default", *torch_kinds)),
        *(Part(f"times default {kind}", 45, times, ("default", kind)) for kind in timed),
        *(
            Part(f"train default {side}", 60, train, ("default", side))
            for side in ("96", "192")[: 1 if asked.quick else 2]
        ),
        *([Part("train default 96 plainly", 60, train, ("default", "96", "plainly"))] if gpu else []),
        Part("export large", 120, export, ("large",)),
        Part("times large torch", 90, times, ("large", *torch_kinds)),
        *(Part(f"times large {kind}", 60, times, ("large", kind)) for kind in timed),
        Part("train large", 90, train, ("large", "154" if asked.quick else "518")),
    ]


def run_part(part: Part, seconds: float) -> Figures:
    """Status, reason, seconds and figures of a part, in a process that is killed when its time is up."""
    start = time.time()
    command = [sys.executable, *sys.argv, "--part", part.name, "--began", str(start), "--parent", str(os.getpid())]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            late, code = False, process.wait(seconds)
        except subprocess.TimeoutExpired:
            late, code = True, 1
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those that it started, too
            process.wait()
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    figures = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    last = next((line for line in reversed(lines) if not line.startswith(MARK)), "it said nothing")
    status = {0: "ok", SKIPPED: "skipped"}.get(code, "failed")
    why = {"ok": None, "skipped": last, "failed": f"{last} (exit code {code})"}
    reason = f"stopped after its {seconds:.0f} s; {last}" if late else why[status]
    return {"status": status, "reason": reason, "seconds": round(time.time() - start, 1), "figures": figures}


def be_part(asked: Namespace) -> int:
    """In a part's process, which ends with the one that started it: its figures as marked lines, and as the last line the
    reason where it ends early."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != asked.parent:  # it was gone before
        return 1
    part = next(part for part in all_parts(asked) if part.name == asked.part)
    try:
        for figures in part.run(asked, *part.arguments):
            print(MARK + json.dumps(figures), flush=True)
    except (Skipped, ModuleNotFoundError) as missing:
        print(" ".join(str(missing).split()))
        return SKIPPED
    return 0


def figures_of(report: Figures, *having: str) -> list[Figures]:
    """All that have these fields."""
    found = [figures for part in report["parts"].values() for figures in part["figures"]]
    return [figures for figures in found if all(name in figures for name in having)]


def compare(report: Figures) -> None:
    """Add to each time its share of the card's product rate in that precision, and how many times as fast as the literal
    reference in float32 it is; all of the same run."""
    times, bounds = figures_of(report, "ms_an_image"), next(iter(figures_of(report, "copy_gb_s")), {})
    literal = {(f["model"], f["batch"]): f["ms_an_image"] for f in times if f["kind"] == "torch-reference fp32"}
    for f in times:
        if rate := bounds.get(f"product_{f['kind'].split()[1]}_tflops"):
            f["share_of_product_rate"] = bounds[f"gflop_{f['model']}"] / f["ms_an_image"] / rate
        if reference := literal.get((f["model"], f["batch"])):
            f["times_reference"] = reference / f["ms_an_image"]


def print_report(report: Figures) -> None:
    columns = {
        "batch": ("batch", "d", 6),
        "ms_an_image": ("ms an image", ".3f", 13),
        "share_of_product_rate": ("of product rate", ".1%", 17),
        "times_reference": ("times reference", ".1f", 17),
        "off_reference": ("off reference", ".1e", 15),
        "first_result_s": ("first s", ".1f", 9),
    }
    print("\n" + " " * 34 + "".join(title.rjust(width) for title, _, width in columns.values()))
    for f in figures_of(report, "ms_an_image"):
        values = ((f.get(name), digits, width) for name, (_, digits, width) in columns.items())
        row = "".join(("-" if v is None else format(v, digits)).rjust(width) for v, digits, width in values)
        print(f"{f['model'] + ', ' + f['kind']:34}{row}")
    for f in figures_of(report, "images_a_second"):
        how = f"{f['images_a_second']:.1f} images/s, {f['waiting_for_data']:.0%} waiting for data"
        print(
            f"training {f['model']} at {f['side']} px {f['how']}, batch {f['batch']}, mixed precision {f['precision']}: {how}"
        )
    for name, part in report["parts"].items():
        if part["status"] != "ok":
            print(f"{part['status']}: {name}: {part['reason']}")


def install(wheels: Path, target: Path) -> None:
    """Unpack wheels to where every part finds them, before what is installed."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(target))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models and few runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="folder of the JSON and of what is made"
    )
    parser.add_argument(
        "--recorded", type=Path, default=ROOT / "tests/recorded", help="folder of the recorded mini.npz"
    )
    parser.add_argument("--bundle", type=Path, help="of ViT-L/14, as this script exports it")
    parser.add_argument("--wheels", type=Path, help="folder of packages that are missing")
    parser.add_argument("--parts", default="", help="with commas: only those whose names begin so")
    parser.add_argument("--minutes", type=float, default=6.8, help="for everything")
    for name, kind in (("--part", str), ("--began", float), ("--parent", int)):  # of the process of a part
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.quick:  # threads that wait for each other take longer than tiny models
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if asked.part:
        sys.exit(be_part(asked))
    end, written = time.monotonic() + 60 * asked.minutes, asked.out / "gpu_check.json"
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.wheels:
        install(asked.wheels, asked.out.resolve() / "packages")
    report: Figures = {"command": " ".join(sys.argv), "parts": {}}
    for part in all_parts(asked):
        if part.name.startswith(tuple(asked.parts.split(","))):
            left = end - time.monotonic()
            late = {"status": "skipped", "reason": "no time was left", "seconds": 0.0, "figures": []}
            limit = min(part.seconds * (QUICK_PATIENCE if asked.quick else 1), left)
            report["parts"][part.name] = done = run_part(part, limit) if left > 0 else late
            compare(report)
            written.with_suffix(".part").write_text(json.dumps(report, indent=1) + "\n")
            written.with_suffix(".part").replace(written)
            print(f"{done['seconds']:6.1f} s  {part.name}: {done['status']}", flush=True)
    print_report(report)


if __name__ == "__main__":
    main()
