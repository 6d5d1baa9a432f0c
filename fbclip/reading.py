"""Image files to frames, uint8 (H, W, 3) RGB, and mask files to 0 and 1."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fbclip.errors import ImageError, SizeError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's names of what SUFFIXES are
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
MAX_SIDE = 65_535  # pixels of an upload, the most that JPEG knows
CLASS_LEVELS = 5  # grey levels of a mask drawn in flat greys, black included; soft edges make more


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read a file upright (EXIF) as uint8 (H, W, 3) RGB.

    16-bit images are scaled by 1/257; transparent pixels are laid on black; the first page or frame is taken.

    Raises:
        ImageError: missing, empty, damaged, no image, or more pixels than Pillow takes for honest (179 million).
    """
    return _read(path, to_rgb)


def decode_image(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """What `read_image` makes of a file's content, for content of unknown origin; uint8 (H, W, 3) RGB.

    Of Pillow's decoders only those of `FORMATS` see it, and the size in its header decides before any pixel.

    Raises:
        ImageError: as `read_image`.
        SizeError: more pixels than allowed, or a side of more than `MAX_SIDE`.
    """
    return _read(BytesIO(data), to_rgb, max_pixels)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read a defect mask as uint8 (H, W) of 0 and 1, upright (EXIF).

    What counts as defective depends on how the mask was written:

    - class numbers (no value above 127) and flat greys or colours (at most 5 levels): whatever is not 0;
    - soft edges (more levels): above half of the largest value;
    - JPEG: above 127, because compression leaves faint specks beside every edge.

    Colours, palettes and transparency count by the brightest channel of what `read_image` sees; 16-bit values are
    compared as they are.

    Raises:
        ImageError: as `read_image`.
    """
    return _read(path, _to_mask)


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey; Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.float64)
        deep = image.mode.startswith("I;16") or values.max(initial=0) > 255
        grey = np.clip(np.round(values / 257 if deep else values), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


def _to_mask(image: Image.Image) -> NDArray[np.uint8]:
    single = len(image.getbands()) == 1 and image.mode != "P" and "transparency" not in image.info
    values = np.asarray(image) if single else to_rgb(image).max(axis=2)
    if image.format in ("JPEG", "MPO"):
        level = 127.0
    else:
        levels = np.unique(values)
        level = 0.0 if len(levels) <= CLASS_LEVELS or levels[-1] <= 127 else float(levels[-1]) / 2
    mask: NDArray[np.uint8] = (values > level).astype(np.uint8)
    return mask


def _read(
    source: Path | BytesIO, convert: Callable[[Image.Image], NDArray[np.uint8]], max_pixels: int | None = None
) -> NDArray[np.uint8]:
    name, formats = (source, None) if isinstance(source, Path) else ("the image", FORMATS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses twice that size
            with Image.open(source, formats=formats) as file:
                if max_pixels is not None and file.width * file.height > max_pixels:
                    raise SizeError(f"at most {max_pixels:,} pixels are taken; {name} has {file.width} × {file.height}")
                if max_pixels is not None and max(file.size) > MAX_SIDE:
                    raise SizeError(
                        f"sides of at most {MAX_SIDE:,} pixels are taken; {name} has {file.width} × {file.height}"
                    )
                ImageOps.exif_transpose(file, in_place=True)  # a copy would forget its format
                return convert(file)
    except FileNotFoundError as error:
        raise ImageError(f"no file at {name}") from error
    except UnidentifiedImageError as error:
        empty = source.is_file() and source.stat().st_size == 0 if isinstance(source, Path) else not source.getvalue()
        raise ImageError(f"{name} is {'empty' if empty else 'no image that Pillow can read'}") from error
    except SizeError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} can't be read: {error}") from error
