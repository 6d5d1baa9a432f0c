"""Errors a user can act on. The command line prints them as one line, without a traceback."""

from __future__ import annotations

from importlib.util import find_spec


class FBClipError(Exception):
    """The work failed for a stated reason; exit code 1.

    Args:
        message: one line: the rule, the value, the cure. It names no options of the command line.
        option: the parameter that it is about, as Python spells it, like "min_area".

    Attributes:
        flag: how the running command calls that parameter, like "--min-area"; the command line says it before the
            message. "" where it has none of that name.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, option: str = "") -> None:
        super().__init__(message)
        self.option, self.flag = option, ""


class UsageError(FBClipError, ValueError):
    """Wrong usage or unusable input: the message names the rule, the value and the cure; exit code 2."""

    exit_code = 2


class BundleError(UsageError):
    """A bundle that is missing, damaged, unsafe, or of another format."""


class CheckpointError(UsageError):
    """A checkpoint or CLIP weights that do not fit."""


class DeviceError(UsageError):
    """A device or precision that was asked for and is not there."""


class ImageError(UsageError):
    """An image that cannot be read."""


class SizeError(ImageError):
    """An image with more pixels than are taken."""


class Interrupted(FBClipError):
    """Asked to stop by a signal; exit code 128 and its number, as shells have it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class GraphError(FBClipError):
    """An exported graph that a runtime it is meant for would not take."""


class ParityError(FBClipError):
    """An exported graph that deviates from the trained model past its budget."""


def reason(error: BaseException) -> str:
    """An exception as one line: ours as it is, others with their type and their first line that has words."""
    if type(error).__module__ == "fbclip.errors":
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def require_package(module: str, extra: str, option: str = "") -> None:
    """Insist that an optional package is installed.

    Args:
        module: its name in Python.
        extra: of fbclip's, that brings it.
        option: the parameter that asked for it.

    Raises:
        UsageError: it is missing.
    """
    if find_spec(module) is None:
        raise UsageError(f"this needs a package that is not installed: pip install 'fbclip[{extra}]'", option=option)
