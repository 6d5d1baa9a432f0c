"""From a JPEG on disk to a verdict, on the CPU: images a second, percentiles, stages, the first result of a new process and
the peak of memory, as on a device, without torch.

python benchmarks/end_to_end.py [BUNDLE [ROUNDS]]    # the embedded model without one
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fbclip import Predictor
from fbclip.folders import list_images

WARM_UP, COLD_STARTS = 20, 5


def cold_start(bundle: str | None, image: Path) -> float:
    """Seconds from starting Python to the first result, in a process of its own."""
    code = f"from fbclip import Predictor; Predictor({bundle!r}, device='cpu')({str(image)!r})"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main(bundle: str | None = None, rounds: str = "300") -> None:
    images, timed = list_images([]), int(rounds)
    cold = [cold_start(bundle, images[0]) for _ in range(min(COLD_STARTS, timed))]
    warm_up = min(WARM_UP, timed)
    predictor = Predictor(bundle, device="cpu")
    milliseconds, stages = [], []
    for number in range(warm_up + timed):
        start = time.perf_counter()
        prediction = predictor(images[number % len(images)])
        milliseconds.append((time.perf_counter() - start) * 1e3)
        stages.append(prediction.timings_ms)
    milliseconds, stages = milliseconds[warm_up:], stages[warm_up:]
    p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
    result = {
        "model": predictor.bundle.manifest.name,
        "graph_for_the_cpu": predictor.bundle.graph_for("cpu", "fp32").name,
        "frame_hw": prediction.image.shape[:2],
        "cpus": len(os.sched_getaffinity(0)),
        "images_a_second": round(1e3 * timed / sum(milliseconds), 1),
        "milliseconds": {"p50": round(p50, 2), "p90": round(p90, 2), "p99": round(p99, 2)},
        "p99_over_p50": round(p99 / p50, 2),
        "stages_ms": {name: round(statistics.median(s[name] for s in stages), 2) for name in stages[0]},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cold_start_s": {"median": round(statistics.median(cold), 2), "all": [round(s, 2) for s in cold]},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
