"""MJPEG as cameras send it: any head, any parts, damage. The servers are real; their manners are those of public bug reports."""

from __future__ import annotations

import base64
import hashlib
import io
import random
import re
import socketserver
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fbclip.runtime.live.sources import mjpeg
from fbclip.runtime.live.sources.devices import Fault
from fbclip.runtime.live.sources.mjpeg import Pictures, StreamPicture
from fbclip.runtime.live.sources.streams import MjpegStream, connect_stream
from helpers.stream_faults import SIZE, Camera, answering, jpeg, serving
from helpers.waiting import PATIENCE_S

Part = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy that the environment names stands before the servers of the tests."""
    monkeypatch.setenv("no_proxy", "*")


def answer(kind: str, *fields: str, status: str = "HTTP/1.0 200 OK\r\n") -> bytes:
    """A head of that Content-Type."""
    return (status + "\r\n".join([f"Content-Type: {kind}", *fields, "", ""])).encode()


def part(*fields: str, end: str = "\r\n", boundary: str = "--f", after: str = "\r\n") -> Part:
    """A part with these headers, in which LEN stands for the picture's length."""

    def made(picture: bytes) -> bytes:
        lines = [boundary, *(field.replace("LEN", str(len(picture))) for field in fields)]
        return (end.join([*lines, "", ""])).encode() + picture + after.encode()

    return made


REPLACE = "multipart/x-mixed-replace; boundary=f"
TYPE, LENGTH = "Content-Type: image/jpeg", "Content-Length: LEN"
USUAL = part(TYPE, LENGTH)
MANNERS: dict[str, tuple[bytes, Part]] = {
    "as the standard has it": (answer(REPLACE), USUAL),
    "LF line ends": (answer(REPLACE), part(TYPE, LENGTH, end="\n", after="\n")),
    "LF line ends without length": (answer(REPLACE), part(TYPE, end="\n", after="\n")),
    "LF line ends in the head": (answer(REPLACE).replace(b"\r\n", b"\n"), USUAL),
    "no boundary parameter": (answer("multipart/x-mixed-replace"), USUAL),
    "an empty boundary": (answer("multipart/x-mixed-replace; boundary="), part(TYPE, boundary="--")),
    "another boundary than announced": (answer("multipart/x-mixed-replace; boundary=g"), USUAL),
    "a boundary without dashes": (answer(REPLACE), part(TYPE, LENGTH, boundary="f")),
    "quotes and dashes": (answer('multipart/x-mixed-replace; boundary="--f"'), USUAL),
    "multipart/mixed": (answer("multipart/mixed; boundary=f"), USUAL),
    "odd capitals": (
        answer("Multipart/X-Mixed-Replace; Boundary=f"),
        part("CONTENT-type: image/jpeg", "cOnTeNt-LeNgTh:LEN"),
    ),
    "Content-Length 0": (answer(REPLACE), part(TYPE, "Content-Length: 0")),
    "Content-Length too short": (answer(REPLACE), part(TYPE, "Content-Length: 99")),
    "Content-Length too long": (answer(REPLACE), part(TYPE, "Content-Length: 1LEN")),
    "Content-Length in another header": (answer(REPLACE), part("X-Note: content-length: 5", LENGTH)),
    "Content-Length of the whole answer 0": (answer(REPLACE, "Content-Length: 0"), USUAL),
    "Content-Length of the whole answer": (answer(REPLACE, "Content-Length: 300"), USUAL),
    "no headers": (answer(REPLACE), part()),
    "no headers and no empty line": (answer(REPLACE), lambda picture: b"--f\r\n" + picture + b"\r\n"),
    "nothing behind a picture": (answer(REPLACE), part(TYPE, after="")),
    "zeros behind a picture": (answer(REPLACE), part(TYPE, after="\0" * 100 + "\r\n")),
    "text between": (
        answer(REPLACE),
        lambda picture: b"--f\r\nContent-Type: text/plain\r\n\r\n21 \xc2\xb0C\r\n" + USUAL(picture),
    ),
    "another picture inside the length": (answer(REPLACE), lambda picture: USUAL(picture + b"\x90" + jpeg(7, (8, 8)))),
    "endless image/jpeg": (answer("image/jpeg"), bytes),
    "endless image/jpeg in parts": (answer("image/jpeg"), USUAL),
    "no type": (b"HTTP/1.0 200 OK\r\n\r\n", USUAL),
    "a wrong type": (answer("text/plain"), USUAL),
    "video/x-motion-jpeg": (answer("video/x-motion-jpeg"), bytes),
    "application/octet-stream": (answer("application/octet-stream"), bytes),
    "no status": (answer(REPLACE, status=""), USUAL),
    "ICY 200 OK": (answer(REPLACE, status="ICY 200 OK\r\n"), USUAL),
    "no head": (b"", USUAL),
    "nothing but pictures": (b"", bytes),
}
RAW = [name for name, (_, part) in MANNERS.items() if part is bytes]  # only the pictures tell where they are
PLAIN = [name for name in MANNERS if name != "another picture inside the length"]


def number_of(image: NDArray[np.uint8]) -> int:
    """What `jpeg` painted into a picture."""
    assert image.shape == (SIZE[1], SIZE[0], 3)
    red, green, blue = image.reshape(-1, 3).mean(axis=0)
    assert green < 8 and abs(red + blue - 255) < 8
    return round(red)


@pytest.mark.parametrize("manner", MANNERS)
def test_every_picture_of_every_manner_arrives(manner: str) -> None:
    with (
        answering(*MANNERS[manner]) as port,
        closing(connect_stream(f"http://127.0.0.1:{port}/", PATIENCE_S)) as device,
    ):
        numbers = []
        for _ in range(5):
            device.grab()
            numbers.append(number_of(device.retrieve()))
    assert isinstance(device, MjpegStream)  # FFmpeg would paint what is missing of a damaged picture
    assert all(abs(number - wanted) <= 2 for number, wanted in zip(numbers, range(5), strict=True)), numbers


def test_a_boundary_that_comes_late() -> None:
    pictures = [jpeg(number) for number in range(6)]
    stream = b"".join(pictures[:3]) + b"".join(map(USUAL, pictures[3:]))
    assert cut(stream, 1000) == [StreamPicture(picture) for picture in pictures]


def test_one_picture_per_connection() -> None:
    with answering(answer(REPLACE), USUAL, once := Camera()) as port:
        once.pictures = lambda: iter([jpeg(3)])  # type: ignore[method-assign]
        for _ in range(3):
            with closing(connect_stream(f"http://127.0.0.1:{port}/", PATIENCE_S)) as device:
                device.grab()
                assert abs(number_of(device.retrieve()) - 3) <= 2
                with pytest.raises(Fault, match="the server ended the stream"):
                    device.grab()


def test_parts_of_another_kind_are_taken_by_the_boundary() -> None:
    def png(picture: bytes) -> bytes:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture)).save(buffer, "PNG")
        return part("Content-Type: image/png")(buffer.getvalue())

    with answering(answer(REPLACE), png) as port:
        device = connect_stream(f"http://127.0.0.1:{port}/", PATIENCE_S)
        for number in range(3):
            device.grab()
            assert abs(number_of(device.retrieve()) - number) <= 2
        device.close()


# Answers that are no stream


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        (answer("image/jpeg", "Content-Length: 700"), bytes(700), "sends one picture .image/jpeg., which is no stream"),
        (
            answer("text/html"),
            b"<!--\n-->\n<p>log in</p>" * 400,
            "sends text/html, which is no stream: ask it for MJPEG",
        ),
        (b"HTTP/1.0 404 No such camera geheim\r\n\r\n", b"", "the server answers 404 Not Found$"),
        (b"HTTP/1.0 799 Odd\r\n\r\n", b"", "the server answers 799$"),
        (b"HTTP/1.0 401 No\r\nWWW-Authenticate: Negotiate geheim\r\n\r\n", b"", "neither Basic nor Digest"),
        (b"ICY 401 geheim\r\n\r\n", b"", "the server answers 401 Unauthorized$"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", b"", "no video that FFmpeg knows"),
        (b"", b"", "closes the connection without an answer"),
        (answer(REPLACE), b"--f\r\n\r\n" + b"hello" * 1000, "the server ended the stream"),
    ],
)
def test_what_is_no_stream_is_told(head: bytes, body: bytes, message: str) -> None:
    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.request.recv(1 << 16)
                self.request.sendall(head + body)

    with serving(Answer) as port, pytest.raises(Fault, match=message):
        connect_stream(f"http://127.0.0.1:{port}/?geheim", PATIENCE_S).grab()


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (b"hello there\r\n", "no JPEG begins in it"),
        (jpeg(1)[:-2], r"a JPEG begins, but its end mark \(FF D9\) does not come"),
    ],
)
def test_a_stream_that_never_makes_a_picture_says_what_is_missing(begin: bytes, message: str) -> None:
    class Dribble(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return super().read1(size) or b"\0"

    with pytest.raises(Fault, match=message) as caught:
        MjpegStream(Dribble(begin), patience=0.05).grab()
    assert caught.value.cause == "stalled"


class Guarded(BaseHTTPRequestHandler):
    """Redirects from / to /video, which asks for a log-in: Basic, or Digest at /digest."""

    def do_GET(self) -> None:
        given = self.headers["Authorization"] or ""
        if self.path == "/":
            self.send_response(302)
            self.send_header("Location", "/video")
            self.end_headers()
        elif given == "Basic " + base64.b64encode(b"me:s3cret/").decode() or self.digest() in given.split('"'):
            self.wfile.write(answer(REPLACE) + USUAL(jpeg(3)))
        else:
            self.send_response(401)
            kind = 'Digest realm="camera", nonce="once"' if self.path == "/digest" else 'Basic realm="camera"'
            self.send_header("WWW-Authenticate", kind)
            self.end_headers()

    def digest(self) -> str:
        """The answer to the challenge (RFC 2069)."""
        secret, request = (hashlib.md5(text.encode()).hexdigest() for text in ("me:camera:s3cret/", f"GET:{self.path}"))
        return hashlib.md5(f"{secret}:once:{request}".encode()).hexdigest()

    def log_message(self, *message: object) -> None:
        pass


@pytest.mark.parametrize("path", ["", "video", "digest"])
def test_redirects_and_log_ins(path: str) -> None:
    with serving(Guarded) as port:
        device = connect_stream(f"http://me:s3cret%2F@127.0.0.1:{port}/{path}", PATIENCE_S)
        device.grab()
        assert abs(number_of(device.retrieve()) - 3) <= 2
        device.close()
        with pytest.raises(Fault, match="401 Unauthorized"):
            connect_stream(f"http://me:other@127.0.0.1:{port}/{path}", PATIENCE_S)


def test_a_log_in_where_there_is_no_status() -> None:
    class Guard(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked = self.request.recv(1 << 16)
            known = b"Authorization: Basic " + base64.b64encode(b"me:s3cret")
            self.request.sendall(b"ICY 200 OK\r\n\r\n" + USUAL(jpeg(3)) if known in asked else b"ICY 401 No\r\n\r\n")

    with serving(Guard) as port:
        device = connect_stream(f"http://me:s3cret@127.0.0.1:{port}/", PATIENCE_S)
        device.grab()
        assert abs(number_of(device.retrieve()) - 3) <= 2
        device.close()


# Pictures in bytes


def cut(stream: bytes, *sizes: int) -> list[StreamPicture]:
    """What is taken out of a stream that arrives in pieces of these sizes, again and again."""
    pictures, found, at = Pictures(), [], 0
    while at < len(stream):
        for size in sizes:
            pictures.feed(stream[at : at + size])
            at += size
            while picture := pictures.take():
                found.append(picture)
    return found


def with_thumbnail(picture: bytes) -> bytes:
    thumbnail = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + jpeg(99, (16, 16))
    return picture[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + picture[2:]


def shot(seed: int, **options: object) -> bytes:
    """A noisy picture: its data are many times longer than its header."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


SHOTS = (
    shot(0),
    with_thumbnail(shot(1)),
    shot(2, progressive=True),
    with_thumbnail(shot(3, progressive=True)),
    shot(4, optimize=True, subsampling=0),
    shot(5, quality=5),
    shot(6, restart_marker_rows=1),
)
shots = st.lists(st.sampled_from(SHOTS), min_size=3, max_size=6)
pieces = st.lists(st.sampled_from([7, 100, 1460, 65536]), min_size=1, max_size=5)


@given(shots, st.sampled_from(PLAIN), pieces)
def test_pictures_arrive_as_they_were_in_any_pieces(pictures: list[bytes], manner: str, sizes: list[int]) -> None:
    head, part = MANNERS[manner]
    assert cut(head + b"".join(map(part, pictures)), *sizes) == [StreamPicture(picture) for picture in pictures]


@given(
    parts=st.lists(
        st.binary(max_size=300).map(lambda data: b"\x89" + data).filter(lambda data: b"--" not in data),
        min_size=1,
        max_size=5,
    ),
    lengths=st.booleans(),
    chunk=st.integers(1, 400),
    preamble=st.sampled_from([b"", b"\r\n", b"This is a multipart message.\r\n"]),
)
def test_other_parts_arrive_whole(parts: list[bytes], lengths: bool, chunk: int, preamble: bytes) -> None:
    made = part(LENGTH if lengths else "X: y")
    found = [picture.data for picture in cut(preamble + b"".join(map(made, parts)) + b"--f--\r\n", chunk)]
    assert [data if lengths else data.removesuffix(b"\r\n") for data in found] == parts


@given(shots, st.sampled_from(PLAIN), pieces, st.floats(0.01, 0.99))
def test_a_picture_that_is_cut_short_is_counted_and_not_shown(
    pictures: list[bytes], manner: str, sizes: list[int], where: float
) -> None:
    head, part = MANNERS[manner]
    pictures = [shot(7), *pictures, shot(8)]
    parts = [part(picture) for picture in pictures]
    header = pictures[1].index(b"\xff\xda") if manner in RAW else 2
    end = header + round(where * (len(pictures[1]) - 2 - header))
    parts[1] = parts[1].replace(pictures[1], pictures[1][:end])
    found = cut(head + b"".join(parts), *sizes)
    shown = [picture.data for picture in found if not picture.fault and picture.is_jpeg]
    rest = pictures[:1] + pictures[2:]
    assert len(found) > len(shown)
    assert shown in (rest, rest[:1] + rest[2:])  # the next one too, where the cut hides that it begins


@pytest.mark.parametrize("manner", ["as the standard has it", "endless image/jpeg"])
@pytest.mark.parametrize("damage", [0, 3, 5, 9])  # in the first mark, in the mark, length and content of its thumbnail
def test_a_thumbnail_of_a_damaged_picture_is_not_shown(manner: str, damage: int) -> None:
    head, part = MANNERS[manner]
    pictures = [with_thumbnail(shot(seed)) for seed in range(4)]
    broken = bytearray(pictures[1])
    broken[damage] ^= 0x55
    stream = head + b"".join(map(part, [pictures[0], bytes(broken), *pictures[2:]]))
    shown = [picture.data for picture in cut(stream, 1000) if not picture.fault and picture.is_jpeg]
    assert shown[0] == pictures[0] and shown[-1] == pictures[-1]
    assert set(shown) <= {*pictures, bytes(broken)}


@given(st.randoms(use_true_random=False), st.sampled_from(list(MANNERS)))
def test_damage_passes(chance: random.Random, manner: str) -> None:
    head, part = MANNERS[manner]
    stream = bytearray(head + b"".join(map(part, SHOTS)))
    for _ in range(chance.randint(1, 5)):
        at, length = chance.randrange(len(stream)), chance.choice([1, 2, 10, 1000])
        stream[at : at + length] = chance.randbytes(chance.choice([0, length]))
    whole = [shot(seed) for seed in range(20, 24)]
    found = cut(bytes(stream) + b"".join(map(part, whole)), 1460)
    assert [picture.data for picture in found[-2:]] == whole[-2:]


@pytest.mark.parametrize(
    "junk",
    [
        b"-",
        b"--a\r\n",
        b"--a\r\nx\r\n\r\n",
        b"\xff",
        b"\xff\xd9",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd8",
        b"text\r\n",
        b"\r\n",
        b"\0",
    ],
)
def test_a_stream_of_anything_takes_time_in_proportion(junk: bytes) -> None:
    """At a time that grows with its square this would be a minute and more."""
    cut(junk * ((1 << 19) // len(junk)), 1 << 16)


# What is not decoded


def sized(width: int, height: int, picture: bytes | None = None) -> bytes:
    """A picture whose header says that it is of another size."""
    picture = picture or jpeg(1)
    at = re.search(rb"\xff[\xc0-\xc2]\0\x11", picture)
    assert at
    return picture[: at.end() + 1] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + picture[at.end() + 5 :]


def scans(number: int) -> bytes:
    """A progressive JPEG with a scan repeated."""
    picture = shot(1, progressive=True)
    last = picture.rindex(b"\xff\xda")
    return picture[:last] + picture[last:-2] * (number - picture.count(b"\xff\xda") + 1) + picture[-2:]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (sized(30000, 30000), "a picture of 30000x30000; at most 16384 a side and 20 megapixels are taken"),
        (sized(20000, 10), "a picture of 20000x10; at most"),
        (sized(5000, 3900), "data end before it is full"),
        (sized(5000, 3900, shot(1, progressive=True)), "data end before it is full"),
        (sized(0, 0), "can't be decoded"),
        (scans(33), "a picture of 33 scans; at most 32 are taken"),
        (jpeg(1)[:2] + b"\xff\xd9", "a picture without a size"),
        (jpeg(1).replace(b"\x01\x22\0", b"\x01\x00\0"), "whose header is damaged"),
    ],
)
def test_what_would_take_memory_or_be_painted_is_garbage(picture: bytes, message: str) -> None:
    stream = MjpegStream(io.BytesIO(USUAL(picture) + USUAL(jpeg(3))), PATIENCE_S)
    stream.grab()
    with pytest.raises(Fault, match=message) as caught:
        stream.retrieve()
    assert caught.value.cause == "garbage"
    stream.grab()
    assert abs(number_of(stream.retrieve()) - 3) <= 2  # in step again


def test_32_scans_are_taken() -> None:
    stream = MjpegStream(io.BytesIO(USUAL(scans(mjpeg.MAX_SCANS))), PATIENCE_S)
    stream.grab()
    assert stream.retrieve().shape == (96, 128, 3)


def test_headers_that_lie_take_no_memory() -> None:
    """OpenCV alone would take 2.7 GB for the pixels of the first."""
    program = (
        "import io, resource, sys\n"
        "from fbclip.runtime.live.sources.devices import Fault\nfrom fbclip.runtime.live.sources.streams import MjpegStream\n"
        "stream = MjpegStream(io.BytesIO(sys.stdin.buffer.read()), 60)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in range(3):\n"
        "    stream.grab()\n"
        "    try: stream.retrieve()\n"
        "    except Fault as fault: assert fault.cause == 'garbage'\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    png = io.BytesIO()
    Image.new("1", (15000, 15000)).save(png, "PNG")
    pictures = USUAL(sized(30000, 30000)) + USUAL(sized(5000, 3900)) + part()(png.getvalue()) + b"--f--\r\n"
    done = subprocess.run([sys.executable, "-c", program], input=pictures, capture_output=True, check=True)
    assert int(done.stdout) < 20_000  # KB
