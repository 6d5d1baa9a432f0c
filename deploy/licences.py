"""Write docs/licences.md: the licences of what fbclip and each of its extras install, as the packages state them.

    python deploy/licences.py

pip resolves each extra for this machine and reports the packages' metadata; nothing is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"
LEAN = "lean"
NOT_INSTALLED = ("dev", "docs")  # what users don't run
HEAD = """# Licences

fbclip itself is under the Apache License 2.0. This page lists what `pip install fbclip` brings (*lean*), and what each extra adds, with the licences that the packages state of themselves. `make licences` writes it; it was written on
{machine} with Python {python}, for the versions in `constraints.txt`.

Wheels may hold libraries under licences of their own, which their files name: OpenCV's holds FFmpeg (LGPL 2.1), NumPy's OpenBLAS and GCC's runtime libraries. Packages of NVIDIA ("Other/Proprietary", `LicenseRef-NVIDIA-Proprietary`) are under NVIDIA's terms, which are yours to accept: [CUDA's](https://docs.nvidia.com/cuda/eula/), and those in the packages of cuDNN and TensorRT.
*Not stated* means that a package names no licence: ask its authors. The extras `dev` and `docs` are for work on fbclip, and not listed.

`deploy/compose.yaml` pulls images with licences of their own: Prometheus (Apache-2.0), Mosquitto (EPL-2.0 or EDL-1.0), Grafana (AGPL-3.0).

| package | version | licence | comes with |
| --- | --- | --- | --- |
"""


def resolved(extra: str) -> list[Mapping[str, Any]]:
    """Metadata of the packages that fbclip with an extra would install here.

    Raises:
        ValueError: something of it can't be resolved here.
    """
    wanted = str(ROOT) if extra == LEAN else f"{ROOT}[{extra}]"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        line = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            report,
        ]
        done = subprocess.run([*line, "-c", ROOT / "constraints.txt", wanted], capture_output=True, text=True)
        if done.returncode:
            errors = [text for text in done.stderr.splitlines() if text.startswith(("ERROR", "error"))]
            raise ValueError(errors[-1] if errors else done.stderr[-200:])
        packages = json.loads(report.read_text())["install"]
    return [package["metadata"] for package in packages if package["metadata"]["name"] != "fbclip"]


def licence(metadata: Mapping[str, Any]) -> str:
    """What a package states: its expression, else its classifiers, else the first line of its text."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    classifiers = [text.split(" :: ")[-1] for text in metadata.get("classifier", []) if text.startswith("License ::")]
    text = str(metadata.get("license") or "").strip().splitlines()
    stated = [name for name in classifiers if name != "OSI Approved"] or [
        name for name in text[:1] if name != "UNKNOWN"
    ]
    return ", ".join(stated)[:80] or "not stated"


def main() -> None:
    extras = {*importlib.metadata.metadata("fbclip").get_all("Provides-Extra", [])} - {*NOT_INSTALLED}
    rows: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    missing = []
    for extra in (LEAN, *sorted(extras)):
        print(extra, flush=True)
        try:
            packages = resolved(extra)
        except ValueError as error:
            missing.append(
                f"- {extra} is not in this table: pip could not resolve it where this page was written ({error})"
            )
            continue
        for metadata in packages:
            origins = rows.setdefault(metadata["name"].lower().replace("_", "-"), (metadata, []))[1]
            if LEAN not in origins:
                origins.append(extra)
    table = [
        f"| {name} | {metadata['version']} | {licence(metadata)} | {', '.join(origins)} |\n"
        for name, (metadata, origins) in sorted(rows.items())
    ]
    head = HEAD.format(machine=f"{platform.system()} on {platform.machine()}", python=platform.python_version())
    PAGE.write_text(head + "".join(table) + ("\n" + "\n".join(missing) + "\n" if missing else ""))


if __name__ == "__main__":
    main()
