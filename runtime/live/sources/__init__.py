"""Where frames come from: `open_source("0", options)`, a stream, a video, a folder, as an iterator of `Frame`."""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from fbclip.addresses import shown
from fbclip.errors import ImageError, UsageError
from fbclip.folders import list_images
from fbclip.images import SUFFIXES, is_image, note_of_pages, read_image
from fbclip.runtime.live.records import Frame
from fbclip.runtime.live.sources import devices
from fbclip.runtime.live.sources.capture import CaptureOptions, LiveSource, Source
from fbclip.runtime.live.sources.devices import Device, Fault
from fbclip.runtime.live.sources.watch import arrivals

__all__ = ["CaptureOptions", "FileSource", "Source", "open_source"]

KINDS = "a camera (0, /dev/video0, csi://0), a stream (rtsp://, http://), a video, or images (file, folder, glob)"
MOTION_JPEG = frozenset({".mjpeg", ".mjpg"})  # videos that begin as an image does
Retrieve = Callable[[], NDArray[np.uint8]]
Connect = Callable[[], Device]


class FileSource(Source):
    """Images and videos, one after the other, none dropped. What can't be read is reported and skipped.

    Args:
        paths: their files. Read lazily: it may go on for ever.
        notes: told before the first frame.

    Iterating raises UsageError at the end where nothing could be read.
    """

    def __init__(self, name: str, paths: Iterable[Path], options: CaptureOptions, notes: Iterable[str] = ()) -> None:
        super().__init__(name, options)
        self._paths = paths
        self._notes = notes
        self._frames = self._read()
        self._turn = Lock()  # whoever is in the generator has it

    def __next__(self) -> Frame:
        with self._turn:
            if self._closed.is_set():
                self._frames.close()
                raise StopIteration
            frame = next(self._frames)
            self._counters["frames"] += 1
            return frame

    def close(self) -> None:
        super().close()
        if self._turn.acquire(blocking=False):  # else another thread is in it, and ends it
            try:
                self._frames.close()
            finally:
                self._turn.release()

    def _read(self) -> Generator[Frame]:
        skipped = ""
        for note in self._notes:
            self._tell("live", note)
        pictures = (picture for path in self._paths for picture in _pictures(path, self._tell))
        for index, (name, retrieve) in enumerate(pictures):
            if self._closed.is_set():
                return
            if index % self.options.every:
                continue
            try:
                image = retrieve()
            except (ImageError, Fault) as error:
                skipped = f"{name}: {error}" if isinstance(error, Fault) else str(error)
                self._counters["garbage"] += 1
                self._tell("live", f"skipped {skipped}")
            else:
                yield Frame(image, name, index, time.monotonic(), time.time())
        if skipped and not self._counters["frames"] and not self._closed.is_set():
            raise UsageError(f"nothing of {self.name} could be read: {skipped}")
        self._tell("ended", f"{self._counters['frames']} frames")


class WatchSource(FileSource):
    """Images that another program drops into a folder, each once, until it is closed; see `arrivals`."""

    def __init__(self, folder: Path, options: CaptureOptions) -> None:
        super().__init__(str(folder), (), options)
        self._paths = arrivals(folder, self._closed, self._tell, options.give_up)


def _pictures(path: Path, tell: Callable[[str, str], None]) -> Iterator[tuple[str, Retrieve]]:
    """Name of each picture in a file, one or a video's, and what reads it, raising ImageError or Fault."""
    if not os.path.isfile(path) or not is_video(path):  # noqa: PTH113 (never raises)
        yield str(path), partial(_first_page, path, tell)
        return
    try:
        video = devices.open_ffmpeg(str(path), patience=0)
    except Fault:
        yield str(path), partial(_refuse, path)
        return
    number = 0
    with closing(video), suppress(Fault):  # its end
        while True:
            video.grab()
            yield f"{path}#{number}", video.retrieve
            number += 1
    if not number:
        yield str(path), partial(_refuse, path)


def _first_page(path: Path, tell: Callable[[str, str], None]) -> NDArray[np.uint8]:
    image = read_image(path)
    if note := note_of_pages(path):
        tell("live", note)
    return image


def is_video(path: Path) -> bool:
    """Whether a file is tried as a video: it is no image, by its name or its content."""
    suffix = path.suffix.lower()
    return suffix in MOTION_JPEG or not (suffix in SUFFIXES or is_image(path))


def opens_as_video(path: Path) -> bool:
    """Whether a file is a video that FFmpeg can read."""
    devices.prepare_opencv()
    try:
        devices.open_ffmpeg(str(path), patience=0).close()
    except Fault:
        return False
    return True


def _refuse(path: Path) -> NDArray[np.uint8]:
    raise ImageError(f"{path} is neither an image that Pillow nor a video that FFmpeg can read")


def open_source(text: str, options: CaptureOptions | None = None) -> Source:
    """A camera, stream, video or images by what the command line calls them. Cameras and streams open at the first frame.

    Args:
        text: a camera's number or device file, `csi://N`, `rtsp://…`, `http://…`, a video, an image, a folder, a glob;
            with `options.watch` the folder to watch.
        options: how to read it.

    Raises:
        UsageError: none of these, what can't be asked of it, or a CSI camera without GStreamer in OpenCV. A camera that
            is not there is none: it may be plugged in later.
    """
    devices.prepare_opencv()
    options = options or CaptureOptions()
    if not options.watch and (camera := _camera(text, options)):
        return camera
    stream = "://" in text and not options.watch
    name = devices.stream_address(text).name if stream else text
    if options.resolution or options.fps:
        raise UsageError(f"--resolution and --fps are asked of cameras; {name} has its own: leave them out")
    if stream:
        return LiveSource(name, partial(devices.connect_stream, text, options.stall), options)
    if options.skip_first:
        raise UsageError(
            f"--skip-first is for cameras and streams, which are connected to; {name} is none: leave it out"
        )
    if options.watch:
        if not text or not os.path.isdir(text):  # noqa: PTH112 (never raises)
            raise UsageError(f"--watch takes the folder that images are dropped into; make {shown(text) or 'it'} first")
        return WatchSource(Path(text), options)
    if text and not os.path.lexists(text) and (not glob.has_magic(text) or shown(text) != text):
        raise UsageError(f"SOURCE is {KINDS}; there is no {shown(text)}")
    notes: list[str] = []
    return FileSource(text, list_images([text], notes.append), options, notes)


def _camera(text: str, options: CaptureOptions) -> LiveSource | None:
    if match := re.fullmatch(r"csi://(\d{1,2})", text):
        devices.require_gstreamer(text)
        connect: Connect = partial(devices.connect_csi, int(match[1]), options.resolution, options.fps)
        return LiveSource(text, connect, options)
    if re.fullmatch(r"\d{1,3}|/dev/(?!shm\b).+", text):  # what the system's rules call cameras may be any name there
        device = Path(text if text.startswith("/") else f"/dev/video{text}")
        return LiveSource(
            str(device), partial(devices.connect_camera, device, options.resolution, options.fps), options
        )
    return None
