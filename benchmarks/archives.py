"""What `fbclip score` costs beside a plain loop, how it scales, and what it loses when a machine is killed.

    python benchmarks/archives.py make --images FOLDER --to ARCHIVE --count 20000
    python benchmarks/archives.py speed --archive ARCHIVE --count 2000 --rounds 3
    python benchmarks/archives.py kill --archive ARCHIVE --bundle BUNDLE

Each adds to benchmarks/results/archives.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from fbclip.folders import list_images

RESULTS = Path(__file__).parent / "results" / "archives.json"
COMMAND = Path(sys.executable).with_name("fbclip")
PLAIN = """import sys, time
from fbclip import Predictor
from fbclip.folders import list_images
from fbclip.runtime.host import use_cores
use_cores(1)
predictor = Predictor()
images = list_images([sys.argv[1]])
predictor(images[0])
start = time.perf_counter()
for image in images:
    predictor(image)
print(time.perf_counter() - start)
"""


def make(images: Path, to: Path, count: int) -> None:
    """Crops, mirror images and changes of brightness of real images, as JPEG, in folders of a thousand."""
    originals = [path for path in list_images([str(images)]) if "ground_truth" not in path.parts]
    draw = np.random.default_rng(0)
    for number in range(count):
        image = Image.open(originals[number % len(originals)]).convert("RGB")
        width, height = image.size
        x, y = draw.integers(0, width // 6 + 1), draw.integers(0, height // 6 + 1)
        image = image.crop((x, y, x + 5 * width // 6, y + 5 * height // 6))
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(draw.uniform(0.85, 1.15))
        place = to / f"{number // 1000:03}" / f"{number:06}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place, quality=90)
    print(f"{count} images of {len(originals)} in {to}")


def speed(archive: Path, count: int, rounds: int) -> None:
    """The plain loop on one core, one worker and two, in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        some = Path(scratch, "some")
        some.mkdir()
        for path in list_images([str(archive)])[:count]:
            (some / path.name).symlink_to(path)
        times: dict[str, list[float]] = {"plain": [], "1 worker": [], "2 workers": []}
        for turn in range(rounds):
            done = subprocess.run([sys.executable, "-c", PLAIN, some], text=True, capture_output=True, check=True)
            times["plain"].append(float(done.stdout))
            for workers in (1, 2):
                out = Path(scratch, f"out{turn}-{workers}")
                times[f"{workers} worker{'s' if workers > 1 else ''}"].append(_score(some, out, workers))
            print({name: round(values[-1], 1) for name, values in times.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = zip(*times.values(), strict=True)
    ratios = [(one / plain - 1, one / two) for plain, one, two in pairs]
    _add(
        "speed",
        {
            "images": count,
            "seconds": times,
            "median_s": medians,
            "overhead_of_1_worker": statistics.median(ratio for ratio, _ in ratios),
            "speedup_of_2_workers": statistics.median(ratio for _, ratio in ratios),
            "load": os.getloadavg()[1],
        },
    )


def _score(archive: Path, out: Path, workers: int, *more: str) -> float:
    """Seconds of the work as the command tells them, from the start of its workers to the last table."""
    arguments = ["score", archive, "--out", out, "--workers", workers, "--cores", 1, *more]
    done = subprocess.run([COMMAND, *map(str, arguments)], text=True, capture_output=True, check=True)
    line = next(line for line in done.stdout.splitlines() if " images in " in line and "/s)" in line)
    return float(line.split(" images in ")[1].split(" s ")[0])


def kill(archive: Path, bundle: Path | None) -> None:
    """Two machines of a cluster, one of which is killed at a third; memory of the workers meanwhile."""
    from ray.cluster_utils import Cluster

    count = len(list_images([str(archive)]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    out = Path(tempfile.mkdtemp(), "scores")
    start = time.monotonic()
    chosen = [] if bundle is None else ["--bundle", bundle]
    scoring = subprocess.Popen([COMMAND, "score", archive, "--out", out, "--address", cluster.address, *chosen])
    memory: list[tuple[float, float, float]] = []
    killed_at: float | None = None
    while scoring.poll() is None:
        time.sleep(1)  # between two samples
        done = sum(pq.read_metadata(path).num_rows for path in out.glob("rows/*.parquet"))
        memory.append((time.monotonic() - start, _rss("MapWorker"), _rss_of(scoring.pid)))
        if killed_at is None and done >= count / 3:
            killed_at = time.monotonic() - start
            cluster.remove_node(nodes[0], allow_graceful=False)
    names = pq.read_table(out / "rows", columns=["source"])["source"].to_pylist()
    cluster.shutdown()
    shutil.rmtree(out.parent)
    workers = [used for at, used, _ in memory if used]
    driver = [used for at, _, used in memory if used]
    tenth = max(1, len(workers) // 10)
    _add(
        "kill",
        {
            "images": count,
            "seconds": time.monotonic() - start,
            "killed_at_s": killed_at,
            "rows": len(names),
            "different_rows": len(set(names)),
            "exit_code": scoring.returncode,
            "largest_worker_mb": {
                "first tenth": statistics.median(workers[tenth : 2 * tenth]),
                "last tenth": statistics.median(workers[-tenth:]),
                "most": max(workers),
            },
            "driver_mb": {
                "first tenth": statistics.median(driver[tenth : 2 * tenth]),
                "last tenth": statistics.median(driver[-tenth:]),
                "most": max(driver),
            },
        },
    )


def _rss(name: str) -> float:
    """MB of the largest process of that name."""
    found = [0.0]
    for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
        if name in " ".join(process.info["cmdline"] or ()) and process.info["memory_info"]:
            found.append(process.info["memory_info"].rss / 1e6)
    return max(found)


def _rss_of(pid: int) -> float:
    try:
        return psutil.Process(pid).memory_info().rss / 1e6
    except psutil.Error:
        return 0.0


def _add(name: str, found: dict[str, object]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[name] = {"command": " ".join(["python", "benchmarks/archives.py", *sys.argv[1:]]), **found}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("make", "speed", "kill"))
    parser.add_argument("--images", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--bundle", type=Path, help="for kill; the embedded one if left out")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.task == "make":
        make(given.images, given.to, given.count)
    elif given.task == "speed":
        speed(given.archive, given.count, given.rounds)
    else:
        kill(given.archive, given.bundle)


if __name__ == "__main__":
    main()
