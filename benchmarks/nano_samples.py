"""Ten rendered pictures, with or without a defect: python benchmarks/nano_samples.py [BUNDLE] [--json F].

Right in verdict: "defect" where there is one, "good" where there is none. Right in place: the map's highest pixel lies
on the defect, or no further from it than a patch of the model; a good part has no place to be wrong in. The six of
`rendered_parts.py` were drawn without looking at what any model says of them.
Writes docs/pictures/rendered.jpg, where the true outlines are drawn beside the heat maps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from nano_pictures import PICTURES, Picture, outlined
from PIL import Image, ImageOps
from render_samples import Photo, more, samples

from fbclip.runtime.predictor import Prediction, Predictor

CELL, COLUMNS = (
    (375, 300),
    5,
)  # of the montage: width and height of a picture in px, pairs of pictures beside each other


class Found(NamedTuple):
    """What was said of a picture, and whether it is right."""

    prediction: Prediction
    verdict: bool
    place: bool


def judged(predictor: Predictor, photo: Photo) -> Found:
    rgb, mask = photo
    prediction = predictor(rgb)
    if not mask.any():
        return Found(prediction, prediction.verdict == "good", True)
    patch = max(mask.shape) / predictor.bundle.manifest.grid  # px of the picture
    reach = 2 * int(np.ceil(patch)) + 1
    near = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)))
    peak = np.unravel_index(prediction.anomaly_map.argmax(), mask.shape)
    return Found(prediction, prediction.verdict == "defect", bool(near[peak]))


def montage(pairs: list[tuple[Picture, Picture]]) -> Picture:
    """Pictures above what is said of them, in rows of `COLUMNS`, on grey where they are narrower or lower than others."""
    rows = []
    for start in range(0, len(pairs), COLUMNS):
        for line in zip(*pairs[start : start + COLUMNS], strict=True):
            rows.append(np.hstack([fitted(picture) for picture in line]))
    return np.vstack(rows).astype(np.uint8)


def fitted(picture: Picture) -> Picture:
    """The picture as large as it fits into `CELL`, in its middle."""
    inside = ImageOps.contain(Image.fromarray(picture), CELL)
    return np.asarray(ImageOps.pad(inside, CELL, color=(60, 60, 60)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="the embedded default if left out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    predictor = Predictor(arguments.bundle)
    photos = samples() | more()
    found = {name: judged(predictor, photo) for name, photo in photos.items()}
    for name, (prediction, verdict, place) in found.items():
        wrong = [what for what, right in (("verdict", verdict), ("place", place)) if not right]
        said = f"wrong {' and '.join(wrong)}" if wrong else "right"
        print(f"{name:22} {prediction.score:.3f}  {prediction.verdict:7} {said}")
    pairs = [(outlined(photos[name][0], photos[name][1]), one.prediction.overlay()) for name, one in found.items()]
    Image.fromarray(montage(pairs)).save(PICTURES / "rendered.jpg", quality=85)
    if arguments.json:
        figures = {
            name: {"score": one.prediction.score, "verdict": one.verdict, "place": one.place}
            for name, one in found.items()
        }
        arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
