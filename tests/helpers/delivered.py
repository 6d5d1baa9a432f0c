"""Results and notices as the pipeline hands them to sinks."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fbclip.runtime.live.records import Frame, Notice, Record
from fbclip.runtime.regions import find_regions
from helpers.predicted import predicted


def result(
    index: int = 0, score: float = 0.25, alarm: bool = False, size: tuple[int, int] = (320, 320), name: str = "camera:0"
) -> Record:
    """A grey frame (width, height) with a brighter square, which is anomalous."""
    width, height = size
    image = np.full((height, width, 3), 90, np.uint8)
    anomaly_map = np.full((height, width), 0.1, np.float32)
    image[100:140, 60:100], anomaly_map[100:140, 60:100] = 200, 0.75
    prediction = predicted(
        score, anomaly_map, image, regions=find_regions(anomaly_map, 0.5), timings_ms={"model": 30.0}
    )
    frame = Frame(image, name, index, time.monotonic() - 0.04, time.time())
    return Record(frame, prediction, alarm, alarm, {"wait": 1.0, "preprocess": 2.0, "model": 30.0, "postprocess": 4.0})


def let_off() -> Record:
    """A result whose score reaches the threshold, but whose regions were left out as too small: it is good."""
    reaching = result(score=0.75, alarm=True, size=(1280, 960))
    return replace(reaching, prediction=replace(reaching.prediction, regions=(), overruled="min_area"))


def drawn_verdict(picture: NDArray[np.uint8]) -> str:
    """What an overlay (H, W, 3) RGB says: by the colour of its bar's left end."""
    red, green, _ = picture[3, 3].astype(int)
    return "defect" if red > green else "good"


def has_outlines(picture: NDArray[np.uint8]) -> bool:
    """Whether an overlay marks a region in red; the bar above ends where the right edge changes its colour."""
    edge = np.abs(picture[:, -1].astype(int) - picture[3, -1]).max(axis=1)
    red, green, blue = picture[np.argmax(edge > 40) :].astype(int).transpose(2, 0, 1)
    return bool(((red > 180) & (green < 90) & (blue < 90)).any())


def notice(kind: str = "source", state: str = "lost", subject: str = "camera:0", wall: float | None = None) -> Notice:
    message = f"{subject} is {state}"
    return Notice(wall or time.time(), kind, subject, state, message, {"frames": 7, "dropped": 2})
