"""Lines of the report of `fbclip doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Literal

from fbclip.runtime.host import Machine, ProcessFailed
from fbclip.runtime.workers import Worker

Status = Literal["ok", "missing", "broken", "info"]


@dataclass(frozen=True)
class Check:
    """A line of the report.

    Attributes:
        topic: under which it stands.
        name: what was looked at.
        status: "ok", "missing" (not there), "broken" (there and unusable) or "info" (neither good nor bad).
        found: what was found.
        cure: a command, with a comment where it needs one; empty where nothing is wrong.
    """

    topic: str
    name: str
    status: Status
    found: str
    cure: str = ""


def probe(machine: Machine, name: str, *arguments: str) -> dict[str, Any]:
    """What a probe of `probes.py` finds, in a Python like this one.

    Raises:
        ProcessFailed: it raised, crashed or hung.
    """
    with Worker("fbclip.runtime.doctor.probes:Probe", name, *arguments, patience=machine.patience) as worker:
        found: dict[str, Any] = worker.ready
    return found


def failed(topic: str, name: str, error: ProcessFailed, module: str, cure: str) -> Check:
    """Missing where `module` itself is not there, broken where something else went wrong."""
    if module and (error.missing or "").partition(".")[0] == module:
        return Check(topic, name, "missing", "not installed", cure)
    if "multiarray" in str(error) or "_ARRAY_API" in str(error) or "numpy.dtype size changed" in str(error):
        cure = "pip install 'numpy<2'  # this library was compiled for NumPy 1; or install a newer build of it"
    return Check(topic, name, "broken", str(error), cure)


def version_of(found: dict[str, Any]) -> tuple[Status, str]:
    return "ok", found["version"] or found["place"]


def installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
