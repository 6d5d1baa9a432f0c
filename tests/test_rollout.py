"""The scripts of docs/guides/rollout.md, on two folders that stand for devices."""

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
cd "$DEVICES_HOME/$1" || exit 255
shift
exec sh -c "$*"
"""
SSH_THAT_DAMAGES = SSH.replace(
    "shift",
    """case "$1 $2" in
"HERE cd "*) printf x | tee -a srv/fbclip/*/calibration.json;;  # after it was sent, before the check
esac
shift""",
)
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
            (folder / device / "srv" / "fbclip").mkdir(parents=True)
        (folder / "devices.txt").write_text("\n".join(DEVICES) + "\n")
        page = PAGE.read_text().replace("/srv/fbclip", "srv/fbclip").replace("/opt/fbclip/bin/", "")
        self.send, self.switch, self.back = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DEVICES_HOME": str(self.folder)}
        environment["PATH"] = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{environment['PATH']}"
        return subprocess.run(["bash", "-c", script], cwd=self.folder, env=environment, text=True, capture_output=True)

    def device(self, name: str) -> Path:
        return self.folder / name / "srv" / "fbclip"

    def works(self, *scripts: str) -> None:
        for script in scripts:
            done = self.run(script)
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


def links(home: Path) -> tuple[str, ...]:
    """What a device runs, and the way back if it has one."""
    return tuple(
        str((home / f"{name}.fbclip").readlink())
        for name in ("current", "previous")
        if (home / f"{name}.fbclip").is_symlink()
    )


def test_there_and_back(computer: Computer) -> None:
    (computer.folder / "line3.fbclip" / "text.npy").chmod(0o600)
    computer.works(computer.send, computer.switch)
    home = computer.device(DEVICES[0])
    (first,) = links(home)
    assert computer.run(computer.back).returncode != 0 and links(home) == (first,)  # nowhere to go back to
    assert not (home / first / "engines").exists()
    assert all(
        path.stat().st_mode & 0o004 for path in (home / first, *(home / first).iterdir())
    )  # for the service's user
    with command(home, "--bundle", "current.fbclip") as server:
        calibrated(computer)
        computer.works(computer.send)
        assert links(home) == (first,)  # nothing has changed for the line so far
        computer.works(computer.switch, computer.switch)  # again: the way back is not lost
        model = server.json("/v1/status")["model"]  # nor for what runs, before it is started anew
        assert (f"{model['name']}.fbclip", model["calibration"]) == (first, None)
    for device in map(computer.device, DEVICES):
        second, previous = links(device)
        assert second != first and previous == first
        for file in EMBEDDED.iterdir():
            assert sha256(device / second / file.name) == sha256(file)
        assert (device / "restarts").read_text() == "systemctl restart fbclip@line1\n" * 3
    with command(home, "--bundle", "current.fbclip", log="second.log") as server:
        model = server.json("/v1/status")["model"]
        made = json.loads((computer.folder / "line3.fbclip" / "calibration.json").read_text())["made"]
        assert (f"{model['name']}.fbclip", model["calibration"]["made"]) == (second, made)
    computer.works(computer.back, computer.back)
    for device in map(computer.device, DEVICES):
        assert links(device) == (first, first)
        assert not (device / "next").exists()


@pytest.mark.parametrize("damaged", DEVICES)
def test_a_damaged_device_stops_the_roll_out(computer: Computer, damaged: str) -> None:
    computer.works(computer.send, computer.switch)
    before = links(computer.device(damaged))
    calibrated(computer)
    (computer.folder / "bin" / "ssh").write_text(SSH_THAT_DAMAGES.replace("HERE", damaged))
    done = computer.run(computer.send)
    assert done.returncode != 0 and "calibration.json: FAILED" in done.stdout
    assert computer.run(computer.switch).returncode != 0
    assert {links(computer.device(device)) for device in DEVICES} == {before}
    (computer.folder / "bin" / "ssh").write_text(SSH)
    computer.works(computer.send, computer.switch)  # rsync mends it
    assert all(links(computer.device(device))[1:] == before for device in DEVICES)


def test_a_device_whose_fbclip_refuses_the_bundle_stops_the_roll_out(computer: Computer) -> None:
    (computer.folder / "line3.fbclip" / "parity.json").write_text("{}")  # the hashes are of this
    done = computer.run(computer.send)
    assert done.returncode == 1 and "parity.json is damaged" in done.stdout
    assert computer.run(computer.switch).returncode != 0 and links(computer.device(DEVICES[0])) == ()


def test_a_device_that_cannot_be_reached_stops_the_roll_out(computer: Computer) -> None:
    computer.works(computer.send)
    shutil.rmtree(computer.folder / DEVICES[0])
    assert computer.run(computer.send).returncode != 0
    assert computer.run(computer.switch).returncode != 0
    assert links(computer.device(DEVICES[1])) == ()
