"""Image files to frames, uint8 (H, W, 3) RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fbclip.errors import ImageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read a file upright (EXIF) as uint8 (H, W, 3) RGB.

    16-bit images are scaled by 1/257; transparent pixels are laid on black; the first page or frame is taken.

    Raises:
        ImageError: missing, empty, damaged, no image, or more pixels than Pillow takes for honest (179 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses twice that size
            with Image.open(path) as file:
                return to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise ImageError(f"no file at {path}") from error
    except UnidentifiedImageError as error:
        empty = path.is_file() and path.stat().st_size == 0
        raise ImageError(f"{path} is {'empty' if empty else 'no image that Pillow can read'}") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} can't be read: {error}") from error


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


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read a defect mask as uint8 (H, W) of 0 and 1: whatever is not black is defective.

    Raises:
        ImageError: as `read_image`.
    """
    mask: NDArray[np.uint8] = (read_image(path).max(axis=2) > 0).astype(np.uint8)
    return mask
