"""Predictions without a model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.runtime.prediction import Prediction


def predicted(
    score: float, anomaly_map: NDArray[np.float32], image: NDArray[np.uint8] | None = None, **values: Any
) -> Prediction:
    """A prediction with a map in the frame's size; the threshold is 0.5 and the frame black if not given."""
    given = {"threshold": 0.5, "regions": (), "timings_ms": {}, **values}
    frame = np.zeros((*anomaly_map.shape, 3), np.uint8) if image is None else image
    return Prediction(score=score, anomaly_map=anomaly_map, model_map=anomaly_map, image=frame, **given)
