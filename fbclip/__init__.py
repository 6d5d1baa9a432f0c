"""FB-CLIP, deployed: zero-shot anomaly detection from a checkpoint to scores and heat maps.

`from fbclip import Predictor` needs neither torch nor open_clip.
"""

from __future__ import annotations

TYPE_CHECKING = (
    False  # as type checkers know it; until `fbclip.main` is imported Ctrl-C is a traceback, so no typing here
)

__version__ = "0.1.0"
__all__ = ["Bundle", "FBClipError", "Prediction", "Predictor", "__version__"]

if TYPE_CHECKING:
    from fbclip.bundle import Bundle
    from fbclip.errors import FBClipError
    from fbclip.runtime.prediction import Prediction
    from fbclip.runtime.predictor import Predictor

_HOMES = {
    "Bundle": "fbclip.bundle",
    "FBClipError": "fbclip.errors",
    "Prediction": "fbclip.runtime.predictor",
    "Predictor": "fbclip.runtime.predictor",
}


def __getattr__(name: str) -> object:
    """Import on first use: `fbclip --help` must not wait for numpy, OpenCV and ONNX Runtime."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fbclip' has no attribute {name!r}")
