"""Build a release into dist/ and check it: sdist, wheel, SBOM of the lean install (CycloneDX), SHA256SUMS.

    python deploy/release.py

Wheel and sdist hold what git tracks of the package, and nothing else. The sdist is installed into an environment of its
own, which inspects the samples; what that environment holds is the SBOM, and its size and times are printed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import fbclip
from wheelhouse import build, write_sums

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
AROUND = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", "PKG-INFO", "setup.cfg"}


def tracked() -> set[str]:
    """Files of the package that git tracks, by their place in an installation: the links are what they lead to."""
    line = ["git", "ls-files", "fbclip", "export", "runtime", "cli.py"]
    names = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    real = [name for name in names if not (ROOT / name).is_symlink()]
    return {name if name.startswith("fbclip/") else f"fbclip/{name}" for name in real}


def check_wheel(wheel: Path) -> None:
    """Raise SystemExit unless the wheel holds the package, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    _compare(wheel, names, tracked())


def check_sdist(sdist: Path) -> None:
    """Raise SystemExit unless the sdist holds the package, what builds it, and nothing else; as files, not links."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    if links := [member.name for member in members if not member.isreg()]:
        raise SystemExit(f"{sdist.name} holds links: {', '.join(links)}")
    names = {member.name.partition("/")[2] for member in members}
    _compare(sdist, {name for name in names if not name.startswith("fbclip.egg-info/")}, tracked() | AROUND)


def _compare(archive: Path, names: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - names):
        raise SystemExit(f"{archive.name} lacks {', '.join(missing)}")
    if more := sorted(names - wanted):
        raise SystemExit(f"{archive.name} holds more than the package: {', '.join(more)}")


def install(sdist: Path, place: Path) -> Path:
    """The Python of a new environment with the lean install of the sdist, which has inspected the samples."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    line = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*line, sdist], check=True)
    done = subprocess.run([place / "bin" / "fbclip", "infer", "--no-save"], cwd=place, capture_output=True, text=True)
    if done.returncode or "4 images" not in done.stdout:
        raise SystemExit(f"the installed sdist can't inspect the samples: {done.stdout}{done.stderr}")
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "pip", "setuptools"], check=True)
    return python


def write_sbom(python: Path, path: Path) -> None:
    """What an environment holds, as CycloneDX 1.6 (JSON)."""
    tool = Path(sys.executable).with_name("cyclonedx-py")
    options = ["--pyproject", ROOT / "pyproject.toml", "--output-reproducible", "--output-file", path]
    subprocess.run([tool, "environment", python, *options], check=True, stderr=subprocess.DEVNULL)
    bill = json.loads(path.read_text())
    bill["metadata"]["component"]["version"] = fbclip.__version__  # which pyproject.toml reads from the package
    path.write_text(json.dumps(bill, indent=2) + "\n")


def print_cost(place: Path) -> None:
    """Size on disk, and the time until the command answers and until a model is open: the median of 5 runs."""
    packages = next((place / "lib").glob("python3*/site-packages"))
    sizes = {path.name: _megabytes(path) for path in packages.iterdir()}
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:8]
    print(f"lean install: {sum(sizes.values()):.0f} MB: " + ", ".join(f"{name} {sizes[name]:.0f}" for name in largest))
    for words in (
        ["-m", "fbclip.cli", "-h"],
        ["-c", "import fbclip"],
        ["-c", "from fbclip import Predictor; Predictor()"],
    ):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            subprocess.run([place / "bin" / "python", *words], check=True, stdout=subprocess.DEVNULL, cwd=place)
            times.append(time.perf_counter() - begin)
        print(f"python {' '.join(words)}: {statistics.median(times):.2f} s")


def _megabytes(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_blocks for file in files) * 512 / 1e6


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # it takes nothing, and says so
    shutil.rmtree(DIST, ignore_errors=True)
    sdist, wheel = build(DIST)
    check_sdist(sdist)
    check_wheel(wheel)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "lean"
        write_sbom(install(sdist, place), DIST / f"{sdist.name.removesuffix('.tar.gz')}.cdx.json")
        print_cost(place)
    write_sums(DIST)
    print(*sorted(path.name for path in DIST.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
