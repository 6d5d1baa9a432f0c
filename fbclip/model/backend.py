"""The trained model behind the runtime's interface, to be measured and timed like a deployed one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fbclip.assets import NANO
from fbclip.backend import Backend, Described, Results
from fbclip.bundle import Bundle
from fbclip.errors import CheckpointError, DeviceError
from fbclip.memory import Tensors
from fbclip.model import reference
from fbclip.model.capture import Captured
from fbclip.model.checkpoint import load
from fbclip.model.memory import AdaptableVisual, MemoryTensors
from fbclip.model.network import FBCLIP
from fbclip.resample import upsampling_matrix

SAME_TEXT = 1e-3  # largest difference of text features that are the same model's
Forward = Callable[[Tensor, Tensor], Sequence[Tensor]]  # score (B,) and patch map (B, g, g)


class TorchBackend(Backend):
    """A torch model, before anything is folded or halved.

    Args:
        model: used, not copied; moved to the device.
        device: "auto" (CUDA where it is there), "cpu" or "cuda".
        forward: normalised images (B, 3, S, S) and text (2, E) to score (B,) and patch map (B, g, g) with the model's
            weights, which takes no memory; its own forward pass if None, which does.

    Attributes:
        device: where the model is.
        text: its text features float32 (2, E).

    Raises:
        DeviceError: another device, or one that is not there.
    """

    def __init__(self, model: FBCLIP, device: str = "cpu", forward: Forward | None = None) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise DeviceError(
                f"a checkpoint runs on auto, cpu or cuda; got {device!r}: export it for others", option="device"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("cuda needs a GPU that torch can use; this torch has cpu only", option="device")
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        model.eval().to(self.device)
        # a compiled one can't be asked whether it is true
        self.forward: Forward | None = model.visual if forward is None else forward
        self.launches = "CUDA graph" if isinstance(forward, Captured) else None
        self.memory_shape = model.config.memory_shape if forward is None else None
        self._memory: MemoryTensors | None = None
        self._adaptable = AdaptableVisual(model.config, model.visual).to(self.device) if forward is None else None
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
            score, maps = self._downloaded(self._compute(self._uploaded(images)))
            return score, maps

    def _uploaded(self, images: NDArray[np.uint8]) -> Tensor:
        if self.device == "cpu":
            return torch.tensor(images)
        pinned = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)  # from torch's cache of such memory
        pinned.numpy()[...] = images
        return pinned.to(self.device, non_blocking=True)

    def _downloaded(self, results: Iterable[Tensor]) -> list[NDArray[np.float32]]:
        if self.device == "cpu":
            return [result.numpy() for result in results]
        pinned = [torch.empty(t.shape, pin_memory=True).copy_(t, non_blocking=True) for t in results]
        torch.cuda.current_stream().synchronize()
        return [t.numpy().copy() for t in pinned]  # results may be kept, and pages that can't be swapped are scarce

    def _compute(self, images: Tensor) -> tuple[Tensor, Tensor]:
        forward, normalised = self._require_open(), self._normalised(images)
        if self._adaptable and self._memory:
            score, patch_map, *_ = self._adaptable(normalised, self.text, self._memory)
        else:
            score, patch_map = forward(normalised, self.text)
        return score, self._upsampling @ patch_map @ self._upsampling.mT

    def _require_open(self) -> Forward:
        if self.forward is None:
            raise DeviceError("this backend of a checkpoint is closed: make a new one")
        return self.forward

    def _normalised(self, images: Tensor) -> Tensor:
        return ((images.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std).contiguous()

    def _write_memory(self, tensors: Tensors) -> None:
        with self._turn:
            self._require_open()
            self._memory = self._on_device(tensors)

    def _on_device(self, tensors: Tensors) -> MemoryTensors:
        return MemoryTensors(*(torch.tensor(value, device=self.device) for value in tensors.named().values()))

    @torch.no_grad()
    def describe(self, images: NDArray[np.uint8]) -> Described:
        if self.memory_shape is None:
            raise self._no_memory()
        with self._turn:
            self._require_open()
            assert self._adaptable
            neutral = self._on_device(Tensors.neutral(self.memory_shape))
            found = self._adaptable(self._normalised(self._uploaded(images)), self.text, neutral)
            return Described(*self._downloaded([found.features, found.logits]))

    @torch.no_grad()
    def recall(self, described: Described, tensors: Tensors | None) -> Results:
        """What `run` gives with a memory, or without one, for images that are described already: the same bits."""
        if self.memory_shape is None:
            raise self._no_memory()
        self._require_open()
        adaptable = self._adaptable
        assert adaptable
        memory = self._on_device(tensors or Tensors.neutral(self.memory_shape))
        features, logits = (torch.from_numpy(value).to(self.device) for value in described)
        head = adaptable.head
        fused = head.fused(logits, head.squared_distance(features, memory), memory.weights)
        score, patch_map = adaptable.visual.probabilities(fused)
        maps = self._upsampling @ patch_map @ self._upsampling.mT
        return score.cpu().numpy(), maps.cpu().numpy()

    @torch.no_grad()
    def device_times(self, images: NDArray[np.uint8]) -> dict[str, float] | None:
        """Milliseconds of one run by the GPU's events: upload, compute, download. None on a CPU."""
        if self.device == "cpu":
            return None
        begin, uploaded, computed, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        begin.record()
        on_device = self._uploaded(images)
        uploaded.record()
        results = self._compute(on_device)
        computed.record()
        self._downloaded(results)
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
            self.forward = self._adaptable = self._memory = None


def bundle_backend(
    bundle: Bundle, kind: str, checkpoint: Path | None, clip: str | None, clip_weights: str | None
) -> TorchBackend:
    """The torch model that a bundle was exported from, for a benchmark; on CUDA where torch has it.

    Args:
        kind: "torch"; "torch-captured", the same replayed as a CUDA graph; "torch-compile", through torch.compile;
            "torch-reference", `fbclip.model.reference`.
        checkpoint: the bundle's; the embedded model's if None.
        clip, clip_weights: the CLIP underneath, as `fbclip.model.checkpoint.load` takes it.

    Raises:
        CheckpointError: not the checkpoint of this bundle.
        DeviceError: "torch-captured", and torch has no GPU.
    """
    if kind == "torch-captured" and not torch.cuda.is_available():
        raise DeviceError("torch-captured needs a GPU that torch can use; this torch has cpu only", option="backends")
    manifest = bundle.manifest
    path = checkpoint or NANO
    model = load(path, clip, clip_weights, manifest.image_size, manifest.feature_layers)
    model.prompts.set_prompts(manifest.prompts, model.text)
    forward: Forward | None = None
    if kind == "torch-reference":
        forward = lambda image, text: reference.forward(model.visual, image, text)  # noqa: E731
    elif kind == "torch-compile":
        forward = torch.compile(model.visual)
    elif kind == "torch-captured":
        forward = Captured(model.visual)
    backend = TorchBackend(model, "auto", forward)
    text = backend.text.cpu().numpy()
    if text.shape != bundle.text.shape or np.abs(text - bundle.text).max() > SAME_TEXT:
        raise CheckpointError(
            f"torch runs the checkpoint that the bundle was exported from; {path.name} has other text features than "
            f"{bundle.path.name}: name its checkpoint, and the CLIP underneath",
            option="checkpoint",
        )
    return backend


def matrix_products(a: NDArray[np.float32]) -> dict[str, Callable[[], object]]:
    """Torch's products of a matrix (n, n) with itself, by "device precision library", for a benchmark to time."""

    def product(matrix: torch.Tensor) -> Callable[[], object]:
        out = torch.empty_like(matrix)

        def run() -> None:
            torch.matmul(matrix, matrix, out=out)
            if matrix.is_cuda:
                torch.cuda.synchronize()

        return run

    matrix = torch.from_numpy(a)
    products = {"cpu fp32 torch": product(matrix)}
    if torch.cuda.is_available():
        products["cuda fp32 torch"] = product(matrix.cuda())
        products["cuda fp16 torch"] = product(matrix.cuda().half())
    return products
