"""FB-CLIP, deployed: finds defects on objects that it has never seen, on a small device.

    from fbclip import Predictor, adapt, calibrate

    with Predictor() as predict:                    # the embedded model; Predictor("part.fbclip") for yours
        prediction = predict("part.png")            # a path, Pillow image or array; a list or a folder gives a list
        print(prediction.verdict, prediction.score, prediction.boxes)
        prediction.save("overlay.png")
    adapt("part.fbclip", "good/")                   # ten good parts teach it the line, in seconds
    calibrate("part.fbclip", "more-good/")          # a threshold from good parts, with a stated false-alarm rate

Predictor, Prediction, Region   images to verdicts, heat maps and marked regions
Roi, open_source                where frames are inspected, and where they come from
Bundle                          what is deployed: a folder with the model, its text and proofs
adapt, calibrate, evaluate      what your good parts look like, and their threshold; figures on a data set
export, load_checkpoint         from a checkpoint to a bundle, and to the torch model (both need torch)
FBClipError                     what all errors are that a user can act on, each in one line
"""

from __future__ import annotations

import os

TYPE_CHECKING = (
    False  # as type checkers know it; until `fbclip.main` is imported Ctrl-C is a traceback, so no typing here
)

__version__ = "0.2.0"
# before ONNX Runtime is imported, which from 1.32 on otherwise keeps a database of its use and sends it home
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
__all__ = [
    "Align",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "DeviceError",
    "FBClipError",
    "GraphError",
    "ImageError",
    "ParityError",
    "Prediction",
    "Predictor",
    "Region",
    "Roi",
    "Tiles",
    "UsageError",
    "__version__",
    "adapt",
    "calibrate",
    "evaluate",
    "export",
    "load_checkpoint",
    "open_source",
]

if TYPE_CHECKING:
    from fbclip.bundle import Bundle
    from fbclip.checkpoints import load_checkpoint
    from fbclip.errors import (
        BundleError,
        CheckpointError,
        DeviceError,
        FBClipError,
        GraphError,
        ImageError,
        ParityError,
        UsageError,
    )
    from fbclip.export import export
    from fbclip.runtime.align import Align
    from fbclip.runtime.live.sources import open_source
    from fbclip.runtime.prediction import Prediction
    from fbclip.runtime.predictor import Predictor
    from fbclip.runtime.regions import Region
    from fbclip.runtime.roi import Roi
    from fbclip.runtime.tiles import Tiles
    from fbclip.tasks import adapt, calibrate, evaluate

_HOMES = {
    "Align": "fbclip.runtime.align",
    "Bundle": "fbclip.bundle",
    "Prediction": "fbclip.runtime.prediction",
    "Predictor": "fbclip.runtime.predictor",
    "Region": "fbclip.runtime.regions",
    "Roi": "fbclip.runtime.roi",
    "Tiles": "fbclip.runtime.tiles",
    "adapt": "fbclip.tasks",
    "calibrate": "fbclip.tasks",
    "evaluate": "fbclip.tasks",
    "load_checkpoint": "fbclip.checkpoints",
    "open_source": "fbclip.runtime.live.sources",
}


def __getattr__(name: str) -> object:
    """Import on first use: `fbclip --help` must not wait for numpy, OpenCV and ONNX Runtime."""
    from importlib import import_module

    if name == "export":  # the room of that name, which can be called
        return import_module("fbclip.export")
    if name in _HOMES or name in __all__:
        return getattr(import_module(_HOMES.get(name, "fbclip.errors")), name)
    raise AttributeError(f"module 'fbclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
