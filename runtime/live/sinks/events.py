"""The frames around an alarm, kept: `--events DIR`.

One folder per event, `EVENT/event.json` and JPEG pictures, that takes its name when it is whole; the oldest are removed
where all together would pass the bound.
"""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.errors import UsageError
from fbclip.files import new_folder, remove_folder, require_writable, sweep
from fbclip.images import encode_image
from fbclip.runtime.live.records import HUGE, HUGE_SIDE, Notice, Record

BEFORE, AFTER = 10, 10  # frames kept around the one that raised an alarm
LONGEST = 60  # frames of one event, however many alarms follow each other
UNSAVED = 4  # events kept while the disk takes none: at most some 60 MB at 1920x1080
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LEAST = 10**6  # bytes of all events together that a recorder agrees to


@dataclass(frozen=True)
class _Shot:
    """A frame as it is kept: its JSON record and its picture."""

    record: dict[str, Any]
    jpeg: bytes = field(repr=False)


class _Event:
    """An event in the making."""

    def __init__(self, before: list[_Shot]) -> None:
        self.shots = before
        self.alarms: list[int] = []  # indices of the frames that raised one
        self.overlay = b""  # of the first of them
        self.missing = AFTER

    def add(self, shot: _Shot, record: Record) -> None:
        self.shots.append(shot)
        self.missing -= 1
        if record.alarm_began:
            self.alarms.append(record.frame.index)
            self.overlay = self.overlay or encode_image(record.draw())
            self.missing = AFTER

    @property
    def whole(self) -> bool:
        return self.missing <= 0 or len(self.shots) >= LONGEST


class EventRecorder:
    """A sink that saves the frames around each alarm: `BEFORE`, the one that raised it, and `AFTER`.

    An alarm raised while the frames after another are still collected joins its event. Frames wait in memory as JPEG.
    What the disk doesn't take is tried again with the next result; beyond `UNSAVED` events the oldest is given up.

    Args:
        folder: made if it isn't there, also when it is removed later; leftovers of a killed run are removed.
        max_bytes: of all events together.

    Raises:
        FBClipError, UsageError: the folder can't be written to, or the bound is below 1 MB.
    """

    name = "events"

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < LEAST:
            raise UsageError(f"events take at least 1MB; got {max_bytes} bytes", option="events_size")
        self.folder, self.max_bytes = folder, max_bytes
        self.saved = self.lost = 0
        self._ring: deque[_Shot] = deque(maxlen=BEFORE)
        self._event: _Event | None = None
        self._unsaved: deque[_Event] = deque()
        self._last: Record | None = None
        require_writable(folder, room=False)
        sweep(folder)

    def write(self, record: Record) -> None:
        if record is not self._last:  # the same one comes again after a failure
            self._last = record
            self._take(record)
        self._save_all()

    def notify(self, notice: Notice) -> None:
        """A camera that left will not show what comes after an alarm: what there is becomes the event."""
        if notice.kind == "source" and notice.state in ("lost", "ended"):
            self._finish()
            self._save_all()

    def close(self) -> None:
        self._finish()
        self._save_all()

    def _take(self, record: Record) -> None:
        shot = _Shot(record.to_dict(), encode_image(_bounded(record.frame.image)))
        if record.alarm_began and self._event is None:
            self._event = _Event(list(self._ring))
        if self._event is None:
            self._ring.append(shot)
            return
        self._event.add(shot, record)
        if self._event.whole:
            self._finish()

    def _finish(self) -> None:
        if self._event:
            self._ring.extend(self._event.shots)
            self._unsaved.append(self._event)
            self._event = None
            if len(self._unsaved) > UNSAVED:
                self._unsaved.popleft()
                self.lost += 1

    def _save_all(self) -> None:
        while self._unsaved:
            self._save(self._unsaved[0])
            self._unsaved.popleft()
            self.saved += 1

    def _save(self, event: _Event) -> None:
        shots = _nearest(event, self.max_bytes // 2)
        first = next(shot.record for shot in event.shots if shot.record["index"] == event.alarms[0])
        raised = datetime.fromtimestamp(first["time"], timezone.utc)
        name = f"{raised:%Y%m%dT%H%M%S.%f}-{first['index']:06d}"
        frames = [{"file": f"{shot.record['index']:06d}.jpg", **shot.record} for shot in shots]
        values = {"event": name, "time": first["time"], "alarms": event.alarms, "frames": frames}
        description = json.dumps(values, allow_nan=False)
        need = sum(len(shot.jpeg) for shot in shots) + len(event.overlay) + len(description.encode())
        with new_folder(self.folder / name) as part:
            self._make_room(need)
            for frame, shot in zip(frames, shots, strict=True):
                (part / str(frame["file"])).write_bytes(shot.jpeg)
            (part / "overlay.jpg").write_bytes(event.overlay)
            (part / "event.json").write_text(description, encoding="utf-8")
            part.rename(self.folder / name)

    def _make_room(self, need: int) -> None:
        """Remove the oldest events until the new one fits too."""
        sizes = {event: sum(file.stat().st_size for file in event.iterdir()) for event in event_folders(self.folder)}
        total = sum(sizes.values())
        for event, size in sizes.items():
            if total + need <= self.max_bytes:
                return
            remove_folder(event)
            total -= size


def _bounded(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame as it waits in memory: one of more than `HUGE` pixels is shrunk, as its overlay is."""
    height, width = image.shape[:2]
    if height * width <= HUGE:
        return image
    factor = HUGE_SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def event_folders(folder: Path) -> list[Path]:
    """The events in a folder, oldest first."""
    return sorted(path for path in folder.iterdir() if path.name[:1] != "." and (path / "event.json").is_file())


def parse_size(text: str) -> int:
    """`500MB`, `2GB`, … in bytes, powers of ten.

    Raises:
        UsageError: no such size.
    """
    units = "|".join(UNITS)
    if not (match := re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({units})\s*", text, re.IGNORECASE)):
        raise UsageError(
            f"a size is a number with {', '.join(UNITS)}, like 500MB or 2GB; got {text!r}", option="events_size"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def _nearest(event: _Event, max_bytes: int) -> list[_Shot]:
    """The frames nearest to the first alarm's that fit, in order; never none."""
    onset = next(i for i, shot in enumerate(event.shots) if shot.record["index"] == event.alarms[0])
    kept: list[int] = []
    total = 0
    for i in sorted(range(len(event.shots)), key=lambda i: abs(i - onset)):
        total += len(event.shots[i].jpeg)
        if kept and total > max_bytes:
            break
        kept.append(i)
    return [event.shots[i] for i in sorted(kept)]
