"""`fbclip doctor`: what works on this machine and what is missing, with the cure.

Imports nothing that may be broken: third-party libraries are tried in processes of their own (`probes.py`), and a
check that fails itself becomes a line of the report.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fbclip
from fbclip.errors import reason
from fbclip.files import write_text
from fbclip.runtime.doctor.checks import Check, failed, installed, probe, version_of
from fbclip.runtime.doctor.gpu import check_nvidia, check_onnxruntime
from fbclip.runtime.host import GSTREAMER, Machine, ProcessFailed
from fbclip.terminal import cell, say

STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red", "info": "dim"}
TESTED = ((3, 10), (3, 13))  # versions of Python
BACKENDS = {
    "V4L2": "USB cameras",
    "FFMPEG": "video files, RTSP and HTTP streams",
    "GSTREAMER": "CSI cameras of a Jetson",
}
BUNDLE, INFERENCE = "bundle", "inference"
BUNDLE_COPIES = 3  # weights on disk, ONNX Runtime's own copy, activations: what a run holds, in sizes of the graph
RUNTIME_MB = 300  # of the interpreter and its libraries

SWAP = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"


def examine(
    bundle: Path | None, machine: Machine | None = None, say: Callable[[str], None] = lambda topic: None
) -> list[Check]:
    """Everything that is looked at, in the order of the report. Never raises.

    Args:
        bundle: a bundle, or None for the embedded default model.
        say: told each topic before it is looked at.
    """
    machine = machine or Machine()
    topics: dict[str, Callable[[], Iterator[Check]]] = {
        "fbclip": lambda: check_python(machine),
        "ONNX Runtime": lambda: check_onnxruntime(machine),
        "NVIDIA": lambda: check_nvidia(machine),
        "Machine": lambda: check_machine(machine),
        "Bundle": lambda: check_bundle(machine, bundle),
        "Video": lambda: check_video(machine),
        "Extras": check_extras,
    }
    checks: list[Check] = []
    for topic, look in topics.items():
        say(topic)
        try:
            checks.extend(look())
        except Exception as error:  # a doctor does not fall ill
            checks.append(Check(topic, "this check", "broken", reason(error), "fbclip --debug doctor  # and report it"))
    return checks


def works(checks: list[Check]) -> bool:
    """Whether the bundle is whole, and a sample image could be scored with the default device and precision."""
    return _problem(checks) is None


def _problem(checks: list[Check]) -> str | None:
    """Why the bundle can't be used: a file is not as its export wrote it, even of a graph that nobody asked for, or
    inference does not work."""
    found = {check.name: check for check in checks if check.topic == "Bundle"}
    if (whole := found.get(BUNDLE)) and whole.status == "broken":
        return f"the bundle can't be used: {whole.found}"
    if (run := found.get(INFERENCE)) and run.status == "ok":
        return None
    return f"inference does not work: {run.found}" if run else "inference does not work"


def check_python(machine: Machine) -> Iterator[Check]:
    topic, here = "fbclip", sys.version_info[:2]
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    found = f"{platform.python_version()} ({platform.machine()}, {kind}) {sys.executable}"
    if TESTED[0] <= here <= TESTED[1]:
        yield Check(topic, "Python", "ok", found)
    else:
        yield Check(topic, "Python", "info", f"{found}; tried are 3.10 to 3.13")
    yield Check(topic, "fbclip", "ok", f"{fbclip.__version__} {Path(fbclip.__file__).parent}")
    for name, module, package in (
        ("NumPy", "numpy", "numpy"),
        ("Pillow", "PIL", "pillow"),
        ("psutil", "psutil", "psutil"),
    ):
        yield _package(machine, topic, name, module, f"pip install --force-reinstall {package}")


def check_machine(machine: Machine) -> Iterator[Check]:
    topic = "Machine"
    system = machine.read("etc/os-release")
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', system, re.MULTILINE)
    yield Check(topic, "system", "info", f"{name[1] if name else platform.platform()}, {os.cpu_count()} CPU cores")
    if memory := machine.memory():
        total, available, swap = (size >> 20 for size in (memory.total, memory.available, memory.swap))
        found = f"{available} of {total} MB free, swap {swap} MB"
        cure = ""
        if machine.is_jetson and total < 9000 and swap < total // 2:
            cure = f"{SWAP}  # before engines are built or PyCUDA is compiled"
        yield Check(topic, "memory", "info" if cure else "ok", found, cure)
    try:
        free = shutil.disk_usage(Path.cwd()).free >> 20
    except OSError as error:
        yield Check(topic, "disk", "broken", reason(error), "cd ~  # a folder that can be read")
        return
    if free < 1000:
        yield Check(topic, "disk", "broken", f"{free} MB free here", "df -h .  # results and engines need room")
    else:
        yield Check(topic, "disk", "ok", f"{free} MB free here")


def check_bundle(machine: Machine, bundle: Path | None) -> Iterator[Check]:
    topic, path = "Bundle", str(bundle or "")
    shown = f" --bundle {bundle}" if bundle else ""
    try:
        found = probe(machine, "bundle", path)
    except ProcessFailed as error:
        yield Check(
            topic, BUNDLE, "broken", str(error), "fbclip export" if bundle else "pip install --force-reinstall fbclip"
        )
        found = None
    largest = 0
    if found:
        sizes = {precision: size >> 20 for precision, size in found["precisions"].items()}
        largest = max(sizes.values())
        words = f"{found['name']}, {found['image_size']} px, opset {found['opset']}; as its export wrote it"
        yield Check(topic, BUNDLE, "ok", words)
        yield Check(topic, "precisions", "ok", ", ".join(f"{p} ({size} MB)" for p, size in sizes.items()))
        yield _learned(machine, path, shown)
        yield from _plans(machine, Path(found["path"]))
    try:
        run = probe(machine, INFERENCE, path)
    except ProcessFailed as error:
        cure = f"fbclip --debug infer{shown} --device cpu  # after curing what is listed above"
        yield failed(topic, INFERENCE, error, "", cure)
        run = {}
    else:
        yield Check(topic, INFERENCE, "ok", _said(run))
        yield Check(
            topic, "device auto", "info" if run["told"] else "ok", "; ".join([f"takes {run['device']}", *run["told"]])
        )
    measured = run.get("peak_mb")
    if found or measured:
        yield from _memory_need(machine, measured, largest)


def _learned(machine: Machine, path: str, shown: str) -> Check:
    """What good parts taught the bundle, or whether they can."""
    try:
        found = probe(machine, "memory", path)
    except ProcessFailed as error:
        cure = f"fbclip adapt GOOD...{shown}  # or, for the zero-shot model, fbclip adapt --forget{shown}"
        return Check("Bundle", "good parts", "broken", str(error), cure)
    if found["memory"]:
        return Check("Bundle", "good parts", "ok", found["memory"])
    if found["adaptable"]:
        return Check("Bundle", "good parts", "ok", "adaptable; no memory of good parts yet")
    cure = "fbclip export  # its checkpoint again, so that good parts can teach it"
    return Check(
        "Bundle", "good parts", "info", "not adaptable: an older release exported it, without these inputs", cure
    )


def _said(run: dict[str, Any]) -> str:
    """What the probe of inference found."""
    started = f"; launches: {run['launches']}" if run["launches"] else ""
    return f"{run['device']}, {run['precision']}: a sample image scores {run['score']:.3f} in {run['model_ms']:.0f} ms{started}"


def _plans(machine: Machine, bundle: Path) -> Iterator[Check]:
    """TensorRT plans, and whether they run here: those that fit do so, which also shows how executions are started."""
    if not list(bundle.glob("engines/**/*.plan")):
        return
    try:
        found = probe(machine, "plans", str(bundle))
    except ProcessFailed as error:
        yield Check(
            "Bundle", "engines", "broken", str(error), f"fbclip --debug infer --bundle {bundle} --device tensorrt"
        )
        return
    for name, plan in found["plans"].items():
        device, precision = plan["device"], plan["precision"]
        build = "--rtx" if device == "tensorrt-rtx" else "--engine"
        cure = f"fbclip export {build} --bundle {bundle} --precision {precision}"
        if plan["refusal"]:
            yield Check("Bundle", name, "broken", plan["refusal"], cure)
        elif not plan["here"]:
            yield Check("Bundle", name, "info", f"built for {plan['built_for']}; no {device} and GPU here to compare")
        else:
            try:
                run = probe(machine, INFERENCE, str(bundle), device, precision)
            except ProcessFailed as error:
                yield Check("Bundle", name, "broken", str(error), cure)
            else:
                yield Check("Bundle", name, "ok", f"built for {plan['built_for']}, as here; {_said(run)}")


def _memory_need(machine: Machine, measured: int | None, largest_mb: int) -> Iterator[Check]:
    memory = machine.memory()
    if not memory:
        return
    available = memory.available >> 20
    need = measured or RUNTIME_MB + BUNDLE_COPIES * largest_mb
    how = (
        "measured on that image"
        if measured
        else f"estimated: {RUNTIME_MB} MB and {BUNDLE_COPIES} times the largest graph"
    )
    found = f"needs {need} MB ({how}); {available} MB free"
    if need < available:
        yield Check("Bundle", "memory", "ok", found)
    else:
        cure = "fbclip infer --precision fp16  # or close other programs; headless: sudo systemctl isolate multi-user"
        yield Check("Bundle", "memory", "broken", found, cure)


def check_video(machine: Machine) -> Iterator[Check]:
    topic = "Video"
    try:
        found = probe(machine, "opencv")
    except ProcessFailed as error:
        yield failed(topic, "OpenCV", error, "cv2", "pip install --force-reinstall opencv-python-headless")
    else:
        yield Check(topic, "OpenCV", "ok", found["version"])
        for backend, use in BACKENDS.items():
            if backend in found["backends"]:
                yield Check(topic, backend, "ok", use)
            elif backend != "GSTREAMER":
                yield Check(
                    topic, backend, "missing", f"not in this OpenCV: no {use}", "pip install opencv-python-headless"
                )
            elif machine.is_jetson:
                yield Check(topic, backend, "missing", f"not in this OpenCV: no {use}", GSTREAMER)
            else:
                yield Check(topic, backend, "info", f"not in this OpenCV: no {use}")
    yield from _cameras(machine)


def _cameras(machine: Machine) -> Iterator[Check]:
    cameras = machine.cameras()
    if not cameras:
        yield Check(
            "Video",
            "cameras",
            "info",
            "none: no /dev/video*",
            "ls -l /dev/video*  # after plugging one in; in Docker: --device /dev/video0",
        )
    for device, label in cameras.items():
        if os.access(device, os.R_OK | os.W_OK, effective_ids=True):
            yield Check("Video", f"/dev/{device.name}", "ok", label)
        else:
            cure = "sudo usermod -aG video $USER  # then log in again"
            yield Check("Video", f"/dev/{device.name}", "broken", f"{label}: permission denied", cure)


def check_extras() -> Iterator[Check]:
    """Optional parts, by what the installed package says they need; those for a GPU are looked at above."""
    try:
        package = distribution("fbclip")
    except PackageNotFoundError:
        yield Check("Extras", "fbclip", "missing", "runs from its source folder, not installed", "pip install .")
        return
    for extra in package.metadata.get_all("Provides-Extra") or []:
        if extra in ("dev", "gpu", "tensorrt", "rtx"):
            continue
        wanted = [
            re.split(r"[^A-Za-z0-9._-]", line)[0]
            for line in package.requires or []
            if re.search(rf"extra == ['\"]{extra}['\"]", line)
        ]
        lacking = [name for name in wanted if not installed(name)]
        if lacking:
            yield Check("Extras", extra, "info", f"lacks {', '.join(lacking)}", f"pip install 'fbclip[{extra}]'")
        else:
            yield Check("Extras", extra, "ok", ", ".join(f"{name} {version(name)}" for name in wanted))


def _package(machine: Machine, topic: str, name: str, module: str, cure: str) -> Check:
    try:
        return Check(topic, name, *version_of(probe(machine, "package", module)))
    except ProcessFailed as error:
        return failed(topic, name, error, module, cure)


def print_report(checks: list[Check], console: Console) -> None:
    """A table by topic, then every cure on lines of its own, so that it can be copied."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    topic = None
    for check in checks:
        if check.topic != topic:
            topic = check.topic
            table.add_row("", cell(topic, "bold"), "")
        table.add_row(cell(check.status, STYLES[check.status]), cell(check.name), cell(check.found))
    console.print(table)
    cures = [check for check in checks if check.cure]
    for status in ("broken", "missing", "info"):
        for check in (c for c in cures if c.status == status):
            console.print(cell(status, STYLES[status]), cell(f"{check.topic}: {check.name}"))
            say(console, f"  {check.cure}")
    if problem := _problem(checks):
        say(console, problem, "bold red")
    else:
        say(console, "inference works")


def write_report(checks: list[Check], target: str) -> None:
    """The report as JSON to a file, or to standard output for "-"."""
    values = {"works": works(checks), "checks": [asdict(check) for check in checks]}
    write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", target)
