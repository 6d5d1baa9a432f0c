"""A trained checkpoint as `fbclip eval` judges it: the torch model before anything is exported."""

from __future__ import annotations

from pathlib import Path

from fbclip.files import sha256
from fbclip.manifest import DEFAULT_THRESHOLD
from fbclip.model.backend import TorchBackend
from fbclip.model.checkpoint import about, fingerprint, load
from fbclip.runtime.calibration import checked_threshold
from fbclip.runtime.evaluation.evaluate import Subject


def checkpoint_subject(
    path: Path,
    clip: str | None,
    clip_weights: str | None,
    image_size: int | None,
    feature_layers: tuple[int, ...] | None,
    device: str,
    threshold: float | None = None,
) -> Subject:
    """The torch model of a checkpoint, to be evaluated; arguments as `fbclip.model.checkpoint.load`.

    Args:
        threshold: of scores, 0..1; None for the checkpoint's, else `DEFAULT_THRESHOLD`.

    Raises:
        CheckpointError, DeviceError, UsageError.
    """
    known = about(path)
    if threshold is None:
        threshold = DEFAULT_THRESHOLD if known.threshold is None else known.threshold
        chosen = "a checkpoint's default" if known.threshold is None else "the checkpoint's"
        threshold_from = f"threshold {threshold:.3g} is {chosen}"
    else:
        threshold_from = f"threshold {checked_threshold(threshold):g} was given"
    model = load(path, clip, clip_weights, image_size, feature_layers)
    config = model.config
    backend = TorchBackend(model, device)
    description = {
        "kind": "checkpoint",
        "name": known.name,
        "sha256": sha256(path),
        "clip": config.clip.name,
        "clip_fingerprint": fingerprint(model.visual.tower.proj),
        "device": backend.device,
        "precision": "fp32",
        "feature_layers": list(config.feature_layers),
        "prompts": list(config.prompts),
    }
    return Subject(
        backend,
        config.image_size,
        config.clip.mean,
        config.clip.std,
        threshold,
        threshold_from,
        description,
        "torch",
        seen=known.seen,
    )
