"""The unit of a line, by systemd's own check."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

from fbclip.assets import EMBEDDED
from helpers.serving import command
from helpers.video import write_video
from helpers.waiting import eventually

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "systemd" / "fbclip@.service"


@pytest.fixture
def analyze(tmp_path: Path) -> list[str]:
    """`systemd-analyze` on an instance of the unit, with the fbclip that is installed here."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not here")
    here = str(Path(sys.executable).with_name("fbclip"))
    text = UNIT.read_text()
    assert re.findall(r"^ExecStart=(\S+) serve --config", text, re.M) == ["/opt/fbclip/bin/fbclip"]
    (tmp_path / "fbclip@line1.service").write_text(text.replace("/opt/fbclip/bin/fbclip", here))
    return ["systemd-analyze", str(tmp_path / "fbclip@line1.service")]


def test_systemd_understands_the_unit(analyze: list[str], tmp_path: Path) -> None:
    tool, unit = analyze
    done = subprocess.run([tool, "verify", "--man=no", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    wrong = Path(unit).with_name("wrong@line1.service")
    wrong.write_text(Path(unit).read_text().replace("ProtectSystem=strict", "ProtectSystem=very"))
    assert "very" in subprocess.run([tool, "verify", "--man=no", wrong], capture_output=True, text=True).stderr


def test_the_unit_is_hardened(analyze: list[str]) -> None:
    """systemd counts exposure from 0 to 10, in tenths; it judges a unit that does nothing at 9.6."""
    tool, unit = analyze
    line = [tool, "security", "--offline=true", "--threshold=30", unit]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_template_is_for_a_line_with_a_page_and_for_one_without(fbclip: Run, tmp_path: Path) -> None:
    text = UNIT.with_name("line.toml").read_text()
    moved = text.replace("/dev/video0", "belt.avi").replace("/srv/fbclip/current.fbclip", str(EMBEDDED))
    assert (text.count('"/'), moved.count(str(EMBEDDED))) == (2, 1)
    (tmp_path / "line.toml").write_text(moved)
    write_video(tmp_path / "belt.avi", ["good", "good", "good"])
    done = fbclip("infer", "--config", "line.toml")
    assert "3 frames" in done.stdout
    assert (tmp_path / "events").is_dir()
    with command(tmp_path, "--config", "line.toml") as server:
        eventually(lambda: b"fbclip_results_total 3" in server.ask("/metrics")[1])
