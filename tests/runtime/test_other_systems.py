"""Commands with what Windows lacks taken away (`helpers/windows.py`): an imitation, for nothing here runs Windows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

from fbclip.assets import EMBEDDED, SAMPLES

WINDOWS = Path(__file__).parents[1] / "helpers" / "windows.py"
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from windows import pretend
pretend()
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks for open files in /proc")]


def there(folder: Path, *arguments: object) -> str:
    """What a command prints there."""
    line = [sys.executable, WINDOWS, *map(str, arguments)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_there(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(folder=str(WINDOWS.parent)) + text
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)


def scores(path: Path) -> dict[str, float]:
    records = map(json.loads, path.read_text().splitlines())
    return {Path(record["source"]).name: record["score"] for record in records if record["kind"] == "result"}


def test_the_imitation_refuses_what_windows_does(tmp_path: Path) -> None:
    text = "import os\nopen('a', 'w').close()\nfile = open('a')\n"
    assert "another process has it open" in python_there(tmp_path, text + "os.replace('a', 'b')").stderr
    assert "has no attribute 'pread'" in python_there(tmp_path, text + "os.pread(file.fileno(), 1, 0)").stderr
    assert "fcntl" in python_there(tmp_path, "import fcntl").stderr


def test_pictures_are_inspected_as_here(fbclip: Run, tmp_path: Path) -> None:
    options = ["--csv", "table.csv", "--save-map"]
    there(tmp_path, "infer", SAMPLES, "--json", "there.jsonl", *options)
    there(tmp_path, "infer", SAMPLES, "--json", "there.jsonl", *options)  # lines are added to files that are there
    fbclip("infer", SAMPLES, "--json", "here.jsonl", "--no-save")
    assert scores(tmp_path / "there.jsonl") == scores(tmp_path / "here.jsonl")
    assert len((tmp_path / "there.jsonl").read_text().splitlines()) == 8
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 9
    assert len([*(tmp_path / "runs" / "infer" / "exp2").glob("*.npy")]) == 4


def test_a_bundle_is_taught_calibrated_and_taught_again(tmp_path: Path) -> None:
    good = [SAMPLES / "brushed-steel-good.jpg", SAMPLES / "casting-pit.jpg"]
    there(tmp_path, "adapt", EMBEDDED, *good, "--out", "part.fbclip")
    there(tmp_path, "calibrate", SAMPLES, "--bundle", "part.fbclip", "--false-alarm-rate", "0.4")
    there(tmp_path, "adapt", *good, "--bundle", "part.fbclip", "--weight", "0.5")  # replaces files
    there(tmp_path, "infer", good[0], "--bundle", "part.fbclip", "--no-save")


def test_full_files_of_lines_are_put_aside(tmp_path: Path) -> None:
    text = """
from pathlib import Path
from fbclip.runtime.live.sinks.lines import LineFile
lines = LineFile(Path("out.jsonl"), limit=100)
for number in range(12):
    lines.append('{"kind": "result", "index": %d}' % number)
lines.close()
"""
    done = python_there(tmp_path, text)
    assert done.returncode == 0, done.stderr
    kept = [tmp_path / name for name in ("out.jsonl.3", "out.jsonl.2", "out.jsonl.1", "out.jsonl")]
    assert [json.loads(line)["index"] for path in kept for line in path.read_text().splitlines()] == [*range(12)]
