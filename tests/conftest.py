from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import golden
import pytest
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fbclip(tmp_path: Path) -> Run:
    """The installed command, run in an empty folder."""
    command = Path(sys.executable).with_name("fbclip")

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [command, *map(str, arguments)], cwd=tmp_path, env=environment, text=True, capture_output=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other make tiny steps many times slower while the machine does other work."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip.json, clip.pt, official.pth and raw.png of the recorded configuration."""
    folder = tmp_path_factory.mktemp("golden")
    golden.write(folder)
    Image.fromarray(golden.arrays()["raw_image"]).save(folder / "raw.png")
    return folder


@pytest.fixture(scope="session")
def real_images() -> Path:
    """Photographs that may not be distributed with the project."""
    places = [os.environ.get("FBCLIP_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    for place in places:
        if place and (folder := Path(place) / "magnetic_tile").is_dir():
            return folder
    pytest.skip("no real photographs: set FBCLIP_DATA to a folder with magnetic_tile/")
