"""Values as people write them in options and files: sizes, lists of numbers, thresholds."""

from __future__ import annotations

import re

from fbclip.addresses import shown
from fbclip.errors import UsageError


def parse_resolution(text: str) -> tuple[int, int]:
    """ "1280x720" to width and height in pixels.

    Raises:
        UsageError: no such size.
    """
    return _sides(text, "a resolution is WIDTHxHEIGHT in pixels, like 1920x1080", "resolution")


def parse_frame_size(text: str) -> tuple[int, int]:
    """ "1080x1920" to height and width in pixels.

    Raises:
        UsageError: no such size.
    """
    return _sides(text, "a frame size is HEIGHTxWIDTH in pixels, like 1080x1920", "frame_size")


def _sides(text: str, rule: str, option: str) -> tuple[int, int]:
    if not (sides := re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", text)):
        raise UsageError(f"{rule}; got {text!r}", option=option)
    return int(sides[1]), int(sides[2])


def parse_numbers(text: str, rule: str, option: str) -> tuple[int, ...]:
    """ "1,6,12" to whole numbers from 1, such as feature layers or batches.

    Args:
        rule: what they are, for the error.
        option: the parameter that it is about.

    Raises:
        UsageError: anything else.
    """
    if not re.fullmatch(r"\s*[1-9]\d{0,8}(\s*,\s*[1-9]\d{0,8})*\s*", text, re.ASCII):
        raise UsageError(f"{rule}; got {text!r}", option=option)
    return tuple(int(part) for part in text.split(","))


def parse_layers(text: str) -> tuple[int, ...]:
    """ "1,6,12" to the numbers of blocks, as `parse_numbers`."""
    return parse_numbers(text, "feature layers are numbers with commas, like 1,6,12,18,24", "feature_layers")


def parse_place(text: str, rule: str, option: str) -> tuple[str, int]:
    """ "0.0.0.0:9464" or "[::]:9464" to host and port; "9464" alone is a port of this machine for itself.

    Args:
        rule: what it is, for the error.
        option: the parameter that it is about.

    Raises:
        UsageError: anything else.
    """
    found = re.fullmatch(r"(?:(?:\[([0-9a-fA-F:.]+)\]|([^\s:\[\]/@]+)):)?(\d{1,5})", text, re.ASCII)
    if not found or not 0 < int(found[3]) < 65536:
        raise UsageError(f"{rule}; got {shown(text)!r}", option=option)
    return found[1] or found[2] or "127.0.0.1", int(found[3])


def parse_names(text: str) -> tuple[str, ...]:
    """ "bottle, cable" to its names."""
    return tuple(part.strip() for part in text.split(","))


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" to whole numbers from 0.

    Raises:
        UsageError: anything else.
    """
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text, re.ASCII):
        raise UsageError(f"seeds are whole numbers from 0, like 0 or 0,1,2,3,4; got {text!r}", option="seed")
    return tuple(int(part) for part in text.split(","))


def parse_positions(text: str) -> int | None:
    """A number of patches, or None for "off"; `fbclip.runtime.adapt.Choice` says which there may be.

    Raises:
        UsageError: neither.
    """
    if text != "off" and not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise UsageError(f"positions are off, or a number of patches like 1; got {text!r}", option="positions")
    return None if text == "off" else int(text)


def parse_threshold(text: str) -> float | None:
    """A number, or None for "auto"; `fbclip.runtime.calibration.checked_threshold` says whether it is a probability.

    Raises:
        UsageError: neither.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise UsageError(
            f"a threshold is auto, or a probability between 0 and 1; got {text!r}", option="threshold"
        ) from error
