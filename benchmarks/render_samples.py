"""Render the sample images that ship with the package: python benchmarks/render_samples.py [OUT_DIR].

Six more that don't ship, and their masks: python benchmarks/render_samples.py --more OUT_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rendered_parts import Drawn, Mask, Picture, parts

Photo = tuple[NDArray[np.uint8], Mask]  # (H, W, 3) RGB and (H, W), 1 where the defect is
SHIPPED = Path(__file__).resolve().parent.parent / "fbclip" / "assets" / "samples"


def brushed_steel(rng: np.random.Generator, height: int, width: int) -> Picture:
    """Ground steel: streaks along x, a soft band of light."""
    streaks = sum(
        cv2.resize(rng.random((height // fine, 6 + 4 * k), np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        for k, fine in enumerate((1, 2, 5))
    )
    light = np.exp(-(((np.arange(height) / height - 0.35) / 0.45) ** 2))[:, None]
    grey = 0.42 + 0.10 * (streaks / 3 - 0.5) + 0.16 * light
    return (grey[..., None] * np.array([0.97, 0.99, 1.03])).astype(np.float32)


def scratch(image: Picture, points: list[tuple[int, int]], width: int) -> Picture:
    """A groove: dark inside, a bright burr along one edge."""
    for shift, level, thick in ((width, 0.93, max(1, width // 2)), (0, 0.16, width)):
        alpha = np.zeros(image.shape[:2], np.float32)
        path = np.array(points, np.int32)[:, None] + shift
        cv2.polylines(alpha, [path], False, 1.0, thick, cv2.LINE_AA)
        image = image + cv2.GaussianBlur(alpha, (0, 0), 0.8)[..., None] * (level - image)
    return image.astype(np.float32)


def casting(rng: np.random.Generator, height: int, width: int) -> Picture:
    """A cast ring with a machined bore on a dark belt."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    far = np.hypot(x - width * 0.5, y - height * 0.5) / height
    rough = cv2.GaussianBlur(rng.normal(0, 1, (height, width)).astype(np.float32), (0, 0), 1.6)
    belt = 0.10 + 0.015 * rough
    shade = 0.12 * (width - x + height - y) / (width + height)
    part = 0.42 + shade + 0.05 * rough - 0.10 * np.clip((far - 0.36) / 0.05, 0, 1)
    rim = 0.62 + shade + 0.01 * np.sin(far * 900)
    grey = np.where(far < 0.41, part, belt)
    grey = np.where(far < 0.19, rim, grey)
    grey = np.where(far < 0.16, 0.07, grey)
    return np.repeat(cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)[..., None], 3, axis=2)


def pit(image: Picture, centre: tuple[int, int], axes: tuple[int, int]) -> Picture:
    """A blowhole: a dark hole with a lit lower edge."""
    for shift, level, grow in ((2, 0.8, 2), (0, 0.05, 0)):
        alpha = np.zeros(image.shape[:2], np.float32)
        place = (centre[0] + shift, centre[1] + shift)
        cv2.ellipse(alpha, place, (axes[0] + grow, axes[1] + grow), 25, 0, 360, 1.0, -1, cv2.LINE_AA)
        image = image + cv2.GaussianBlur(alpha, (0, 0), 1.2)[..., None] * (level - image)
    return image.astype(np.float32)


def fabric(rng: np.random.Generator, height: int, width: int) -> Picture:
    """A plain weave of slightly uneven threads."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    wander = cv2.resize(rng.random((6, 8), np.float32), (width, height), interpolation=cv2.INTER_CUBIC) * 6
    u, v = np.sin((x + wander) * 2 * np.pi / 14), np.sin((y + wander) * 2 * np.pi / 14)
    over = (np.sin((x + wander) * np.pi / 14) * np.sin((y + wander) * np.pi / 14)) > 0
    grey = 0.5 + 0.12 * np.where(over, u, v) + 0.03 * rng.normal(0, 1, (height, width))
    return (grey[..., None] * np.array([0.80, 0.95, 1.12])).astype(np.float32)


def stain(rng: np.random.Generator, image: Picture, centre: tuple[int, int], radius: int) -> Picture:
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    ragged = cv2.resize(rng.random((14, 18), np.float32), image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    alpha = np.clip(2.0 - np.hypot(x - centre[0], y - centre[1]) / radius - ragged, 0, 0.75)
    alpha = cv2.GaussianBlur(alpha, (0, 0), 2)
    return (image * (1 - alpha[..., None] * (1 - np.array([0.30, 0.20, 0.14])))).astype(np.float32)


def photograph(rng: np.random.Generator, image: Picture) -> NDArray[np.uint8]:
    """Vignette and sensor noise."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    corner = ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2)[..., None]
    noisy = image * (1 - 0.45 * corner) + rng.normal(0, 0.008, image.shape)
    return (noisy.clip(0, 1) * 255).astype(np.uint8)


def changed(good: Picture, defective: Picture) -> Mask:
    """Where a defect was drawn: 1 where the picture without it looks different, with gaps of a few pixels closed."""
    differs = (np.abs(defective - good).max(axis=2) > 0.08).astype(np.uint8)
    return cv2.morphologyEx(differs, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))


def photographed(rng: np.random.Generator, drawn: dict[str, Drawn]) -> dict[str, Photo]:
    return {name: (photograph(rng, picture), mask) for name, (picture, mask) in drawn.items()}


def samples() -> dict[str, Photo]:
    """The four that ship, name -> (picture, mask). The order of the random numbers is that of the shipped files."""
    rng = np.random.Generator(np.random.PCG64(7))
    good, steel = brushed_steel(rng, 480, 720), brushed_steel(rng, 480, 720)
    scratched = scratch(steel, [(250, 380), (330, 322), (430, 262), (545, 214)], 4)
    cast = casting(rng, 600, 640)
    pitted = pit(cast, (455, 215), (17, 12))
    cloth = fabric(rng, 520, 780)
    stained = stain(rng, cloth, (520, 190), 60)
    drawn = {
        "brushed-steel-good": (good, changed(good, good)),
        "brushed-steel-scratch": (scratched, changed(steel, scratched)),
        "casting-pit": (pitted, changed(cast, pitted)),
        "fabric-stain": (stained, changed(cloth, stained)),
    }
    return photographed(rng, drawn)


def more() -> dict[str, Photo]:
    """Six that don't ship, name -> (picture, mask); a mask of a good part is all 0."""
    rng = np.random.Generator(np.random.PCG64(8))
    return photographed(rng, parts(rng))


def write(out: Path, photos: dict[str, Photo], masks: bool) -> None:
    """`NAME.jpg` for each picture and, with `masks`, `NAME-mask.png`, white where the defect is."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (rgb, mask) in photos.items():
        cv2.imwrite(str(out / f"{name}.jpg"), rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        if masks:
            cv2.imwrite(str(out / f"{name}-mask.png"), mask * 255)


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the sample images.")
    parser.add_argument("out_dir", nargs="?", type=Path, default=SHIPPED, help="where the four that ship go")
    parser.add_argument(
        "--more", type=Path, metavar="OUT_DIR", help="write the six others and their masks, here, instead"
    )
    args = parser.parse_args()
    if args.more:
        write(args.more, more(), masks=True)
    else:
        write(args.out_dir, samples(), masks=False)


if __name__ == "__main__":
    main()
