"""Whether a mask of the part that is learnt from good parts is worth having beside one that a person paints.

    python benchmarks/foreground.py [--json results/foreground.json]

Good parts in line with their picture: where they all differ from what lies at the border of the picture, by more than
they differ among themselves, is the part. Compared, on the parts of benchmarks/align.py on a belt with crumbs: nothing
masked, this mask, and the true one grown by 15 pixels as a person would paint it. A learnt mask must lower the scores of
good frames, and cover the part's edge, or defects there are hidden.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from align import HEIGHT, MIDDLE, PARTS, WIDTH, pose, scene
from numpy.typing import NDArray

import fbclip
from fbclip.metrics import image_metrics
from fbclip.runtime.align import Align

TAUGHT, FRAMES = 8, 12
GROWN = np.ones((31, 31), np.uint8)
Mask = NDArray[np.uint8]


def learnt(frames: list[NDArray[np.uint8]]) -> Mask | None:
    """Where all these frames of a part in place differ from the border of theirs, uint8 (H, W); None where nowhere."""
    grey = np.stack([cv2.GaussianBlur(frame[..., 0], (0, 0), 2).astype(np.float32) for frame in frames])
    border = np.ones(grey.shape[1:], bool)
    border[HEIGHT // 20 : -HEIGHT // 20, WIDTH // 20 : -WIDTH // 20] = False
    relative = grey - np.median(grey[:, border], axis=1)[:, None, None]
    middle, spread = np.median(relative, axis=0), np.median(abs(relative - np.median(relative, axis=0)), axis=0)
    part = (abs(middle) > 4 * spread + 6).astype(np.uint8)
    part = cv2.morphologyEx(part, cv2.MORPH_CLOSE, GROWN)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(part)
    if count < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    return np.asarray(cv2.dilate((labels == largest).astype(np.uint8), GROWN), np.uint8)


def measure(name: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(len(name))
    part = PARTS[name](rng)
    true = cv2.warpPerspective(part[1], MIDDLE, (WIDTH, HEIGHT), flags=cv2.INTER_NEAREST)
    painted = np.asarray(cv2.dilate(true, GROWN), np.uint8)
    reference = scene(rng, part, MIDDLE, plain=True)
    align = Align.parse(reference)
    taught = [scene(rng, part, pose(rng, 20)) for _ in range(TAUGHT)]
    in_line = [found.onto_reference(frame, (0, 0, WIDTH, HEIGHT)) for frame in taught if (found := align.find(frame))]
    mask = learnt(in_line)
    edge = cv2.dilate(true, np.ones((5, 5), np.uint8)) - cv2.erode(true, np.ones((5, 5), np.uint8))
    frames = [scene(rng, part, pose(rng, 20), defect=number % 2 == 1) for number in range(2 * FRAMES)]
    rows = []
    for kind, each in (("nothing masked", None), ("learnt", mask), ("painted", painted)):
        row: dict[str, Any] = {"part": name, "mask": kind}
        if kind != "nothing masked":
            if each is None:
                rows.append({**row, "covers": 0.0})
                continue
            row["covers of the part's edge"] = float(each[edge > 0].mean())
            row["of what it covers, no part"] = float(1 - (true * each).sum() / each.sum())
        with TemporaryDirectory() as folder:
            bundle, seen = Path(folder) / "part.fbclip", Align.parse(reference, each)
            fbclip.adapt(None, taught, align=seen, positions=1, out=bundle)
            with fbclip.Predictor(bundle, align=seen) as predict:
                found = [predict(frame) for frame in frames]
        labels = [number % 2 for number, one in enumerate(found) if not one.absent]
        scores = [one.score for one in found if not one.absent]
        row["found"] = len(scores) / len(found)
        row["good that alarm"] = float(
            np.mean([s >= 0.5 for s, label in zip(scores, labels, strict=True) if not label])
        )
        row["AUROC"] = image_metrics(labels, scores).auroc
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for name in ("board", "casting", "metal", "plate") for row in measure(name)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
