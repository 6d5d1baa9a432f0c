"""Bundle to a model of an NVIDIA Triton repository: graph or plan, configuration, README. Needs onnx, not torch.

Triton wants every input of a graph from the client, and batches only what has a batch axis. So the text features and
the memory become constants of the graph: clients send frames, nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT, Bundle, checked_name
from fbclip.errors import BundleError, UsageError
from fbclip.files import new_folder
from fbclip.memory import FEATURES, LOGITS, MEMORY_LINE, Memory, Tensors
from fbclip.runtime.backends import resolve_precision
from fbclip.runtime.calibration import Calibration
from fbclip.untrusted import one_line

MAX_BATCH = 8
QUEUE_DELAY_US = 2000  # a request waits so long for others to share its batch: little against a frame's 33 ms
CONTAINER = "nvcr.io/nvidia/tritonserver:25.06-py3"

Build = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Served:
    """What the templates of configuration and README are filled with.

    Attributes:
        name: of the model and its folder.
        platform: "onnxruntime_onnx" or "tensorrt_plan".
        frame_hw, map_hw: sides of the graph's input and of its map in pixels.
        max_batch: frames at once.
        threshold: scores from here on are anomalous: the calibration's, or the bundle's default.
        map_threshold: map values from here on are marked.
        promise: where the threshold comes from, as a sentence.
        memory: what of good parts is in the graph, for a sentence.
    """

    name: str
    platform: str
    frame_hw: tuple[int, int]
    map_hw: tuple[int, int]
    max_batch: int
    threshold: float
    map_threshold: float
    promise: str
    memory: str


def write_model(
    bundle: Bundle,
    repository: Path,
    precision: str = "auto",
    build: Build | None = None,
    max_batch: int = MAX_BATCH,
    name: str | None = None,
) -> Path:
    """Write a bundle's model into a Triton model repository.

    Args:
        bundle: read only.
        repository: the folder of models; made if it is not there, and other models in it are left alone.
        precision: "fp32", "fp16", "int8" in its static form, or "auto": half where the bundle has it.
        build: makes a TensorRT plan (second argument) from a graph (first) for a batch of 1 to `max_batch`; if left
            out, the graph itself is served. The plan only loads in a Triton with the same TensorRT on the same GPU.
        max_batch: frames that Triton puts together at most.
        name: of the model; the bundle's own (its folder's) if left out.

    Returns:
        The model's folder, NAME/ with config.pbtxt, README.md and 1/model.onnx or 1/model.plan.

    Raises:
        UsageError: no onnx package, a folder of that name is there already, or it can't be written.
        BundleError: no such graph, or damaged; a calibration of another memory than the bundle's.
        DeviceError: no such precision, or 8 bit in the form for CPUs, which a Triton with a GPU can't place there.
    """
    if find_spec("onnx") is None:
        raise UsageError(
            "a model for Triton has text features and memory in its graph, written with the onnx package: pip install onnx",
            option="triton",
        )
    precision = resolve_precision(bundle, "Triton on a GPU", precision)
    name = triton_name(bundle.name) if name is None else checked_name(name)
    folder = repository.resolve() / name
    if folder.exists():
        raise UsageError(
            f"a model for Triton is a new one; {folder} is there already: remove it, or choose another name or folder",
            option="triton",
        )
    memory = bundle.memory()
    calibration = Calibration.load(bundle)
    if calibration and not calibration.is_of(memory):
        raise BundleError(f"the calibration of {bundle.path} is of another memory: run fbclip calibrate again")
    with new_folder(folder) as temporary:
        version = temporary / "1"
        version.mkdir()
        frame_hw, map_hw = bake(bundle, precision, memory, version)
        if build:
            build(version / "model.onnx", version / "model.plan")
            for graph_file in version.iterdir():
                if graph_file.name != "model.plan":
                    graph_file.unlink()
        default = MEMORY_LINE if memory else bundle.manifest.threshold
        threshold, map_threshold = (
            (calibration.threshold, calibration.map_threshold) if calibration else (default, default)
        )
        platform, promised = (
            "tensorrt_plan" if build else "onnxruntime_onnx",
            promise(bundle, memory, calibration, precision),
        )
        taught = memory.explain(precision) if memory else "no memory of good parts"
        served = Served(name, platform, frame_hw, map_hw, max_batch, threshold, map_threshold, promised, taught)
        (temporary / "config.pbtxt").write_text(config(served))
        (temporary / "README.md").write_text(readme(served, bundle, precision), encoding="utf-8")
        temporary.rename(folder)
    return folder


def triton_name(name: str) -> str:
    """A bundle's name as a model of Triton may be called."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "fbclip"


def promise(bundle: Bundle, memory: Memory | None, calibration: Calibration | None, precision: str) -> str:
    """Where the threshold comes from, as a sentence."""
    if calibration is None and memory:
        return f"Threshold {MEMORY_LINE:g} is where the memory's good parts end: it is not calibrated."
    if calibration is None:
        return f"Threshold {bundle.manifest.threshold:g} is the bundle's default: it is not calibrated."
    text = f"T{calibration.explain(bundle, precision).removeprefix('t')}."
    if calibration.roi:
        text += f" It was calibrated with --roi {calibration.roi}: send that part of a frame only."
    return text


def bake(
    bundle: Bundle, precision: str, memory: Memory | None, folder: Path
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Write model.onnx, a bundle's graph with text features and memory as constants, without what `Backend.describe`
    gives; weights beside a graph stay beside it.

    Returns:
        (H, W) of the frames it takes and of the maps it gives.
    """
    import onnx
    from onnx import numpy_helper

    constants = {TEXT: bundle.text}
    if shape := bundle.manifest.memory_shape:
        constants |= (memory.tensors if memory else Tensors.neutral(shape)).named()
    graph_path, (_, *beside) = bundle.graph(precision), bundle.graph_files(precision)
    try:
        model = onnx.load(graph_path, load_external_data=False)
        inputs = {tensor.name: tensor for tensor in model.graph.input}
        outputs = {tensor.name: tensor for tensor in model.graph.output}
        for name in constants:
            model.graph.input.remove(inputs[name])
        for name in outputs.keys() & {FEATURES, LOGITS}:
            model.graph.output.remove(outputs[name])
        sides = _sides(inputs[IMAGE]), _sides(outputs[ANOMALY_MAP])
    except Exception as error:  # protobuf's, and what is not there
        raise BundleError(f"{graph_path} is no graph of a bundle: {one_line(repr(error))}; export it again") from error
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.save(model, folder / "model.onnx")
    for name in beside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, folder / name)
    return sides


def _sides(tensor: Any) -> tuple[int, int]:
    """(H, W) of a tensor (N, H, W, ...)."""
    height, width = (dim.dim_value for dim in tensor.type.tensor_type.shape.dim[1:3])
    if not height or not width:
        raise BundleError(f"{tensor.name} of a deployed graph has fixed sides; export the bundle again")
    return height, width


def config(served: Served) -> str:
    """config.pbtxt: the text form of Triton's ModelConfig."""
    height, width = served.frame_hw
    warm_ups = "".join(
        f"""model_warmup {{
  name: "batch of {batch}"
  batch_size: {batch}
  inputs {{ key: "{IMAGE}" value {{ data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] random_data: true }} }}
}}
"""
        for batch in (1, served.max_batch)
    )
    return f"""name: {json.dumps(served.name, allow_nan=False)}
platform: "{served.platform}"
max_batch_size: {served.max_batch}
input {{ name: "{IMAGE}" data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] }}
# the graph gives scores (N); Triton wants an axis behind the batch, so clients get (N, 1)
output {{ name: "{SCORE}" data_type: TYPE_FP32 dims: [ 1 ] reshape {{ shape: [ ] }} }}
output {{ name: "{ANOMALY_MAP}" data_type: TYPE_FP32 dims: [ {served.map_hw[0]}, {served.map_hw[1]} ] }}
# what clients compare with
parameters {{ key: "threshold" value {{ string_value: "{served.threshold!r}" }} }}
parameters {{ key: "map_threshold" value {{ string_value: "{served.map_threshold!r}" }} }}
dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY_US} }}
# one copy of the model per GPU; on the CPU where there is none
instance_group {{ count: 1 kind: {"KIND_GPU" if served.platform == "tensorrt_plan" else "KIND_AUTO"} }}
# the first request is as fast as the next, for one frame and for a full batch
{warm_ups}"""


def readme(served: Served, bundle: Bundle, precision: str) -> str:
    """How to start Triton on this model, and a client."""
    height, width = served.frame_hw
    order = bundle.manifest.channel_order
    swap = "[..., ::-1]" if order == "bgr" else ""
    shape = f"{IMAGE}:{{}}x{height}x{width}x3"
    ranges = " ".join(
        f"--{end}Shapes={shape.format(n)}" for end, n in (("min", 1), ("opt", 1), ("max", served.max_batch))
    )
    plan = f"""
## As a TensorRT plan

Usually faster, and bound to this GPU and to the TensorRT of this Triton, so it is built in the same container.
Text features and memory are in the graph; a plan from the bundle's `engines/` takes them as inputs and is not for
Triton. The types are in the graph too, hence no precision flags.

```
docker run --rm --gpus all -v "$PWD":/models {CONTAINER} \\
  /usr/src/tensorrt/bin/trtexec --stronglyTyped --onnx=/models/{served.name}/1/model.onnx --saveEngine=/models/{served.name}/1/model.plan \\
  {ranges}
sed -i 's/onnxruntime_onnx/tensorrt_plan/; s/KIND_AUTO/KIND_GPU/' {served.name}/config.pbtxt
```
"""
    return f"""# {served.name} in NVIDIA Triton

Written by fbclip from the bundle {bundle.path.name} ({precision}). It was checked against Triton's configuration
schema and in ONNX Runtime; it has not run in a Triton server.

## Serve

In the folder that holds `{served.name}/`:

```
docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD":/models \\
  {CONTAINER} tritonserver --model-repository=/models
```

Without a GPU leave out `--gpus all`. HTTP is on port 8000, gRPC on 8001, metrics on 8002.

| tensor | | |
| --- | --- | --- |
| `{IMAGE}` | uint8 (N, {height}, {width}, 3) | {order.upper()} frames, N up to {served.max_batch}; 0 to 255, other sizes resized bicubically first |
| `{SCORE}` | float32 (N, 1) | abnormal probability of the frame; anomalous from {served.threshold:g} on |
| `{ANOMALY_MAP}` | float32 (N, {served.map_hw[0]}, {served.map_hw[1]}) | the same, pixel by pixel; marked from {served.map_threshold:g} on |

{served.promise} Triton gives numbers, not verdicts: the client compares. Both thresholds are parameters in
`config.pbtxt`, with all their digits. `fbclip calibrate` and `fbclip adapt` change the bundle and not this model: write
it anew after that.

Normalisation, upsampling, blur, the text features and {served.memory} are in the graph.

## Ask

`pip install 'tritonclient[http]' pillow`, then `python client.py part.png`:

```python
import sys

import numpy as np
import tritonclient.http as triton
from PIL import Image

picture = Image.open(sys.argv[1]).convert("RGB").resize(({width}, {height}), Image.Resampling.BICUBIC)
frames = np.ascontiguousarray(np.asarray(picture)[None]{swap})  # uint8 (N, {height}, {width}, 3)
image = triton.InferInput("{IMAGE}", list(frames.shape), "UINT8")
image.set_data_from_numpy(frames)
client = triton.InferenceServerClient(sys.argv[2] if len(sys.argv) > 2 else "localhost:8000")
result = client.infer("{served.name}", [image])
score = result.as_numpy("{SCORE}")[0, 0]
verdict = "good" if score < {served.threshold!r} else "defect"
print(verdict, "score", score, "highest on the map", result.as_numpy("{ANOMALY_MAP}").max())
```

## Tune

In `config.pbtxt`: requests wait up to {QUEUE_DELAY_US / 1000:g} ms for others to share their batch (`dynamic_batching`); a second
`count` of the `instance_group` overlaps copying with computing and takes the memory twice. `perf_analyzer -m {served.name}`
measures it. On GPUs from Ampere on, ONNX Runtime computes float32 products in TF32 unless told otherwise, which
moves the scores a little.
{"" if served.platform == "tensorrt_plan" else plan}"""
