"""Secrets from files: where NAME is an environment variable that sets an option, NAME_FILE names a file with its value.

systemd's credentials (`FBCLIP_TOKEN_FILE=%d/token`) and secrets of Docker and Kubernetes are such files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MOST = 65536  # bytes of a value


@contextmanager
def values_from_files(names: Iterable[str]) -> Iterator[list[Path]]:
    """Inside, each variable NAME has the content of the file that NAME_FILE names; afterwards it is gone again, so that no
    other program inherits it.

    Yields:
        These files.

    Raises:
        UsageError: no such file, one that holds no text, or NAME and NAME_FILE are both set.
    """
    from fbclip.errors import UsageError

    found: dict[str, str] = {}
    files: list[Path] = []
    for name in dict.fromkeys(names):
        if (path := os.environ.get(f"{name}_FILE")) is None:
            continue
        if name in os.environ:
            raise UsageError(f"a value comes from one place; got {name} and {name}_FILE: leave one out")
        files.append(Path(path))
        found[name] = _read(f"{name}_FILE", files[-1])
    os.environ.update(found)
    try:
        yield files
    finally:
        for name in found:
            os.environ.pop(name, None)


def is_open(path: Path) -> bool:
    """Whether others than its owner and group can read a file; False where the system doesn't say."""
    try:
        return os.name != "nt" and bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def _read(name: str, path: Path) -> str:
    """What is in a file, without the line end behind it."""
    from fbclip.errors import UsageError

    try:
        with path.open("rb") as file:
            content = file.read(MOST + 1)
        text = content.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UsageError(f"{name} names a file with the value; {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} names a file with the value, in UTF-8; {path} is none") from error
    if not text or "\0" in text or len(content) > MOST:
        raise UsageError(f"{name} names a file with the value, of 1 to {MOST} bytes of text; {path} holds none")
    return text
