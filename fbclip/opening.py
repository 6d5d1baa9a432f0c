"""Opens picture files that may be damaged, odd or hostile: what they could cost is bounded before Pillow decodes them.

Of what a file holds beside its pixels only the orientation is taken. EXIF, previews and profiles of a JPEG are cut out
before Pillow sees it, since their parsers fail on values that have nothing to do with the picture.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image, UnidentifiedImageError

from fbclip.errors import FBClipError, ImageError, SizeError
from fbclip.terminal import printable

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's names of what uploads may be
FILE_FORMATS = (*FORMATS, "GIF", "PPM")
RARE_FORMATS = {".jp2": "JPEG2000", ".j2k": "JPEG2000", ".avif": "AVIF"}  # seconds a picture, or not in every Pillow
SUFFIXES = frozenset(  # of FILE_FORMATS: what is taken from folders
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
MAX_PIXELS = 178_956_970  # what Pillow takes for honest
MAX_SIDE = 65_535  # the most that JPEG knows
MAX_BYTES_BESIDE = 128 << 20  # of a file, for more pages and whatever else is in it ...
MAX_PIXEL_BYTES = 8  # ... than its pixels: 4 channels of 16 bit
MAX_RUN_LENGTHS = 1 << 23  # bytes and pixels of a BMP in run lengths, which Pillow decodes in Python: some seconds
MAX_SCANS = 100  # of a progressive JPEG, each as long as a whole picture; encoders make about 10; libtiff's limit
MAX_PARTS = 1 << 17  # segments, chunks, strips: each is work in Python. 16 x 16 tiles of 25 megapixels are fewer
MAX_PAGES = 1000  # that are counted
MAX_TILE_PIXELS = 1 << 24  # of a TIFF whose pictures may be smaller than its tiles

ORIENTATION, WIDTH, HEIGHT, BITS, SUBFILE, TILE_WIDTH, TILE_HEIGHT = 274, 256, 257, 258, 254, 322, 323
TURNS = {  # by EXIF's orientation, as Pillow's ImageOps.exif_transpose has them
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0")  # the last is BigTIFF; Pillow misreads it with MM
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 11: 4, 13: 4}  # bytes of a value by its type; else 8
FILLING = bytes([0xA5, 0x5A, 0x3C, 0x96]) * 16  # holds no mark
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within a JPEG's scans

# Pillow's warnings are of sizes, which are bounded here, and of metadata, which isn't used. Once and for its modules
# alone: warnings.catch_warnings isn't for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        image: its first page or frame, upright.
        format: Pillow's name of it.
        bits: of a channel in the file, where PNG and TIFF state it; 8 otherwise.
    """

    image: Image.Image
    format: str | None
    bits: int


class Tag(NamedTuple):
    """Of a TIFF directory: type, number of values, and the first one where it is in the directory."""

    kind: int
    values: int
    value: int


def open_picture(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a file, or the content of one that was sent.

    Raises:
        ImageError: missing, empty, damaged, of another kind, or too costly. Whatever goes wrong is this picture's
            fault: no other exception comes of it.
        SizeError: more pixels than allowed, or a side of more than `MAX_SIDE`; known before any is decoded.
    """
    name = printable(source) if isinstance(source, Path) else "the image"
    try:
        if isinstance(source, bytes):
            return _decode(BytesIO(source), name, len(source), FORMATS, max_pixels)
        size = _file_size(source, name)
        rare = RARE_FORMATS.get(source.suffix.lower())
        with source.open("rb") as file:
            formats = (*FILE_FORMATS, rare) if rare else FILE_FORMATS
            return _decode(file, name, size, formats, max_pixels)
    except FBClipError:
        raise
    except (UnidentifiedImageError, KeyError) as error:  # KeyError: this Pillow has no decoder of that kind
        raise ImageError(f"{name} is no image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise SizeError(f"at most {max_pixels:,} pixels are taken; {name} has more than {MAX_PIXELS:,}") from error
    except OSError as error:
        raise ImageError(f"{name} can't be read: {error.strerror or _one_line(error)}") from error
    except Exception as error:
        raise ImageError(f"{name} can't be read: {_one_line(error)}") from error


def is_image(path: Path) -> bool:
    """Whether a file begins like an image that can be read."""
    with suppress(Exception), path.open("rb") as file:
        head = file.read(16)
        if head.startswith(b"\xff\xd8\xff") or head[:4] in TIFF_HEADS:
            return True
        rare = RARE_FORMATS.get(path.suffix.lower())
        with Image.open(file, formats=(*FILE_FORMATS, rare) if rare else FILE_FORMATS):
            return True
    return False


def more_pages(path: Path) -> int:
    """How many pages or frames a file has beyond the first, which is the one that is read; 0 if that can't be told.

    Previews and smaller copies (MPO, TIFF pyramids) are no pages. At most `MAX_PAGES` are counted.
    """
    with suppress(Exception), path.open("rb") as file:
        head = file.read(16)
        if head[:4] in TIFF_HEADS:
            return sum(not tags.get(SUBFILE, Tag(4, 1, 0)).value & 5 for tags in _tiff_pages(file)) - 1
        if not head.startswith(b"\xff\xd8"):
            with Image.open(file, formats=("PNG", "GIF", "WEBP")) as image:
                return int(getattr(image, "n_frames", 1)) - 1
    return 0


def _file_size(path: Path, name: str) -> int:
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise ImageError(f"{name} is a link to {printable(path.readlink())}, which is not there") from None
        raise ImageError(f"no file at {name}") from None
    if stat.S_ISDIR(status.st_mode):
        with os.scandir(path):  # says why a folder was given instead of what is in it
            raise ImageError(f"{name} is a folder that isn't looked into: too deep below the one that was named")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name} is no file but a pipe or a device")
    return status.st_size


def _check_size(width: int, height: int, size: int, name: str, max_pixels: int) -> None:
    """Raise ImageError for sides that no picture of `size` bytes may have."""
    if width * height > max_pixels:
        raise SizeError(f"at most {max_pixels:,} pixels are taken; {name} has {width} × {height}")
    if max(width, height) > MAX_SIDE:
        raise SizeError(f"sides of at most {MAX_SIDE:,} pixels are taken; {name} has {width} × {height}")
    if not width or not height:
        raise ImageError(f"{name} has no pixels: its size is {width} × {height}")
    if size > MAX_BYTES_BESIDE + MAX_PIXEL_BYTES * width * height:
        raise ImageError(
            f"{name} has {size >> 20:,} MB, and a picture of {width} × {height} may have {MAX_PIXEL_BYTES} bytes a "
            f"pixel and {MAX_BYTES_BESIDE >> 20} MB: save its first page alone"
        )


def _decode(file: IO[bytes], name: str, size: int, formats: tuple[str, ...], max_pixels: int) -> Picture:
    check = partial(_check_size, size=size, name=name, max_pixels=max_pixels)
    if not size:
        raise ImageError(f"{name} is empty")
    head = file.read(32)
    orientation, bits = 1, 8
    if head.startswith((b"\xff\xd8\xff", b"RIFF")) and size > MAX_BYTES_BESIDE:  # these are read as a whole
        raise ImageError(f"{name} has {size >> 20:,} MB, too many for a compressed picture")
    if head.startswith(b"\xff\xd8\xff"):
        content, exif = _without_metadata(head + file.read(), name)
        file, orientation = BytesIO(content), _orientation(exif)
    elif head.startswith(b"\x89PNG"):
        if head[12:16] == b"IHDR" and len(head) > 24:
            check(int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))
            bits = head[24]
        _check_chunks(file, name)
    elif head[:4] in TIFF_HEADS:
        tags = next(_tiff_pages(file), {})
        check(*(tags.get(side, Tag(4, 1, 0)).value for side in (WIDTH, HEIGHT)))
        _check_tags(tags, size, name)
        file.seek(0)
        file = BytesIO(file.read())  # libtiff would map the file, and end the process where another one cuts it short
    with Image.open(file, formats=formats) as image:
        check(*image.size)
        if image.format == "TIFF":
            bits = max(image.tag_v2.get(BITS, (1,)))  # type: ignore[attr-defined]
            _keep_orientation_alone(image)  # Pillow turns it itself
        if image.tile and image.tile[0][0] == "bmp_rle" and image.width * image.height + size > MAX_RUN_LENGTHS:
            raise ImageError(f"{name} is a large BMP in run lengths, which take too long: save it without compression")
        image.load()
        if head.startswith(b"\xff\xd8\xff") and not is_whole(content):
            raise ImageError(f"{name} can't be read: its data end before its last pixel")
        if image.size != image.im.size:
            raise ImageError(f"{name} is damaged: it isn't of the size that it says")
        if image.format not in ("JPEG", "TIFF"):
            orientation = _orientation(image.info.get("exif") or _raw_profile(image))
        turn = TURNS.get(orientation)
        return Picture(image if turn is None else image.transpose(turn), image.format, bits)


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    return printable(" ".join(str(error).split())) or type(error).__name__


# --- JPEG ----------------------------------------------------------------------------------------------------------


def _without_metadata(data: bytes, name: str) -> tuple[bytes, bytes]:
    """A JPEG without its APP1 to APP13, APP15 and comments, and its EXIF.

    JFIF (APP0) and Adobe's (APP14) stay: they say what the colours mean. What is no segment is left out, as decoders do.
    """
    kept, exif, at = [data[:2]], b"", 2
    channels = 0  # where it has one scan for all of them, there can be no further scan
    for _ in range(MAX_PARTS):
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            raise ImageError(f"{name} can't be read: it is cut off before its pixels")
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker <= 0x01 or 0xD0 <= marker <= 0xD9:  # these have no content
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFE or (0xE0 < marker <= 0xEF and marker != 0xEE):
            if not exif and marker == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
                exif = data[at + 10 : end]
        else:
            kept.append(data[at:end])
        if marker in (0xC0, 0xC1) and at + 9 < len(data):
            channels = data[at + 9]
        if marker == 0xDA:
            if data[at + 4 : at + 5] != bytes([channels]):
                _check_scans(data, end, name)
            kept.append(data[end:])
            return b"".join(kept), exif
        at = end
    raise ImageError(f"{name} can't be read: it has more than {MAX_PARTS:,} segments")


def _check_scans(data: bytes, at: int, name: str) -> None:
    """Refuse a JPEG of very many scans, each of which takes as long as a picture; `at` is where its first one begins."""
    scans = 1
    for _ in range(MAX_PARTS):
        found = MARKER.search(data, at)
        if not found or data[found.end() - 1] == 0xD9:
            return
        scans += data[found.end() - 1] == 0xDA
        if scans > MAX_SCANS:
            raise ImageError(f"{name} can't be read: it is a progressive JPEG of more than {MAX_SCANS} scans")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise ImageError(f"{name} can't be read: it has more than {MAX_PARTS:,} segments")


def is_whole(jpeg: bytes) -> bool:
    """Whether the data of a JPEG reach to its last pixel. Decoders paint what is missing, and say nothing.

    What stands between the data of the last pixel and the end mark is not looked at: decoded with and without other
    bytes put there, only an unfinished picture changes. Sequential ones are compared at an eighth of their size.

    Raises:
        What Pillow raises of data that are damaged otherwise.
    """
    end = _end_of_data(jpeg)
    return end is None or _glance(jpeg) == _glance(jpeg[:end] + FILLING + jpeg[end:])


def _end_of_data(jpeg: bytes) -> int | None:
    """Where the data of the last scan end; None where there is no end mark, which Pillow refuses."""
    at, in_scan = 2, False
    for _ in range(MAX_PARTS):
        found = MARKER.search(jpeg, at)
        if not found:
            return None
        marker, at = jpeg[found.end() - 1], found.end()
        if marker == 0xD9 and in_scan:
            return len(jpeg[: found.start()].rstrip(b"\xff"))  # padding before a mark
        if marker > 0x01 and marker not in (0xD8, 0xD9):
            in_scan = in_scan or marker == 0xDA
            at += int.from_bytes(jpeg[at : at + 2], "big")
    return None


def _glance(jpeg: bytes) -> bytes:
    """A JPEG's pixels: as few as its decoder gives where one part of the data makes all of a pixel, else all."""
    with Image.open(BytesIO(jpeg), formats=("JPEG",)) as image:
        if not image.info.get("progressive"):
            image.draft(image.mode, (1, 1))
        image.load()
        return image.tobytes()


def _orientation(exif: bytes) -> int:
    """EXIF's orientation; 1 where it says none or can't be read: the picture is taken as it is."""
    try:
        tags = next(_tiff_pages(BytesIO(exif.removeprefix(b"Exif\0\0"))), {})
    except Exception:
        return 1
    tag = tags.get(ORIENTATION)
    return tag.value if tag and tag.kind in (3, 4) and tag.values == 1 and 1 <= tag.value <= 8 else 1


def _raw_profile(image: Image.Image) -> bytes:
    """EXIF as ImageMagick writes it into a PNG's text."""
    with suppress(Exception):
        return bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    return b""


# --- PNG, TIFF -----------------------------------------------------------------------------------------------------


def _check_chunks(file: IO[bytes], name: str) -> None:
    file.seek(8)
    for _ in range(MAX_PARTS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    raise ImageError(f"{name} can't be read: it has more than {MAX_PARTS:,} chunks")


def _tiff_pages(file: IO[bytes]) -> Iterator[dict[int, Tag]]:
    """The directories of a TIFF file or of EXIF, one for each page, at most `MAX_PAGES`."""
    file.seek(0)
    head = file.read(16)
    order, big = ("big" if head.startswith(b"MM") else "little"), head[2:3] == b"+"

    def number(data: bytes) -> int:
        return int.from_bytes(data, order)  # type: ignore[arg-type]

    wide = 8 if big else 4  # bytes of an offset
    offset, seen, total = number(head[8:16] if big else head[4:8]), set[int](), 0
    while offset and offset not in seen and len(seen) < MAX_PAGES:
        seen.add(offset)
        file.seek(offset)
        count = number(file.read(8 if big else 2))
        total += count
        if total > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS:,} tags")
        entries = file.read(count * (4 + 2 * wide))
        tags: dict[int, Tag] = {}
        for at in range(0, len(entries) - 3 - 2 * wide, 4 + 2 * wide):
            tag, kind = number(entries[at : at + 2]), number(entries[at + 2 : at + 4])
            inside = entries[at + 4 + wide : at + 4 + 2 * wide][: TIFF_SIZES.get(kind, 8)]
            if tag in tags:  # whom to believe?
                raise ValueError(f"its tag {tag} is there twice")
            tags[tag] = Tag(kind, number(entries[at + 4 : at + 4 + wide]), number(inside))
        yield tags
        offset = number(file.read(wide))


def _check_tags(tags: dict[int, Tag], size: int, name: str) -> None:
    """Refuse a directory that would grow far beyond its file in memory."""
    if sum(min(tag.values * TIFF_SIZES.get(tag.kind, 8), size) for tag in tags.values()) > 2 * size:
        raise ImageError(f"{name} can't be read: its tags say that they hold more than the file does")
    if any(tag.values > MAX_PARTS for tag in tags.values() if TIFF_SIZES.get(tag.kind, 8) > 1):
        raise ImageError(f"{name} can't be read: it has a tag or strips of more than {MAX_PARTS:,} values")
    width, height = (tags.get(side, Tag(4, 1, 0)).value for side in (TILE_WIDTH, TILE_HEIGHT))
    if width * height > max(MAX_TILE_PIXELS, tags[WIDTH].value * tags[HEIGHT].value):
        raise ImageError(f"{name} can't be read: its tiles of {width} × {height} are larger than the picture")


def _keep_orientation_alone(image: Image.Image) -> None:
    """Take from a TIFF all tags but one, which Pillow would write anew when it turns the picture, and stumble over."""
    exif: Image.Exif | dict[int, object] = {}
    with suppress(Exception):
        exif = image.getexif()
    for tag in list(exif):
        if tag != ORIENTATION:
            del exif[tag]
