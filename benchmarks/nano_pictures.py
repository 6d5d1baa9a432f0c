"""Pictures of the embedded model's work: python benchmarks/nano_pictures.py

docs/pictures/samples.jpg        the sample images as `fbclip infer` draws them
docs/pictures/nano-failures.jpg  held-out rendered images it is most wrong about: defects missed, and good ones called defective
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from make_nano import HELD_OUT, JUDGE, VARIETY
from numpy.typing import NDArray
from PIL import Image

from fbclip.data.procedural import ProceduralDefects
from fbclip.folders import list_images
from fbclip.runtime.predictor import Predictor

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
SIDE, SHOWN = 320, 4
Picture = NDArray[np.uint8]


def row(pictures: list[Picture]) -> Picture:
    """Side by side, at the height of the lowest."""
    height = min(len(picture) for picture in pictures)
    scaled = [
        cv2.resize(p, (round(p.shape[1] * height / len(p)), height), interpolation=cv2.INTER_AREA) for p in pictures
    ]
    return np.hstack(scaled).astype(np.uint8)


def outlined(image: Picture, mask: Picture) -> Picture:
    """The image with the true defect's outline."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), contours, -1, (0, 220, 255), 1).astype(np.uint8)


def failures(predictor: Predictor) -> Picture:
    """Above the images with the true outlines, below what the model says: half of them missed, half false alarms."""
    data = ProceduralDefects(SIDE, HELD_OUT, JUDGE, variety=VARIETY)
    scored = [(predictor(sample.image), sample) for sample in (data[i] for i in range(HELD_OUT))]
    defective = sorted((pair for pair in scored if pair[1].label), key=lambda pair: pair[0].score)
    good = sorted((pair for pair in scored if not pair[1].label), key=lambda pair: -pair[0].score)
    chosen = [*defective[:SHOWN], *good[:SHOWN]]
    truth = [outlined(sample.image, sample.mask) for _, sample in chosen if sample.mask is not None]
    return np.vstack([np.hstack(truth), np.hstack([prediction.overlay() for prediction, _ in chosen])])


def main() -> None:
    predictor = Predictor()
    samples = row([predictor(path).overlay() for path in list_images([])])
    Image.fromarray(samples).save(PICTURES / "samples.jpg", quality=85)
    Image.fromarray(failures(predictor)).save(PICTURES / "nano-failures.jpg", quality=85)


if __name__ == "__main__":
    main()
