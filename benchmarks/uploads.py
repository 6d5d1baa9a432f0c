"""Memory and time of the worst pictures that the server takes.

python benchmarks/uploads.py [--command .venv/bin/fbclip]    # writes benchmarks/results/uploads.json

`fbclip serve` runs as it is installed, in a process of its own, and is asked as clients ask; its memory is what Linux
counts (/proc). "Above" is the most that it held during a request beyond what it held with the model loaded and a small
picture scored before; "after" is what stayed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "uploads.json"
MOST_ABOVE_MB = 600  # that a request may take
THRESHOLDS = (0.0, 0.5)  # of 0, the whole map is one region
QUERIES = ("", "?overlay=1", "?map=1", "?overlay=1&map=1")


def flat(mode: str, width: int, height: int, kind: str, **options: object) -> Callable[[], bytes]:
    def make() -> bytes:
        file = BytesIO()
        Image.new(mode, (width, height)).save(file, kind, **options)
        return file.getvalue()

    return make


def noise(width: int, height: int, kind: str, **options: object) -> Callable[[], bytes]:
    def make() -> bytes:
        file = BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(file, kind, **options)
        return file.getvalue()

    return make


PICTURES = {
    "PNG grey 1 x 25,000,000": flat("L", 1, 25_000_000, "PNG"),
    "PNG grey 25,000,000 x 1": flat("L", 25_000_000, 1, "PNG"),
    "PNG grey 65,535 x 381": flat("L", 65_535, 381, "PNG"),
    "PNG grey 381 x 65,535": flat("L", 381, 65_535, "PNG"),
    "PNG 16 bit 5,000 x 5,000": flat("I;16", 5_000, 5_000, "PNG"),
    "PNG RGBA 5,000 x 5,000": flat("RGBA", 5_000, 5_000, "PNG"),
    "PNG palette 5,000 x 5,000": flat("P", 5_000, 5_000, "PNG", transparency=0),
    "PNG noise 2,600 x 2,600": noise(2_600, 2_600, "PNG", compress_level=1),
    "TIFF float 5,000 x 5,000": flat("F", 5_000, 5_000, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF int32 5,000 x 5,000": flat("I", 5_000, 5_000, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF CMYK 5,000 x 5,000": flat("CMYK", 5_000, 5_000, "TIFF", compression="tiff_adobe_deflate"),
    "JPEG progressive 5,000 x 5,000": noise(5_000, 5_000, "JPEG", quality=60, progressive=True),
    "WebP 5,000 x 5,000": flat("RGB", 5_000, 5_000, "WEBP"),
}


class Server:
    """The command, asked from outside."""

    def __init__(self, command: str) -> None:
        arguments = [command, "serve", "--port", "0"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout
        while "serving on" not in (line := self.process.stdout.readline()):
            assert line, "it ended"
        self.port = int(line.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def memory_mb(self, name: str) -> float:
        """VmRSS, what it holds, or VmHWM, the most since `forget_peak`."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--command", default=str(Path(sys.executable).with_name("fbclip")))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    server = Server(options.command)
    try:
        server.ask("POST", "/v1/predict?overlay=1&map=1", flat("RGB", 640, 480, "PNG")())
        model_mb = server.memory_mb("VmRSS")
        print(f"with the model: {model_mb:.0f} MB")
        print(
            f"{'picture':32}{'bytes':>11}  {'threshold':9}  {'query':18}{'status':>6}{'s':>7}{'above MB':>10}{'after MB':>10}"
        )
        rows = []
        for name, make in PICTURES.items():
            data = make()
            for threshold in THRESHOLDS:
                server.ask("PUT", "/v1/threshold", json.dumps({"threshold": threshold}).encode())
                for query in QUERIES:
                    server.forget_peak()
                    start = time.perf_counter()
                    status, text = server.ask("POST", f"/v1/predict{query}", data)
                    seconds = time.perf_counter() - start
                    row = {
                        "picture": name,
                        "bytes": len(data),
                        "threshold": threshold,
                        "query": query,
                        "status": status,
                        "seconds": round(seconds, 2),
                        "above_mb": round(server.memory_mb("VmHWM") - model_mb),
                        "after_mb": round(server.memory_mb("VmRSS")),
                    }
                    rows.append(row)
                    print(
                        f"{name:32}{len(data):>11,}  {threshold:<9}  {query:18}{status:>6}{seconds:>7.2f}"
                        f"{row['above_mb']:>10}{row['after_mb']:>10}" + (f"  {text}" if status != 200 else ""),
                        flush=True,
                    )
    finally:
        server.process.terminate()
        code = server.process.wait()
    worst = max(rows, key=lambda row: row["above_mb"])
    print(f"worst: {worst['above_mb']} MB above the model ({worst['picture']}); it ended with exit code {code}")
    report = {"model_mb": round(model_mb), "worst_above_mb": worst["above_mb"], "exit_code": code, "uploads": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if worst["above_mb"] > MOST_ABOVE_MB:
        raise SystemExit(f"more than {MOST_ABOVE_MB} MB")


if __name__ == "__main__":
    main()
