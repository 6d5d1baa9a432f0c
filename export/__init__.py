"""From a checkpoint to a bundle. The room is called, too: `fbclip.export("checkpoint.safetensors", "part.fbclip")`.

Its modules need torch and onnx, but for `engine`; they are imported by the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fbclip.terminal import say

if TYPE_CHECKING:
    from inspect import Signature

    from rich.console import Console

    from fbclip.bundle import Bundle
    from fbclip.export.precision.int8 import Quantization

# What good parts taught a bundle: files, what they are called, and the command that learns them again.
LEARNED = (("memory.npz", "memory", "adapt"), ("calibration.json", "calibration", "calibrate"))


def export(
    checkpoint: str | Path = "nano",
    out: str | Path | None = None,
    *,
    fp16: bool = False,
    int8: bool = False,
    int8_static: bool = False,
    calibration_images: Sequence[str | Path] = (),
    threshold: float | None = None,
    frame_size: tuple[int, int] | None = None,
    channel_order: str = "rgb",
    object: str = "object",
    clip: str | None = None,
    clip_weights: str | None = None,
    image_size: int | None = None,
    feature_layers: tuple[int, ...] | None = None,
    parity_images: Sequence[str | Path] = (),
    name: str | None = None,
    console: Console | None = None,
) -> Bundle:
    """Write a bundle from a checkpoint and prove that every graph of it agrees with the torch model.

    Args:
        checkpoint: an fbclip checkpoint or an official one, a run's folder, or "nano" for the embedded model.
        out: bundle folder to write, which may be there; None for NAME.fbclip.
        fp16: also write a half-precision graph.
        int8, int8_static: also write an 8-bit graph, for CPUs, or with fixed ranges for TensorRT.
        calibration_images: good images that fixed ranges are taken from; the samples if empty.
        threshold: scores from here on are anomalous, 0..1; None for the checkpoint's, else 0.5.
        frame_size: height and width of the camera's frames, resized in the graph; None for any size.
        channel_order: of the images that the graphs take, "rgb" or "bgr".
        object: what the prompts call the inspected thing.
        clip, clip_weights, image_size, feature_layers: as `fbclip.load_checkpoint` takes them.
        parity_images: for the proof: images, folders, globs, or one data set; the samples if empty.
        name: of the bundle; None for the checkpoint's.
        console: where to print each step and the proof.

    Raises:
        UsageError: wrong arguments, or torch is not installed.
        CheckpointError, BundleError: a checkpoint that can't be read; `out` is something else than a bundle.
        ParityError, GraphError: a graph strays too far from the model, or TensorRT would not take it; nothing is
            written then.
    """
    from rich.console import Console

    from fbclip.bundle import SUFFIX, checked_name, require_place
    from fbclip.checkpoints import find_checkpoint, require_training_packages
    from fbclip.errors import UsageError
    from fbclip.runtime.calibration import checked_threshold

    if int8 and int8_static:
        raise UsageError("a bundle holds one 8-bit graph: for CPUs (int8) or for TensorRT (int8_static); got both")
    if calibration_images and not int8_static:
        raise UsageError("calibration images give fixed ranges (int8_static); other graphs have none: leave them out")
    if channel_order not in ("rgb", "bgr"):
        raise UsageError(f"a channel order is rgb or bgr; got {channel_order!r}", option="channel_order")
    if threshold is not None:
        checked_threshold(threshold)
    path = find_checkpoint(checkpoint)
    require_training_packages()
    from fbclip.export.bundle import Deployment, export_bundle
    from fbclip.export.parity import affordable_samples, find_calibration, find_proof, read_proof
    from fbclip.export.report import Steps, print_parity
    from fbclip.manifest import DEFAULT_THRESHOLD
    from fbclip.model.checkpoint import about, load

    console = console or Console(quiet=True)
    tell = partial(say, console)
    paths, labels = find_proof(list(map(str, parity_images)))
    ranges = find_calibration(list(map(str, calibration_images))) if int8_static else []
    known = about(path)
    own_name = known.name if name is None else checked_name(name)
    target = require_place(Path(out or f"{own_name}{SUFFIX}"))  # before the work, not after it
    steps = Steps(tell)
    with steps(f"loading {path.name}"):
        model = load(path, clip, clip_weights, image_size, feature_layers)
    model.set_noun(object)
    if not parity_images and len(paths) > (most := affordable_samples(model.config)):
        tell(f"this model is large: the proof is of {most} of the {len(paths)} samples (name images for more)")
        paths = paths[:most]
    size_hw = frame_size or (model.config.image_size, model.config.image_size)
    deployment = Deployment(
        own_name,
        fp16,
        _quantization(int8, ranges, size_hw, tell),
        frame_size,
        channel_order,
        next(value for value in (threshold, known.threshold, DEFAULT_THRESHOLD) if value is not None),
        {"checkpoint": path.name} | ({"seen": known.seen.to_dict()} if known.seen else {}),
    )
    lost = [each for each in LEARNED if (target / each[0]).exists()]
    bundle, parities = export_bundle(model, target, read_proof(paths, labels, size_hw, tell), deployment, steps)
    print_parity(parities, console)
    for _, what, command in lost:
        again = f"fbclip {command} GOOD... --bundle {bundle.path}"
        tell(f"the {what} of the bundle that was there is gone with it: {again}")
    tell(f"wrote {bundle.path}")
    return bundle


def _quantization(
    int8: bool, ranges: list[Path], size_hw: tuple[int, int], tell: Callable[[str], None]
) -> Quantization | None:
    """How the 8-bit graph is written: with ranges of its own for each image, or fixed by these; None for none."""
    from fbclip.bundle import DYNAMIC, STATIC
    from fbclip.export.parity import read_calibration
    from fbclip.export.precision.int8 import Quantization

    if ranges:
        return Quantization(STATIC, read_calibration(ranges, size_hw, tell))
    return Quantization(DYNAMIC) if int8 else None


class _Room(ModuleType):
    """`fbclip.export` is this package, whoever imported what of it first, and that function."""

    __call__ = staticmethod(export)

    @property
    def __signature__(self) -> Signature:
        from inspect import signature

        return signature(export)


sys.modules[__name__].__class__ = _Room
