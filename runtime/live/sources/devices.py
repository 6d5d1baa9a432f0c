"""One connection to a camera or stream: what it gives, and what it means when it gives no frame."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.runtime.live.sources.mjpeg import oversize

FAULTS = ("missing", "refused", "cut", "stalled", "garbage")


class Fault(Exception):
    """Why there is no frame: its cause, one of FAULTS, by which it is counted, and a line for a person."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Device(Protocol):
    """An open connection, used by one thread."""

    def grab(self) -> None:
        """Wait for the next frame. Fault: "cut" or "stalled"; the connection is of no more use."""

    def retrieve(self) -> NDArray[np.uint8]:
        """The grabbed frame, uint8 (H, W, 3) RGB. Fault: "garbage"; the next one may be better."""

    def close(self) -> None:
        """Release it."""


class VideoDevice:
    """Whatever OpenCV opens."""

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self._capture = capture

    def grab(self) -> None:
        if not self._capture.grab():
            raise Fault("cut", "it stopped giving frames")

    def retrieve(self) -> NDArray[np.uint8]:
        width, height = (self._capture.get(side) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if too_large := oversize(int(width), int(height)):
            raise Fault("garbage", too_large)
        there, frame_bgr = self._capture.retrieve()
        if not there or frame_bgr is None:
            raise Fault("garbage", "a frame that can't be decoded")
        return to_rgb(frame_bgr)

    def close(self) -> None:
        self._capture.release()


def to_rgb(frame_bgr: cv2.typing.MatLike) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB), np.uint8)


def prepare_opencv() -> None:
    """Settings of OpenCV that hold for the process; the environment's own come first."""
    # fpsprobesize: FFmpeg waits for 20 frames to guess their rate, 4 s of a camera with 5 frames per second
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp|fpsprobesize;0")
    # it would write a line at each try, for months; so would OpenCV, which 4.8 (JetPack's) has no way to stop
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if hasattr(cv2, "setLogLevel"):
        cv2.setLogLevel(2)  # errors


def open_ffmpeg(url: str, patience: float) -> VideoDevice:
    """Open what FFmpeg reads; its calls return after twice `patience`, and when they like if that is 0. Fault: "refused"."""
    wait_ms = int(2000 * patience)
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, wait_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, wait_ms]
    with _in_utf8(url) as name:
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG, timeouts)
    if not capture.isOpened():
        capture.release()
        raise Fault(
            "refused", "the server answers, but sends no video that FFmpeg knows: check path, user and password"
        )
    return VideoDevice(capture)


@contextmanager
def _in_utf8(path: str) -> Iterator[str]:
    """The same file under a name that OpenCV takes: one that is no UTF-8 would crash it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:  # noqa: PTH123
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield path
