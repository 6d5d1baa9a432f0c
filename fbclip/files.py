"""Writing, in one way: a file or folder takes its name when it is whole, and what a killed process left is swept up.

Temporary names are `.fbclip-XXXXXXXX.tmp` beside the target, short whatever the target is called (255 bytes are the
most that a name may have), and locked while their writer lives: what has such a name and no lock was left behind.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fbclip.errors import FBClipError, UsageError

if sys.platform != "win32":
    import fcntl

PREFIX, SUFFIX = ".fbclip-", ".tmp"
FULL = (errno.ENOSPC, errno.EDQUOT)
NEW_S = 10.0  # seconds in which a writer may not yet have locked what it made
_swept: set[Path] = set()


def write_error(error: OSError, path: Path | str) -> FBClipError:
    """What to raise, in one line, for a failed attempt to write to `path`: a full disk is a failure (exit code 1), a
    place that can't be written to is wrong usage (2)."""
    if error.errno in FULL:
        return FBClipError(f"the disk is full: can't write {path}; free some space, or choose another disk")
    message = f"can't write {path}: {error.strerror or error}"
    if error.errno == errno.EIO:
        return FBClipError(message)
    return UsageError(f"{message}; choose another place")


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path`, in place of an older one, only when it is whole.

    Args:
        durable: and only when it is on the disk, so that a power cut doesn't leave the name on an empty file; without
            it, for pictures by the thousand, that is up to the file system.

    Raises:
        FBClipError, UsageError: see `write_error`; nothing is left behind, and an older file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=SUFFIX, dir=path.parent)
    except OSError as error:
        raise write_error(error, path) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _lock(handle)
            yield file
            file.flush()
            if durable:
                os.fsync(handle)
            temporary.chmod(0o644)
            temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, path) from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill and to rename; swept up at the end, or later if this process is killed.

    Raises:
        FBClipError, UsageError: see `write_error`; also for what fails in the `with` for want of space.
    """
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=path.parent))
        folder.chmod(0o755)
        handle = os.open(folder, os.O_RDONLY) if sys.platform != "win32" else None
        try:
            if handle is not None:
                _lock(handle)
            yield folder
        finally:
            if handle is not None:
                os.close(handle)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_text(text: str, target: str | Path) -> None:
    """Write to a file, which takes its name when it is whole, or to standard output for "-".

    Raises:
        FBClipError, UsageError: see `write_error`.
    """
    if str(target) == "-":
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise write_error(error, "standard output") from error
        return
    with replacing(Path(target)) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def require_writable(folder: Path) -> None:
    """Make a folder, and a file in it and away again: said before the work, not after it.

    Raises:
        FBClipError, UsageError: see `write_error`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise write_error(error, folder) from error


def new_run(project: Path, name: str, exist_ok: bool = False) -> Path:
    """`project/name`, or name2, name3, … where it is taken; made.

    Raises:
        FBClipError, UsageError: see `write_error`.
    """
    for number in range(1, 1_000_000):
        folder = project / (name if number == 1 else f"{name}{number}")
        try:
            folder.mkdir(parents=True, exist_ok=exist_ok)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise write_error(error, folder) from error
    raise UsageError(f"{project} is full of {name}: choose another name")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder: our temporary names that nobody holds a lock on. Once a process."""
    if sys.platform == "win32" or folder in _swept:
        return  # there an open file can't be removed anyway, and nothing says whether a folder is in use
    _swept.add(folder)
    for left in folder.glob(f"{PREFIX}*{SUFFIX}"):
        with suppress(OSError):  # gone meanwhile, another user's, or still locked
            if time.time() - left.lstat().st_mtime < NEW_S:
                continue
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                _lock(handle)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> None:
    """Hold a lock on an open file or folder until it is closed, also by a kill; OSError where another has it."""
    if sys.platform != "win32":
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_place(new: Path, path: Path) -> None:
    """Let a whole folder take the name `path`; what had it before is at `new` then, or gone.

    A kill at any moment leaves the old or the new folder at `path`, or the old one where `recover` finds it.

    Raises:
        OSError.
    """
    old = _aside(path)
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Give a folder its name back, if a kill came between two renames of `take_place`.

    Raises:
        OSError.
    """
    if not path.exists() and (old := _aside(path)).is_dir():
        old.rename(path)


def _aside(path: Path) -> Path:
    """Where a folder waits while another takes its name."""
    return path.with_name(f"{PREFIX}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change their names in one step (Linux's renameat2); False where that can't be done."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or a C library from before 2018
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(exchange)) == 0)
