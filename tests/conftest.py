from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from fbclip import logs
from helpers import golden

STANDIN = Path(__file__).parent / "helpers" / "standin"
RELEASES = ("10.3.0", "10.16.1", "11.4.0")  # of TensorRT, whose interfaces are recorded
RTX = "1.7.1.116"  # of TensorRT-RTX
SLOW_FIXTURES = {"fbclip", "golden_bundle", "standin", "tensorrt", "belt", "broker"}  # commands, exports, servers
SLOW_FOLDERS = ("export", "training", "serving", "bench", "sources", "sinks", "doctor", "evaluation")
SLOW_FILES = ("test_terminal", "test_fuzz", "test_properties", "test_calibration", "test_threads", "test_holdout")
LONGEST = ("export", "training")
Run = Callable[..., subprocess.CompletedProcess[str]]

# no verdict depends on the clock or on luck; --hypothesis-profile=default draws other examples
settings.register_profile("fbclip", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("fbclip")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so do its children


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out, and begin with the longest files, so that no process is left with one at the end."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        is_slow_place = item.path.stem in SLOW_FILES or any(folder in item.path.parts for folder in SLOW_FOLDERS)
        if SLOW_FIXTURES & fixtures or is_slow_place:
            item.add_marker("slow")
    items.sort(key=lambda item: not any(folder in item.path.parts for folder in LONGEST))


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that runs in this process opens its log for the rest of it: the next test has none."""
    log = logging.getLogger("fbclip")
    before = log.handlers, log.propagate, log.level
    for name in ("choice", "_handler"):
        monkeypatch.setattr(logs, name, getattr(logs, name))
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


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
def golden_bundle(golden_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded configuration by one export in every precision, with a float16 engine of the first release.

    Tests that run in several processes share it: the first that wants it makes it.
    """
    command = [Path(sys.executable).with_name("fbclip"), *export_arguments(golden_files), "--fp16", "--int8-static"]
    environment = {**os.environ, **standin_environment(RELEASES[0]), "HF_HUB_OFFLINE": "1"}
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place
    bundle = place / "golden.fbclip"
    with FileLock(place / "golden.lock"):
        if not bundle.exists():
            whole = [*map(str, command), "--engine", "--out", bundle]
            subprocess.run(whole, env=environment, check=True, capture_output=True)
    return bundle


def export_arguments(folder: Path) -> list[object]:
    """`fbclip export` of the recorded configuration, proven on its image."""
    return [
        "export",
        "--clip",
        folder / "clip.json",
        "--clip-weights",
        folder / "clip.pt",
        "--checkpoint",
        folder / "official.pth",
        "--image-size",
        golden.IMAGE_SIZE,
        "--feature-layers",
        ",".join(map(str, golden.FEATURE_LAYERS)),
        "--parity-images",
        folder / "raw.png",
    ]


@pytest.fixture(scope="session")
def real_images() -> Path:
    """Photographs that may not be distributed with the project."""
    places = [os.environ.get("FBCLIP_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    for place in places:
        if place and (folder := Path(place) / "magnetic_tile").is_dir():
            return folder
    pytest.skip("no real photographs: set FBCLIP_DATA to a folder with magnetic_tile/")


@pytest.fixture(params=RELEASES)
def standin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Stand-ins of tensorrt, pycuda and cuda-bindings, here and in commands; the TensorRT release they are of."""
    with standins(request.param, monkeypatch):
        yield request.param


@pytest.fixture(params=[*RELEASES, pytest.param("real", marks=pytest.mark.gpu)])
def tensorrt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The stand-ins of each release in turn, and the real packages on a machine that has them and a GPU."""
    if request.param == "real":
        from fbclip.errors import DeviceError
        from fbclip.runtime.backends.cuda import Gpu

        try:
            Gpu().close()
        except DeviceError as error:
            pytest.skip(str(error))
        yield "real"
    else:
        with standins(request.param, monkeypatch):
            yield request.param


def standin_environment(release: str) -> dict[str, str]:
    """What makes a command find the stand-ins of a release."""
    rtx = str(STANDIN / "rtx") if release == RTX else None  # others find the real one, which needs no GPU
    path = os.pathsep.join(filter(None, (str(STANDIN), rtx, os.environ.get("PYTHONPATH"))))
    return {"STANDIN_TENSORRT": release, "PYTHONPATH": path}


@contextmanager
def standins(release: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = {"tensorrt", "pycuda", "cuda", "gpu_model", "trt_model"} | ({"tensorrt_rtx"} if release == RTX else set())

    def belongs(module: str) -> bool:
        return module.split(".")[0] in names

    for name, value in standin_environment(release).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(STANDIN)
    if release == RTX:
        monkeypatch.syspath_prepend(STANDIN / "rtx")
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if belongs(name)}
    yield
    for name in filter(belongs, list(sys.modules)):
        if name == "gpu_model":
            assert not sys.modules[name].living, "a CUDA context was not closed"
        del sys.modules[name]
    sys.modules.update(real)
