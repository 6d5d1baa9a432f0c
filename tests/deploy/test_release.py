"""What a release holds, and an installation of it without a network."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fbclip
from release import check_sdist, check_wheel
from wheelhouse import LEAN, build, fill

NAME = f"fbclip-{fbclip.__version__}"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of the lean install for this machine."""
    folder = tmp_path_factory.mktemp("house")
    missing = fill(folder, platform.machine(), PYTHON, [])
    if any("ailed to fetch" in line for line in missing):
        pytest.skip(f"no package index: {missing[0]}")
    assert not missing
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """fbclip's sdist and wheel."""
    return build(tmp_path_factory.mktemp("built"))


def test_wheel_and_sdist_hold_the_package_alone(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    assert (sdist.name, wheel.name) == (f"{NAME}.tar.gz", f"{NAME}-py3-none-any.whl")
    check_wheel(wheel)
    check_sdist(sdist)
    with zipfile.ZipFile(wheel) as archive:
        for name in ("fbclip/export/engine.py", "fbclip/runtime/predictor.py", "fbclip/cli.py"):
            assert (archive.getinfo(name).external_attr >> 16) & 0o170000 in (0, 0o100000), "a file, not a link"


def test_what_does_not_belong_is_refused(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel = Path(shutil.copy(built[1], tmp_path))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tests/test_face.py", "")
    with pytest.raises(SystemExit, match=r"holds more than the package: tests/test_face\.py"):
        check_wheel(wheel)
    sdist = tmp_path / "fbclip-1.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(Path(__file__), "fbclip-1/LICENSE")
    with pytest.raises(SystemExit, match=r"lacks .*fbclip/runtime/predictor\.py"):
        check_sdist(sdist)


def test_a_wheelhouse_installs_without_an_index(house: Path, tmp_path: Path) -> None:
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=house).returncode == 0
    assert "onnxruntime==" in (house / f"{LEAN}.txt").read_text()
    assert (house / "fbclip@.service").exists()
    assert (house / "line.toml").exists()
    # as on a Debian without python3-venv
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "lean"], check=True)
    # no index can be asked: neither by this machine's configuration nor by pip's own
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    (pip,) = house.glob("pip-*.whl")
    line = [tmp_path / "lean" / "bin" / "python", pip / "pip", "install", "--quiet", "--no-index"]
    line += ["--find-links", house, "fbclip"]
    subprocess.run(line, env=environment, check=True)
    command = [tmp_path / "lean" / "bin" / "fbclip", "infer", "--no-save"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 images" in done.stdout
    torch = subprocess.run([tmp_path / "lean" / "bin" / "python", "-c", "import torch"], capture_output=True)
    assert torch.returncode == 1, "the lean install has no torch"


def test_what_makes_a_wheelhouse_is_asked_for_in_one_line(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    script = Path(__file__).resolve().parents[2] / "deploy" / "wheelhouse.py"
    done = subprocess.run([tmp_path / "bare" / "bin" / "python", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "uv and build aren't beside this Python" in done.stderr
