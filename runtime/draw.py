"""Overlays: what a person looks at."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

MIN_SIDE = 320  # smaller frames are enlarged, so that the text stays legible
GOOD, BAD = (46, 160, 67), (218, 54, 51)  # RGB


def draw_overlay(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    score: float,
    threshold: float,
    map_threshold: float | None = None,
    map_scale: tuple[float, float] = (0.0, 1.0),
) -> NDArray[np.uint8]:
    """Heat map (a fixed scale, never the image's own), contours, and a bar with score and verdict.

    Args:
        image: uint8 (H, W, 3) RGB.
        anomaly_map: float32 (H, W), 0..1.
        score, threshold: the image score, and where anomalous ones begin.
        map_threshold: where contours are drawn; None: at the threshold.
        map_scale: map values (low, high) of the first and the last colour.

    Returns:
        uint8 (H', W', 3) RGB: the frame, enlarged where it is small, with the bar above it.
    """
    image, anomaly_map = _enlarged(image), _enlarged(anomaly_map)
    height, width = anomaly_map.shape
    low, high = map_scale
    heat = ((anomaly_map - low) / (high - low)).clip(0, 1)
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    # the surface stays visible where the map is low, the colour where it is high
    alpha = (0.15 + 0.5 * heat)[..., None]
    canvas = np.ascontiguousarray((image * (1 - alpha) + colours * alpha).astype(np.uint8))
    line = max(1, round(min(height, width) / 300))
    marked = anomaly_map >= (threshold if map_threshold is None else map_threshold)
    contours, _ = cv2.findContours(marked.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, contours, -1, (255, 255, 255), line + 2, cv2.LINE_AA)
    cv2.drawContours(canvas, contours, -1, BAD, line, cv2.LINE_AA)
    return np.vstack([_bar(width, score, threshold), canvas])


def _bar(width: int, score: float, threshold: float) -> NDArray[np.uint8]:
    bad = score >= threshold
    text = f"{'DEFECT' if bad else 'GOOD'}  {score:.3f} {'>=' if bad else '<'} {threshold:.3f}"
    scale = min(max(width / 640, 0.5), 3.0)
    thickness = max(1, round(1.6 * scale))
    (text_width, text_height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    if text_width > width - 12:
        scale *= (width - 12) / text_width
        thickness = max(1, round(1.6 * scale))
        (text_width, text_height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    bar = np.full((text_height + base + 12, width, 3), BAD if bad else GOOD, np.uint8)
    cv2.putText(
        bar, text, (6, text_height + 6), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thickness, cv2.LINE_AA
    )
    return bar


def _enlarged(array: NDArray[Any]) -> NDArray[Any]:
    """At least 320 pixels on both sides; a side that is far shorter than the other is stretched to it."""
    height, width = array.shape[:2]
    factor = max(1.0, MIN_SIDE / max(height, width))
    size = (max(MIN_SIDE, round(width * factor)), max(MIN_SIDE, round(height * factor)))
    if size == (width, height):
        return array
    return cv2.resize(array, size, interpolation=cv2.INTER_LINEAR)
