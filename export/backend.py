"""The trained model behind the runtime's interface, to be measured like a deployed one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fbclip.bundle import sha256
from fbclip.checkpoint import fingerprint, load
from fbclip.errors import DeviceError
from fbclip.image import upsampling_matrix
from fbclip.model import FBCLIP
from fbclip.runtime.evaluate import Subject

DEFAULT_THRESHOLD = 0.5  # a checkpoint has none; calibration and export set a bundle's


class TorchBackend:
    """A torch model, before anything is folded or halved.

    Args:
        model: used, not copied; moved to the device.
        device: "auto" (CUDA where it is there), "cpu" or "cuda".

    Attributes:
        device: where the model is.
        text: its text features float32 (2, E).

    Raises:
        DeviceError: another device, or one that is not there.
    """

    def __init__(self, model: FBCLIP, device: str = "cpu") -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError(f"--device is auto, cpu or cuda for a checkpoint; got {device!r}: export it for others")
        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("--device cuda needs a GPU that torch can use; this torch has cpu only")
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.eval().to(self.device)
        self.upsampling = upsampling_matrix(model.config.image_size, model.config.grid)
        with torch.no_grad():
            self.text = model.encode_text()

    @torch.no_grad()
    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Images uint8 (B, S, S, 3) -> scores float32 (B,), maps float32 (B, S, S), both 0..1."""
        clip = self.model.config.clip
        mean, std = (np.asarray(v, np.float32) for v in (clip.mean, clip.std))
        normalised = ((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
        score, patch_map = self.model.visual(torch.from_numpy(normalised).to(self.device), self.text)
        maps: NDArray[np.float32] = self.upsampling @ patch_map.cpu().numpy() @ self.upsampling.T
        return score.cpu().numpy(), maps


def checkpoint_subject(
    path: Path,
    clip: str | None,
    clip_weights: str | None,
    image_size: int | None,
    feature_layers: tuple[int, ...] | None,
    device: str,
) -> Subject:
    """The torch model of a checkpoint, to be evaluated; arguments as `fbclip.checkpoint.load`.

    Raises:
        CheckpointError, DeviceError.
    """
    model = load(path, clip, clip_weights, image_size, feature_layers)
    config = model.config
    backend = TorchBackend(model, device)
    description = {
        "kind": "checkpoint",
        "name": path.stem,
        "sha256": sha256(path),
        "clip": config.clip.name,
        "clip_fingerprint": fingerprint(model.visual.tower.proj),
        "device": backend.device,
        "precision": "fp32",
        "feature_layers": list(config.feature_layers),
        "prompts": list(config.prompts),
    }
    return Subject(
        backend, config.image_size, config.clip.mean, config.clip.std, DEFAULT_THRESHOLD, description, "torch"
    )
