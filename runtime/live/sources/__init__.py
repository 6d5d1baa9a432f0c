"""Where frames come from: `open_source("0")`, a stream, a video, a folder, a list of images, as an iterator of `Frame`."""

from __future__ import annotations

import glob
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from fbclip.runtime.live.sources import cameras, devices, streams
from fbclip.runtime.live.sources.capture import BaseSource, CaptureOptions, LiveSource
from fbclip.runtime.live.sources.devices import Device, Fault
from fbclip.runtime.live.sources.watch import arrivals

__all__ = ["BaseSource", "CaptureOptions", "FileSource", "WatchSource", "open_source"]

KINDS = "a camera (0, /dev/video0, csi://0), a stream (rtsp://, http://), a video, or images (file, folder, glob)"
MOTION_JPEG = frozenset({".mjpeg", ".mjpg"})  # videos that begin as an image does
Retrieve = Callable[[], NDArray[np.uint8]]
Connect = Callable[[], Device]


class FileSource(BaseSource):
    """Images and videos, one after the other, none dropped. What can't be read is reported and skipped.

    Args:
        paths: their files.
        notes: told before the first frame.

    Iterating raises UsageError at the end where nothing could be read.
    """

    def __init__(self, name: str, paths: Sequence[Path], options: CaptureOptions, notes: Iterable[str] = ()) -> None:
        super().__init__(name, options)
        self.paths = paths
        self.still = not any(is_video(path) for path in paths)
        self.total = len(range(0, len(paths), options.every)) if self.still else None
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
            self._notify("live", note)
        pictures = (picture for path in self._files() for picture in _pictures(path, self._notify))
        for index, (name, retrieve) in enumerate(pictures):
            if self._closed.is_set():
                return
            if index % self.options.every:
                continue
            start = time.perf_counter()
            try:
                image = retrieve()
            except (ImageError, Fault) as error:
                skipped = f"{name}: {error}" if isinstance(error, Fault) else str(error)
                self._counters["garbage"] += 1
                self._notify("live", f"skipped {skipped}")
            else:
                read_ms = (time.perf_counter() - start) * 1e3
                yield Frame(image, name, index, time.monotonic(), time.time(), read_ms)
        if skipped and not self._counters["frames"] and not self._closed.is_set():
            raise UsageError(f"nothing of {self.name} could be read: {skipped}")
        self._notify("ended", f"{self._counters['frames']} frames")

    def _files(self) -> Iterable[Path]:
        return self.paths


class WatchSource(FileSource):
    """Images that another program drops into a folder, each once, until it is closed; see `arrivals`."""

    def __init__(self, folder: Path, options: CaptureOptions) -> None:
        super().__init__(str(folder), (), options)
        self.still, self.total = False, None
        self._folder = folder

    def _files(self) -> Iterable[Path]:
        return arrivals(self._folder, self._closed, self._notify, self.options.give_up, self.options.settled_s)


def _pictures(path: Path, tell: Callable[[str, str], None]) -> Iterator[tuple[str, Retrieve]]:
    """Name of each picture in a file, one or a video's, and what reads it, raising ImageError or Fault."""
    if not is_video(path):
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
    if suffix in SUFFIXES or not os.path.isfile(path):  # noqa: PTH113 (never raises)
        return False
    return suffix in MOTION_JPEG or not is_image(path)


def _refuse(path: Path) -> NDArray[np.uint8]:
    raise ImageError(f"{path} is neither an image that Pillow nor a video that FFmpeg can read")


def open_source(text: str | int | Path | Sequence[str | Path], options: CaptureOptions | None = None) -> BaseSource:
    """A camera, stream, video or images by what the command line calls them. Cameras and streams open at the first frame.

    Args:
        text: a camera's number or device file, `csi://N`, `rtsp://…`, `http://…`, a video, an image, a folder, a glob;
            with `options.watch` the folder to watch. Or several files, folders and globs, one after the other.
        options: how to read it.

    Raises:
        UsageError: none of these, what can't be asked of it, or a CSI camera without GStreamer in OpenCV. A camera that
            is not there is none: it may be plugged in later.
    """
    devices.prepare_opencv()
    options = options or CaptureOptions()
    texts = [str(text)] if isinstance(text, str | int | Path) else list(map(str, text))
    if alone := [text for text in texts if options.watch or is_stream(text)]:
        if len(texts) > 1:
            raise UsageError(
                f"a camera, stream or watched folder is inspected alone; got {', '.join(map(shown, texts))}"
            )
        return _open_watched(alone[0], options) if options.watch else _open_stream(alone[0], options)
    if options.watch:
        raise UsageError("the folder to watch is missing: name it", option="watch")
    if not texts:
        raise UsageError("there is nothing to inspect: name images, a folder, a video or a camera", option="source")
    return _open_files(texts, options)


def is_stream(text: str) -> bool:
    """Whether a text names a camera or an address, and no files."""
    if "://" in text or text.startswith("/dev/") or re.fullmatch(r"\d{1,3}", text):
        return True
    return not os.path.lexists(text) and shown(text) != text  # an address without its //


def _open_files(texts: list[str], options: CaptureOptions) -> FileSource:
    name = shown(texts[0]) if len(texts) == 1 else f"{len(texts)} sources"
    _refuse_camera_options(name, options)
    for text in texts:
        if text and not os.path.lexists(text) and not glob.has_magic(text):
            raise UsageError(f"SOURCE is {KINDS}; there is no {shown(text)}")
    notes: list[str] = []
    return FileSource(name, list_images(texts, notes.append), options, notes)


def _open_watched(text: str, options: CaptureOptions) -> WatchSource:
    _refuse_camera_options(text, options)
    if not text or not os.path.isdir(text):  # noqa: PTH112 (never raises)
        raise UsageError(
            f"what is watched is the folder that images are dropped into; make {shown(text) or 'it'} first",
            option="watch",
        )
    return WatchSource(Path(text), options)


def _open_stream(text: str, options: CaptureOptions) -> LiveSource:
    if camera := _camera(text, options):
        return camera
    name = streams.stream_address(text).name
    if options.resolution or options.fps:
        asked = "resolution" if options.resolution else "fps"
        raise UsageError(f"a size and a rate are asked of cameras; {name} has its own: leave them out", option=asked)
    return LiveSource(name, partial(streams.connect_stream, text, options.stall), options)


def _refuse_camera_options(name: str, options: CaptureOptions) -> None:
    if options.resolution or options.fps:
        asked = "resolution" if options.resolution else "fps"
        raise UsageError(f"a size and a rate are asked of cameras; {name} has its own: leave them out", option=asked)
    if options.skip_first:
        raise UsageError(
            f"first frames are left out of cameras and streams, which are connected to; {name} is none: leave it out",
            option="skip_first",
        )


def _camera(text: str, options: CaptureOptions) -> LiveSource | None:
    if match := re.fullmatch(r"csi://(\d{1,2})", text):
        cameras.require_gstreamer(text)
        connect: Connect = partial(cameras.connect_csi, int(match[1]), options.resolution, options.fps)
        return LiveSource(text, connect, options)
    if text.isdecimal() and len(text) <= 3 and sys.platform != "linux":  # there cameras have numbers alone
        connect = partial(cameras.connect_numbered, int(text), options.resolution, options.fps)
        return LiveSource(text, connect, options)
    if re.fullmatch(r"\d{1,3}|/dev/(?!shm\b).+", text):  # what the system's rules call cameras may be any name there
        device = Path(text if text.startswith("/") else f"/dev/video{text}")
        return LiveSource(
            str(device), partial(cameras.connect_camera, device, options.resolution, options.fps), options
        )
    return None
