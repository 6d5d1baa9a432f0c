"""Pictures as factories have them: odd tags, deep pixels, several pages, and what would cost too much."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from fbclip import images as reading
from fbclip.errors import ImageError, SizeError, UsageError
from fbclip.images import decode_image, more_pages, note_of_pages, read_image, read_mask, to_rgb
from fbclip.runtime.predictor import Predictor

MILLION = 1_000_000
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(exif: bytes) -> bytes:
    """A JPEG with these bytes as its EXIF, and without the resolution that Pillow would look for there."""
    plain = encoded(Image.fromarray(NOISE), "JPEG")
    after_jfif = 4 + int.from_bytes(plain[4:6], "big")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif + plain[after_jfif:]


def tiff(*entries: tuple[int, int, int, bytes], after: bytes = b"") -> bytes:
    """A little-endian TIFF, or EXIF, of entries (tag, type, count, content)."""
    directory, beyond = struct.pack("<H", len(entries)), b""
    place = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, content in entries:
        if len(content) > 4:
            content, beyond = struct.pack("<I", place + len(beyond)), beyond + content
        directory += struct.pack("<HHI", tag, kind, count) + content.ljust(4, b"\0")
    return b"II*\0\x08\0\0\0" + directory + bytes(4) + beyond + after


def short(value: int) -> bytes:
    return struct.pack("<H", value)


# --- EXIF ---

TURNED = (0x0112, 3, 1, short(6))
ODD_TAGS = {
    "text as resolution": (0x011A, 2, 4, b"72\0\0"),
    "one letter as resolution": (0x011A, 2, 1, b"7"),
    "resolution of zero": (0x011A, 5, 1, struct.pack("<II", 72, 0)),
    "long number in a short": (0x0128, 4, 1, struct.pack("<I", 70000)),
    "negative short": (0x0128, 8, 1, struct.pack("<h", -2)),
    "width as text": (0x0101, 2, 5, b"xxxx\0"),
    "offset beyond the end": (0x8769, 4, 1, struct.pack("<I", 1 << 30)),
}


@pytest.mark.parametrize("entry", ODD_TAGS.values(), ids=ODD_TAGS)
def test_odd_tags_leave_the_picture_turned_as_they_say(tmp_path: Path, entry: tuple[int, int, int, bytes]) -> None:
    data = jpeg(tiff(*sorted((TURNED, entry))))
    (tmp_path / "odd.jpg").write_bytes(data)
    plain = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(NOISE), "JPEG"))))
    for pixels in (read_image(tmp_path / "odd.jpg"), decode_image(data, MILLION)):
        assert (pixels == np.rot90(plain, -1)).all()
    assert read_mask(tmp_path / "odd.jpg").shape == (60, 40)
    strip = tiff(
        *((256, 3, 1, short(3)), (257, 3, 1, short(2)), (258, 3, 1, short(8)), (259, 3, 1, short(1))),
        *((262, 3, 1, short(1)), (273, 4, 1, struct.pack("<I", 150)), (0x0112, 3, 1, short(6))),
        *((277, 3, 1, short(1)), (278, 3, 1, short(2)), (279, 4, 1, struct.pack("<I", 6)), entry),
        after=bytes(200),
    )
    data = strip[:150] + bytes([1, 2, 3, 4, 5, 6]) + strip[156:]
    if entry[0] != 0x0101:  # which says something else of a TIFF
        assert decode_image(data, MILLION)[..., 0].tolist() == [[4, 1], [5, 2], [6, 3]]


@pytest.mark.parametrize("exif", [b"", bytes(40), b"II*\0", b"II*\0\xff\xff\xff\xff", tiff((0x0112, 3, 1, short(99)))])
def test_a_broken_exif_leaves_the_picture_as_it_is(exif: bytes) -> None:
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(Image.fromarray(NOISE), kind, exif=b"Exif\0\0" + exif, **options)
        assert (decode_image(data, MILLION) == NOISE).all()
    assert decode_image(jpeg(exif), MILLION).shape == NOISE.shape


@pytest.mark.parametrize("strip", [1 << 21, 100], ids=["at once", "in strips"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, strip: int
) -> None:
    monkeypatch.setattr(reading, "STRIP", strip)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, options in (
        ("a.jpg", {}),
        ("a.png", {}),
        ("a.webp", {"lossless": True}),
        ("a.tif", {}),
        ("lzw.tif", {"compression": "tiff_lzw"}),
    ):
        Image.fromarray(NOISE).save(tmp_path / name, exif=exif, **options)
        wanted = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
        assert (read_image(tmp_path / name) == wanted).all(), name
        assert read_mask(tmp_path / name).shape == wanted.shape[:2]


def test_what_else_a_jpeg_holds_is_not_looked_at(tmp_path: Path) -> None:
    """Metadata of several kinds, broken; a second picture behind; bytes that are none of its segments."""
    data = encoded(Image.fromarray(NOISE), "JPEG")
    for marker, content in (
        (0xE2, b"MPF\0II*\0junk"),
        (0xED, b"Photoshop 3.0\08BIM"),
        (0xE1, b"Exif\0\0"),
        (0xFE, b""),
    ):
        data = data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]
    (tmp_path / "a.jpg").write_bytes(data[:6] + b"junk\xff\xff" + data[6:] + data)
    plain = encoded(Image.fromarray(NOISE), "JPEG")
    assert (read_image(tmp_path / "a.jpg") == decode_image(plain, MILLION)).all()
    assert more_pages(tmp_path / "a.jpg") == 0


# --- whatever goes wrong is the picture's fault ---


@pytest.mark.parametrize(
    "kind", [MemoryError, RecursionError, struct.error, ZeroDivisionError, AssertionError, OSError]
)
def test_no_exception_of_a_decoder_comes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def load(self: object) -> None:
        raise kind("first line\nsecond line")

    Image.fromarray(NOISE).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    for read in (
        lambda: read_image(tmp_path / "a.png"),
        lambda: read_mask(tmp_path / "a.png"),
        lambda: decode_image((tmp_path / "a.png").read_bytes(), MILLION),
        lambda: to_rgb(Image.open(tmp_path / "a.png")),
    ):
        with pytest.raises(ImageError, match="can't be read") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to("/nowhere/x.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    subprocess.run(["mkfifo", tmp_path / "pipe.png"], check=True)
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, message in (
        ("gone.png", "is a link to /nowhere/x.png, which is not there"),
        ("loop.png", "can't be read: Too many levels of symbolic links"),
        ("folder.png", "is a folder"),
        ("pipe.png", "is no file but a pipe or a device"),
        ("eps.png", "is no image"),
        ("x" * 300, "File name too long"),
        ("no\nsuch.png", r"no file at .*no\\nsuch.png"),
        ("\udcdf.png", r"no file at .*\\xdf.png"),
        ("\0.png", "can't be read"),
    ):
        for read in (read_image, read_mask):
            with pytest.raises(ImageError, match=message) as caught:
                read(tmp_path / name)
            assert str(caught.value).isprintable()


def test_pillow_warns_of_nothing_that_is_told_otherwise(tmp_path: Path) -> None:
    """Neither of metadata, nor of a size that is allowed (Pillow warns above 89 million pixels)."""
    many = (TURNED, (0x011A, 5, 1, b"\0\0\0\0"), (0x8769, 4, 1, struct.pack("<I", 1 << 30)))
    (tmp_path / "a.jpg").write_bytes(jpeg(tiff(*many)))
    (tmp_path / "a.png").write_bytes(header(12_000, 9_000) + struct.pack(">I", 999) + b"IDAT")
    program = """
        import sys
        from pathlib import Path
        from fbclip.errors import ImageError
        from fbclip.images import read_image
        for path in map(Path, sys.argv[1:]):
            try:
                read_image(path)
            except ImageError as error:
                print(error)
    """
    files = [tmp_path / name for name in ("a.jpg", "a.png")]
    command = [sys.executable, "-W", "default", "-c", textwrap.dedent(program), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "truncated" in done.stdout  # the PNG was taken up to its pixels


# --- sizes and cost ---


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))


@pytest.mark.parametrize("size", [(20_000, 20_000), (1, 25 * MILLION), (25 * MILLION, 1), (5001, 5000)])
def test_too_many_pixels_are_known_from_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(SizeError, match=f"{size[0]} × {size[1]}"):
        decode_image(header(*size), 25 * MILLION)
    (tmp_path / "a.png").write_bytes(header(*size))
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "a.png")
    assert isinstance(caught.value, SizeError) == (size != (5001, 5000))


def test_a_jpeg_of_too_many_pixels() -> None:
    data = bytearray(encoded(Image.new("L", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 30_000, 30_000)
    with pytest.raises(SizeError, match="pixels are taken"):
        decode_image(bytes(data), 25 * MILLION)


def test_a_line_scan_is_read_from_a_file(tmp_path: Path) -> None:
    Image.new("1", (20_000, 5_000), 1).save(tmp_path / "scan.png")
    assert read_image(tmp_path / "scan.png").shape == (5_000, 20_000, 3)


def with_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("L", (64, 64), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (number - data.count(b"\xff\xda") + 1) + data[-2:]


def with_chunks(number: int) -> bytes:
    data, chunk = encoded(Image.new("L", (9, 9)), "PNG"), b"prVt"
    return data[:33] + (bytes(4) + chunk + struct.pack(">I", zlib.crc32(chunk))) * number + data[33:]


GREY = ((256, 3, 1, short(100)), (257, 3, 1, short(100)), (258, 3, 1, short(8)), (259, 3, 1, short(8)))
RUN_LENGTHS = struct.pack("<IiiHHIIiiII", 40, 5000, 5000, 1, 4, 2, 200_000, 0, 0, 16, 0)
BOMBS = {
    "scans": lambda: with_scans(400),
    "tiles": lambda: tiff(*GREY, (262, 3, 1, short(1)), (322, 3, 1, short(20_000)), (323, 3, 1, short(20_000))),
    "strips": lambda: tiff(*GREY, (273, 3, 200_000, bytes(400_000)), (278, 3, 1, short(1))),
    "tags": lambda: tiff(*GREY, *((40_000 + tag, 7, MILLION, b"") for tag in range(99)), after=bytes(MILLION)),
    "directory": lambda: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1 << 40) + bytes(1000),
    "chunks": lambda: with_chunks(200_000),
    "segments": lambda: b"\xff\xd8" + b"\xff\xe3\0\2" * 200_000 + encoded(Image.new("L", (9, 9)), "JPEG")[2:],
    "run lengths": lambda: b"BM" + struct.pack("<IHHI", 200_118, 0, 0, 118) + RUN_LENGTHS + bytes(64) + bytes(200_000),
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_what_would_cost_too_much_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes]
) -> None:
    data = make()
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match=r"more than|larger than|too long"):
        decode_image(data, 25 * MILLION)


def test_what_is_only_long_is_read() -> None:
    assert decode_image(with_scans(40), MILLION).shape == (64, 64, 3)
    assert decode_image(with_chunks(500), MILLION).shape == (9, 9, 3)
    exif = b"".join(b"\xff\xe1\xff\xff" + b"Exif\0\0".ljust(65_533, b"x") for _ in range(100))
    assert decode_image(b"\xff\xd8" + exif + encoded(Image.new("L", (9, 9)), "JPEG")[2:], MILLION).shape == (9, 9, 3)


def test_a_file_much_larger_than_its_pixels(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"):
        Image.fromarray(NOISE).save(tmp_path / name)
        with (tmp_path / name).open("r+b") as file:
            file.truncate(3 << 30)  # a hole, not on the disk
        with pytest.raises(ImageError, match="MB"):
            read_image(tmp_path / name)


@pytest.mark.slow
def test_memory_for_large_pictures(tmp_path: Path) -> None:
    """25 megapixels of each kind, read in a process of their own: decoder, result and little more."""
    side = 5000
    kinds: dict[str, Image.Image] = {
        "deep.png": Image.fromarray(np.full((side, side), 30_000, np.uint16)),
        "float.tif": Image.fromarray(np.full((side, side), 0.5, np.float32)),
        "clear.png": Image.new("RGBA", (side, side), (90, 90, 90, 200)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name, **({"compression": "tiff_deflate"} if name.endswith("tif") else {}))
    program = """
        import sys
        from pathlib import Path
        from fbclip.images import read_image
        def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
        before = peak()
        for path in sys.argv[1:]:
            assert read_image(Path(path)).shape == (5000, 5000, 3)
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *(tmp_path / name for name in kinds)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 75 < float(done.stdout) < 300  # MB; with copies in float64 it was 800 and more


# --- depth ---

RAMP = np.linspace(0, 1, 40 * 60).reshape(40, 60)
EIGHT = np.rint(RAMP * 255).astype(np.uint8)
READ = {
    "16 bit": ((RAMP * 65535).astype(np.uint16), "png"),
    "16 bit TIFF": ((RAMP * 65535).astype(">u2"), "tif"),
    "floats to 1": (RAMP.astype(np.float32), "tif"),
    "floats to 255": ((RAMP * 255).astype(np.float32), "tif"),
    "floats to 65535": ((RAMP * 65535).astype(np.float32), "tif"),
    "integers to 255": (EIGHT.astype(np.int32), "tif"),
    "integers to 65535": ((RAMP * 65535).astype(np.int32), "tif"),
}
BLACK = np.zeros((40, 60))
REFUSED = {
    "12 bit in 16": ((RAMP * 4095).astype(np.uint16), "png", "nowhere above 4095"),
    "10 bit in 16": ((RAMP * 1023).astype(np.uint16), "tif", "multiply 12 bit by 16"),
    "floats to 1.1": ((RAMP * 1.1).astype(np.float32), "tif", "values from 0 to 1.1"),
    "floats to 1020": ((RAMP * 1020).astype(np.float32), "tif", "values from 0 to 1020"),
    "floats to 4095": ((RAMP * 4095).astype(np.float32), "tif", "scale nobody knows"),
    "floats below 0": ((RAMP - 0.5).astype(np.float32), "tif", "values from -0.5 to 0.5"),
    "NaN": (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "tif", "no finite numbers"),
    "infinity": (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "tif", "no finite numbers"),
    "all of 32 bit": ((RAMP * (2**31 - 1)).astype(np.int32), "tif", "scale nobody knows"),
    "signed": (((RAMP - 0.5) * 60_000).astype(np.int32), "tif", "values from -30000"),
    "integers to 12": ((RAMP * 12).astype(np.int32), "tif", "with some above 15"),
}


@pytest.mark.parametrize("strip", [1 << 21, 100], ids=["at once", "in strips"])
@pytest.mark.parametrize(("values", "suffix"), READ.values(), ids=READ)
def test_deep_pictures_have_the_scale_of_their_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: Any, suffix: str, strip: int
) -> None:
    monkeypatch.setattr(reading, "STRIP", strip)
    image = Image.fromarray(values)
    image.save(tmp_path / f"a.{suffix}")
    for pixels in (read_image(tmp_path / f"a.{suffix}"), to_rgb(image)):
        assert pixels.dtype == np.uint8 and pixels.shape == (40, 60, 3)
        assert abs(pixels.astype(int) - EIGHT[..., None]).max() <= 1


@pytest.mark.parametrize(("values", "suffix", "message"), REFUSED.values(), ids=REFUSED)
def test_values_of_no_known_scale_are_refused(tmp_path: Path, values: Any, suffix: str, message: str) -> None:
    image = Image.fromarray(values)
    image.save(tmp_path / f"a.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=rf"a\.{suffix} .*{message}"):
            read_image(tmp_path / f"a.{suffix}")
        with pytest.raises(ImageError, match=message):
            to_rgb(image)


def test_black_is_black_at_any_depth() -> None:
    for kind in (np.uint16, np.float32, np.int32):
        assert not to_rgb(Image.fromarray(BLACK.astype(kind))).any()


def test_a_tiff_that_says_12_bit_is_of_12_bit(tmp_path: Path) -> None:
    packed = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048
    entries = ((256, 3, 1, short(2)), (257, 3, 1, short(1)), (258, 3, 1, short(12)), (259, 3, 1, short(1)))
    entries += (
        (262, 3, 1, short(1)),
        (273, 4, 1, struct.pack("<I", 130)),
        (277, 3, 1, short(1)),
        (278, 3, 1, short(1)),
    )
    data = tiff(*entries, (279, 4, 1, struct.pack("<I", 3))).ljust(130, b"\0") + packed
    assert decode_image(data, MILLION)[0, :, 0].tolist() == [255, 128]


def test_colours_of_12_bit_in_16_are_no_black_picture() -> None:
    """Pillow reads the high byte of each channel, which is 0 to 15 here."""
    rows = b"".join(b"\0" + struct.pack(">9H", *range(3600, 4050, 50)) for _ in range(3))
    chunks = [header(3, 3)[:16]]
    for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", 3, 3, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows))):
        chunks.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    dark = (
        chunks[0][:8] + b"".join(chunks[1:]) + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    )
    with pytest.raises(ImageError, match="nowhere above 4095"):
        decode_image(dark, MILLION)


def test_a_mask_of_floats_has_no_need_of_a_scale(tmp_path: Path) -> None:
    for number, top in enumerate((1, 255, 1020)):
        file = tmp_path / f"{number}.tif"
        Image.fromarray(np.where(RAMP > 0.5, top, 0).astype(np.float32)).save(file)
        assert (read_mask(file) == (RAMP > 0.5)).all()
    Image.fromarray(np.where(RAMP > 0.5, np.nan, 0).astype(np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ImageError, match="no finite numbers"):
        read_mask(tmp_path / "nan.tif")


def test_a_predictor_has_the_same_rules() -> None:
    predict = Predictor(device="cpu")
    grey = np.asarray(Image.fromarray(NOISE).convert("L"))
    wanted = predict(Image.fromarray(grey)).score
    assert predict(Image.fromarray(grey.astype(np.float32))).score == wanted
    for wrong in (Image.fromarray(grey.astype(np.float32) * 4), Image.new("RGB", (0, 5))):
        with pytest.raises(ImageError, match="the image has"):
            predict(wrong)


# --- kinds and pages ---


def test_kinds_of_files(tmp_path: Path) -> None:
    picture = Image.fromarray(NOISE)
    for name, kind in (("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.gif", "GIF"), ("a.ppm", "PPM"), ("a.apng", "PNG")):
        picture.save(tmp_path / name, kind)
        assert read_image(tmp_path / name).shape == NOISE.shape
        assert Path(name).suffix in reading.SUFFIXES
    picture.convert("L").save(tmp_path / "a.pgm")
    picture.convert("1").save(tmp_path / "a.pbm")
    assert set(np.unique(read_image(tmp_path / "a.pbm"))) == {0, 255}
    assert (read_image(tmp_path / "a.pgm")[..., 0] == np.asarray(picture.convert("L"))).all()


def test_more_pages_are_told(tmp_path: Path) -> None:
    pages = [Image.fromarray(NOISE), Image.fromarray(NOISE[::-1]), Image.fromarray(NOISE[:, ::-1])]
    for name in ("a.tif", "a.gif", "a.webp", "a.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert note_of_pages(tmp_path / name) == f"{tmp_path / name}: 2 more pages are not inspected"
    pages[0].save(tmp_path / "two.tif", save_all=True, append_images=pages[1:2])
    assert note_of_pages(tmp_path / "two.tif").endswith("1 more page is not inspected")
    for name in ("one.tif", "one.jpg", "one.png", "one.webp", "one.gif"):
        pages[0].save(tmp_path / name)
        assert note_of_pages(tmp_path / name) == ""
    pages[0].save(tmp_path / "a.mpo", save_all=True, append_images=pages[1:2])  # its second is a preview
    (tmp_path / "broken.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff")
    for name in ("a.mpo", "broken.tif", "nothing.png"):
        assert note_of_pages(tmp_path / name) == ""


def test_a_pyramid_is_one_page(tmp_path: Path) -> None:
    smaller = tiff(*sorted((*GREY, (254, 4, 1, struct.pack("<I", 1)))))
    assert smaller.index(bytes(4), 10)
    first = bytearray(tiff(*GREY))
    link = 8 + 2 + 12 * len(GREY)
    first[link : link + 4] = struct.pack("<I", len(first))
    (tmp_path / "a.tif").write_bytes(bytes(first) + smaller[8:])
    assert more_pages(tmp_path / "a.tif") == 0
    (tmp_path / "a.tif").write_bytes(bytes(first) + tiff(*GREY)[8:])
    assert more_pages(tmp_path / "a.tif") == 1


def test_masks_of_one_image_have_one_size(tmp_path: Path) -> None:
    for name, box in (("a.png", (slice(0, 9), slice(0, 9))), ("b.png", (slice(20, 29), slice(20, 29)))):
        mask = np.zeros((40, 60), np.uint8)
        mask[box] = 255
        Image.fromarray(mask).save(tmp_path / name)
    assert reading.union_of_masks([tmp_path / "a.png", tmp_path / "b.png"]).sum() == 2 * 81
    Image.new("L", (9, 9)).save(tmp_path / "c.png")
    with pytest.raises(UsageError, match="masks of one image have one size"):
        reading.union_of_masks([tmp_path / "a.png", tmp_path / "c.png"])


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 16}])
def test_a_jpeg_whose_data_end_early_is_refused_although_it_has_its_end_mark(settings: dict[str, Any]) -> None:
    """Decoders paint what is missing in grey, and such a part may look good."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90, **settings)
    whole = file.getvalue()
    decode_image(whole, 10**6)
    for share in (0.4, 0.6, 0.8, 0.95, 0.99):
        cut = whole[: int(share * len(whole))] + b"\xff\xd9"
        with pytest.raises(ImageError, match="end before its last pixel"):
            decode_image(cut, 10**6)
