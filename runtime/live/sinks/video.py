"""Overlays as a Motion JPEG file."""

from __future__ import annotations

import errno
import shutil
from itertools import count
from pathlib import Path

import cv2

from fbclip.errors import UsageError
from fbclip.files import require_file
from fbclip.images import to_bgr
from fbclip.runtime.live.records import Notice, Record

PART_BYTES = 1_000_000_000  # of a video file; AVI counts in 32 bits


RESERVE_BYTES = 200_000_000  # of the disk that a video leaves to everything else


class Video:
    """Overlays as Motion JPEG, one frame per record.

    Of the containers that OpenCV writes, only this one can be played up to the last 32 KB after the process was killed
    (an .mp4 not at all), and it needs no FFmpeg. A file that is there stays: NAME-2.avi, NAME-3.avi, … follow, as they
    do after 1 GB, after another frame size and after a fault.

    Args:
        path: ends in .avi.
        fps: that the file claims; results come at a rate of their own.
    """

    name = "video"

    def __init__(self, path: Path, fps: float) -> None:
        if path.suffix.lower() != ".avi":
            raise UsageError(
                f"a video is Motion JPEG in .avi, which stays playable when the process is killed; got {path}: pass {path.stem}.avi"
            )
        try:
            str(path).encode()
        except UnicodeEncodeError as error:  # it would crash
            raise UsageError(f"OpenCV writes no video to a name that is no UTF-8; got {path}") from error
        if not 0 < fps < 1000:
            raise UsageError(f"a video has more than 0 and less than 1000 frames per second; got {fps}")
        require_file(path, room=False)
        self.path, self._fps = path, fps
        self._writer: cv2.VideoWriter | None = None
        self._part, self._size = path, (0, 0)

    def write(self, record: Record) -> None:
        picture = to_bgr(record.draw())
        size = (picture.shape[1], picture.shape[0])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            # OpenCV doesn't say when a disk is full
            if shutil.disk_usage(self.path.parent).free < RESERVE_BYTES:
                raise OSError(errno.ENOSPC, f"less than {RESERVE_BYTES // 10**6} MB left, no video", str(self.path))
            if self._writer and not (size == self._size and self._goes_on()):
                self.close()
            writer = self._writer or self._begin(size)
        except OSError:
            self.close()
            raise
        writer.write(picture)

    def notify(self, notice: Notice) -> None:
        pass

    def close(self) -> None:
        if self._writer:
            self._writer.release()
            self._writer = None

    def _goes_on(self) -> bool:
        """Whether the file is still there, and not full."""
        return self._part.is_file() and self._part.stat().st_size <= PART_BYTES

    def _begin(self, size: tuple[int, int]) -> cv2.VideoWriter:
        names = (self.path if n == 1 else self.path.with_stem(f"{self.path.stem}-{n}") for n in count(1))
        part = next(name for name in names if not name.exists())
        writer = cv2.VideoWriter(
            str(part), cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter.fourcc(*"MJPG"), self._fps, size, True
        )
        if not writer.isOpened():
            raise OSError(errno.EIO, "OpenCV can't write a video", str(part))
        writer.set(cv2.VIDEOWRITER_PROP_QUALITY, 80)
        self._writer, self._part, self._size = writer, part, size
        return writer
