"""What the texts of options mean, and what commands need before they begin."""

from __future__ import annotations

import re
from pathlib import Path

from fbclip.errors import UsageError


def parse_threshold(text: str) -> float | None:
    """A threshold; None for auto."""
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise UsageError(
            f"a threshold is auto, or a probability between 0 and 1; got {text!r}", option="threshold"
        ) from error


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"feature layers are numbers with commas, like 1,6,12,18,24; got {text!r}", option="feature_layers"
        ) from error


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels."""
    return _sides(text, "a resolution is WIDTHxHEIGHT in pixels, like 1920x1080", "resolution")


def parse_frame_hw(resolution: str | None, frame_size: str | None) -> tuple[int, int] | None:
    """Height and width in pixels, from `--resolution`, or `--frame-size`, which older releases have, height first."""
    if resolution and frame_size:
        raise UsageError("--frame-size is the older form of --resolution: pass one of them")
    size_wh = parse_resolution(resolution)
    return (
        size_wh[::-1]
        if size_wh
        else _sides(frame_size, "a frame size is HEIGHTxWIDTH in pixels, like 1080x1920", "frame_size")
    )


def _sides(text: str | None, rule: str, option: str) -> tuple[int, int] | None:
    if text is None:
        return None
    if not (sides := re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", text)):
        raise UsageError(f"{rule}; got {text!r}", option=option)
    return int(sides[1]), int(sides[2])


def parse_names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def find_checkpoint(name: str, option: str) -> Path:
    """The file of a checkpoint, given by its name, by a run's folder, or as nano: the embedded model.

    Needs no torch, so that a wrong name is told at once.

    Args:
        option: the parameter that names it.

    Raises:
        UsageError: there is none.
    """
    from fbclip.assets import EMBEDDED, NANO

    if name in ("nano", EMBEDDED.stem):
        return NANO
    for path in (Path(name), Path(name, "checkpoint.safetensors")):
        if path.is_file():
            return path
    raise UsageError(
        f"no checkpoint at {name}: pass its file, a run's folder, or nano for the embedded model", option=option
    )


def need_train_extra() -> None:
    need(
        ("torch", "open_clip", "onnx", "onnxscript", "safetensors", "accelerate", "matplotlib"),
        "this command",
        ", which the runtime does without: pip install 'fbclip[train]' on the machine that exports",
    )


def need(packages: tuple[str, ...], who: str, cure: str) -> None:
    """Raise UsageError where one of these packages is missing."""
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise UsageError(f"{who} needs {', '.join(missing)}{cure}")
