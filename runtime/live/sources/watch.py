"""A folder that another program drops images into: each is taken once, when it is whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from fbclip.errors import FBClipError
from fbclip.folders import NO_PICTURES, walk
from fbclip.images import SUFFIXES
from fbclip.terminal import printable

POLL_S = 0.2  # between looks at the folder
SETTLED_S = 2.0  # a file last written before that was moved in, or was there: it is whole


@dataclass(frozen=True, order=True)
class _State:
    """What changes when a file is written: the oldest sorts first."""

    modified_ns: int
    size: int
    inode: int


def arrivals(
    folder: Path, closed: Event, tell: Callable[[str, str], None], give_up: float | None = None
) -> Iterator[Path]:
    """Images of a folder and those below it: those there, oldest first, then new ones as they come, until `closed`.

    A file is taken when its size and time are the same in two looks, or its time is SETTLED_S old (moved in). Written
    anew it is taken again. What is hidden, and names that end otherwise than an image's, are left alone until they are
    renamed; so is what can't be read, until it can. Links to folders are followed once.

    Args:
        tell: told (state, message) when the folder goes and when it comes back, and once of what is left alone though
            it was there for SETTLED_S: links that lead nowhere, folders that can't be listed, other suffixes.
        give_up: seconds without the folder.

    Raises:
        FBClipError: it was gone for `give_up` seconds.
    """
    taken: dict[Path, _State] = {}
    seen: dict[Path, _State] = {}
    told: set[str] = set()
    gone_since = None
    tell("live", f"waiting for images in {folder}")
    while not closed.is_set():
        began = time.monotonic()
        before = seen
        try:
            seen, alone = _look(folder)
        except OSError as error:
            if gone_since is None:
                gone_since = began
                tell("lost", f"the folder can't be read ({error.strerror or error}); waiting for it")
            if give_up is not None and began - gone_since >= give_up:
                raise FBClipError(f"{folder} was gone for {give_up:g} s", option="give_up") from error
        else:
            if gone_since is not None:
                tell("live", f"the folder is back after {began - gone_since:.1f} s")
                gone_since = None
            taken = {path: state for path, state in taken.items() if path in seen}
            settled_ns = time.time_ns() - int(SETTLED_S * 1e9)
            for message, since_ns in sorted(alone.items()):
                if message not in told and since_ns < settled_ns:
                    told.add(message)
                    tell("live", message)
            for path, state in sorted(seen.items(), key=lambda item: (item[1], item[0])):
                if taken.get(path) != state and (before.get(path) == state or state.modified_ns < settled_ns):
                    taken[path] = state
                    yield path
                    if closed.is_set():
                        return
        closed.wait(max(POLL_S, 4 * (time.monotonic() - began)))  # a folder of a million files may take a core's fifth


def _look(folder: Path) -> tuple[dict[Path, _State], dict[str, int]]:
    """Image files below a folder that hold something; and messages on what is left alone, with the time that it is from.

    Raises:
        OSError: the folder itself can't be listed.
    """
    images: dict[Path, _State] = {}
    alone: dict[str, int] = {}
    for entry, is_file in walk(folder):
        suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
        with suppress(OSError):  # gone since it was listed, not for us, or its disk doesn't answer: perhaps next time
            status = entry.stat(follow_symlinks=is_file)
            state = _State(status.st_mtime_ns, status.st_size, status.st_ino)
            if is_file and suffix in SUFFIXES:
                if status.st_size:
                    images[Path(entry.path)] = state
            elif is_file and suffix not in NO_PICTURES:
                message = f"left alone: files with the suffix {printable(suffix) or 'none'}"
                alone[message] = min(state.modified_ns, alone.get(message, state.modified_ns))
            elif not is_file:
                alone[f"left alone: {printable(entry.path)}, which can't be read"] = state.modified_ns
    return images, alone
