"""The trained model behind the runtime's interface, to be measured and timed like a deployed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fbclip.assets import NANO
from fbclip.bundle import Bundle
from fbclip.errors import CheckpointError, DeviceError
from fbclip.files import sha256
from fbclip.model import reference
from fbclip.model.checkpoint import about, fingerprint, load
from fbclip.model.network import FBCLIP
from fbclip.resample import upsampling_matrix
from fbclip.runtime.backends import Backend, Results
from fbclip.runtime.calibration import checked_threshold
from fbclip.runtime.evaluation.evaluate import Subject

DEFAULT_THRESHOLD = 0.5  # where training chose none; calibration and export set a bundle's
SAME_TEXT = 1e-3  # largest difference of text features that are the same model's
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TorchBackend(Backend):
    """A torch model, before anything is folded or halved.

    Args:
        model: used, not copied; moved to the device.
        device: "auto" (CUDA where it is there), "cpu" or "cuda".
        forward: normalised images (B, 3, S, S) and text (2, E) to score (B,) and patch map (B, g, g) with the model's
            weights; its own forward pass if None.

    Attributes:
        device: where the model is.
        text: its text features float32 (2, E).

    Raises:
        DeviceError: another device, or one that is not there.
    """

    def __init__(self, model: FBCLIP, device: str = "cpu", forward: Forward | None = None) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError(f"--device is auto, cpu or cuda for a checkpoint; got {device!r}: export it for others")
        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("--device cuda needs a GPU that torch can use; this torch has cpu only")
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        model.eval().to(self.device)
        # a compiled one can't be asked whether it is true
        self.forward: Forward | None = model.visual if forward is None else forward
        size, clip = model.config.image_size, model.config.clip
        self._upsampling = torch.from_numpy(upsampling_matrix(size, model.config.grid)).to(self.device)
        self._mean, self._std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (clip.mean, clip.std))
        self._turn = Lock()  # a compiled model, and what a model caches, are of one thread
        with torch.no_grad():
            self.text = model.encode_text()

    @torch.no_grad()
    def run(self, images: NDArray[np.uint8]) -> Results:
        """Images uint8 (B, S, S, 3) -> scores float32 (B,), maps float32 (B, S, S), both 0..1.

        Raises:
            DeviceError: it is closed.
        """
        with self._turn:
            score, maps = self._compute(torch.tensor(images, device=self.device))
            return score.cpu().numpy(), maps.cpu().numpy()

    def _compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.forward is None:
            raise DeviceError("this backend of a checkpoint is closed: make a new one")
        normalised = (images.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
        score, patch_map = self.forward(normalised.contiguous(), self.text)
        return score, self._upsampling @ patch_map @ self._upsampling.mT

    @torch.no_grad()
    def device_times(self, images: NDArray[np.uint8]) -> dict[str, float] | None:
        """Milliseconds of one run by the GPU's events: upload, compute, download. None on a CPU."""
        if self.device == "cpu":
            return None
        begin, uploaded, computed, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        begin.record()
        on_device = torch.tensor(images, device=self.device)
        uploaded.record()
        results = self._compute(on_device)
        computed.record()
        for result in results:
            result.cpu()
        end.record()
        end.synchronize()
        return {
            "upload": begin.elapsed_time(uploaded),
            "compute": uploaded.elapsed_time(computed),
            "download": computed.elapsed_time(end),
        }

    def close(self) -> None:
        """Let go of the model, which is the caller's, once a call under way is done; safe to call again."""
        with self._turn:
            self.forward = None


def bundle_backend(
    bundle: Bundle, kind: str, checkpoint: Path | None, clip: str | None, clip_weights: str | None
) -> TorchBackend:
    """The torch model that a bundle was exported from, for a benchmark; on CUDA where torch has it.

    Args:
        kind: "torch"; "torch-compile", the same through torch.compile; "torch-reference", `fbclip.model.reference`.
        checkpoint: the bundle's; the embedded model's if None.
        clip, clip_weights: the CLIP underneath, as `fbclip.model.checkpoint.load` takes it.

    Raises:
        CheckpointError: not the checkpoint of this bundle.
    """
    manifest = bundle.manifest
    path = checkpoint or NANO
    model = load(path, clip, clip_weights, manifest.image_size, manifest.feature_layers)
    model.prompts.set_prompts(manifest.prompts, model.text)
    forward: Forward | None = None
    if kind == "torch-reference":
        forward = lambda image, text: reference.forward(model.visual, image, text)  # noqa: E731
    elif kind == "torch-compile":
        forward = torch.compile(model.visual)
    backend = TorchBackend(model, "auto", forward)
    text = backend.text.cpu().numpy()
    if text.shape != bundle.text.shape or np.abs(text - bundle.text).max() > SAME_TEXT:
        raise CheckpointError(
            f"torch runs the checkpoint that the bundle was exported from; {path.name} has other text features than "
            f"{bundle.path.name}: pass its --checkpoint (and --clip, --clip-weights)"
        )
    return backend


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
