"""Render the sample images that ship with the package: python benchmarks/render_samples.py [OUT_DIR]."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]  # (H, W, 3), 0..1, RGB


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


def main(out: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(7))
    groove = [(250, 380), (330, 322), (430, 262), (545, 214)]
    pictures = {
        "brushed-steel-good": brushed_steel(rng, 480, 720),
        "brushed-steel-scratch": scratch(brushed_steel(rng, 480, 720), groove, 4),
        "casting-pit": pit(casting(rng, 600, 640), (455, 215), (17, 12)),
        "fabric-stain": stain(rng, fabric(rng, 520, 780), (520, 190), 60),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        bgr = photograph(rng, picture)[..., ::-1]
        cv2.imwrite(str(out / f"{name}.jpg"), bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])


if __name__ == "__main__":
    default = Path(__file__).resolve().parent.parent / "fbclip" / "assets" / "samples"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
