"""What to inspect: files, folders and globs to image paths."""

from __future__ import annotations

import glob
from pathlib import Path

from fbclip.errors import UsageError
from fbclip.reading import SUFFIXES
from fbclip.runtime.addresses import shown


def list_images(sources: list[str]) -> list[Path]:
    """Files, folders (recursively, by suffix) and globs to image paths, sorted within each source.

    No source: the sample images that ship with the package.

    Raises:
        UsageError: a source that is none of these, or without an image.
    """
    if not sources:
        sources = [str(samples_folder())]
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            images = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            images = [path]
        else:
            images = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())  # noqa: PTH207
        if not images:
            kinds = ", ".join(sorted(s[1:] for s in SUFFIXES))
            raise UsageError(
                f"SOURCE is an image, a folder with images ({kinds}) or a glob; {shown(source)!r} matches none"
            )
        found += images
    return list(dict.fromkeys(found))


def samples_folder() -> Path:
    import fbclip

    return Path(fbclip.__file__).parent / "assets" / "samples"
