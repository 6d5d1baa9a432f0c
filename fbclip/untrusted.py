"""Files that others wrote: read within bounds and held to rules, so that nothing in them surprises what comes after.

Everything here raises ValueError with one sentence; who calls adds the file's name, the cure and an error of ours. Needs
numpy, nothing else.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from io import BytesIO
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

MIB = 2**20
MOST_DIGITS = 18  # of a whole number in JSON: what int64 holds
MOST_HEADER = 10_000  # bytes of an .npy file's header: NumPy's own limit

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; of a text or a list, its length."""

    low: float
    high: float

    def refuse(self, value: Any) -> str | None:
        sized = isinstance(value, (str, tuple, Mapping))
        if self.low <= (len(value) if sized else value) <= self.high:
            return None
        return f"{'has a length' if sized else 'is a number'} from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Like:
    """A text that a pattern matches from end to end, and the pattern in words."""

    pattern: str
    words: str

    def refuse(self, value: str) -> str | None:
        return None if re.fullmatch(self.pattern, value) else f"is {self.words}"


def one_of(*texts: str) -> Like:
    return Like("|".join(map(re.escape, texts)), " or ".join(texts))


Probability = Annotated[float, Range(0, 1)]
Sha256 = Annotated[str, Like("[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits")]
Line = Annotated[str, Like(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,500}", "one line of 1 to 500 characters")]


def read_json(path: Path, most: int) -> Any:
    """The values of a JSON file of at most `most` bytes; see `parse_json`.

    Raises:
        ValueError: no file, too large, or no JSON.
    """
    return parse_json(read_bytes(path, most))


def read_bytes(path: Path, most: int) -> bytes:
    """What is in a file of at most `most` bytes.

    Raises:
        ValueError: no file (a folder, a pipe), too large, or unreadable.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"it can't be read: {error.strerror or error}") from error
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """The values of JSON as RFC 8259 has it, which Python's reader is laxer than.

    Raises:
        ValueError: no UTF-8, no JSON, NaN or Infinity, a number beyond float64 or int64, a key that is there twice,
            text that is no Unicode, or brackets in brackets without end.
    """
    try:
        values = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_unique,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
        )
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # a lone surrogate can be printed nowhere
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    return values


def build(cls: type[T], values: Any, name: str = "it") -> T:
    """A dataclass from the values of a JSON object, of which every field is there and no other.

    Annotations are the rules: `bool`, `int`, `float` (a whole number is one too), `str`, `Any`, tuples, mappings of
    text, other dataclasses, `T | None`, and with `Annotated` a `Range` or a `Like`.

    Args:
        name: of the object in messages.

    Raises:
        ValueError: names the field, its rule and the value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name} is an object in braces; got {one_line(repr(values), 60)}")
    hints = get_type_hints(cls, include_extras=True)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    if missing := [each for each in names if each not in values]:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    if extra := sorted(values.keys() - set(names)):
        raise ValueError(f"{name} has no field {one_line(', '.join(extra), 60)}")
    return cls(**{each: read_value(hints[each], values[each], each) for each in names})


def read_value(rule: Any, value: Any, name: str) -> Any:
    """A value as its rule has it: see `build`.

    Raises:
        ValueError: names the value, its rule and what it is.
    """
    kind, parts = get_origin(rule), get_args(rule)
    if kind is Annotated:
        found = read_value(parts[0], value, name)
        for limit in parts[1:]:
            if refusal := limit.refuse(found):
                raise ValueError(f"{name} {refusal}; got {one_line(repr(value), 60)}")
        return found
    if kind in (Union, UnionType):  # T | None
        return (
            None if value is None else read_value(next(part for part in parts if part is not type(None)), value, name)
        )
    if kind is tuple and isinstance(value, list):
        rules = [parts[0]] * len(value) if parts[-1] is ... else list(parts)
        if len(rules) == len(value):
            return tuple(read_value(each, item, name) for each, item in zip(rules, value, strict=True))
    elif kind is Mapping and isinstance(value, dict):
        return {
            read_value(parts[0], k, f"a key of {name}"): read_value(parts[1], v, f"{name}[{k!r}]")
            for k, v in value.items()
        }
    elif is_dataclass(rule):
        return build(rule, value, name)  # type: ignore[arg-type]
    elif rule is Any or (kind is None and type(value) is rule):  # True is no number
        return value
    elif rule is float and type(value) is int:
        return float(value)
    raise ValueError(f"{name} is {_words(rule)}; got {one_line(repr(value), 60)}")


def _words(rule: Any) -> str:
    kind, parts = get_origin(rule), get_args(rule)
    if kind is tuple:
        return "a list" if parts[-1] is ... else f"a list of {len(parts)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words.get(rule, "an object in braces")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{one_line(repr(key), 60)} is there twice")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"numbers are finite; got {one_line(text, 60)}")
    return value


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"whole numbers have at most {MOST_DIGITS} digits; got {one_line(text, 60)}")
    return int(text)


def parse_array(content: bytes) -> NDArray[Any]:
    """The array of an .npy file, whose header must say what the file is long enough for; nothing is unpickled.

    Raises:
        ValueError: no .npy file, of objects, or of another length.
    """
    file = BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[version](file, max_header_size=MOST_HEADER)
    except Exception as error:  # whatever NumPy's reader of Python literals stumbles over
        raise ValueError(f"it has no header of an .npy file: {one_line(error)}") from error
    if dtype.hasobject or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"it holds {dtype} {shape}")
    size, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if size != there:
        raise ValueError(f"its header says {size:,} bytes of values, {there:,} follow")
    values = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    return values.reshape(shape, order="F" if by_columns else "C").copy()


# Which fields of ONNX's messages lead to a tensor, by number (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto)
_LEAD = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},  # external_data: keys and values
    "entry": {},
}
_KEY, _VALUE, _LOCATION = 1, 2, b"location"
_SMALL = 4096  # bytes of a message in which to look for that word is quicker than to go through its fields
_DEEPEST = 64  # messages in messages: graphs in the branches of graphs take four each


def external_files(path: Path) -> set[str]:
    """The files beside an ONNX graph that it takes weights from, as it names them. Weights aren't read.

    Raises:
        ValueError: no ONNX graph.
    """
    try:
        if not path.stat().st_size:  # which can't be mapped
            raise ValueError("it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return set(_locations(content))
    except OSError as error:
        raise ValueError(f"it can't be read: {error.strerror or error}") from error


def _locations(content: mmap.mmap) -> Iterator[str]:
    messages = [("model", 0, len(content), 0)]
    while messages:
        kind, start, end, depth = messages.pop()
        if depth > _DEEPEST:
            raise ValueError("its graphs are nested too deeply")
        entry = {}
        for number, first, last in _fields(content, start, end):
            if kind == "entry":
                entry[number] = content[first:last]
            elif (lead := _LEAD[kind].get(number)) and (
                last - first > _SMALL or content.find(_LOCATION, first, last) >= 0
            ):
                messages.append((lead, first, last, depth + 1))
        if entry.get(_KEY) == _LOCATION:
            yield entry.get(_VALUE, b"").decode()


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and last byte of the fields with a length in one message
    (https://protobuf.dev/programming-guides/encoding)."""
    while start < end:
        tag, start = _varint(content, start, end)
        if tag & 7 == 0:
            _, start = _varint(content, start, end)
        elif tag & 7 == 2:
            size, start = _varint(content, start, end)
            if size <= end - start:
                yield tag >> 3, start, start + size
            start += size
        else:
            start += {1: 8, 5: 4}.get(tag & 7, end)  # a group, which ONNX has none of, ends beyond the end
        if start > end:
            raise ValueError("it is no ONNX graph, or cut short")


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    if start < end and content[start] < 128:  # nearly always
        return content[start], start + 1
    value = 0
    for place in range(start, min(end, start + 10)):
        byte = content[place]
        value |= (byte & 127) << 7 * (place - start)
        if byte < 128:
            return value, place + 1
    raise ValueError("it is no ONNX graph, or cut short")


def one_line(text: object, most: int = 200) -> str:
    """A text or an exception's message on one line without control characters, at most so many characters of it."""
    words = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", str(text)[: 4 * most]).split())
    words = words or type(text).__name__
    return words if len(words) <= most else f"{words[: most - 1]}…"
