"""Wheels for machines without a network: of fbclip, of what it needs and of its extras.

    python deploy/wheelhouse.py --python 3.13 --machine aarch64 --extra serve --extra mqtt

writes `build/wheelhouse/cp313-aarch64/`: the wheels, SHA256SUMS, and `EXTRA.txt` with the versions and hashes of an
extra, `lean.txt` for none. On the device, after `sha256sum --check SHA256SUMS`:

    pip install --no-index --find-links cp313-aarch64 'fbclip[serve]'

An extra that has no wheels for a machine is left out, which MISSING.txt and the screen tell. It is an error where
that extra was asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ("x86_64", "aarch64")
# for devices; the others can be asked for
EXTRAS = ("serve", "mqtt", "metrics", "eval", "supervision", "gpu", "tensorrt")
LEAN = "lean"
GLIBC = range(28, 4, -1)  # 2.28 is that of JetPack 6's and later systems, and older ones


def pinned(extra: str, machine: str, python: str) -> str:
    """Versions and hashes of what fbclip, with an extra, needs on a machine.

    Raises:
        ValueError: something of it has no wheel for that machine.
    """
    line = ["pip", "compile", "--quiet", "--generate-hashes", "--no-annotate", "--no-header", "--only-binary", ":all:"]
    line += ["--python-version", python, "--python-platform", f"{machine}-manylinux_2_28"]
    line += ["--constraint", "constraints.txt", *([] if extra == LEAN else ["--extra", extra]), "pyproject.toml"]
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run([uv, *line], cwd=ROOT, capture_output=True, text=True)
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
    build(folder)
    (folder / "MISSING.txt").write_text("".join(f"{line}\n" for line in missing))
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
    parser.add_argument("--extra", action="append", help=f"{', '.join(EXTRAS)} if left out")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wheelhouse")
    given = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", given.python):
        parser.error(f"--python is like 3.12; got {given.python}")
    missing = []
    for machine in given.machine or MACHINES:
        folder = given.out / f"cp{given.python.replace('.', '')}-{machine}"
        missing += fill(folder, machine, given.python, given.extra or [*EXTRAS])
    if missing:
        print(*missing, sep="\n", file=sys.stderr)
        sys.exit(bool(given.extra))


if __name__ == "__main__":
    main()
