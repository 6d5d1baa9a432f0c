"""Checkpoints by their names, told without torch: a wrong name is known at once, and so is a missing torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fbclip.assets import EMBEDDED, NANO
from fbclip.errors import UsageError

if TYPE_CHECKING:
    from fbclip.model.network import FBCLIP

PACKAGES = ("torch", "open_clip", "onnx", "onnxscript", "safetensors", "accelerate", "matplotlib")


def require_training_packages() -> None:
    """Raise UsageError where what trains and exports isn't installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UsageError(
            f"checkpoints need {', '.join(missing)}, which the runtime does without: "
            f"pip install 'fbclip[train]' on the machine that exports"
        )


def find_checkpoint(name: str | Path, option: str = "checkpoint") -> Path:
    """The file of a checkpoint, given by its path, by a run's folder, or as "nano": the embedded model.

    Args:
        option: the parameter that names it.

    Raises:
        UsageError: there is none.
    """
    if str(name) in ("nano", EMBEDDED.stem):
        return NANO
    for path in (Path(name), Path(name, "checkpoint.safetensors")):
        if path.is_file():
            return path
    raise UsageError(
        f"no checkpoint at {name}: pass its file, a run's folder, or nano for the embedded model", option=option
    )


def load_checkpoint(
    checkpoint: str | Path = "nano",
    *,
    clip: str | None = None,
    clip_weights: str | None = None,
    image_size: int | None = None,
    feature_layers: tuple[int, ...] | None = None,
) -> FBCLIP:
    """The torch model of a checkpoint, float32, in eval mode.

    Args:
        checkpoint: an fbclip checkpoint or an official one, a run's folder, or "nano" for the embedded model.
        clip, clip_weights, image_size, feature_layers: as `fbclip.model.checkpoint.load` takes them.

    Raises:
        UsageError: there is none, or torch is not installed.
        CheckpointError: unreadable, or it doesn't fit the CLIP underneath.
    """
    path = find_checkpoint(checkpoint)
    require_training_packages()
    from fbclip.model.checkpoint import load

    return load(path, clip, clip_weights, image_size, feature_layers)
