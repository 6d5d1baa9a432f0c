"""Pictures out of a stream of bytes, as cameras send them over HTTP: by the JPEG's own marks, whatever is around them.

A server's word for where a picture ends (boundary, Content-Length) is often missing or wrong; the marks inside are what
the decoder goes by, too. They also tell a picture that is whole from one that the decoder would paint to its end.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Generator
from dataclasses import dataclass

MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 20_000_000  # a frame takes some 30 bytes a pixel on its way to the sinks, so 600 MB
MAX_SCANS = 32  # of a progressive JPEG, whose every scan goes over all its pixels; encoders make about ten

SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # the marks of a picture's beginning and end
SOS = 0xDA  # entropy-coded data follow
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15: size and components
BITS = {0xC0: 2, 0xC1: 2, 0xC2: 1, 0xC3: 1}  # that a block of 8x8 takes at least: codes of its DC and of its end
SEGMENTS = FRAMES | {0xC4, 0xCC, SOS, 0xDB, 0xDC, 0xDD, 0xFE} | set(range(0xE0, 0xF0))  # marks that a length follows

# No pattern looks twice at what another match has failed on: a stream of anything takes a time in proportion to its length.
# Ends entropy-coded data: no stuffed byte, no restart.
MARK = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
# Before a part of a multipart body: at the beginning of a line or behind a picture the boundary, then lines of headers,
# and mostly an empty line.
HEAD = re.compile(
    rb"-(?<![^\n\xd9]-)-([ -~]{0,200})\r?\n(?:(?!--)[\t -~\x80-\xfe]{1,500}\r?\n){0,30}(?:\r?\n|(?=\xff\xd8\xff))"
)
NEAR = 1 << 12  # bytes within which the next part mostly begins
OVERLAP = 1 << 14  # bytes of the longest head, which may come in pieces
JUNK = re.compile(rb"[^\x00\xff\t\r\n -~]")  # neither text nor what cameras fill up with
# The end of one picture, damaged or not, and the beginning of the next.
SEAM = re.compile(rb"\xff\xd9[\x00\xff\t\r\n -~]{0,4096}(?=\xff\xd8\xff)")
LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d{1,9})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
TEXT = re.compile(rb"^content-type[ \t]*:[ \t]*(?:text|application)/", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class StreamPicture:
    """What came as one picture.

    Attributes:
        data: JPEG from its first mark to its last, or, of a part that begins otherwise, all of it.
        fault: why it must not be decoded; None where it may.
    """

    data: bytes
    fault: str | None = None

    @property
    def is_jpeg(self) -> bool:
        return self.data.startswith(SOI)


def oversize(width: int, height: int) -> str | None:
    """Why a picture of that size in pixels is not taken; None where it is."""
    if max(width, height) <= MAX_SIDE and width * height <= MAX_PIXELS:
        return None
    return f"a picture of {width}x{height}; at most {MAX_SIDE} a side and {MAX_PIXELS / 1e6:.0f} megapixels are taken"


class Torn(Exception):
    """A picture that ends before its last mark."""


class Walk:
    """From mark to mark through a JPEG (ITU-T T.81, annex B) that begins at 0, as far as it has come.

    A thumbnail has marks of its own, in a segment whose length says where to go on.

    Attributes:
        at: where to go on; in the end, where the picture ends.
        in_scan: whether that is in entropy-coded data, in which nothing is embedded.
        fault: why the picture must not be decoded, or None.
    """

    def __init__(self) -> None:
        self.at = 2
        self.in_scan = False
        self.fault: str | None = None
        self._scans = self._coded = 0  # number of scans, bytes in them
        self._least: int | None = None  # bits that the blocks of its size take

    def reaches_end(self, received: bytearray) -> bool:
        """Whether the end is there; Torn where it won't come."""
        while mark := MARK.search(received, self.at):
            code, begin = mark[1][0], mark.end()
            if not self.in_scan and received[self.at : mark.start()].strip(b"\0\xff"):
                self.fault = "a picture whose header is damaged"  # the decoder would look for the next mark, too
            self._go_on(mark.start(), begin - 2)
            if code == EOI[1]:
                self.at = begin
                self._conclude()
                return True
            if code not in SEGMENTS:
                raise Torn
            length = int.from_bytes(received[begin : begin + 2], "big")
            if len(received) < begin + max(2, length):
                return False
            segment = bytes(received[begin + 2 : begin + length])
            if code < 0xE0 and SOI + b"\xff" in segment:  # only what programs add holds pictures
                raise Torn
            if code in FRAMES:
                self._size_up(code, segment)
            self._scans += code == SOS
            self.in_scan = code == SOS
            self.at = begin + length
        self._go_on(end := max(self.at, len(received) - 1), end)  # the last byte may be the first of a mark
        return False

    def _go_on(self, coded_until: int, at: int) -> None:
        self._coded += (coded_until - self.at) * self.in_scan
        self.at = at

    def _size_up(self, code: int, frame: bytes) -> None:
        """Read the frame header: size, and how much data that many blocks take at least."""
        count = frame[5] if len(frame) > 5 else 0
        samplings = [divmod(sides, 16) for sides in frame[7 : 6 + 3 * count : 3]]  # of each component, (across, down)
        if not 1 <= count == len(samplings) <= 4 or not all(1 <= n <= 4 for sides in samplings for n in sides):
            self.fault = "a picture whose header is damaged"
            return
        height, width = struct.unpack(">HH", frame[1:5])
        across, down = (max(sides) for sides in zip(*samplings, strict=True))
        blocks = sum(-(-width * h // (8 * across)) * -(-height * v // (8 * down)) for h, v in samplings)
        self._least = blocks * BITS.get(code, 0)
        self.fault = self.fault or oversize(width, height)

    def _conclude(self) -> None:
        if self._least is None:
            self.fault = self.fault or "a picture without a size"
        elif self._scans > MAX_SCANS:
            self.fault = self.fault or f"a picture of {self._scans} scans; at most {MAX_SCANS} are taken"
        elif 8 * self._coded < self._least:  # the decoder would paint what is missing
            self.fault = self.fault or "a picture whose data end before it is full"


class Pictures:
    """Cuts what arrives into pictures.

    It takes JPEG with or without anything between: parts of a multipart body with any boundary, headers and line ends,
    or none; text; padding. Parts that begin otherwise are taken by their Content-Length or up to the next boundary;
    text is left out. After damage it goes on where a picture begins for certain.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self._cut = self._cutting()
        self._walk: Walk | None = None
        self._token: bytes | None = None  # of the boundary, as it was last seen
        self._boundary: re.Pattern[bytes] | None = None

    def feed(self, data: bytes) -> None:
        self._received += data

    def take(self) -> StreamPicture | None:
        """The next one, once it is whole."""
        return next(self._cut)

    @property
    def waiting(self) -> int:
        """Bytes that are no whole picture yet."""
        return len(self._received)

    @property
    def missing(self) -> str:
        """What to tell of a stream that goes on and on without a picture."""
        if self._walk:
            return "a JPEG begins, but its end mark (FF D9) does not come"
        return "what arrives never makes a picture: no JPEG begins in it (FF D8)"

    def _cutting(self) -> Generator[StreamPicture | None, None, None]:
        """Pictures one after the other; None where more must arrive."""
        received = self._received
        lost = False  # after damage: what comes is no other picture until one begins for certain
        rest = 0  # bytes that still belong to the part before
        looked = 0
        while True:
            if not (place := self._beginning(lost, rest, looked)):
                looked = max(0, len(received) - OVERLAP)
                yield None
                continue
            gap, begin, head = place
            junk = not lost and JUNK.search(received, rest, gap)
            around = bytes(received[max(gap, begin - OVERLAP) : begin])
            token = bytes(head[1]) if head else b""
            del received[:begin]
            if junk:
                yield StreamPicture(b"", "bytes that are no picture")
            if head and token != self._token:
                self._token = token
                self._boundary = re.compile(rb"--" + re.escape(token) + rb"\r?\n(?:\r?\n|[!-~]+:|\xff\xd8)")
            while not (body := received[:100].lstrip(b"\r\n"))[1:]:  # two bytes
                yield None
            lengths = LENGTH.findall(around)
            length = int(lengths[-1]) if lengths else 0
            looked = 0
            if body.startswith(SOI):
                del received[: min(len(received), 100) - len(body)]
                lost, rest = yield from self._jpeg(length)
            else:
                lost, rest = False, 0
                yield from self._other(b"--" + token if token else b"\n--", length, bool(TEXT.search(around)))

    def _beginning(self, lost: bool, rest: int, looked: int) -> tuple[int, int, re.Match[bytes] | None] | None:
        """Where what was left over ends, where the next part begins, and its head, if it has one.

        It begins behind a head; or with a JPEG, at most after text; or, where something else is before, with a JPEG that
        follows the end of another, as no thumbnail does.
        """
        received = self._received
        for end in (NEAR, len(received)):  # many small parts would make it look at everything again and again
            gap, begin = rest, received.find(SOI + b"\xff", max(rest, looked), end)
            if begin < 0 or lost or JUNK.search(received, rest, begin):
                seam = SEAM.search(received, looked, end)
                gap, begin = (seam.start(), seam.end()) if seam else (-1, -1)
            if head := HEAD.search(received, looked, end if begin < 0 else begin + 3):
                return head.start(), head.end(), head
            if begin >= 0:
                return gap, begin, None
        return None

    def _jpeg(self, length: int) -> Generator[StreamPicture | None, None, tuple[bool, int]]:
        """The JPEG that begins here; returns whether it was damaged, and what is left of its part of that length."""
        received = self._received
        walk = self._walk = Walk()
        looked = 0
        try:
            while True:
                whole = walk.reaches_end(received)
                if self._boundary and self._boundary.search(received, looked, walk.at if whole else len(received)):
                    raise Torn
                if whole:
                    break
                looked = max(0, len(received) - 300)  # more than a boundary's line
                yield None
        except Torn:
            follows = walk.in_scan and received.startswith(SOI, walk.at)
            del received[: walk.at if follows else 2]
            yield StreamPicture(b"", "a picture that is cut short")
            return not follows, 0
        finally:
            self._walk = None
        data = bytes(received[: walk.at])
        del received[: walk.at]
        yield StreamPicture(data, walk.fault)
        return False, max(0, length - len(data))

    def _other(self, token: bytes, length: int, is_text: bool) -> Generator[StreamPicture | None, None, None]:
        """The part that begins here, up to its length or to where the boundary comes before."""
        received = self._received
        looked = 0
        while True:
            following = received.find(token, looked)
            if 0 < length <= len(received) and not 0 <= following < length:
                following = length
            if following >= 0:
                break
            looked = max(0, len(received) - len(token))
            yield None
        data = bytes(received[:following])
        del received[:following]
        if not is_text and JUNK.search(data):
            yield StreamPicture(data)
