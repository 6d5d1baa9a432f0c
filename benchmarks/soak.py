"""The live command for half an hour, at full speed, while something happens to its camera every few seconds.

python benchmarks/soak.py [--minutes 30]    # writes benchmarks/results/soak.json

`fbclip infer http://…` runs as it is installed, in a process of its own, which is watched from outside: memory, threads,
descriptors, age of its results as they arrive here. The stream comes through a proxy that cuts, stalls, refuses and
garbles it; broken pictures and other sizes come from the camera itself. Part of the frames show a scratch: each alarm
that a JSON line reports must be among the events on disk at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import fbclip
from fbclip.runtime.live.sinks.events import event_folders
from helpers.stream_faults import Camera, Proxy, filming

SAMPLES = Path(fbclip.__file__).parent / "assets" / "samples"
SIZES = ((320, 240), (400, 300))
FPS = 60  # more than the model takes: frames are dropped all the time
WARM_UP = 0.25  # of the run, at most two minutes
FAULTS = ("cut", "stall", "refuse", "garble", "broken", "resize")


class Belt(Camera):
    """Good steel, and for one second in five scratched steel."""

    def __init__(self) -> None:
        super().__init__(1 / FPS)
        self.size = SIZES[0]
        self.jpegs = {(kind, size): encode(kind, size) for kind in ("good", "scratch") for size in SIZES}

    def pictures(self) -> Iterator[bytes]:
        number = 0
        while not self.stopped.wait(self.interval):
            kind = "scratch" if time.monotonic() % 5 < 1 else "good"
            picture = self.jpegs[kind, self.size]
            broken = self.broken and number % self.broken == 0
            yield picture[: len(picture) // 2] if broken else picture
            number += 1


def encode(kind: str, size: tuple[int, int]) -> bytes:
    buffer = BytesIO()
    Image.open(SAMPLES / f"brushed-steel-{kind}.jpg").resize(size).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass
class Seen:
    """What comes out of the command, read in a thread of its own."""

    ages_ms: list[float] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)
    notices: Counter[str] = field(default_factory=Counter)
    last: float = 0.0  # when the last result came
    torn: int = 0

    def read(self, lines: Iterator[str]) -> None:
        alarm = False
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                self.torn += 1
                continue
            if record["kind"] != "result":
                self.notices[f"{record['kind']} {record['state']}"] += 1
                continue
            self.last = time.time()
            self.ages_ms.append((self.last - record["time"]) * 1e3)
            if record["alarm"] and not alarm:
                self.alarms.append(record["index"])
            alarm = record["alarm"]


def sample(pid: int) -> tuple[float, int, int]:
    """Resident memory in MB, threads, descriptors."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(list((process / "task").iterdir())),
        len(list((process / "fd").iterdir())),
    )


def harm(fault: str, camera: Belt, proxy: Proxy, chance: random.Random) -> None:
    """One fault, which is over at the end."""
    if fault == "cut":
        proxy.cut()
    elif fault == "stall":
        proxy.flowing.clear()
        time.sleep(7)  # longer than the watchdog's five seconds
        proxy.flowing.set()
    elif fault == "refuse":
        proxy.refuse()
        time.sleep(chance.uniform(0.1, 3))
        proxy.accept()
    elif fault == "garble":
        proxy.garble(chance.randint(1, 20))
    elif fault == "broken":
        camera.broken = chance.randint(2, 10)
        time.sleep(1)
        camera.broken = 0
    else:
        camera.size = SIZES[camera.size == SIZES[0]]


def soak(minutes: float, folder: Path) -> dict[str, Any]:
    chance, camera, seen = random.Random(0), Belt(), Seen()
    faults: Counter[str] = Counter()
    returns: list[float] = []
    samples: list[tuple[float, float, int, int]] = []
    command = [Path(sys.executable).with_name("fbclip"), "infer"]
    with filming(camera, "http") as port, Proxy(port) as proxy:
        arguments = ["--json", "-", "--csv", folder / "r.csv", "--events", folder / "events", "--events-size", "4GB"]
        with subprocess.Popen(
            [*command, f"http://127.0.0.1:{proxy.port}/video", "--vote", "2/3", *arguments],
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
        ) as process:
            assert process.stdout
            reader = threading.Thread(target=seen.read, args=(process.stdout,))
            reader.start()
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < minutes * 60 and process.poll() is None:
                time.sleep(chance.uniform(2, 5))
                fault = chance.choice(FAULTS)
                harm(fault, camera, proxy, chance)
                faults[fault] += 1
                over = time.time()
                while seen.last < over + 0.1 and time.time() - over < 10:  # beyond what was on its way
                    time.sleep(0.02)
                if fault in ("cut", "stall", "refuse"):
                    returns.append(seen.last - over)
                samples.append((elapsed, *sample(process.pid)))
            process.send_signal(signal.SIGTERM)
            reader.join(60)
    shown = [alarm for event in event_folders(folder / "events") for alarm in described(event)]
    warm = min(120.0, WARM_UP * minutes * 60)
    settled = np.array([values for elapsed, *values in samples if elapsed > warm])
    third = max(1, len(settled) // 3)
    ages = np.percentile(seen.ages_ms, (50, 95, 99))
    return {
        "minutes": minutes,
        "cores": len(os.sched_getaffinity(0)),
        "exit_code": process.returncode,
        "results": len(seen.ages_ms),
        "torn_lines": seen.torn,
        "faults": dict(faults),
        "notices": dict(sorted(seen.notices.items())),
        "memory_mb": [round(float(np.median(part[:, 0])), 1) for part in (settled[:third], settled[-third:])],
        "threads": [int(settled[0, 1]), int(settled[-1, 1]), int(settled[:, 1].max())],
        "descriptors": [int(settled[0, 2]), int(settled[-1, 2]), int(settled[:, 2].max())],
        "age_ms": {name: round(float(age), 1) for name, age in zip(("p50", "p95", "p99"), ages, strict=True)},
        "return_s": {"median": round(float(np.median(returns)), 2), "longest": round(max(returns), 2)},
        "alarms_reported": len(seen.alarms),
        "alarms_on_disk": len(shown),
        "missing_on_disk": sorted(set(seen.alarms) - set(shown)),
    }


def described(event: Path) -> list[int]:
    alarms: list[int] = json.loads((event / "event.json").read_text())["alarms"]
    return alarms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        result = soak(minutes, Path(folder))
        print((Path(folder) / "log").read_text()[-2000:])
    target = Path(__file__).parent / "results" / "soak.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
