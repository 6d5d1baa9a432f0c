"""What a `Predictor` may be given: images in every form, one or several."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.errors import ImageError, UsageError
from fbclip.folders import list_images
from fbclip.images import read_image, to_rgb

One: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8]"


def listed(image: Any) -> tuple[Sequence[One], bool]:
    """The images of a list, a batch, a folder or a glob, or the one image; and whether it is one."""
    if isinstance(image, (list, tuple)):
        return image, False
    if isinstance(image, np.ndarray) and image.ndim == 4:
        return list(image), False
    if isinstance(image, (str, Path)):
        text = str(image)
        if os.path.isdir(text) or (glob.has_magic(text) and not os.path.lexists(text)):  # noqa: PTH112 (never raises)
            return list_images([text], lambda line: warnings.warn(line, stacklevel=5)), False
    return [image], True


def as_frame(image: One, channel_order: str) -> NDArray[np.uint8]:
    """An image as uint8 (H, W, 3) RGB."""
    if channel_order not in ("rgb", "bgr"):
        raise UsageError(f"a channel order is rgb or bgr; got {channel_order!r}", option="channel_order")
    if isinstance(image, (str, Path)):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"an image is a path, a Pillow image or an array, and several are a list of these; got "
            f"{type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.size == 0:
        raise ImageError(f"a frame is uint8 (H, W, 3) or (H, W); got {image.dtype} {image.shape}{_cure(image)}")
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return image if channel_order == "rgb" else np.ascontiguousarray(image[..., ::-1])


def _cure(image: NDArray[Any]) -> str:
    """What makes a frame of an array that is none, where that can be said."""
    if image.dtype.kind == "f":
        return ": of values 0 to 1 pass (255 * image).round().astype(np.uint8)"
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 4:
        return ": pass image[..., :3], without its alpha"
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] == 3:
        return ": pass image.transpose(1, 2, 0), with the channels last"
    return ""
