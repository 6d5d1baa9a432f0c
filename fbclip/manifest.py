"""What a bundle says of itself, and the names of what is in it. Needs neither torch nor ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fbclip.engines import Precision
from fbclip.errors import BundleError
from fbclip.memory import Shape
from fbclip.untrusted import Like, Line, Probability, Range, Sha256, build, one_line, one_of, parse_json, read_value

DEFAULT_THRESHOLD = 0.5  # of a bundle, where training, calibration and export set none
FORMAT = 4
ADDED = {
    1: {"frame_size": None, "int8": None, "memory": None},
    2: {"int8": None, "memory": None},
    3: {"memory": None},
}  # fields that an older format lacks, and what its bundles mean
GRAPHS = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
DYNAMIC, STATIC = "dynamic", "static"  # forms of the 8-bit graph
# Graphs as ONNX Runtime runs them best on a device; their weights are in the file of the portable graph.
VARIANTS = {
    ("cpu", "fp32"): "model.cpu.onnx",
    ("cuda", "fp32"): "model.cuda.onnx",
    ("cuda", "fp16"): "model.cuda.fp16.onnx",
}

# Names of the graph's tensors and axes, for the exporter and for every runtime.
IMAGE, TEXT, SCORE, ANOMALY_MAP = "image", "text", "score", "anomaly_map"
BATCH_AXIS = "batch"
MOST_MEMORY = 2**26  # numbers in the tensors of a memory; ViT-L/14 at 518 px has 10 million


Side = Annotated[int, Range(1, 16_384)]  # pixels
NAME = Like(r"\w[\w.-]{0,99}", "up to 100 letters, digits and . - _, a letter or digit first")
# of a file in the bundle; no part of it begins with a dot
File = Annotated[str, Like(r"\w[\w.-]{0,199}(/\w[\w.-]{0,199}){0,3}", "a path that stays inside the bundle")]
Channel = Annotated[float, Range(-100, 100)]
Spread = Annotated[float, Range(1e-6, 100)]
Prompt = Annotated[str, Range(0, 10_000)]


Layer = Annotated[int, Range(1, 1000)]


@dataclass(frozen=True)
class MemoryLayout:
    """How the graphs' tensors of a memory are laid out (`fbclip.memory.Tensors`).

    Attributes:
        layers: blocks whose tokens make the features, from 1.
        groups: in which the layers go through the matrix together.
        width: numbers of a group.
    """

    layers: Annotated[tuple[Layer, ...], Range(1, 12)]
    groups: Annotated[int, Range(1, 12)]
    width: Annotated[int, Range(1, 4096)]


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        name: of the model; a bundle's own is its folder's.
        image_size: side S of the model's square input in pixels.
        grid: patches along a side.
        feature_layers: blocks whose tokens are used, from 1.
        frame_size: height and width of the images that the graphs take and of their maps; None for S and S.
        channel_order: of those images, "rgb" or "bgr".
        int8: form of the 8-bit graph: "dynamic" (for CPUs) or "static" (for TensorRT too); None where there is none.
        memory: of the graphs' inputs for what good parts teach; None where they have none (formats 1 to 3).
        mean, std: of CLIP's normalisation, folded into the graph already.
        prompts: the normal and the abnormal sentence behind `text.npy`.
        blur_sigma: of the map's Gaussian in pixels, in the graph already.
        score_kind: what the image score is: "class_token", the class token's abnormal probability.
        threshold: scores and map values from here on are anomalous, 0..1.
        precisions: graphs that are there, of "fp32", "fp16" and "int8".
        opset: of the graphs.
        files: SHA-256 of every other file, by its path inside the bundle.
        provenance: where the weights come from and what exported them.
        parity: the summary of `parity.json`.
        format: of the bundle.
    """

    name: Line
    image_size: Side
    grid: Side
    feature_layers: Annotated[tuple[Layer, ...], Range(1, 6)]
    mean: tuple[Channel, Channel, Channel]
    std: tuple[Spread, Spread, Spread]
    prompts: tuple[Prompt, Prompt]
    blur_sigma: Annotated[float, Range(0, 1000)]
    threshold: Probability
    precisions: Annotated[tuple[Precision, ...], Range(1, 3)]
    opset: Annotated[int, Range(1, 1000)]
    frame_size: tuple[Side, Side] | None = None
    channel_order: Annotated[str, one_of("rgb", "bgr")] = "rgb"
    int8: Annotated[str, one_of(DYNAMIC, STATIC)] | None = None
    memory: MemoryLayout | None = None
    score_kind: Annotated[str, one_of("class_token")] = "class_token"
    files: Mapping[File, Sha256] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[Precision, Mapping[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images that the graphs take, and of their maps."""
        return self.frame_size or (self.image_size, self.image_size)

    @property
    def memory_shape(self) -> Shape | None:
        """Of the graphs' tensors of a memory; None where they have none."""
        return Shape(self.grid, self.memory.groups, self.memory.width) if self.memory else None

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Manifest:
        """
        Raises:
            BundleError: no manifest of a format that is known, or one with impossible values.
        """
        try:
            values = read_value(Mapping[str, Any], parse_json(text), "it")
        except ValueError as error:
            raise BundleError(f"{where} is no fbclip manifest: {one_line(error)}; export the bundle again") from error
        found = values.get("format")
        if type(found) is int and found in ADDED:
            values = {**ADDED[found], **values, "format": FORMAT}
        elif type(found) is not int or found != FORMAT:
            newer = type(found) is int and found > FORMAT
            cure = "upgrade with pip install -U fbclip" if newer else "run fbclip export again"
            formats = ", ".join(map(str, (*ADDED, FORMAT)))
            raise BundleError(
                f"{where} has bundle format {one_line(repr(found), 60)}; this fbclip reads {formats}: {cure}"
            )
        try:
            manifest = build(cls, values)
            manifest._require_sense()
        except ValueError as error:
            raise BundleError(
                f"{where} does not match its format: {one_line(error)}; export the bundle again"
            ) from error
        return manifest

    def _require_sense(self) -> None:
        """Raise ValueError unless the fields fit each other."""
        needed = {"text.npy", *(GRAPHS[precision] for precision in self.precisions)}
        if self.image_size % self.grid:
            raise ValueError(f"image_size is a multiple of grid; got {self.image_size} and {self.grid}")
        for name, layers in (
            ("feature_layers", self.feature_layers),
            ("layers of memory", self.memory.layers if self.memory else ()),
        ):
            if list(layers) != sorted(set(layers)):
                raise ValueError(f"{name} ascend; got {layers}")
        if self.memory and len(self.memory.layers) % self.memory.groups:
            raise ValueError(f"groups of memory share its layers evenly; got {self.memory}")
        if (shape := self.memory_shape) and shape.numbers > MOST_MEMORY:
            raise ValueError(f"a memory has at most {MOST_MEMORY:,} numbers; got {shape.numbers:,} of {shape}")
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError(f"precisions differ; got {self.precisions}")
        if ("int8" in self.precisions) != (self.int8 is not None):
            raise ValueError(f"int8 is the form of the 8-bit graph; got {self.int8!r} with {self.precisions}")
        if missing := sorted(needed - self.files.keys()):
            raise ValueError(f"files lack {', '.join(missing)}")
