"""Values as people write them in options and files: sizes, lists of numbers, thresholds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fbclip.errors import UsageError


def parse_size_hw(text: str, option: str = "frame_size") -> tuple[int, int]:
    """ "1080x1920" to height and width in pixels, (1080, 1920).

    Args:
        option: the parameter that an error is about.

    Raises:
        UsageError: no such size.
    """
    return _sides(text, "HEIGHTxWIDTH in pixels, like 1080x1920", option)


def parse_size_wh(text: str, option: str = "resolution") -> tuple[int, int]:
    """ "1280x720" to width and height in pixels, (1280, 720).

    Args:
        option: the parameter that an error is about.

    Raises:
        UsageError: no such size.
    """
    return _sides(text, "WIDTHxHEIGHT in pixels, like 1280x720", option)


def _sides(text: str, words: str, option: str) -> tuple[int, int]:
    if not (sides := re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", text)):
        raise UsageError(f"a size is {words}; got {text!r}", option=option)
    return int(sides[1]), int(sides[2])


def parse_numbers(text: str, option: str, examples: Sequence[int] = (1, 6, 12, 18, 24)) -> tuple[int, ...]:
    """ "1,6,12" to whole numbers from 1, such as feature layers or batches.

    Args:
        option: the parameter that an error is about.
        examples: for the error.

    Raises:
        UsageError: anything else.
    """
    if not re.fullmatch(r"\s*[1-9]\d{0,8}(\s*,\s*[1-9]\d{0,8})*\s*", text, re.ASCII):
        shown = ",".join(map(str, examples))
        raise UsageError(f"these are whole numbers from 1 with commas, like {shown}; got {text!r}", option=option)
    return tuple(int(part) for part in text.split(","))


def parse_names(text: str) -> tuple[str, ...]:
    """ "bottle, cable" to its names."""
    return tuple(part.strip() for part in text.split(","))


def parse_threshold(text: str) -> float | None:
    """A number, or None for "auto"; `fbclip.runtime.calibration.checked_threshold` says whether it is a probability.

    Raises:
        UsageError: neither.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise UsageError(
            f"a threshold is auto or a probability between 0 and 1; got {text!r}", option="threshold"
        ) from error
