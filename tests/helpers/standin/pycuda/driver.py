"""`pycuda.driver` with exactly the names of the recorded list; those that the model lacks raise when they are used."""

import atexit
import json
import os
import sys
from pathlib import Path

import gpu_model
from gpu_model import Error, LaunchError, LogicError, MemoryError, RuntimeError  # noqa: F401

NAMES = json.loads((Path(__file__).parents[3] / "recorded" / "tensorrt" / "pycuda-driver.json").read_text())


def _lacking(name):
    def lacking(*args, **kwargs):
        raise NotImplementedError(f"the stand-in has no pycuda.driver.{name}")

    return lacking


for _name in NAMES["functions"]:
    globals()[_name] = getattr(gpu_model, _name, _lacking(_name))

for _name, _members in NAMES["classes"].items():
    _model = getattr(gpu_model, _name, None)
    if _model is None:
        globals()[_name] = _lacking(_name)
        continue
    _extra = {member for member in vars(_model) if not member.startswith("_")} - set(_members)
    assert not _extra, f"PyCUDA's {_name} has no {_extra}"
    for _member in _members:
        if not hasattr(_model, _member) and _member != "handle":  # an attribute of the instance
            setattr(_model, _member, _lacking(f"{_name}.{_member}"))
    globals()[_name] = _model


@atexit.register
def _leave():
    if gpu_model.living or not gpu_model.stack_is_empty():
        print("PyCUDA ERROR: The context stack was not empty upon module cleanup.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(134)
