"""Which frames `fbclip.runtime.sight` calls unusable: good and defective ones falsely, faults of the camera rightly.

    python benchmarks/sight.py [--scenes N] [--data FOLDER] [--json results/sight.json]

Rendered: the five parts of benchmarks/align.py on a belt, 1920 x 1080, wherever they lie, with noise; "steady" is a camera
whose light goes 15 % up and down and whose focus hardly moves, "restless" one whose light goes 40 % up and down and whose
frames are blurred by 0.4 to 2 pixels. Real: pictures of magnetic tiles, cut by hand in many sizes, light and focus of
their own (FBCLIP_DATA or --data). What good frames teach is asked of others. A fault is put on each held-out frame:
defocus as a Gaussian, then the sensor's noise again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from align import HEIGHT, PARTS, WIDTH, Part, pose, scene
from numpy.typing import NDArray

from fbclip.data.surfaces import noise
from fbclip.runtime.sight import Usual, look

Picture = NDArray[np.uint8]  # (H, W, 3)
Fault = Callable[[Picture], Picture]
NOISE = 0.015 * 255  # standard deviation of the rendered sensor's noise, in grey levels


def defocus(sigma: float) -> Fault:
    def fault(image: Picture) -> Picture:
        rng = np.random.default_rng(int(image[::97, ::89].sum()))
        blurred = cv2.GaussianBlur(image, (0, 0), sigma)
        return np.asarray((blurred + NOISE * rng.standard_normal(image.shape[:2])[..., None]).clip(0, 255), np.uint8)

    return fault


def gain(factor: float) -> Fault:
    return lambda image: np.asarray(cv2.convertScaleAbs(image, alpha=factor), np.uint8)


def green(share: float) -> Fault:
    def fault(image: Picture) -> Picture:
        lost = image.copy()
        lost[int(len(image) * (1 - share)) :] = (0, 135, 0)
        return lost

    return fault


FAULTS: dict[str, Fault] = {
    **{f"defocus {sigma:g} px": defocus(sigma) for sigma in (1, 1.5, 2, 3, 4, 6, 12)},
    **{f"gain x{factor:g}": gain(factor) for factor in (0.2, 0.4, 0.6, 1.5, 2, 3, 8)},
    **{f"green {share:.0%}": green(share) for share in (0.25, 0.5, 1)},
}


def stained(image: Picture, rng: np.random.Generator) -> Picture:
    """With a large soft stain, dark or bright: a defect that is itself out of focus."""
    spot = np.zeros((HEIGHT // 4, WIDTH // 4), np.float32)
    x, y = (int(each) for each in rng.integers((120, 70), (360, 200)))
    cv2.circle(spot, (x, y), int(rng.integers(10, 45)), 1, -1)
    soft = cv2.resize(cv2.GaussianBlur(spot, (0, 0), 4), (WIDTH, HEIGHT))[..., None]
    return np.asarray((image * (1 - soft) + soft * float(rng.choice([5, 250]))).clip(0, 255), np.uint8)


def taken(rng: np.random.Generator, part: Part, restless: bool, defect: bool = False) -> Picture:
    """A frame of a camera."""
    if restless:
        return scene(rng, part, pose(rng, 45), defect)
    frame = scene(rng, part, pose(rng, 45), defect, plain=True)
    lit = rng.uniform(0.85, 1.15) * (1 + 0.2 * (noise(rng, WIDTH, 2)[:HEIGHT] - 0.5))
    return np.asarray((cv2.GaussianBlur(frame, (0, 0), rng.uniform(0.3, 0.6)) * lit[..., None]).clip(0, 255), np.uint8)


def verdicts(usual: Usual, images: list[Picture]) -> list[str]:
    return [found for image in images if (found := usual.find_fault(look(image)))]


def measure(name: str, taught: list[Picture], good: list[Picture], bad: list[Picture]) -> dict[str, object]:
    usual = Usual.learn([look(image) for image in taught])
    assert usual is not None
    few = good[:: max(1, len(good) // 10)]
    return {
        "frames": name,
        "taught": len(taught),
        "good unusable": [len(verdicts(usual, good)), len(good)],
        "defective unusable": [len(verdicts(usual, bad)), len(bad)],
        "caught": {
            fault: f"{len(verdicts(usual, [put(image) for image in few]))}/{len(few)}" for fault, put in FAULTS.items()
        },
    }


def rendered(name: str, scenes: int, restless: bool) -> dict[str, object]:
    rng = np.random.default_rng(len(name))
    part = PARTS[name](rng)
    taught, good = ([taken(rng, part, restless) for _ in range(scenes)] for _ in range(2))
    bad = [taken(rng, part, restless, defect=True) for _ in range(scenes // 2)]
    bad += [stained(taken(rng, part, restless), rng) for _ in range(scenes // 2)]
    return measure(f"{name}, {'restless' if restless else 'steady'}", taught, good, bad)


def real(folder: Path) -> dict[str, object]:
    def pictures(pattern: str) -> list[Picture]:
        return [np.asarray(cv2.imread(str(path))[..., ::-1]) for path in sorted(folder.glob(pattern))]

    bad = [image for kind in ("blowhole", "break", "crack", "fray", "uneven") for image in pictures(f"test/{kind}/*")]
    return measure("magnetic tiles", pictures("train/good/*"), pictures("test/good/*"), bad)


def milliseconds(height: int, width: int) -> float:
    """The median of 30 looks at a frame of noise and edges."""
    frame = np.random.default_rng(0).integers(0, 60, (height, width, 1), np.uint8).repeat(3, 2)
    frame[:, :: width // 7] = 200
    spent = []
    for _ in range(30):
        start = time.perf_counter()
        look(frame)
        spent.append(time.perf_counter() - start)
    return round(1e3 * float(np.median(spent)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FBCLIP_DATA", "../shared/data")))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []

    def tell(row: dict[str, object]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    tell(
        {
            "look ms": {
                f"{width}x{height}": milliseconds(height, width) for height, width in ((1080, 1920), (5000, 20000))
            }
        }
    )
    for name in PARTS:
        tell(rendered(name, options.scenes, restless=False))
    for name in ("plate", "board"):
        tell(rendered(name, options.scenes, restless=True))
    if (tiles := options.data / "magnetic_tile").is_dir():
        tell(real(tiles))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
