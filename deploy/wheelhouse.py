"""Wheels for machines without a network: of fbclip, of what it needs and of its extras.

    python deploy/wheelhouse.py --python 3.13 --machine aarch64 --extra serve --extra mqtt

writes `build/wheelhouse/cp313-aarch64/`: the wheels, of pip too, systemd's unit and a line's options, SHA256SUMS, and
`EXTRA.txt` with the versions and hashes of an extra, `lean.txt` of what all need. It is an error if an extra has no
wheels for a machine. docs/guides/deploy.md has what to do on the device.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ("x86_64", "aarch64")
LEAN = "lean"
GLIBC = range(28, 4, -1)  # 2.28 is that of JetPack 6's and later systems, and older ones


def pinned(extra: str, machine: str, python: str) -> str:
    """Versions and hashes of what fbclip, with an extra, needs on a machine, and of pip, which Debian's Python lacks.

    Raises:
        ValueError: something of it has no wheel for that machine.
    """
    line = ["pip", "compile", "--quiet", "--generate-hashes", "--no-annotate", "--no-header", "--only-binary", ":all:"]
    line += ["--python-version", python, "--python-platform", f"{machine}-manylinux_2_28"]
    line += ["--constraint", "constraints.txt", *([] if extra == LEAN else ["--extra", extra]), "pyproject.toml", "-"]
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run([uv, *line], cwd=ROOT, input="pip", capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()).split(": Because ")[-1]
        raise ValueError(reason.split(", we can conclude")[0])
    return str(done.stdout)


def download(pins: Path, folder: Path, machine: str, python: str) -> None:
    """The wheels of pinned versions, whose hashes are checked."""
    tags = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC]
    tags += [f"--platform=manylinux2014_{machine}", f"--platform=linux_{machine}", f"--python-version={python}"]
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    subprocess.run([*line, *tags, "--dest", folder, "--requirement", pins], check=True)


def fill(folder: Path, machine: str, python: str, extras: list[str]) -> list[str]:
    """Fill a wheelhouse anew; what could not be put into it, a line each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    missing = []
    for extra in (LEAN, *extras):
        try:
            pins = pinned(extra, machine, python)
        except ValueError as error:
            missing.append(f"{extra} is left out on {machine}, Python {python}: {error}")
            continue
        before = _size(folder)
        (folder / f"{extra}.txt").write_text(pins)
        download(folder / f"{extra}.txt", folder, machine, python)
        print(f"{folder.name} {extra}: {(_size(folder) - before) / 1e6:.0f} MB more", flush=True)
    sdist, _ = build(folder)
    sdist.unlink()
    for path in (ROOT / "deploy" / "systemd").iterdir():
        shutil.copy(path, folder)
    write_sums(folder)
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {_size(folder) / 1e6:.0f} MB")
    return missing


def build(folder: Path) -> tuple[Path, Path]:
    """fbclip's sdist, and the wheel that is made from it, so that nothing of an earlier build slips in."""
    line = [sys.executable, "-m", "build", "--installer", "uv", "--outdir", folder, ROOT]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = folder.glob("fbclip-*.tar.gz"), folder.glob("fbclip-*.whl")
    return sdist, wheel


def write_sums(folder: Path) -> None:
    """SHA256SUMS of the files of a folder, as `sha256sum --check` reads it."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill build/wheelhouse for machines without a network.")
    parser.add_argument("--python", default="3.13", help="its version on the machine")
    parser.add_argument("--machine", action="append", choices=MACHINES, help="both if left out")
    parser.add_argument("--extra", action="append", default=[], help="of pyproject.toml; the lean install if left out")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wheelhouse")
    given = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", given.python):
        parser.error(f"--python is like 3.12; got {given.python}")
    if not Path(sys.executable).with_name("uv").exists() or not find_spec("build"):
        parser.error("uv and build aren't beside this Python: make wheelhouse installs them")
    missing = []
    for machine in given.machine or MACHINES:
        folder = given.out / f"cp{given.python.replace('.', '')}-{machine}"
        missing += fill(folder, machine, given.python, given.extra)
    if missing:
        sys.exit("\n".join(missing))


if __name__ == "__main__":
    main()
