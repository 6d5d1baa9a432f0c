"""Writing, in one way: a file or folder takes its name when it is whole, and what a killed process left is swept up.

Temporary names are `.fbclip-XXXXXXXXXXXXXXXX.tmp` beside the target, short whatever the target is called (255 bytes are
the most that a name may have), and locked while their writer lives: what has such a name and no lock was left behind.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import secrets
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
# The place is wrong, and another will do; any other error is a failure.
WRONG_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
LEAST = 4096  # bytes, a block of most disks: one with less is full, though it may take an empty file
NEW_S = 2.0  # seconds in which a writer may not yet have locked what it made
_swept: set[Path] = set()
_unfinished: set[Path] = set()


def write_error(error: OSError, path: Path | str) -> FBClipError:
    """What to raise, in one line, for a failed attempt to write to `path`: a full disk is a failure (exit code 1), a
    place that can't be written to is wrong usage (2)."""
    # libraries that write past Python only say that it failed
    if error.errno in FULL or (error.errno is None and _is_full(Path(path))):
        return FBClipError(f"the disk is full: can't write {path}; free some space, or choose another disk")
    message = f"can't write {path}: {error.strerror or error}"
    if error.errno == errno.EFBIG:
        return FBClipError(f"{message}: this disk or account takes no larger files; choose another disk")
    return UsageError(f"{message}; choose another place") if error.errno in WRONG_PLACE else FBClipError(message)


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path`, in place of an older one, only when it is whole.

    It has no descriptor, so that what writes to it goes through Python and its errors have a reason. A link stays and
    what it leads to is replaced; a device or pipe is written to as it is.

    Args:
        durable: and only when it is on the disk, so that a power cut doesn't leave the name on an empty file; without
            it, for pictures by the thousand, that is up to the file system.

    Raises:
        FBClipError, UsageError: see `write_error`; nothing is left behind, and an older file stays.
    """
    with _telling(path):
        _refuse_folder(path)
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target.parent) as temporary:
            raw = io.FileIO(temporary, "x")
            with _held(temporary):
                with _Content(raw) as file:
                    yield file
                    file.flush()
                    if durable:
                        os.fsync(raw.fileno())
                temporary.replace(target)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill and to rename; swept up at the end, or later if this process is killed.

    Raises:
        FBClipError, UsageError: see `write_error`; also for what fails in the `with` for want of space.
    """
    with _telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path.parent) as folder, _telling(path):  # before room is made again: see `_is_full`
            folder.mkdir()
            with _held(folder):
                yield folder


def write_text(text: str, target: str | Path) -> None:
    """Write to a file, which takes its name when it is whole, or to standard output for "-"; always in UTF-8.

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


def require_writable(folder: Path, room: bool = True) -> None:
    """Make a folder, and a file in it and away again: said before the work, not after it.

    Args:
        room: whether a full disk is an error too; a camera's line goes on without its files until there is room.

    Raises:
        FBClipError, UsageError: see `write_error`.
    """
    with _telling(folder):
        _try(folder, room)


def require_file(target: str | Path | None, room: bool = True) -> None:
    """The same of a file to be written later; None and "-", standard output, always can.

    Raises:
        FBClipError, UsageError: see `write_error`.
    """
    if target is None or str(target) == "-":
        return
    path = Path(target)
    with _telling(path):
        _refuse_folder(path)
        if path.is_file() or not path.exists():
            _try(Path(os.path.realpath(path)).parent, room)


def new_run(project: Path, name: str, exist_ok: bool = False) -> Path:
    """`project/name`, or name2, name3, … where it is taken; made, and found to take files.

    Raises:
        FBClipError, UsageError: see `write_error`.
    """
    for number in range(1, 1_000_000):
        folder = project / (name if number == 1 else f"{name}{number}")
        try:
            folder.mkdir(parents=True, exist_ok=exist_ok)
        except FileExistsError as error:
            if os.path.lexists(folder):
                continue
            raise write_error(error, folder) from error  # something else is called like the project
        except OSError as error:
            raise write_error(error, folder) from error
        try:
            require_writable(folder)
        except FBClipError:
            with suppress(OSError):  # it holds something
                folder.rmdir()
            raise
        return folder
    raise UsageError(f"{project} is full of {name}: choose another name")


def remove_folder(path: Path) -> None:
    """Remove a folder so that nobody sees half of it.

    Raises:
        OSError: it can't be, or is gone.
    """
    with _temporary(path.parent) as temporary:
        path.rename(temporary)


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
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe of that name would hold it up
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            finally:
                os.close(handle)


def lock(handle: int, wait: bool = False) -> bool:
    """Hold a lock on an open file or folder until `unlock`, or until it is closed, also by a kill.

    Returns:
        Whether nobody else has it; True as well on disks that know no locks.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:  # some network disks
            pass
    return True


def unlock(handle: int) -> None:
    """Let others have it."""
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


def abandon() -> None:
    """Remove what is half written, for a process that ends without unwinding."""
    for temporary in list(_unfinished):
        _remove(temporary)


class _Content(io.BufferedWriter):
    """A file without a descriptor: given one, numpy and Pillow write past Python and lose the reason of a failure."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A free name in a folder, whose file or folder is removed at the end where it still is there."""
    sweep(folder)
    path = folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
    _unfinished.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _try(folder: Path, room: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(LEAST if room else 0))


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock on a file or folder, also while it is renamed."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        lock(handle)
        yield
    finally:
        os.close(handle)


def _is_full(path: Path) -> bool:
    with suppress(OSError):
        return shutil.disk_usage(next(place for place in (path, *path.parents, Path()) if place.exists())).free < LEAST
    return False


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
