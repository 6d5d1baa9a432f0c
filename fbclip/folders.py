"""What lies in a folder, for images, data sets and watched folders alike, and when two names are the same."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from fbclip.addresses import shown
from fbclip.assets import SAMPLES
from fbclip.errors import UsageError
from fbclip.images import SUFFIXES
from fbclip.terminal import printable

MAX_DEPTH = 64  # folders within folders
OF_SYSTEMS = frozenset({"@eadir", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information"})
NO_PICTURES = frozenset(
    {".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".pdf", ".txt", ".xml", ".yaml", ".zip"}
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of what people put there: dot files, and what network drives and archives add."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def walk(folder: Path | str) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """Everything below a folder but the folders themselves, in no order.

    What is hidden is left out, with all that lies in it. Links to folders are followed, each folder once.

    Yields:
        An entry, and whether it is a file. It is none where a link leads nowhere or in a circle, where a folder can't
        be listed or lies deeper than `MAX_DEPTH`, and where it is a pipe or a device.

    Raises:
        OSError: the folder itself can't be listed.
    """
    folders: list[tuple[str | os.PathLike[str], os.DirEntry[str] | None, int]] = [(folder, None, 0)]
    links: list[tuple[str, os.DirEntry[str], int]] = []  # last, so that what is there by itself isn't found by a link
    seen: set[tuple[int, int]] = set()
    while folders or links:
        if not folders:
            links.sort(key=lambda link: link[0], reverse=True)
            folders.append(links.pop())
        place, found_as, depth = folders.pop()
        try:
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            if depth > MAX_DEPTH:
                raise OSError(f"deeper than {MAX_DEPTH} folders")
            with os.scandir(place) as listing:
                entries = list(listing)
        except OSError:
            if found_as is None:
                raise
            yield found_as, False
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append((entry.path, entry, depth + 1))
                else:
                    yield entry, entry.is_file()
            except OSError:  # a link in a circle, a share that went away
                yield entry, False


def images_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Image files below a folder by their suffix, sorted, and what looked like a folder or a file and is none.

    These last can't be read: whoever tries says so. Nothing that was named or linked to is left out in silence.

    Args:
        left_out: counts the suffixes of files that are no images by it; what is plainly no picture isn't counted.

    Raises:
        OSError: the folder itself can't be listed.
    """
    found = []
    for entry, is_file in walk(folder):
        suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
        lost = not is_file and (entry.is_symlink() or entry.is_dir(follow_symlinks=False))
        if suffix in SUFFIXES or lost:
            found.append(Path(entry.path))
        elif suffix not in NO_PICTURES:
            left_out[suffix] += 1
    return sorted(found)


def what_was_left_out(left_out: Counter[str]) -> str:
    """A line for a person; empty where nothing was."""
    if not left_out:
        return ""
    number = sum(left_out.values())
    suffixes = ", ".join(printable(suffix) or "none" for suffix in sorted(left_out))
    if number == 1:
        return f"1 file with another suffix than images have was left out: {suffixes}"
    return f"{number} files with other suffixes than images have were left out: {suffixes}"


def plain(name: str) -> str:
    """What names that people take for the same have in common: composed letters, lower case, no blanks around."""
    return unicodedata.normalize("NFC", name).strip().lower()


def locate(base: Path, text: str) -> Path:
    """The file that an index means by `text`, relative to `base` or absolute.

    If there is none of this very name: with the slashes of Windows turned, with letters composed or decomposed, or in
    other case, if that is unambiguous. Otherwise the path as it was written.
    """
    for form in dict.fromkeys((text, text.replace("\\", "/"))):
        for name in dict.fromkeys((form, unicodedata.normalize("NFC", form), unicodedata.normalize("NFD", form))):
            if os.path.lexists(path := base / name):
                return path
    path = base / text.replace("\\", "/")
    found = Path(path.anchor) if path.is_absolute() else Path()
    for part in path.relative_to(found).parts:
        if part != ".." and not os.path.lexists(found / part):
            alike = _by_plain_name(found).get(plain(part), [])
            if len(alike) != 1:
                return base / text
            part = alike[0]
        found /= part
    return found


def _by_plain_name(folder: Path) -> dict[str, list[str]]:
    try:
        return _listed(str(folder), folder.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=8)  # an index of many missing files would list one folder for each
def _listed(folder: str, changed_ns: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):  # noqa: PTH208
        names.setdefault(plain(name), []).append(name)
    return names


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
        sources = [str(SAMPLES)]
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
