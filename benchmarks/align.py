"""How well, how exactly and how fast `fbclip.runtime.align` finds parts: on rendered scenes, where the pose is known.

    python benchmarks/align.py [--scenes N] [--turn DEGREES] [--json results/align.json]
    python benchmarks/align.py --picture        # docs/pictures/align.jpg

Five parts lie before a belt, in 1920 x 1080, turned, moved, 80 to 120 % as large, in moderate perspective; the light
changes, the camera has noise and blur, half of them have a defect. Frames without the part: the empty belt, another
part, the part with half of it outside. An error is the largest distance of the reference's part's four corners from
where they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from numpy.typing import NDArray

import fbclip
from fbclip.data.surfaces import brushed, clouds, grain, noise
from fbclip.images import encode_image
from fbclip.runtime.align import Align, _project

HEIGHT, WIDTH, SIDE = 1080, 1920, 720  # of frames, and of a part, in pixels
MIDDLE = np.array([(1, 0, (WIDTH - SIDE) / 2), (0, 1, (HEIGHT - SIDE) / 2), (0, 0, 1)])
Picture = NDArray[np.uint8]  # (S, S)
Part = tuple[Picture, NDArray[np.uint8]]  # and where it is


def grey_levels(field: NDArray[np.float32]) -> Picture:
    return (field.clip(0, 1) * 255).astype(np.uint8)


def plate(rng: np.random.Generator) -> Part:
    """Nearly without texture: rounded, with a hole, a notch and a faint number."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    cv2.rectangle(shape, (60, 140), (660, 580), 1, -1)
    cv2.circle(shape, (560, 240), 60, 0, -1)
    cv2.rectangle(shape, (60, 480), (160, 580), 0, -1)
    picture = grey_levels(0.6 + 0.02 * clouds(rng, SIDE))
    cv2.putText(picture, "A-17", (150, 300), cv2.FONT_HERSHEY_SIMPLEX, 3, 140, 6, cv2.LINE_AA)
    return picture, shape


def metal(rng: np.random.Generator) -> Part:
    """Brushed metal with three holes and nothing else."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    cv2.rectangle(shape, (60, 200), (660, 520), 1, -1)
    for place in ((150, 280), (570, 280), (360, 460)):
        cv2.circle(shape, place, 34, 0, -1)
    return grey_levels(0.5 + 0.15 * (brushed(rng, SIDE) - 0.5)), shape


def casting(rng: np.random.Generator) -> Part:
    """A disc with ribs, bolts and a cast mark."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(shape, (360, 360), 320, 1, -1)
    picture = grey_levels(0.4 + 0.1 * grain(rng, SIDE))
    cv2.circle(picture, (360, 360), 120, 140, 14, cv2.LINE_AA)
    for number in range(6):
        x, y = (360 + 220 * np.array((np.cos(number * np.pi / 3), np.sin(number * np.pi / 3)))).astype(int)
        cv2.circle(picture, (int(x), int(y)), 34, 50, -1, cv2.LINE_AA)
    cv2.putText(picture, "GG25 7", (240, 520), cv2.FONT_HERSHEY_SIMPLEX, 2, 165, 5, cv2.LINE_AA)
    cv2.rectangle(picture, (330, 60), (390, 110), 153, -1)
    return picture, shape


def board(rng: np.random.Generator) -> Part:
    """A circuit board: chips, pads and tracks."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    cv2.rectangle(shape, (40, 120), (680, 600), 1, -1)
    picture = np.full((SIDE, SIDE), 76, np.uint8)
    for _ in range(60):
        x, y, w, h = rng.integers((50, 130, 10, 10), (600, 540, 80, 60))
        cv2.rectangle(picture, (int(x), int(y)), (int(x + w), int(y + h)), int(rng.choice([25, 190, 128])), -1)
    for _ in range(40):
        x, y, z = (int(each) for each in rng.integers((50, 130, 60), (660, 590, 660)))
        cv2.line(picture, (x, y), (z, y), 115, 3, cv2.LINE_AA)
    return picture, shape


def ring(rng: np.random.Generator) -> Part:
    """A seal with one lug: a contour and hardly anything in it."""
    shape = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(shape, (360, 360), 300, 1, -1)
    cv2.circle(shape, (360, 360), 200, 0, -1)
    cv2.rectangle(shape, (620, 320), (710, 400), 1, -1)
    cv2.rectangle(shape, (300, 40), (340, 90), 0, -1)
    return grey_levels(0.12 + 0.03 * grain(rng, SIDE)), shape


PARTS: dict[str, Callable[[np.random.Generator], Part]] = {
    "plate": plate,
    "metal": metal,
    "casting": casting,
    "board": board,
    "ring": ring,
}


def pose(rng: np.random.Generator, turn: float, outside: bool = False) -> NDArray[np.float64]:
    """From the part's pixels to the frame's."""
    scale, degrees = rng.uniform(0.8, 1.2), rng.uniform(-turn, turn)
    centre = np.array((SIDE, SIDE)) / 2
    turned = np.vstack([cv2.getRotationMatrix2D(tuple(centre), degrees, scale), (0, 0, 1)])
    box = np.array([(0, 0), (SIDE, 0), (SIDE, SIDE), (0, SIDE)], np.float32)
    corners = _project(turned, box.astype(float)) + rng.uniform(-0.03, 0.03, (4, 2)) * SIDE
    low, high = corners.min(0), corners.max(0)
    if outside:
        edge = rng.choice([-1, 1]) * (WIDTH / 2)
        move = np.array((WIDTH / 2 + edge, HEIGHT / 2)) - (low + high) / 2
    else:
        room = np.array((WIDTH, HEIGHT)) - (high - low)
        move = np.maximum(room, 0) * rng.uniform(0, 1, 2) + np.minimum(room, 0) / 2 - low
    return cv2.getPerspectiveTransform(box, (corners + move).astype(np.float32))


def scene(
    rng: np.random.Generator, part: Part | None, place: NDArray[np.float64], defect: bool = False, plain: bool = False
) -> NDArray[np.uint8]:
    """A frame uint8 (1080, 1920, 3)."""
    belt = 0.25 + 0.06 * (noise(rng, WIDTH, 300)[:HEIGHT] - 0.5) + 0.08 * (noise(rng, WIDTH, 4)[:HEIGHT] - 0.5)
    if not plain:
        for _ in range(int(rng.integers(0, 6))):  # crumbs
            x, y = (int(each) for each in rng.integers((0, 0), (WIDTH, HEIGHT)))
            cv2.circle(belt, (x, y), int(rng.integers(3, 15)), float(rng.uniform(0.1, 0.6)), -1)
    image = belt
    if part is not None:
        picture, shape = part[0].copy(), part[1]
        if defect:
            inside = np.argwhere(shape)[:, ::-1]
            for _ in range(3):
                a, b = inside[rng.integers(len(inside), size=2)]
                cv2.line(picture, tuple(map(int, a)), tuple(map(int, (a + b) // 2)), int(rng.integers(256)), 4)
                cv2.circle(picture, tuple(map(int, b)), int(rng.integers(8, 40)), int(rng.integers(256)), -1)
        size = (WIDTH, HEIGHT)
        alpha = cv2.warpPerspective(shape.astype(np.float32), place, size, flags=cv2.INTER_LINEAR)
        image = belt * (1 - alpha) + alpha * cv2.warpPerspective(picture, place, size, flags=cv2.INTER_LINEAR) / 255
    if not plain:
        image = image * rng.uniform(0.6, 1.4) * (1 + 0.5 * (noise(rng, WIDTH, 2)[:HEIGHT] - 0.5))
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 2.0))
    image = image + rng.standard_normal(image.shape) * 0.015
    return np.repeat((image.clip(0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def measure(name: str, scenes: int, turn: float, masked: bool) -> dict[str, object]:
    """One part: how often it is found where it is, and where it isn't."""
    rng = np.random.default_rng([len(name), turn > 45])
    part, others = PARTS[name](rng), [PARTS[other](rng) for other in PARTS if other != name]
    mask = None
    if masked:
        grown = cv2.dilate(part[1], np.ones((31, 31), np.uint8))
        mask = cv2.warpPerspective(grown, MIDDLE, (WIDTH, HEIGHT), flags=cv2.INTER_NEAREST)
    align = Align.parse(scene(rng, part, MIDDLE, plain=True), mask)
    corners = np.argwhere(part[1])[:, ::-1]
    (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
    box = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)
    errors, likenesses, seconds, wrong, warps = [], [], [], [], []
    for number in range(scenes):
        place = pose(rng, turn)
        frame = scene(rng, part, place, defect=number % 2 == 1)
        start = time.perf_counter()
        found = align.find(frame)
        seconds.append(time.perf_counter() - start)
        if found is None:
            errors.append(np.inf)
            continue
        likenesses.append(found.likeness)
        start = time.perf_counter()
        found.onto_reference(frame, (0, 0, WIDTH, HEIGHT))
        warps.append(time.perf_counter() - start)
        errors.append(float(np.linalg.norm(_project(found.matrix @ MIDDLE, box) - _project(place, box), axis=1).max()))
        kind = number % 3
        absent = (
            scene(rng, None, place)
            if kind == 0
            else scene(rng, others[number % len(others)], place)
            if kind == 1
            else scene(rng, part, pose(rng, turn, outside=True))
        )
        start = time.perf_counter()
        if (false := align.find(absent)) is not None:
            wrong.append((("empty", "other", "half outside")[kind], round(false.likeness, 3)))
        seconds.append(time.perf_counter() - start)
    hit = [error for error in errors if error < 20]
    return {
        "part": name,
        "mask": masked,
        "turn": turn,
        "scenes": scenes,
        "found": len(hit) / scenes,
        "wrong poses": sum(20 <= error < np.inf for error in errors),
        "error median px": round(float(np.median(hit)), 2) if hit else None,
        "error p95 px": round(float(np.quantile(hit, 0.95)), 2) if hit else None,
        "likeness least": round(min(likenesses), 3) if likenesses else None,
        "false poses without the part": wrong,
        "find ms median": round(1e3 * float(np.median(seconds)), 1),
        "find ms p95": round(1e3 * float(np.quantile(seconds, 0.95)), 1),
        "warp ms median": round(1e3 * float(np.median(warps)), 1) if warps else None,
    }


def picture() -> None:
    """The frames of docs/guides/parts-that-move.md."""
    rng = np.random.default_rng(4)
    part = board(rng)
    grown = cv2.warpPerspective(cv2.dilate(part[1], np.ones((31, 31), np.uint8)), MIDDLE, (WIDTH, HEIGHT))
    align = Align.parse(scene(rng, part, MIDDLE, plain=True), grown)
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "board.fbclip"
        fbclip.adapt(None, [scene(rng, part, pose(rng, 30)) for _ in range(10)], align=align, positions=1, out=bundle)
        with fbclip.Predictor(bundle, align=align) as predict:
            frames = [scene(rng, part, pose(rng, 30), defect=number > 0) for number in range(3)]
            shown = [predict(frame).overlay(640) for frame in (*frames, scene(rng, None, MIDDLE))]
    height = max(map(len, shown)) + 8
    cells = [np.pad(each, ((0, height - len(each)), (0, 8), (0, 0)), constant_values=255) for each in shown]
    rows = [np.hstack(cells[:2]), np.hstack(cells[2:])]
    Path("docs/pictures/align.jpg").write_bytes(encode_image(np.vstack(rows).astype(np.uint8)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--turn", type=float, nargs="*", default=[45.0, 180.0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", action="store_true")
    options = parser.parse_args()
    if options.picture:
        picture()
        return
    rows = []
    for turn in options.turn:
        for name in options.parts:
            for masked in (False, True):
                try:
                    rows.append(measure(name, options.scenes, turn, masked))
                except Exception as error:
                    rows.append({"part": name, "mask": masked, "turn": turn, "refused": str(error)})
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
