"""The parts and the picture of docs/guides/adapt.md: python benchmarks/adapt_pictures.py [FOLDER, runs/adapt-guide if left out].

FOLDER/good          ten good castings, none lying or lit like another
FOLDER/more          forty more
FOLDER/test          two good ones and four with a pit, a scratch, a stain and a filled bore
docs/pictures/adapt.jpg   above the four as the included model draws them, below after `fbclip adapt` from FOLDER/good
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from nano_pictures import PICTURES, row
from PIL import Image
from render_samples import Picture, casting, photograph, pit, scratch, stain

import fbclip

HEIGHT, WIDTH = 480, 512
Draw = Callable[[np.random.Generator, Picture], Picture]


def plugged(rng: np.random.Generator, image: Picture) -> Picture:
    """A bore that was not machined through: the grey of the part in the middle of the hole."""
    alpha = np.zeros(image.shape[:2], np.float32)
    cv2.ellipse(alpha, (WIDTH // 2 + 18, HEIGHT // 2 - 14), (34, 27), 30, 0, 360, 1.0, -1, cv2.LINE_AA)
    return (image + cv2.GaussianBlur(alpha, (0, 0), 3)[..., None] * (0.4 - image)).astype(np.float32)


DEFECTS: dict[str, Draw] = {
    "pit": lambda rng, image: pit(image, (372, 168), (11, 8)),
    "scratch": lambda rng, image: scratch(image, [(120, 300), (165, 350), (225, 388)], 2),
    "stain": lambda rng, image: stain(rng, image, (330, 345), 26),
    "bore": plugged,
}


def part(rng: np.random.Generator, draw: Draw | None = None) -> Image.Image:
    """A casting as it comes along a belt: turned and moved a little, lit a little otherwise."""
    image = casting(rng, HEIGHT, WIDTH)
    if draw:
        image = draw(rng, image)
    place = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), rng.normal(0, 4), 1 + rng.normal(0, 0.01))
    place[:, 2] += rng.uniform(-9, 9, 2)
    image = cv2.warpAffine(image, place, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT_101).astype(np.float32)
    return Image.fromarray(photograph(rng, (image * rng.uniform(0.85, 1.15)).astype(np.float32)))


def main(folder: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(14))
    shutil.rmtree(folder, ignore_errors=True)
    pictures = {f"good/{n:02}": part(rng) for n in range(10)} | {f"more/{n:02}": part(rng) for n in range(40)}
    pictures |= {f"test/good-{n}": part(rng) for n in range(2)}
    pictures |= {f"test/{name}": part(rng, draw) for name, draw in DEFECTS.items()}
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
    learned = fbclip.adapt(None, folder / "good", out=folder / "line3.fbclip")
    shown = [folder / "test" / f"{name}.png" for name in ("good-0", *DEFECTS)]
    with fbclip.Predictor(memory=None) as alone, fbclip.Predictor(learned.bundle) as adapted:
        rows = [row([predict(path).overlay() for path in shown]) for predict in (alone, adapted)]
    Image.fromarray(np.vstack(rows)).resize((1280, 1280 * len(rows[0]) * 2 // rows[0].shape[1])).save(
        PICTURES / "adapt.jpg", quality=85
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/adapt-guide"))
