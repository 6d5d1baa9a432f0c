"""What the examples in other languages need, from the npm registry, once a user: ~/.cache/fbclip-tests. No package's own
install script is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

NODE = "onnxruntime-node@1.30.0"  # ONNX Runtime with its library for Linux, macOS and Windows: 290 MB
# ONNX Runtime's own C and C++ headers (Microsoft's, MIT) lie beside its library for iOS in this package; no package of
# PyPI or Debian 12 has them. Their 1.29 works with every later library. 150 MB, of which the headers are kept.
HEADERS = "com.github.asus4.onnxruntime@0.4.9"
HEADERS_SINCE = (1, 29)
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fbclip-tests"
PATIENCE_S = 300


def node_modules() -> Path:
    """A folder in which Node.js finds onnxruntime-node; skips the test where it can't be had."""
    with _folder(NODE) as (folder, is_new):
        if is_new:
            _npm("install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", folder, NODE)
    return folder


def headers() -> Path:
    """A folder with onnxruntime_cxx_api.h; skips the test where it can't be had."""
    with _folder(HEADERS) as (folder, is_new):
        if is_new:
            _npm("pack", "--pack-destination", folder, HEADERS)
            (packed,) = folder.glob("*.tgz")
            with tarfile.open(packed) as archive:
                for member in archive:
                    if member.isfile() and "-simulator/onnxruntime.framework/Headers/" in member.name:
                        content = archive.extractfile(member)
                        assert content
                        (folder / Path(member.name).name).write_bytes(content.read())
            packed.unlink()
    return folder


def libraries(folder: Path) -> Path:
    """The same ONNX Runtime as Python's, under the names that a linker looks for; skips the test where its wheel has none."""
    spec = find_spec("onnxruntime")
    assert spec and spec.origin
    found = list(Path(spec.origin).with_name("capi").glob("libonnxruntime.so.*"))
    if not found or tuple(map(int, version("onnxruntime").split(".")[:2])) < HEADERS_SINCE:
        pytest.skip("this wheel of ONNX Runtime has no library of its own, or one older than the headers")
    folder.mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(found[0])
    return folder


@contextmanager
def _folder(package: str) -> Iterator[tuple[Path, bool]]:
    """A folder to be filled, once, by one process at a time."""
    folder = CACHE / package.replace("@", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{folder.name}.lock"):
        done = folder / "done"
        yield folder, not done.exists()
        done.touch()


def _npm(*arguments: object) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here: apt-get install npm")
    try:
        subprocess.run(["npm", *map(str, arguments)], check=True, capture_output=True, timeout=PATIENCE_S, text=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm can't get {arguments[-1]}: {error}")
