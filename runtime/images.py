"""What to inspect: files, folders and globs to image paths."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fbclip.errors import UsageError
from fbclip.folders import images_below, what_was_left_out
from fbclip.images import SUFFIXES
from fbclip.runtime.live.addresses import shown
from fbclip.terminal import printable


def list_images(sources: list[str], tell: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Files, folders (recursively, by suffix) and globs to image paths, sorted within each source.

    No source: the sample images that ship with the package. Hidden files and folders below a folder are left out;
    links to folders are followed once; links that lead nowhere and folders that can't be listed are in the list, so
    that they are reported by whoever reads them.

    Args:
        tell: told how many files of a folder were left out for their suffix.

    Raises:
        UsageError: a source that is none of these, or without an image.
    """
    if not sources:
        sources = [str(samples_folder())]
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for source in sources:
        if not source:
            raise UsageError("SOURCE is an image, a folder or a glob; got an empty one (for this folder say .)")
        path = Path(source)
        try:
            if path.is_dir():
                images = images_below(path, left_out)
            elif os.path.lexists(path):
                images = [path]
            else:
                images = _matches(source)
        except OSError as error:
            raise UsageError(f"{printable(source)} can't be listed: {error.strerror or error}") from error
        except RecursionError as error:
            raise UsageError(f"{printable(source)} goes too deep: name the folder instead of a glob") from error
        if not images:
            kinds = ", ".join(sorted(s[1:] for s in SUFFIXES))
            more = f"; {line}" if (line := what_was_left_out(left_out)) else ""
            raise UsageError(
                f"SOURCE is an image, a folder with images ({kinds}) or a glob; '{printable(shown(source))}' matches "
                f"none{more}"
            )
        found += images
    if line := what_was_left_out(left_out):
        tell(line)
    return list(dict.fromkeys(found))


def _matches(pattern: str) -> list[Path]:
    """Files that match a glob, each once, however many links lead to its folder."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(map(Path, glob.glob(pattern, recursive=True))):  # noqa: PTH207
        if not os.path.isdir(path):  # noqa: PTH112
            found.setdefault((os.path.realpath(path.parent), path.name), path)
    return list(found.values())


def samples_folder() -> Path:
    import fbclip

    return Path(fbclip.__file__).parent / "assets" / "samples"
