"""Streams for tests, and what happens to them: an MJPEG server, an RTSP server, and a proxy that cuts, stalls and garbles.

Everything runs in threads of the test's own process and needs nothing but the standard library and Pillow.
"""

from __future__ import annotations

import base64
import io
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

SIZE = (64, 48)


def jpeg(number: int, size: tuple[int, int] = SIZE) -> bytes:
    """A picture that tells its number by its colour: red is the number, blue the rest to 255. A stripe at the right has
    some green too: a picture of one colour shows nothing."""
    buffer = io.BytesIO()
    picture = Image.new("RGB", size, (number % 200, 0, 255 - number % 200))
    picture.paste((number % 200, 40, 255 - number % 200), (size[0] - size[0] // 8, 0, *size))
    picture.save(buffer, "JPEG", quality=90, subsampling=2)
    return buffer.getvalue()


class Camera:
    """What a server films; tests change `size` and `broken` while it does.

    Attributes:
        interval: seconds between pictures.
        broken: of each this many pictures one is cut short; 0 is none.
        password: that user "me" must give; "" asks for none.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.size = SIZE
        self.broken = 0
        self.password = ""
        self.stopped = threading.Event()

    def pictures(self) -> Iterator[bytes]:
        number = 0
        while not self.stopped.wait(self.interval):
            picture = jpeg(number, self.size)
            yield picture[: len(picture) // 2] if self.broken and number % self.broken == self.broken - 1 else picture
            number += 1


class _Mjpeg(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        camera: Camera = self.server.camera
        expected = "Basic " + base64.b64encode(f"me:{camera.password}".encode()).decode()
        if camera.password and self.headers["Authorization"] != expected:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="camera"')
            self.end_headers()
            return
        path = self.path.partition("?")[0]
        if path == "/nowhere":
            self.send_error(404)
            return
        if path == "/page":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with suppress(OSError):
            for picture in camera.pictures():
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                self.wfile.write(head.encode() + picture + b"\r\n")

    def log_message(self, *message: object) -> None:
        pass


class _Raw(socketserver.BaseRequestHandler):
    """Sends `head` and then each picture as `part` makes it, whatever HTTP says."""

    server: Any

    def handle(self) -> None:
        with suppress(OSError):
            self.request.recv(1 << 16)
            self.request.sendall(self.server.head)
            for picture in self.server.camera.pictures():
                self.request.sendall(self.server.part(picture))


class _Rtsp(socketserver.StreamRequestHandler):
    """Plays JPEG over RTP (RFC 2435), interleaved in the RTSP connection (RFC 2326, 10.12)."""

    server: Any

    def handle(self) -> None:
        with suppress(OSError):
            while request := self._request():
                method, fields = request
                answers = {
                    "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n\r\n",
                    "DESCRIBE": self._describe(),
                    "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n\r\n",
                }
                answer = answers.get(method, "Session: 1\r\n\r\n")
                self.wfile.write(f"RTSP/1.0 200 OK\r\nCSeq: {fields['cseq']}\r\n{answer}".encode())
                if method == "PLAY":
                    for number, picture in enumerate(self.server.camera.pictures()):
                        self._send(number, picture)

    def _request(self) -> tuple[str, dict[str, str]] | None:
        first = self.rfile.readline().decode()
        fields = {}
        while (line := self.rfile.readline().decode().strip()) and first:
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        return (first.split()[0], fields) if first else None

    def _describe(self) -> str:
        sdp = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\nc=IN IP4 0.0.0.0\r\na=control:video\r\n"
        return f"Content-Type: application/sdp\r\nContent-Length: {len(sdp)}\r\n\r\n{sdp}"

    def _send(self, number: int, picture: bytes) -> None:
        tables, width, height, scan = _parts(picture)
        header = struct.pack(">IBBBB", 0, 1, 255, width // 8, height // 8)  # type 1: 4:2:0; 255: tables in band
        payload = header + struct.pack(">BBH", 0, 0, len(tables)) + tables + scan  # small: one packet each
        time = int(number * 90000 * self.server.camera.interval)
        packet = struct.pack(">BBHII", 0x80, 0x80 | 26, number & 0xFFFF, time & 0xFFFFFFFF, 1) + payload
        self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)


def _parts(picture: bytes) -> tuple[bytes, int, int, bytes]:
    """Quantization tables, width, height and scan of a JPEG."""
    tables, width, height, position = b"", 0, 0, 2
    while True:
        marker, length = struct.unpack(">xBH", picture[position : position + 4])
        body = picture[position + 4 : position + 2 + length]
        position += 2 + length
        if marker == 0xDB:
            tables += b"".join(body[i + 1 : i + 65] for i in range(0, len(body), 65))
        elif marker == 0xC0:
            height, width = struct.unpack(">HH", body[1:5])
        elif marker == 0xDA:
            return tables, width, height, picture[position:-2]


class _Server(ThreadingHTTPServer):
    camera: Camera
    head = b""
    part: Callable[[bytes], bytes]
    block_on_close = False

    def handle_error(self, *where: object) -> None:
        """Clients that are cut off are what this is for."""


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler], camera: Camera | None = None) -> Iterator[int]:
    """Serve each connection with a handler, in a thread of its own; yields the port."""
    with _Server(("127.0.0.1", 0), handler) as server:
        if camera:
            server.camera = camera
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def filming(camera: Camera, protocol: str) -> Iterator[int]:
    """Serve a camera as "http" or "rtsp", at /video; yields the port."""
    try:
        with serving(_Mjpeg if protocol == "http" else _Rtsp, camera) as port:
            yield port
    finally:
        camera.stopped.set()


@contextmanager
def answering(head: bytes, part: Callable[[bytes], bytes], camera: Camera | None = None) -> Iterator[int]:
    """Serve a camera's pictures behind any head and in any parts; yields the port."""

    class Answer(_Raw):
        def setup(self) -> None:
            self.server.head, self.server.part = head, part

    camera = camera or Camera()
    try:
        with serving(Answer, camera) as port:
            yield port
    finally:
        camera.stopped.set()


def bound(port: int = 0) -> socket.socket:
    """A socket at a port, 0 for a free one, which others that reuse addresses may have too while it doesn't listen."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made


class Proxy:
    """Passes TCP connections on, until told otherwise.

    Attributes:
        port: where it listens.
        flowing: clear it, and nothing comes from the server any more.
        garbled: chunks from the server that are still to be garbled.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.flowing = threading.Event()
        self.flowing.set()
        self._reserved = bound()  # never listens: keeps the port from others while nobody does
        self.port: int = self._reserved.getsockname()[1]
        self.garbled = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.accept()

    def accept(self) -> None:
        """Take connections, at the port it had before."""
        self._listener = bound(self.port)
        self._listener.listen()
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def refuse(self) -> None:
        """Cut every connection and refuse new ones."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End every connection that is open."""
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def garble(self, chunks: int) -> None:
        """Turn the bytes of what comes next from the server."""
        self.garbled = chunks

    def close(self) -> None:
        self.refuse()
        self._reserved.close()
        self.flowing.set()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.upstream))
                threading.Thread(target=self._relay, args=(client, server), daemon=True).start()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            with self._lock:
                self._open |= {client, server}
            up = threading.Thread(target=self._pump, args=(client, server), daemon=True)
            up.start()
            self._pump(server, client, down=True)
            up.join()  # it must not find its descriptor closed and taken by another
            with self._lock:
                self._open -= {client, server}

    def _pump(self, source: socket.socket, target: socket.socket, down: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if down:
                    self.flowing.wait()
                    if self.garbled:
                        self.garbled -= 1
                        data = bytes(byte ^ 0x55 for byte in data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
