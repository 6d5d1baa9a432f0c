"""Stand-in of `tensorrt`, made from the recorded interface of the release that $STANDIN_TENSORRT names.

Classes, members, enums and arguments are those of the record; anything else raises. `trt_model` says what the few
members that fbclip uses do; the others raise NotImplementedError.
"""

import enum
import functools
import json
import os
import re
import sys
from pathlib import Path

import trt_model

__version__ = os.environ["STANDIN_TENSORRT"]


def _record(version):
    """The recorded interface; TensorRT-RTX's names another, and what it has besides."""
    record = json.loads((Path(__file__).parents[3] / "recorded" / "tensorrt" / f"api-{version}.json").read_text())
    base = _record(record["base"]) if "base" in record else {"classes": {}, "enums": {}}
    classes = {name: {**base["classes"].get(name, {}), **members} for name, members in record["classes"].items()}
    return {"classes": {**base["classes"], **classes}, "enums": {**base["enums"], **record["enums"]}}


API = _record(__version__)
_severity = enum.Enum("Severity", {name: i for i, name in enumerate(trt_model.SEVERITIES)})
SIGNATURE = re.compile(r"(?:\d+\. )?\w+\((.*)\)(?: -> .*)?")


def _arguments(signature):
    """[(name, type, has a default)] of a recorded signature, without self; None where the record has none."""
    match = SIGNATURE.fullmatch(signature)
    if not match:
        return None
    parts, depth = [""], 0
    for sign in match[1]:
        depth += (sign in "[(<") - (sign in "])>")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    found = []
    for part in (part.strip() for part in parts if part.strip()):
        name, _, rest = part.partition(": ")
        kind, _, default = rest.partition(" = ")
        if name != "self":
            found.append((name, kind, default))
    return found


def _accepts(kind, value):
    if kind in ("int", "typing.SupportsInt"):
        return hasattr(value, "__int__") or hasattr(value, "__index__")
    if kind in ("buffer", "typing_extensions.Buffer"):
        return isinstance(value, bytes | bytearray | memoryview)
    if kind in ("str", "bool", "tuple", "list"):
        return isinstance(value, {"str": str, "bool": bool, "tuple": tuple, "list": list}[kind])
    if kind == "tensorrt.Dims":
        return isinstance(value, tuple | list | Dims)  # noqa: F821
    own = functools.reduce(lambda place, name: getattr(place, name, None), kind.split(".")[1:], sys.modules[__name__])
    return isinstance(value, own) if kind.startswith("tensorrt.") and isinstance(own, type) else True


def _fits(arguments, given, named):
    names = [name for name, _, _ in arguments]
    if len(given) > len(names) or set(named) - set(names[len(given) :]):
        return False
    values = {**dict(zip(names, given, strict=False)), **named}
    return all(
        (_accepts(kind, values[name]) or (values[name] is None and default == "None")) if name in values else default
        for name, kind, default in arguments
    )


def _checked(owner, member, signatures, do):
    """A member that takes what the record says and does what the model says."""
    overloads = [_arguments(s) for s in ([signatures] if isinstance(signatures, str) else signatures)]

    def call(self, *given, **named):
        if not any(overload is None or _fits(overload, given, named) for overload in overloads):
            raise TypeError(f"{member}(): incompatible function arguments; {signatures}; invoked with {given} {named}")
        if do is None:
            raise NotImplementedError(f"the stand-in has no tensorrt.{owner}.{member}")
        return do(self, *given, **named)

    call.__name__ = member
    return call


class _Meta(type):
    def __call__(cls, *given, **named):
        made = super().__call__(*given, **named)
        if not made._is_initialised:
            raise TypeError(f"{cls.__mro__[1].__name__}.__init__() must be called when overriding __init__")
        return made


class _Object(metaclass=_Meta):
    _is_initialised = False

    def __setattr__(self, name, value):
        listed = type(self).__dict__
        if type(self) in _classes and not name.startswith("_") and not isinstance(listed.get(name), property):
            raise AttributeError(f"tensorrt.{type(self).__name__} has no attribute {name} to set")
        object.__setattr__(self, name, value)


def _value(owner, name):
    """A property that only keeps what it is given."""

    def get(self):
        if name not in self.__dict__:
            raise NotImplementedError(f"the stand-in has no tensorrt.{owner}.{name}")
        return self.__dict__[name]

    return property(get, lambda self, value: self.__dict__.__setitem__(name, value))


def _class(name, members):
    model = vars(getattr(trt_model, name, object))
    space = {
        key: value for key, value in model.items() if key.startswith("_") and key not in ("__dict__", "__weakref__")
    }
    make = space.pop("__init__", None)
    for member, record in members.items():
        if record == "Severity":
            space[member] = _severity[member]
        elif member == "Severity":
            space[member] = _severity
        elif record == "property":
            space[member] = model.get(member) or _value(name, member)
        elif member != "__init__":
            space[member] = _checked(name, member, record, model.get(member))
    record = members.get("__init__", "")
    can_make = isinstance(record, list) or "(" in record
    checked = _checked(name, "__init__", record, make or (lambda self: None)) if can_make else None

    def init(self, *given, **named):
        if checked is None:
            raise TypeError(f"tensorrt.{name}: No constructor defined!")
        object.__setattr__(self, "_is_initialised", True)
        checked(self, *given, **named)

    space["__init__"] = init
    base = trt_model.BASES.get(name)
    bases = (globals()[base],) if isinstance(base, str) else (_Object, base) if base else (_Object,)
    return _Meta(name, bases, space)


for _name, _members in API["enums"].items():
    globals()[_name] = enum.Enum(_name, {member: number for number, member in enumerate(_members)})
    globals()[_name].__int__ = globals()[_name].__index__ = lambda self: self.value
_classes = set()
for _name, _members in API["classes"].items():
    globals()[_name] = _class(_name, _members)
    _classes.add(globals()[_name])
trt_model.trt = sys.modules[__name__]
deserialised, compiled = trt_model.deserialised, trt_model.compiled
