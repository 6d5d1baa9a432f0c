"""Pictures and anomaly maps of results, a file for each."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fbclip.errors import UsageError
from fbclip.files import replacing
from fbclip.images import encode_image
from fbclip.runtime.live.records import Frame, Notice, Record

LONGEST_NAME = 255  # bytes, of a file
RESERVE_BYTES = 200_000_000  # of the disk that pictures of a source without end leave to everything else
QUALITY = 92  # of a JPEG that people look at closely


@dataclass(frozen=True)
class Saving:
    """Which results get files, and where.

    Attributes:
        folder: where they go; it is there.
        overlays: whether pictures are kept: of stills all, of other sources those of frames that vote for an alarm
            (defects, and what `Alarm` is asked to take for them) while it is on.
        maps: the same of anomaly maps, float32 .npy.
        map_size: "frame", or "model" for the map as the model gives it.
        tiles: whether the tiles are drawn.
    """

    folder: Path
    overlays: bool = True
    maps: bool = False
    map_size: str = "frame"
    tiles: bool = False


class Pictures:
    """A sink that keeps pictures and maps, by the names that `name_files` gave them.

    Args:
        saving: which, and where.
        stills: the files that are inspected, where each becomes one result; None for a source that goes on.

    Raises:
        UsageError: a picture or map would take the place of a file that is inspected.
    """

    name = "pictures"

    def __init__(self, saving: Saving, stills: Sequence[Path] | None = None) -> None:
        self._saving = saving
        self._names = None if stills is None else names_of(stills)
        if stills is not None:
            self._spare(stills)

    def name_files(self, frame: Frame, is_for_alarm: bool) -> tuple[str | None, str | None]:
        """The files of a frame's picture and map; None for those that aren't kept."""
        if self._names is None:
            if not is_for_alarm:
                return None, None
            name = f"{shortened(Path(frame.name).stem)}-{frame.index:06d}"
        else:
            name = self._names[frame.name]
        place = self._saving.folder / name
        overlay = f"{place}.jpg" if self._saving.overlays else None
        return overlay, f"{place}.npy" if self._saving.maps else None

    def write(self, record: Record) -> None:
        if record.map:
            self._leave_room()
            prediction = record.prediction
            with replacing(Path(record.map), durable=False) as file:
                np.save(file, prediction.anomaly_map if self._saving.map_size == "frame" else prediction.model_map)
        if record.overlay:
            self._leave_room()
            with replacing(Path(record.overlay), durable=False) as file:
                file.write(encode_image(record.draw(tiles=self._saving.tiles), quality=QUALITY))

    def notify(self, notice: Notice) -> None:
        """A picture has no place for notices."""

    def close(self) -> None:
        """Nothing stays open."""

    def _leave_room(self) -> None:
        """Raise OSError where a source without end would fill the disk."""
        if self._names is None and shutil.disk_usage(self._saving.folder).free < RESERVE_BYTES:
            message = f"less than {RESERVE_BYTES // 10**6} MB left, no pictures"
            raise OSError(errno.ENOSPC, message, str(self._saving.folder))

    def _spare(self, stills: Sequence[Path]) -> None:
        if self._names is None or not any(self._saving.folder.iterdir()):
            return
        inspected = {os.path.realpath(still) for still in stills}
        for name in self._names.values():
            for target in (self._saving.folder / f"{name}.jpg", self._saving.folder / f"{name}.npy"):
                if os.path.realpath(target) in inspected:
                    raise UsageError(
                        f"results would replace {target}, which is inspected: choose another folder", option="name"
                    )


def names_of(stills: Sequence[Path]) -> dict[str, str]:
    """A file name, without suffix, for each image's results; images of one name in different folders keep apart."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    used: Counter[str] = Counter()
    for still in stills:
        stem = name = shortened(still.stem)
        while name in taken:
            used[stem] += 1
            name = f"{stem}-{used[stem] + 1}"
        taken.add(name)
        names[str(still)] = name
    return names


def shortened(stem: str) -> str:
    """The stem itself where it leaves room for a number and a suffix, else its beginning and a hash of it."""
    if sys.platform == "win32":
        stem = re.sub(r'[<>:"/\\|?*]', "_", stem)  # of streams' addresses, which files can't be called there
    room = LONGEST_NAME - len("-1000000.npy")
    if len(os.fsencode(stem)) <= room:
        return stem
    digest = f"-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}"
    while len(os.fsencode(stem)) > room - len(digest):
        stem = stem[:-1]
    return stem + digest
