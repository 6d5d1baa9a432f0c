"""Checkpoint to bundle: text features, graphs, the proof that they agree."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

import fbclip
from fbclip.bundle import GRAPHS, Bundle, Manifest, save
from fbclip.errors import ParityError
from fbclip.export.backend import TorchBackend
from fbclip.export.graph import OPSET, DeployedModel, make_half, write_onnx
from fbclip.image import BLUR_SIGMA, resize
from fbclip.model import FBCLIP
from fbclip.runtime.backends import Backend, OnnxRuntimeBackend

# Largest difference allowed: of any score, and of the map (at its 99.9th percentile for float16).
BUDGETS = {"fp32": (1e-4, 1e-4), "fp16": (2e-3, 5e-3)}


@dataclass(frozen=True)
class Parity:
    """How far an exported graph is from the torch model on the same images; all values are probabilities 0..1."""

    precision: str
    images: int
    score_max: float
    map_max: float
    map_p999: float
    score_budget: float
    map_budget: float
    nodes: int
    seconds: float

    @property
    def map_drift(self) -> float:
        """What the budget is about: the worst pixel in float32, the 99.9th percentile in half precision."""
        return self.map_max if self.precision == "fp32" else self.map_p999

    @property
    def within(self) -> bool:
        return bool(self.score_max <= self.score_budget and self.map_drift <= self.map_budget)


def export_bundle(
    model: FBCLIP,
    out: Path,
    images: list[NDArray[np.uint8]],
    name: str,
    half: bool = False,
    threshold: float = 0.5,
    provenance: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Bundle, list[Parity]]:
    """Write a bundle and prove it: every graph is run in ONNX Runtime against the torch model.

    Args:
        model: taken apart on the way, not to be used afterwards.
        out: the folder to write.
        images: uint8 (H, W, 3) RGB, for the proof.
        half: also write the float16 graph.
        say: told each step.

    Raises:
        ParityError: a graph drifts past its budget; nothing is written.
    """
    config = model.config
    frames = np.stack([resize(image, config.image_size) for image in images])
    trained = TorchBackend(model)
    text = trained.text
    say(f"running the torch model on {len(frames)} images")
    expected = one_by_one(trained, frames)
    parities: list[Parity] = []

    def write_files(folder: Path) -> Manifest:
        deployed = DeployedModel(model)
        for precision in ("fp32", "fp16") if half else ("fp32",):
            if precision == "fp16":
                make_half(deployed)
            say(f"writing {GRAPHS[precision]}")
            start = time.perf_counter()
            graph = write_onnx(deployed, text, folder / GRAPHS[precision])
            seconds = time.perf_counter() - start
            check_operators(graph)
            say(f"running {GRAPHS[precision]} in ONNX Runtime")
            parities.append(
                compare(precision, folder / GRAPHS[precision], frames, text.numpy(), expected, graph, seconds)
            )
        report = {p.precision: {**p.__dict__, "within": p.within} for p in parities}
        (folder / "parity.json").write_text(json.dumps(report, indent=1) + "\n")
        if failed := [p for p in parities if not p.within]:
            worst = failed[0]
            raise ParityError(
                f"{worst.precision} must stay within {worst.score_budget:g} (score) and {worst.map_budget:g} "
                f"(map) of the torch model; it drifts by {worst.score_max:.2g} and {worst.map_drift:.2g}, "
                f"so {out} was not written"
            )
        return Manifest(
            name=name,
            image_size=config.image_size,
            grid=config.grid,
            feature_layers=config.feature_layers,
            mean=config.clip.mean,
            std=config.clip.std,
            prompts=config.prompts,
            blur_sigma=BLUR_SIGMA,
            threshold=threshold,
            precisions=tuple(p.precision for p in parities),
            opset=OPSET,
            provenance={
                **(provenance or {}),
                "clip": config.clip.name,
                "noun": config.noun,
                "fbclip": fbclip.__version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
            },
            parity={
                p.precision: {"score_max": p.score_max, "map_max": p.map_max, "map_p999": p.map_p999} for p in parities
            },
        )

    return save(out, text.numpy(), write_files), parities


def one_by_one(backend: Backend, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores (B,) and maps (B, S, S) of frames uint8 (B, S, S, 3), each run alone."""
    scores, maps = zip(*(backend.run(frame[None]) for frame in frames), strict=True)
    return np.concatenate(scores), np.concatenate(maps)


def compare(
    precision: str,
    path: Path,
    frames: NDArray[np.uint8],
    text: NDArray[np.float32],
    expected: tuple[NDArray[Any], NDArray[Any]],
    graph: onnx.ModelProto,
    seconds: float,
) -> Parity:
    """Run a written graph on the CPU, one image at a time and two at once, against expected scores and maps."""
    backend = OnnxRuntimeBackend(path, text, "cpu")
    scores, maps = one_by_one(backend, frames)
    if len(frames) > 1:  # a dynamic batch that only works for one is none
        pair = backend.run(frames[:2])
        if (drift := np.abs(pair[0] - scores[:2]).max()) > BUDGETS[precision][0]:
            raise ParityError(f"a batch of two must score like its images alone; {path.name} differs by {drift:.2g}")
    map_error = np.abs(maps - expected[1])
    score_budget, map_budget = BUDGETS[precision]
    return Parity(
        precision,
        len(frames),
        float(np.abs(scores - expected[0]).max()),
        float(map_error.max()),
        float(np.quantile(map_error, 0.999)),
        score_budget,
        map_budget,
        len(graph.graph.node),
        seconds,
    )


# Operators of the exported graph, each known to TensorRT's parser (release 10.1) and to ONNX Runtime.
SUPPORTED = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "Cos",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "LayerNormalization",
        "Less",
        "LessOrEqual",
        "Log",
        "MatMul",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)


def check_operators(graph: onnx.ModelProto) -> None:
    """Raise ParityError for an operator that the target runtimes do not take."""
    if strange := sorted({node.op_type for node in graph.graph.node} - SUPPORTED):
        raise ParityError(
            f"exported graphs hold only operators that TensorRT takes; this one has {', '.join(strange)}: "
            f"install the tested versions of torch and onnxscript (constraints.txt)"
        )
