"""One connection to a camera or stream: how each kind is opened, and what it means when it gives no frame."""

from __future__ import annotations

import http.client
import os
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.errors import UsageError
from fbclip.runtime.machine import GSTREAMER, Machine
from fbclip.runtime.probes import opencv, reason

FAULTS = ("missing", "refused", "cut", "stalled", "garbage")
CONNECT_S = 1.0  # for TCP: a camera behind a cable that comes back must be seen within 2 s, SYN retries double
PART_LIMIT = 1 << 25  # bytes of a picture in a stream
USB2_BYTES = 40e6  # per second, what USB 2 carries of raw video
PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}


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
        there, frame_bgr = self._capture.retrieve()
        if not there or frame_bgr is None:
            raise Fault("garbage", "a frame that can't be decoded")
        return _to_rgb(frame_bgr)

    def close(self) -> None:
        self._capture.release()


class MjpegStream:
    """JPEG pictures, one after the other, in one HTTP response (multipart/x-mixed-replace).

    Not FFmpeg's: it would paint what is missing of a damaged picture, which looks like a defect, and scale every
    picture to the size of the first.

    Args:
        response: open, its headers read.
        boundary: what separates the parts, as the Content-Type has it.
        patience: seconds that a picture may take.
    """

    def __init__(self, response: http.client.HTTPResponse, boundary: str, patience: float) -> None:
        self._response = response
        self._boundary = b"--" + boundary.lstrip("-").encode()  # some servers count the dashes in, some don't
        self._patience = patience
        self._received = bytearray()
        self._part = b""

    def grab(self) -> None:
        deadline = time.monotonic() + self._patience
        while not self._take():
            if len(self._received) > PART_LIMIT:
                raise Fault("cut", f"{PART_LIMIT >> 20} MiB without the end of a picture")
            try:
                received = self._response.read1(1 << 16)
            except TimeoutError as error:
                raise Fault("stalled", "nothing arrives") from error
            except (OSError, http.client.HTTPException) as error:
                raise Fault("cut", f"the connection broke ({reason(error)})") from error
            if not received:
                raise Fault("cut", "the server ended the stream")
            if time.monotonic() > deadline:
                raise Fault("stalled", "what arrives never makes a picture")
            self._received += received

    def _take(self) -> bool:
        """Move the first whole part out of what was received: it ends where its length says, or at the next boundary."""
        received, boundary = self._received, self._boundary
        start = received.find(boundary)
        if start > len(b"\r\n--") and self._part:  # a picture or two of which even the boundary is damaged
            self._part = bytes(received[:start])
            del received[:start]
            return True
        if start < 0:
            return False
        following = received.find(boundary, start + len(boundary))
        body = received.find(b"\r\n\r\n", start, following if following > 0 else len(received)) + 4
        if body < 4:
            body, length = start, None
        else:
            length = re.search(rb"content-length:\s*(\d{1,9})\r", received[start:body], re.IGNORECASE)
        end = body + int(length[1]) if length else -1
        if end > len(received) or end < 0 or 0 < following < end:
            end = following
        if end < 0:
            return False
        self._part = bytes(received[body:end])
        del received[:end]
        return True

    def retrieve(self) -> NDArray[np.uint8]:
        try:
            frame_bgr = cv2.imdecode(
                np.frombuffer(self._part, np.uint8), cv2.IMREAD_COLOR
            )  # Pillow takes four times as long
        except cv2.error:
            frame_bgr = None
        if frame_bgr is None:
            raise Fault("garbage", f"a picture that can't be decoded ({len(self._part)} bytes)")
        return _to_rgb(frame_bgr)

    def close(self) -> None:
        self._response.close()


def _to_rgb(frame_bgr: cv2.typing.MatLike) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB), np.uint8)


def prepare_opencv() -> None:
    """Settings of OpenCV that hold for the process; the environment's own come first."""
    # fpsprobesize: FFmpeg waits for 20 frames to guess their rate, 4 s of a camera with 5 frames per second
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp|fpsprobesize;0")
    # it would write a line at each try, for months; so would OpenCV, which 4.8 (JetPack's) has no way to stop
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if hasattr(cv2, "setLogLevel"):
        cv2.setLogLevel(2)  # errors


def connect_camera(
    device: Path, resolution: tuple[int, int] | None, fps: float | None, machine: Machine | None = None
) -> VideoDevice:
    """Open a V4L2 device (USB cameras), asking it for a resolution (width, height) and rate; it may choose others.

    Raises:
        Fault: "missing" with those that are there, or "refused".
    """
    if not device.exists():
        cameras = [f"{path} ({label})" for path, label in (machine or Machine()).cameras().items()]
        here = f"here are {', '.join(cameras)}" if cameras else "no camera is here, no /dev/video*"
        raise Fault("missing", f"there is no {device}; {here}")
    if not os.access(device, os.R_OK | os.W_OK):
        raise Fault("refused", f"permission denied for {device}: sudo usermod -aG video $USER, then log in again")
    capture = cv2.VideoCapture(str(device), cv2.CAP_V4L2)
    if not capture.isOpened():
        capture.release()
        raise Fault("refused", f"{device} can't be opened: another program has it, or it is no camera")
    if resolution:
        width, height = resolution
        if 2 * width * height * (fps or 30) > USB2_BYTES:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, width)
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, height)
    if fps:
        capture.set(cv2.CAP_PROP_FPS, fps)
    return VideoDevice(capture)


def csi_pipeline(sensor: int, resolution: tuple[int, int] | None, fps: float | None) -> str:
    """GStreamer's pipeline from a Jetson's CSI camera to BGR frames, the newest only."""
    wanted = "video/x-raw(memory:NVMM), format=NV12"
    if resolution:
        wanted += ", width={}, height={}".format(*resolution)
    if fps:
        rate = Fraction(fps).limit_denominator(1001)
        wanted += f", framerate={rate.numerator}/{rate.denominator}"
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! {wanted} ! nvvidconv ! video/x-raw, format=BGRx"
        " ! videoconvert ! video/x-raw, format=BGR ! appsink drop=true max-buffers=1 sync=false"
    )


def require_gstreamer(text: str) -> None:
    """UsageError where this OpenCV has no GStreamer, which CSI cameras need."""
    if "GSTREAMER" not in opencv()["backends"]:
        raise UsageError(
            f"{text} needs an OpenCV with GStreamer; OpenCV {cv2.__version__} from {Path(cv2.__file__).parent} "
            f"has none. On a Jetson: {GSTREAMER}"
        )


def connect_csi(sensor: int, resolution: tuple[int, int] | None, fps: float | None) -> VideoDevice:
    """Open a Jetson's CSI camera. Fault: "refused"."""
    capture = cv2.VideoCapture(csi_pipeline(sensor, resolution, fps), cv2.CAP_GSTREAMER)
    if not capture.isOpened():
        capture.release()
        cure = "check the cable and the sensor's mode (v4l2-ctl --list-devices), then sudo systemctl restart nvargus-daemon"
        raise Fault("refused", f"CSI camera {sensor} does not open: {cure}")
    return VideoDevice(capture)


def connect_stream(url: str, patience: float) -> Device:
    """Open an RTSP or HTTP stream; `patience` is the seconds that a frame may take. Fault: "refused"."""
    parts = urlsplit(url)
    if parts.scheme.startswith("http"):
        stream = _open_mjpeg(url, patience)
        if stream:
            return stream
    else:
        try:
            socket.create_connection((parts.hostname, parts.port or PORTS[parts.scheme]), CONNECT_S).close()
        except OSError as error:
            raise Fault("refused", f"no connection ({reason(error)})") from error
    return open_ffmpeg(url, patience)


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


def _open_mjpeg(url: str, patience: float) -> MjpegStream | None:
    """The pictures that an HTTP server sends; None where it sends another kind of video."""
    bare, user, password = _credentials(url)
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, bare, user, password)
    opener = urllib.request.build_opener(
        urllib.request.HTTPBasicAuthHandler(passwords),
        urllib.request.HTTPDigestAuthHandler(passwords),
        _HttpHandler(),
        _HttpsHandler(),
    )
    try:
        response = opener.open(bare, timeout=patience)
    except HTTPError as error:
        error.close()
        raise Fault("refused", f"the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: an answer to 401 that is no Digest
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        raise Fault("refused", f"no connection ({reason(cause)})") from error
    kind, boundary = response.headers.get_content_type(), response.headers.get_boundary()
    if kind == "multipart/x-mixed-replace" and boundary:
        return MjpegStream(response, boundary, patience)
    response.close()
    if kind.startswith(("text/", "image/", "multipart/")):
        raise Fault("refused", f"the server sends {kind}, which is no stream: ask it for MJPEG")
    return None


class _Impatient:
    """Before an HTTP(S) connection of http.client: CONNECT_S to connect, its own timeout for what comes over it."""

    timeout: float | None
    sock: Any

    def connect(self) -> None:
        patience, self.timeout = self.timeout, CONNECT_S
        super().connect()  # type: ignore[misc]
        self.sock.settimeout(patience)


class _Http(_Impatient, http.client.HTTPConnection):
    pass


class _Https(_Impatient, http.client.HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, request)


def _credentials(url: str) -> tuple[str, str, str]:
    """A URL without its user and password, and these."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host)), unquote(parts.username or ""), unquote(parts.password or "")


def check_url(url: str) -> str:
    """The URL; UsageError where it is none of a stream."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:  # its text may hold half a password
        form = "rtsp://USER:PASSWORD@HOST:PORT/PATH"
        raise UsageError(
            f"a stream's address is {form}, with / and : of a password as %2F and %3A; this one is not"
        ) from error
    if parts.scheme not in PORTS or not parts.hostname:
        raise UsageError(f"a stream is rtsp://HOST/PATH or http://HOST/PATH; got {public_name(url)}")
    return url


def public_name(url: str) -> str:
    """A URL as results and logs may show it: without user, password and query."""
    bare = urlsplit(_credentials(url)[0])
    return urlunsplit(bare._replace(query="", fragment=""))
