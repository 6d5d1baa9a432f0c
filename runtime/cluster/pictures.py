"""What people look at of an archive: how its scores are spread, and the pictures with the highest ones."""

from __future__ import annotations

import io
from pathlib import PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fbclip.errors import FBClipError
from fbclip.images import encode_image
from fbclip.runtime.cluster.archive import Item, Reader, read_content
from fbclip.runtime.cluster.results import BINS, Receipt
from fbclip.runtime.histogram import GOOD, Kind
from fbclip.runtime.histogram import draw_histogram as draw
from fbclip.runtime.predictor import Predictor
from fbclip.terminal import printable

SIDE = 420  # pixels of a picture on the sheet
COLUMNS, DRAWN = 4, 12
INK = (36, 41, 47)


def draw_histogram(total: Receipt, threshold: float) -> bytes:
    """The scores of an archive, as PNG."""
    counts = np.array(total.histogram, np.int64)
    defects = total.verdicts.get("defect", 0)
    title = f"{counts.sum():,} images judged, {defects:,} of them defective"
    kind = Kind(f"{counts.sum():,} images", GOOD, counts)
    data = io.BytesIO()
    draw([kind], np.linspace(0, 1, BINS + 1), threshold, title).save(data, "PNG")
    return data.getvalue()


def draw_worst(total: Receipt, predictor: Predictor, reader: Reader) -> bytes | None:
    """The pictures with the highest scores, inspected again and drawn with their heat maps, as JPEG; None where none of
    them can be read any more."""
    cells = []
    for _, name in total.worst[:DRAWN]:
        try:
            overlay = predictor(read_content(reader.fetch(Item(name)))).overlay(SIDE, zoom=False)
        except (FBClipError, OSError):  # of a table, or gone meanwhile
            continue
        cells.append(_cell(overlay, "/".join(PurePosixPath(name).parts[-2:])))
    if not cells:
        return None
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % min(COLUMNS, len(cells)))
    columns = min(COLUMNS, len(cells))
    rows = [np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return encode_image(np.vstack(rows).astype(np.uint8))


def _cell(overlay: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """A picture in a square of the sheet, its name below."""
    factor = SIDE / max(overlay.shape[:2])
    size = round(overlay.shape[1] * factor), round(overlay.shape[0] * factor)
    shown = np.asarray(Image.fromarray(overlay).resize(size, Image.Resampling.BOX))
    square = np.full((SIDE, SIDE, 3), 255, np.uint8)
    square[: size[1], : size[0]] = shown
    caption = np.full((26, SIDE, 3), 255, np.uint8)
    text = printable(name).encode("ascii", "replace").decode()[-50:]
    cv2.putText(caption, text, (4, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)
    return np.pad(np.vstack([square, caption]), ((0, 12), (0, 16), (0, 0)), constant_values=255).astype(np.uint8)
