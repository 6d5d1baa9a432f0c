"""Streams over the network: RTSP by FFmpeg, and HTTP, whose JPEG pictures are read here."""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import time
import urllib.request
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip import addresses
from fbclip.addresses import Address
from fbclip.errors import reason
from fbclip.images import decode_image
from fbclip.opening import is_whole
from fbclip.runtime.live.sources.devices import Device, Fault, open_ffmpeg, to_rgb
from fbclip.runtime.live.sources.mjpeg import MAX_PIXELS, Pictures, StreamPicture

CONNECT_S = 1.0  # for TCP: a camera behind a cable that comes back must be seen within 2 s, SYN retries double


PART_LIMIT = 1 << 25  # bytes of a picture in a stream


SNIFFED = 4096  # bytes of an answer that tell what it is


# An answer that holds JPEG pictures, whatever its type says: one begins, or the head of a part, or a head that names them.
PICTURES = re.compile(
    rb"[\t\r\n -~]*?(?:\xff\xd8\xff|^--[ -~]*\r?\n(?:content-|\r?\n?\xff\xd8)|^content-type[ \t]*:[ \t]*(?:multipart|image)/)",
    re.IGNORECASE | re.MULTILINE,
)


PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}


class Response(Protocol):
    """What a server sends, as HTTPResponse or a socket's file have it."""

    def read1(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


class MjpegStream:
    """JPEG pictures, one after the other, in what an HTTP server sends; see `mjpeg.Pictures`.

    Not FFmpeg's: it would paint what is missing of a damaged picture, which looks like a defect, and scale every
    picture to the size of the first.

    Args:
        response: open, its headers read.
        patience: seconds that a picture may take.
        begun: what was read of the body already.
    """

    def __init__(self, response: Response, patience: float, begun: bytes = b"") -> None:
        self._response = response
        self._patience = patience
        self._pictures = Pictures()
        self._pictures.feed(begun)
        self._picture = StreamPicture(b"")

    def grab(self) -> None:
        deadline = time.monotonic() + self._patience
        while not (picture := self._pictures.take()):
            if self._pictures.waiting > PART_LIMIT:
                raise Fault("cut", f"{PART_LIMIT >> 20} MiB without the end of a picture")
            received = _receive(self._response)
            if not received:
                raise Fault("cut", "the server ended the stream")
            if time.monotonic() > deadline:
                raise Fault("stalled", self._pictures.missing)
            self._pictures.feed(received)
        self._picture = picture

    def retrieve(self) -> NDArray[np.uint8]:
        data, fault = self._picture.data, self._picture.fault
        if fault:
            raise Fault("garbage", fault)
        if not self._picture.is_jpeg:
            try:
                return decode_image(data, MAX_PIXELS)
            except Exception as error:  # whatever a decoder makes of it
                raise Fault("garbage", f"a part that is no picture ({reason(error)})") from error
        try:
            frame_bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)  # Pillow takes four times as long
        except cv2.error:
            frame_bgr = None
        if frame_bgr is None:
            raise Fault("garbage", f"a picture that can't be decoded ({len(data)} bytes)")
        if not _is_whole(data):
            raise Fault("garbage", "a picture whose data end before its last pixel")
        return to_rgb(frame_bgr)

    def close(self) -> None:
        self._response.close()


def _receive(response: Response) -> bytes:
    """What arrives next, b"" at the end. Fault: "cut" or "stalled"."""
    try:
        return response.read1(1 << 16)
    except TimeoutError as error:
        raise Fault("stalled", "nothing arrives") from error
    except (OSError, http.client.HTTPException) as error:
        raise Fault("cut", f"the connection broke ({_cause(error)})") from error


def _cause(error: Exception) -> str:
    """What went wrong with a connection; of what is no fault of the system only its kind, for its text may hold the address."""
    return reason(error) if isinstance(error, OSError) else type(error).__name__


def _is_whole(jpeg: bytes) -> bool:
    try:
        return is_whole(jpeg)
    except Exception:  # Pillow refuses what OpenCV took
        return False


def stream_address(text: str) -> Address:
    """The parts of a stream's address; UsageError where it is none."""
    return addresses.parse(text, "a stream is rtsp://HOST/PATH or http://HOST/PATH", PORTS)


def connect_stream(url: str, patience: float) -> Device:
    """Open an RTSP or HTTP stream; `patience` is the seconds that a frame may take. Fault: "refused"."""
    address = stream_address(url)
    if address.scheme.startswith("http"):
        stream = _open_mjpeg(address, patience)
        if stream:
            return stream
    else:
        try:
            socket.create_connection((address.host, address.port), CONNECT_S).close()
        except OSError as error:
            raise Fault("refused", f"no connection ({_cause(error)})") from error
    return open_ffmpeg(url, patience)


def _open_mjpeg(address: Address, patience: float) -> MjpegStream | None:
    """The pictures that an HTTP server sends; None where it sends another kind of video."""
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, urljoin(address.bare, "/"), address.user, address.password)
    opener = urllib.request.build_opener(
        urllib.request.HTTPBasicAuthHandler(passwords),
        urllib.request.HTTPDigestAuthHandler(passwords),
        _HttpHandler(),
        _HttpsHandler(),
    )
    response: Response
    try:
        response = opened = opener.open(address.bare, timeout=patience)
    except HTTPError as error:
        error.close()
        raise Fault("refused", f"the server answers {addresses.status(error.code)}") from error
    except http.client.RemoteDisconnected as error:
        raise Fault("refused", "the server closes the connection without an answer") from error
    except http.client.HTTPException:  # another head than HTTP's, or none
        kind, response = "", _ask_plainly(address, patience)
    except ValueError as error:
        raise Fault("refused", "the server asks for a log-in that is neither Basic nor Digest") from error
    except OSError as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        raise Fault("refused", f"no connection ({_cause(cause)})") from error
    else:
        kind = opened.headers.get_content_type() if "Content-Type" in opened.headers else ""
        if kind.startswith("image/") and 0 < (opened.length or 0) < PART_LIMIT:
            response.close()
            raise Fault("refused", f"the server sends one picture ({kind}), which is no stream: ask it for MJPEG")
        opened.length = None  # of a stream it is wrong
    try:
        is_mjpeg, begun = kind.startswith("multipart/") or "jpeg" in kind, b""
        while not is_mjpeg and len(begun) < SNIFFED and (more := _receive(response)):
            begun += more
            if answer := re.match(rb"ICY ([45]\d\d)", begun):
                raise Fault("refused", f"the server answers {addresses.status(int(answer[1]))}")
            is_mjpeg = bool(PICTURES.match(begun))
    except Fault:
        response.close()
        raise
    if is_mjpeg:
        return MjpegStream(response, patience, begun)
    response.close()
    if kind.startswith(("text/", "image/")):
        raise Fault("refused", f"the server sends {kind}, which is no stream: ask it for MJPEG")
    return None


def _ask_plainly(address: Address, patience: float) -> Response:
    """The whole answer of a server that sends "ICY 200 OK" or nothing where HTTP has its status. Fault: "refused"."""
    target = address.bare.partition("://")[2].partition("/")[2]
    request = [f"GET /{target} HTTP/1.0", f"Host: {address.host}", "Connection: close"]
    if address.user:
        login = base64.b64encode(f"{address.user}:{address.password}".encode()).decode()
        request.append(f"Authorization: Basic {login}")
    try:
        connection = socket.create_connection((address.host, address.port), CONNECT_S)
        try:
            if address.scheme == "https":
                connection = ssl.create_default_context().wrap_socket(connection, server_hostname=address.host)
            connection.settimeout(patience)
            connection.sendall("\r\n".join([*request, "", ""]).encode())
            return connection.makefile("rb")
        finally:
            connection.close()  # once that is closed
    except OSError as error:
        raise Fault("refused", f"no connection ({_cause(error)})") from error


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
