"""The commands of docs/guides/rollout.md, on two folders that stand for devices."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fbclip import calibrate
from fbclip.assets import EMBEDDED
from fbclip.files import sha256
from helpers.serving import command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("rsync"), reason="no rsync: apt install rsync"),
]
PAGE = Path(__file__).parent.parent / "docs" / "guides" / "rollout.md"
DEVICES = ("line3-left", "line3-right")
SSH = """#!/bin/sh
cd "$DEVICES_HOME/$1" && shift && exec sh -c "$*"
"""
SUDO = """#!/bin/sh
echo "$@" >> restarts
"""


class Computer:
    """The one that bundles are made on; its devices are folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"ssh": SSH, "sudo": SUDO}.items():
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        for device in DEVICES:
            (folder / device).mkdir()
        (folder / "devices.txt").write_text("\n".join(DEVICES) + "\n")
        self.name, self.send, self.check, self.switch, self.back = re.findall(
            r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S
        )

    def run(self, *blocks: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DEVICES_HOME": str(self.folder)}
        environment["PATH"] = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{environment['PATH']}"
        script = "\n".join(("set -eu", self.name, *blocks))
        return subprocess.run(["bash", "-c", script], cwd=self.folder, env=environment, text=True, capture_output=True)

    def device(self, name: str) -> Path:
        return self.folder / name / "fbclip"


def worked(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def computer(tmp_path: Path) -> Computer:
    shutil.copytree(EMBEDDED, tmp_path / "line3.fbclip")
    (tmp_path / "line3.fbclip" / "engines").mkdir()
    (tmp_path / "line3.fbclip" / "engines" / "orin.plan").write_bytes(b"of this computer")
    return Computer(tmp_path)


def calibrated(computer: Computer) -> None:
    """Another release: the same model, a calibration more."""
    (computer.folder / "good").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3))
    for number in range(4):
        Image.fromarray(np.roll(noise, number, 0).astype(np.uint8)).save(computer.folder / "good" / f"{number}.png")
    calibrate(computer.folder / "line3.fbclip", computer.folder / "good", false_alarm_rate=0.2)


def test_there_and_back(computer: Computer) -> None:
    worked(computer.run(computer.send, computer.check, computer.switch))
    home = computer.device(DEVICES[0])
    first = (home / "current.fbclip").readlink()
    assert (home / "previous.fbclip").readlink() == first
    assert not (home / first / "engines").exists()
    with command(home.parent, "--bundle", "fbclip/current.fbclip") as server:
        calibrated(computer)
        worked(computer.run(computer.send, computer.check))
        assert (home / "current.fbclip").readlink() == first  # nothing has changed for the line so far
        worked(computer.run(computer.switch))
        model = server.json("/v1/status")["model"]  # nor for what runs, before it is started anew
        assert (model["name"], model["calibration"]) == (first.stem, None)
    for device in map(computer.device, DEVICES):
        second = (device / "current.fbclip").readlink()
        assert second != first
        assert (device / "previous.fbclip").readlink() == first
        for file in EMBEDDED.iterdir():
            assert sha256(device / second / file.name) == sha256(file)
        assert (device.parent / "restarts").read_text() == "systemctl restart fbclip@line1\n" * 2
    with command(home.parent, "--bundle", "fbclip/current.fbclip", log="second.log") as server:
        model = server.json("/v1/status")["model"]
        made = json.loads((computer.folder / "line3.fbclip" / "calibration.json").read_text())["made"]
        assert (model["name"], model["calibration"]["made"]) == (second.stem, made)
    worked(computer.run(computer.back))
    for device in map(computer.device, DEVICES):
        assert (device / "current.fbclip").readlink() == first
        assert not (device / "next").exists()


def test_what_is_damaged_on_the_way_is_not_switched_to(computer: Computer) -> None:
    worked(computer.run(computer.send, computer.check, computer.switch))
    before = (computer.device(DEVICES[1]) / "current.fbclip").readlink()
    calibrated(computer)
    worked(computer.run(computer.send))
    (sent,) = set(computer.device(DEVICES[1]).glob("line3-*.fbclip")) - {computer.device(DEVICES[1]) / before}
    calibration = json.loads((sent / "calibration.json").read_text())
    (sent / "calibration.json").write_text(json.dumps({**calibration, "threshold": 0.99}))
    done = computer.run(computer.check, computer.switch)
    assert done.returncode != 0 and "calibration.json: FAILED" in done.stdout
    for file in ("parity.json", "calibration.json"):  # without the list of hashes fbclip refuses it as well
        worked(computer.run(computer.send))
        (sent / file).write_text((sent / file).read_text().replace("0", "1", 1))
        doctor = Path(sys.executable).with_name("fbclip")
        assert subprocess.run([doctor, "doctor", "-q", "--bundle", sent], capture_output=True).returncode == 1
    assert (computer.device(DEVICES[1]) / "current.fbclip").readlink() == before
    worked(computer.run(computer.send, computer.check, computer.switch))  # rsync mends it
    assert (computer.device(DEVICES[1]) / "current.fbclip").readlink() == Path(sent.name)
