"""A bundle's graph for other programs: it takes images and nothing else. Needs onnx, not torch.

Text features and the memory of good parts are constants of it; what a program must know besides, its size, its
thresholds, where these come from, is its card: `model.json` beside it, and the same in its metadata. What a program does
with both is written in docs/reference/contract.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

import fbclip
from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT, Bundle, checked_name
from fbclip.engines import Precision
from fbclip.errors import BundleError, ParityError, UsageError
from fbclip.files import new_folder, sha256
from fbclip.folders import list_images
from fbclip.images import read_image
from fbclip.manifest import File, Side
from fbclip.memory import FEATURES, LOGITS, MEMORY_LINE, Memory, Tensors
from fbclip.resample import in_order, resize
from fbclip.runtime.backends import resolve_precision
from fbclip.runtime.calibration import Calibration
from fbclip.untrusted import Line, Probability, Range, Sha256, build, one_line, one_of, read_json

if TYPE_CHECKING:
    import onnx

GRAPH, CARD, DEEPSTREAM = "model.onnx", "model.json", "config_infer.txt"
UINT8_NHWC, FLOAT_NCHW = "uint8-nhwc", "float-nchw"  # forms of the input
METADATA = "fbclip."  # before each name in the graph's metadata
MOST_CARD = 100_000  # bytes
SAMES = 2  # sample images that the written graph is compared on, as one batch
# Largest difference of a score or map value from the bundle's own graph. The constants let ONNX Runtime compute some
# products in advance, in another order: a few of float32's last digits, or of float16's.
SAME = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-3}


@dataclass(frozen=True)
class Card:
    """What a program must know of a graph.

    Attributes:
        name: of the model.
        input: "uint8-nhwc", uint8 (N, H, W, 3), or "float-nchw", float32 (N, 3, H, W); values 0 to 255 in both.
        height, width: of the images that it takes, and of its maps.
        channel_order: of those images, "rgb" or "bgr".
        precision: of the graph.
        threshold: an image is good if its score is below, and only then; 0..1.
        map_threshold: map values from here on are marked.
        threshold_from: where both come from, as a sentence.
        roi: the part of a frame that the thresholds are for, as `Roi.parse` takes it; None for all of it.
        memory: `Memory.sha256` of what good parts taught, None of the zero-shot model.
        model_sha256: `Bundle.model_sha256` of the bundle's graph.
        fbclip: the release that wrote it.
        files: SHA-256 of the graph's file and of those beside it with its weights; not in the graph itself.
        format: of the card.
    """

    name: Line
    input: Annotated[str, one_of(UINT8_NHWC, FLOAT_NCHW)]
    height: Side
    width: Side
    channel_order: Annotated[str, one_of("rgb", "bgr")]
    precision: Precision
    threshold: Probability
    map_threshold: Annotated[float, Range(0, 1.001)]
    threshold_from: Line
    roi: Line | None
    memory: Sha256 | None
    model_sha256: Sha256
    fbclip: Line
    files: Mapping[File, Sha256] = field(default_factory=dict)
    format: Annotated[int, Range(1, 1)] = 1

    @classmethod
    def load(cls, path: Path) -> Card:
        """
        Raises:
            ValueError: no file, or no card.
        """
        return build(cls, read_json(path, MOST_CARD))

    def save(self, path: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(f"{text}\n", encoding="utf-8")

    def metadata(self) -> dict[str, str]:
        """The same as texts by names, for the graph."""
        known = {name: value for name, value in asdict(self).items() if value is not None and name != "files"}
        return {METADATA + name: value if isinstance(value, str) else repr(value) for name, value in known.items()}


def write_standalone(
    bundle: Bundle, folder: Path, form: str = UINT8_NHWC, precision: str = "auto", name: str | None = None
) -> Path:
    """Write a bundle's graph for other programs, proven against the bundle's own.

    Args:
        bundle: read only.
        folder: a new one.
        form: of the input, "uint8-nhwc" or "float-nchw". DeepStream's nvinfer takes the second; its configuration lies
            beside the graph then.
        precision: "fp32", "fp16" or "int8"; "auto" is "fp32".
        name: of the model; the bundle's own (its folder's) if left out.

    Returns:
        The folder, with model.onnx, model.json and, for "float-nchw", config_infer.txt.

    Raises:
        UsageError: no onnx package, or the folder is there already, or can't be written; the bundle inspects in tiles or
            aligned, which other programs don't.
        BundleError: no such graph, or damaged; a calibration of another memory than the bundle's.
        DeviceError: no such precision, or 8 bit in the form for CPUs as "float-nchw".
        GraphError: TensorRT would not take the graph ("float-nchw").
        ParityError: the graph gives other numbers than the bundle's. In both cases nothing is written.
    """
    require_onnx("standalone")
    place = "cpu" if form == UINT8_NHWC else "DeepStream"
    precision = "fp32" if precision == "auto" else resolve_precision(bundle, place, precision)
    name = bundle.name if name is None else checked_name(name)
    folder = folder.resolve()
    if folder.exists():
        raise UsageError(
            f"a graph for other programs goes into a new folder; {folder} is there already: remove it, or choose another",
            option="standalone",
        )
    memory = bundle.memory()
    with new_folder(folder) as temporary:
        card = write_graph(bundle, memory, temporary, name, form, precision)
        _prove(bundle, memory, temporary, card)
        if form == FLOAT_NCHW:
            (temporary / DEEPSTREAM).write_text(deepstream_config(card), encoding="utf-8")
        temporary.rename(folder)
    return folder


def require_onnx(option: str) -> None:
    """Raise UsageError where the onnx package is missing."""
    if find_spec("onnx") is None:
        raise UsageError(
            "a model for other programs has text features and memory in its graph, written with the onnx package: "
            "pip install onnx",
            option=option,
        )


def write_graph(bundle: Bundle, memory: Memory | None, folder: Path, name: str, form: str, precision: str) -> Card:
    """Write model.onnx and model.json into a folder; weights beside a graph stay beside it.

    Without what `Backend.describe` gives.

    Raises:
        UsageError, BundleError: as `write_standalone`.
    """
    import onnx
    from onnx import helper, numpy_helper

    card = describe(bundle, memory, name, form, precision)
    constants = {TEXT: bundle.text}
    if shape := bundle.manifest.memory_shape:
        constants |= (memory.tensors if memory else Tensors.neutral(shape)).named()
    graph_path, (_, *beside) = bundle.graph(precision), bundle.graph_files(precision)
    try:
        model = onnx.load(graph_path, load_external_data=False)
        inputs = {tensor.name: tensor for tensor in model.graph.input}
        outputs = {tensor.name: tensor for tensor in model.graph.output}
        for tensor in constants:
            model.graph.input.remove(inputs[tensor])
        for tensor in outputs.keys() & {FEATURES, LOGITS}:
            model.graph.output.remove(outputs[tensor])
        sides = {_sides(inputs[IMAGE]), _sides(outputs[ANOMALY_MAP]), (card.height, card.width)}
        if form == FLOAT_NCHW:
            _take_planes(model, inputs[IMAGE])
    except Exception as error:  # protobuf's, and what is not there
        raise BundleError(f"{graph_path} is no graph of a bundle: {one_line(repr(error))}; export it again") from error
    if len(sides) > 1:
        raise BundleError(f"image and map of {graph_path} have the manifest's sides; export the bundle again")
    model.graph.initializer.extend(numpy_helper.from_array(value, tensor) for tensor, value in constants.items())
    helper.set_model_props(model, card.metadata())
    onnx.save(model, folder / GRAPH)
    for file in beside:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / file, folder / file)
    files = {file: sha256(folder / file) for file in (GRAPH, *beside)}
    card = replace(card, files=files)
    card.save(folder / CARD)
    return card


def describe(bundle: Bundle, memory: Memory | None, name: str, form: str, precision: str) -> Card:
    """The card of a bundle's graph: the verdicts are those of a `Predictor` that is given whole frames.

    Raises:
        UsageError, BundleError: as `write_standalone`.
    """
    calibration = Calibration.load(bundle)
    if calibration and not calibration.is_of(memory):
        raise BundleError(f"the calibration of {bundle.path} is of another memory: run fbclip calibrate again")
    roi = None
    for learned, what in ((memory.about if memory else None, "memory"), (calibration, "calibration")):
        if learned is None:
            continue
        roi, *more = learned.place
        if any(more):
            raise UsageError(
                f"other programs see a frame as it lies and at once; the {what} of {bundle.path} is of frames in tiles or "
                f"aligned to a picture: make one without"
            )
    default = MEMORY_LINE if memory else bundle.manifest.threshold
    height, width = bundle.manifest.input_size
    return Card(
        name=name,
        input=form,
        height=height,
        width=width,
        channel_order=bundle.manifest.channel_order,
        precision=precision,
        threshold=calibration.threshold if calibration else default,
        map_threshold=calibration.map_threshold if calibration else default,
        threshold_from=_promise(bundle, memory, calibration, precision),
        roi=roi,
        memory=memory.sha256 if memory else None,
        model_sha256=bundle.model_sha256(precision),
        fbclip=fbclip.__version__,
    )


def _promise(bundle: Bundle, memory: Memory | None, calibration: Calibration | None, precision: str) -> str:
    """Where the threshold comes from, as a sentence."""
    if calibration is None and memory:
        return f"Threshold {MEMORY_LINE:g} is where the memory's good parts end: it is not calibrated."
    if calibration is None:
        return f"Threshold {bundle.manifest.threshold:g} is the bundle's default: it is not calibrated."
    text = f"T{calibration.explain(bundle, precision).removeprefix('t')}."
    if calibration.roi:
        text += f" It was calibrated with --roi {calibration.roi}: send that part of a frame only."
    return text


def _sides(tensor: Any) -> tuple[int, int]:
    """(H, W) of a tensor (N, H, W, ...)."""
    height, width = (dim.dim_value for dim in tensor.type.tensor_type.shape.dim[1:3])
    return height, width


def _take_planes(model: onnx.ModelProto, image: onnx.ValueInfoProto) -> None:
    """Make the image float32 (N, 3, H, W) of whole numbers; what was its cast from uint8 (N, H, W, 3) transposes it.

    The transposition back that follows takes that away again, in ONNX Runtime as in TensorRT.
    """
    from onnx import TensorProto, helper

    (cast,) = (node for node in model.graph.node if IMAGE in node.input)
    if cast.op_type != "Cast" or cast.attribute[0].i != TensorProto.FLOAT:
        raise ValueError(f"the image goes into {cast.op_type}")
    batch, height, width, channels = image.type.tensor_type.shape.dim
    sides = [batch.dim_param, channels.dim_value, height.dim_value, width.dim_value]
    image.CopyFrom(helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, sides))
    transpose = helper.make_node(
        "Transpose", [IMAGE], list(cast.output), "input/Transpose of planes", perm=[0, 2, 3, 1]
    )
    cast.CopyFrom(transpose)


def _prove(bundle: Bundle, memory: Memory | None, folder: Path, card: Card) -> None:
    """Raise ParityError, or GraphError, unless a written graph gives the bundle's numbers."""
    import onnxruntime as ort
    from onnx import TensorProto

    from fbclip.export.tensorrt_rules import check_graph
    from fbclip.runtime.backends.onnx import OnnxRuntimeBackend

    if card.input == FLOAT_NCHW:
        check_graph(folder / GRAPH, image_type=TensorProto.FLOAT)
    size = card.height, card.width
    images = np.stack([resize(read_image(path), size) for path in list_images([])[:SAMES]])
    images = in_order(images, card.channel_order)
    with OnnxRuntimeBackend(bundle.graph(card.precision), bundle.text, "cpu", bundle.manifest.memory_shape) as backend:
        backend.set_memory(memory.tensors if memory else None)
        expected = backend.run(images)
    session = ort.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    found = session.run([SCORE, ANOMALY_MAP], {IMAGE: as_input(images, card.input)})
    deviation = max(float(np.abs(each - wanted).max()) for each, wanted in zip(found, expected, strict=True))
    if not deviation <= SAME[card.precision]:
        raise ParityError(
            f"a graph for other programs stays within {SAME[card.precision]:g} of the bundle's own; it deviates by "
            f"{deviation:.2g}, so nothing was written"
        )


def as_input(images: NDArray[np.uint8], form: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Images uint8 (N, H, W, 3) in a form of the input."""
    if form == UINT8_NHWC:
        return images
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)


def deepstream_config(card: Card) -> str:
    """config_infer.txt of DeepStream's nvinfer, which scales no pixel: the graph does that itself.

    Keys: https://docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvinfer.html
    """
    graph = f"onnx-file={GRAPH}\nnetwork-mode=0\n" if card.precision == "fp32" else ""
    return f"""# {card.name}, written by fbclip {card.fbclip} for Gst-nvinfer. It has not run in DeepStream.
# score is good below {card.threshold!r} and not otherwise (also not where it is no number); {CARD} has all digits.
# {card.threshold_from}
[property]
gpu-id=0
gie-unique-id=1
# whole frames, every one, raw tensors: no boxes, no classes, no labels
process-mode=1
network-type=100
output-tensor-meta=1
output-blob-names={SCORE};{ANOMALY_MAP}
interval=0
# built by: trtexec --stronglyTyped --onnx={GRAPH} --saveEngine=model.plan --shapes={IMAGE}:1x3x{card.height}x{card.width}
# the types are in the graph, and only --stronglyTyped keeps them
model-engine-file=model.plan
{graph}batch-size=1
infer-dims=3;{card.height};{card.width}
network-input-order=0
# pixels 0 to 255 as they are: mean and spread are in the graph
net-scale-factor=1.0
offsets=0;0;0
model-color-format={("rgb", "bgr").index(card.channel_order)}
maintain-aspect-ratio=0
"""
