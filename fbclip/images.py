"""Image files to frames, uint8 (H, W, 3) RGB, and mask files to 0 and 1."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.errors import FBClipError, ImageError
from fbclip.opening import SUFFIXES, Picture, is_image, more_pages, open_picture
from fbclip.terminal import printable

__all__ = [
    "SUFFIXES",
    "decode_image",
    "encode_image",
    "is_image",
    "more_pages",
    "note_of_pages",
    "read_image",
    "read_mask",
    "to_bgr",
    "to_rgb",
    "union_of_masks",
]

CLASS_LEVELS = 5  # grey levels of a mask drawn in flat greys, black included; soft edges make more
JPEG_QUALITY = 85
STRIP = 1 << 21  # pixels that are converted at once: a picture of 1920 x 1080, and little memory beside a larger one


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read a file upright (EXIF) as uint8 (H, W, 3) RGB.

    Transparent pixels are laid on black; the first page or frame is taken. What is deeper than 8 bit has the scale of
    its type, or of values that leave no doubt of it, or is refused:

    - 16 bit: by 255/65535; refused where nothing is above 4095, which is how cameras of 10 and 12 bit store theirs,
      and would be read as black. TIFF that says 12 bit: by 255/4095.
    - Floats from 0 to 1: by 255. Floats and 32-bit integers from 0 to 255: as they are, if any is above 15; from 0
      to 65535: by 255/65535, if any is above 16383. Every other range, NaN and infinity are refused.

    Raises:
        ImageError: missing, empty, damaged, no image, values of no known scale, or a file far larger than its pixels.
        SizeError: more than 178,956,970 pixels, or a side of more than 65,535.
    """
    return _rgb(open_picture(path), printable(path))


def pixels_sha256(image: NDArray[np.uint8]) -> str:
    """The hash of an image's shape and pixels, whatever file it came from."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def note_of_pages(path: Path) -> str:
    """A line for a person where a file has more pages or frames than the one that is read; empty otherwise."""
    more = more_pages(path)
    return f"{printable(path)}: {more} more page{'s are' if more > 1 else ' is'} not inspected" if more > 0 else ""


def decode_image(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """What `read_image` makes of a file's content, for content of unknown origin; uint8 (H, W, 3) RGB.

    Of Pillow's decoders only those of `FORMATS` see it, and the size in its header decides before any pixel.

    Raises:
        ImageError: as `read_image`.
        SizeError: more pixels than allowed, or a side of more than 65,535.
    """
    return _rgb(open_picture(bytes(data), max_pixels), "the image")


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read a defect mask as uint8 (H, W) of 0 and 1, upright (EXIF).

    What counts as defective depends on how the mask was written:

    - class numbers (no value above 127) and flat greys or colours (at most 5 levels): whatever is not 0;
    - soft edges (more levels): above half of the largest value;
    - JPEG: above 127, because compression leaves faint specks beside every edge.

    Colours, palettes and transparency count by the brightest channel of what `read_image` sees; deeper values are
    compared as they are.

    Raises:
        ImageError, SizeError: as `read_image`, but for the scale of values, which doesn't matter here.
    """
    picture = open_picture(path)
    return _guarded(_mask, picture, printable(path))


def union_of_masks(paths: Iterable[Path]) -> NDArray[np.uint8]:
    """What any of an image's masks marks: uint8 (H, W) of 0 and 1.

    Raises:
        ImageError: as `read_mask`, or they have several sizes.
    """
    union: NDArray[np.uint8] | None = None
    for path in paths:
        mask = read_mask(path)
        if union is not None and mask.shape != union.shape:
            raise ImageError(f"masks of one image have one size; {printable(path)} has another than the one before it")
        union = mask if union is None else union | mask
    if union is None:
        raise ImageError("an image of no masks has no union of masks")
    return union


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A Pillow image as `read_image` would read it from a file without EXIF: uint8 (H, W, 3) RGB.

    Raises:
        ImageError: it can't be decoded, has no pixels, or values of no known scale.
    """
    return _rgb(Picture(image, image.format, 8), "the image")


def to_bgr(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame uint8 (H, W, 3) RGB as OpenCV has it."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8)


def _rgb(picture: Picture, name: str) -> NDArray[np.uint8]:
    return _guarded(_to_rgb, picture, name)


def _guarded(convert: Callable[[Picture, str], NDArray[np.uint8]], picture: Picture, name: str) -> NDArray[np.uint8]:
    try:
        picture.image.load()
        if not picture.image.width or not picture.image.height:
            raise ImageError(f"{name} has no pixels: its size is {picture.image.width} × {picture.image.height}")
        return convert(picture, name)
    except FBClipError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name} can't be read: it takes more memory than there is") from error
    except Exception as error:
        raise ImageError(f"{name} can't be read: {printable(error)}") from error


def _to_rgb(picture: Picture, name: str) -> NDArray[np.uint8]:
    image = picture.image
    if image.mode == "F" or image.mode.startswith("I"):
        factor = np.float32(255 / _white(picture, name))

        def convert(strip: Image.Image) -> NDArray[np.uint8]:
            grey = np.rint(np.asarray(strip).astype(np.float32) * factor).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)

        return _assemble(image, convert)
    rgb = _assemble(image, _colours)
    if picture.bits == 16 and 0 < rgb.max() <= 15:  # Pillow keeps the high byte of 16-bit colours
        raise ImageError(_DARK.format(name=name))
    return rgb


def _colours(strip: Image.Image) -> NDArray[np.uint8]:
    if "A" in strip.getbands() or "transparency" in strip.info:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, (0, 0, 0, 255)), strip)
    return np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


_DARK = (
    "{name} is of 16 bit but nowhere above 4095, which is how 10 and 12 bit are often stored; it would be read as black: "
    "multiply 12 bit by 16 (10 bit by 64), or save 8 bit"
)


def _white(picture: Picture, name: str) -> float:
    """The value that is white by the rules of `read_image`."""
    image = picture.image
    low, high = _extremes(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and picture.format in ("PNG", "PPM")):  # Pillow scales PPM's
        if picture.bits == 12:
            return 4095
        if 0 < high <= 4095:
            raise ImageError(_DARK.format(name=name))
        return 65535
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError(f"{name} has pixels that are no finite numbers (NaN or infinity): replace them")
    if low >= 0:
        if image.mode == "F" and high <= 1:
            return 1
        if high == 0 or 15 < high <= 255:
            return 255
        if 16383 < high <= 65535:
            return 65535
    kind = "floats are 0 to 1, or " if image.mode == "F" else "32-bit integers are "
    raise ImageError(
        f"{name} has values from {low:g} to {high:g}, whose scale nobody knows: {kind}0 to 255 with some above 15, or "
        f"0 to 65535 with some above 16383; or save 8 or 16 bit"
    )


def _extremes(image: Image.Image) -> tuple[float, float]:
    """The lowest and the highest value of a picture of one channel; NaN where there is one."""
    found = [(values.min(), values.max()) for values in (np.asarray(strip) for _, strip in _strips(image))]
    return float(np.min([low for low, _ in found])), float(np.max([high for _, high in found]))


def _mask(picture: Picture, name: str) -> NDArray[np.uint8]:
    image = picture.image
    single = len(image.getbands()) == 1 and image.mode != "P" and "transparency" not in image.info

    def brightest(strip: Image.Image) -> NDArray[Any]:
        values: NDArray[Any] = np.asarray(strip) if single else _colours(strip).max(axis=2)
        return values

    values = _assemble(image, brightest)
    if image.mode == "F" and not np.isfinite(values).all():
        raise ImageError(f"{name} has pixels that are no finite numbers (NaN or infinity): replace them")
    if picture.format == "JPEG":
        level = 127.0
    else:
        levels = np.unique(values)
        level = 0.0 if len(levels) <= CLASS_LEVELS or levels[-1] <= 127 else float(levels[-1]) / 2
    mask: NDArray[np.uint8] = (values > level).astype(np.uint8)
    return mask


def _strips(image: Image.Image) -> Iterable[tuple[int, Image.Image]]:
    """A picture in strips of about `STRIP` pixels, each with its first row: a conversion then takes little memory."""
    width, height = image.size
    rows = max(1, STRIP // width)
    if rows >= height:
        return [(0, image)]
    return ((top, image.crop((0, top, width, min(top + rows, height)))) for top in range(0, height, rows))


def _assemble(image: Image.Image, convert: Callable[[Image.Image], NDArray[Any]]) -> NDArray[Any]:
    result: NDArray[Any] | None = None
    for top, strip in _strips(image):
        values = convert(strip)
        if len(values) == image.height:
            return values
        if result is None:
            result = np.empty((image.height, *values.shape[1:]), values.dtype)
        result[top : top + len(values)] = values
    assert result is not None
    return result


def encode_image(image: NDArray[Any], suffix: str = ".jpg", quality: int = JPEG_QUALITY) -> bytes:
    """A picture, RGB uint8 (H, W, 3) or grey uint16 (H, W), as the bytes of a ".jpg" or ".png" file.

    Args:
        quality: of a JPEG, 0 to 100.

    Raises:
        FBClipError: it is too large for that format.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    try:
        done, data = cv2.imencode(suffix, to_bgr(image) if image.ndim == 3 else image, options)
    except cv2.error:
        done = False
    if not done:
        height, width = image.shape[:2]
        raise FBClipError(f"a picture of {width} × {height} can't be written as {suffix}: use a smaller one")
    return data.tobytes()
