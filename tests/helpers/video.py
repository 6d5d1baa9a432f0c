"""Videos of parts on a belt."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from fbclip.assets import SAMPLES


def write_video(path: Path, kinds: list[str]) -> None:
    """Frames of brushed steel, good or scratched, at 10 per second."""
    pictures = {
        kind: np.ascontiguousarray(np.asarray(Image.open(SAMPLES / f"brushed-steel-{kind}.jpg"))[..., ::-1])
        for kind in set(kinds)
    }
    height, width = pictures[kinds[0]].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (width, height))
    for kind in kinds:
        writer.write(pictures[kind])
    writer.release()
