"""Bundle to a model of an NVIDIA Triton repository: graph or plan, configuration, README. Needs onnx, not torch.

Triton wants every input of a graph from the client, and batches only what has a batch axis. So the text features and
the memory are constants of the graph (`fbclip.export.standalone`): clients send frames, nothing else. What changes, a
memory or a threshold, is another version of the model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, Bundle, checked_name
from fbclip.errors import UsageError
from fbclip.export.standalone import CARD, GRAPH, UINT8_NHWC, Card, require_onnx, write_graph
from fbclip.files import new_folder, replacing, sha256
from fbclip.memory import Memory
from fbclip.runtime.backends import resolve_precision
from fbclip.untrusted import one_line, read_bytes

MAX_BATCH = 8
QUEUE_DELAY_US = 2000  # a request waits so long for others to share its batch: little against a frame's 33 ms
CONTAINER = "nvcr.io/nvidia/tritonserver:25.06-py3"
PLAN = "model.plan"
CONFIG, MOST_CONFIG = "config.pbtxt", 1_000_000  # bytes
PARAMETERS = re.compile(r"""(?:parameters { key: "(?:map_)?threshold(?:_[0-9]+)?" value .*\n)+""")
LOADED = 2  # of the newest versions: who asks for the one before by its number goes on meanwhile

Build = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Served:
    """What the templates of configuration and README are filled with.

    Attributes:
        cards: of all versions in the repository, by their numbers, ascending.
        max_batch: frames at once.
        is_plan: whether TensorRT plans are served, not the graphs.
        memory: what of good parts is in the newest version, for a sentence.
    """

    cards: dict[int, Card]
    max_batch: int
    is_plan: bool
    memory: str

    @property
    def version(self) -> int:
        """The newest."""
        return max(self.cards)

    @property
    def card(self) -> Card:
        """The newest one's."""
        return self.cards[self.version]


def write_model(
    bundle: Bundle,
    repository: Path,
    precision: str = "auto",
    build: Build | None = None,
    max_batch: int = MAX_BATCH,
    name: str | None = None,
) -> Path:
    """Write a bundle's model into a Triton model repository; where the model is there, as its next version.

    Args:
        bundle: read only.
        repository: the folder of models; made if it is not there, and other models in it are left alone.
        precision: "fp32", "fp16", "int8" in its static form, or "auto": half where the bundle has it.
        build: makes a TensorRT plan (second argument) from a graph (first) for a batch of 1 to `max_batch`; if left
            out, the graph itself is served. The plan only loads in a Triton with the same TensorRT on the same GPU.
        max_batch: frames that Triton puts together at most.
        name: of the model; the bundle's own (its folder's) if left out.

    Returns:
        The model's folder, NAME/, with config.pbtxt, README.md and for each version N/model.onnx or N/model.plan and its
        card, N/model.json. Versions that are there stay as they are, and so does config.pbtxt but for its thresholds.

    Raises:
        UsageError: no onnx package; a model of that name is there that isn't such a one, or takes other images; it can't
            be written; the bundle inspects in tiles or aligned.
        BundleError: no such graph, or damaged; a calibration of another memory than the bundle's.
        DeviceError: no such precision, or 8 bit in the form for CPUs, which a Triton with a GPU can't place there.
    """
    require_onnx("triton")
    precision = resolve_precision(bundle, "Triton on a GPU", precision)
    name = triton_name(bundle.name) if name is None else checked_name(name)
    folder = repository.resolve() / name
    memory = bundle.memory()
    if not folder.exists():
        with new_folder(folder) as temporary:
            _write_version(bundle, memory, temporary, {}, precision, build, max_batch, name)
            temporary.rename(folder)
    else:
        _write_version(bundle, memory, folder, _versions(folder), precision, build, max_batch, name)
    return folder


def _write_version(
    bundle: Bundle,
    memory: Memory | None,
    folder: Path,
    versions: dict[int, Card],
    precision: str,
    build: Build | None,
    max_batch: int,
    name: str,
) -> None:
    """Write the next version into a model's folder, then what tells of it."""
    number = max(versions, default=0) + 1
    configured = _configured(folder / CONFIG, max_batch, build is not None) if versions else None
    with new_folder(folder / str(number)) as temporary:
        card = write_graph(bundle, memory, temporary, name, UINT8_NHWC, precision)
        if versions:
            _require_like(folder, versions, card, build is not None)
        if build:
            build(temporary / GRAPH, temporary / PLAN)
            for other in [path for path in temporary.iterdir() if path.name not in (PLAN, CARD)]:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
            card = replace(card, files={PLAN: sha256(temporary / PLAN)})
            card.save(temporary / CARD)
        temporary.rename(folder / str(number))
    taught = memory.explain(precision) if memory else "no memory of good parts"
    text, most = configured or ("", max_batch)
    served = Served({**versions, number: card}, most, build is not None, taught)
    text = PARAMETERS.sub(lambda _: parameters(served), text) if configured else config(served)
    for file_name, content in ((CONFIG, text), ("README.md", readme(served, bundle))):
        with replacing(folder / file_name) as target:
            target.write(content.encode())


def _versions(folder: Path) -> dict[int, Card]:
    """The cards of a model's versions, by their numbers, ascending.

    Raises:
        UsageError: it holds something else, or what an older fbclip wrote.
    """
    cure = "remove it, or choose another name or folder"
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and re.fullmatch("[1-9][0-9]{0,8}", path.name):
            try:
                found[int(path.name)] = Card.load(path / CARD)
            except ValueError as error:
                raise UsageError(
                    f"a model's next version goes beside versions with a {CARD}; {path} has none: {one_line(error)}; {cure}",
                    option="triton",
                ) from error
    if not found:
        raise UsageError(f"a model for Triton is a folder of versions; {folder} has none: {cure}", option="triton")
    return dict(sorted(found.items()))


def _configured(path: Path, max_batch: int, is_plan: bool) -> tuple[str, int]:
    """A model's configuration as it is, which may have been edited, and how many frames it puts together.

    Raises:
        UsageError: it has no thresholds to be replaced, or a plan for another number of frames is to be added.
    """
    try:
        text = read_bytes(path, MOST_CONFIG).decode()
        (found,) = re.findall(r"^max_batch_size: *([0-9]{1,4})$", text, re.MULTILINE)
        (_,) = PARAMETERS.findall(text)
    except ValueError as error:
        raise UsageError(
            f"a model's next version is added to the configuration that fbclip wrote; {path} is none: {one_line(error)}; "
            f"choose another name",
            option="triton",
        ) from error
    if is_plan and int(found) != max_batch:
        raise UsageError(
            f"all plans of a model take as many frames; {path} says {found}, and this one is for {max_batch}",
            option="batch",
        )
    return text, int(found)


def _require_like(folder: Path, versions: dict[int, Card], card: Card, is_plan: bool) -> None:
    """Raise UsageError unless a version fits those that are there: one configuration is of all of them."""

    def common(card: Card, is_plan: bool) -> str:
        served = "a plan" if is_plan else "a graph"
        return f"{served} of {card.channel_order} images of {card.height}x{card.width} (height x width)"

    for number, other in versions.items():
        there, here = common(other, (folder / str(number) / PLAN).exists()), common(card, is_plan)
        if there != here:
            raise UsageError(
                f"all versions of a model take the same images in the same form; version {number} of {folder} is {there}, "
                f"and this one {here}: choose another name",
                option="name",
            )


def triton_name(name: str) -> str:
    """A bundle's name as a model of Triton may be called."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "fbclip"


def config(served: Served) -> str:
    """config.pbtxt: the text form of Triton's ModelConfig."""
    card = served.card
    height, width = card.height, card.width
    warm_ups = "".join(
        f"""model_warmup {{
  name: "batch of {batch}"
  batch_size: {batch}
  inputs {{ key: "{IMAGE}" value {{ data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] random_data: true }} }}
}}
"""
        for batch in (1, served.max_batch)
    )
    return f"""name: {json.dumps(card.name, allow_nan=False)}
platform: "{"tensorrt_plan" if served.is_plan else "onnxruntime_onnx"}"
# the newest version, and the one before for clients that ask for it by its number; to go back for all:
# version_policy {{ specific {{ versions: [ {max(served.version - 1, 1)} ] }} }}
version_policy {{ latest {{ num_versions: {LOADED} }} }}
max_batch_size: {served.max_batch}
input {{ name: "{IMAGE}" data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] }}
# the graph gives scores (N); Triton wants an axis behind the batch, so clients get (N, 1)
output {{ name: "{SCORE}" data_type: TYPE_FP32 dims: [ 1 ] reshape {{ shape: [ ] }} }}
output {{ name: "{ANOMALY_MAP}" data_type: TYPE_FP32 dims: [ {height}, {width} ] }}
# what clients compare with: the newest version's, then each version's own
{parameters(served)}dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY_US} }}
# one copy of the model per GPU; on the CPU where there is none
instance_group {{ count: 1 kind: {"KIND_GPU" if served.is_plan else "KIND_AUTO"} }}
# the first request is as fast as the next, for one frame and for a full batch
{warm_ups}"""


def parameters(served: Served) -> str:
    """The lines of the configuration with the thresholds: the newest version's, and each version's own."""
    lines = ""
    for suffix, card in [("", served.card), *((f"_{number}", each) for number, each in served.cards.items())]:
        for kind, value in (("threshold", card.threshold), ("map_threshold", card.map_threshold)):
            lines += f"""parameters {{ key: "{kind}{suffix}" value {{ string_value: "{value!r}" }} }}\n"""
    return lines


def readme(served: Served, bundle: Bundle) -> str:
    """How to start Triton on this model, and a client."""
    card = served.card
    name, height, width, order, precision = card.name, card.height, card.width, card.channel_order, card.precision
    swap = "[..., ::-1]" if order == "bgr" else ""
    shape = f"{IMAGE}:{{}}x{height}x{width}x3"
    ranges = " ".join(
        f"--{end}Shapes={shape.format(n)}" for end, n in (("min", 1), ("opt", 1), ("max", served.max_batch))
    )
    plan = f"""
## As a TensorRT plan

Usually faster, and bound to this GPU and to the TensorRT of this Triton, so it is built in the same container.
Text features and memory are in the graph; a plan from the bundle's `engines/` takes them as inputs and is not for
Triton. The types are in the graph too, hence no precision flags. Build one for each version that Triton loads.

```
docker run --rm --gpus all -v "$PWD":/models {CONTAINER} \\
  /usr/src/tensorrt/bin/trtexec --stronglyTyped --onnx=/models/{name}/{served.version}/model.onnx --saveEngine=/models/{name}/{served.version}/model.plan \\
  {ranges}
sed -i 's/onnxruntime_onnx/tensorrt_plan/; s/KIND_AUTO/KIND_GPU/' {name}/config.pbtxt
```
"""
    return f"""# {name} in NVIDIA Triton

Written by fbclip from the bundle {bundle.path.name} ({precision}). It was checked against Triton's configuration
schema and in ONNX Runtime; it has not run in a Triton server.

## Serve

In the folder that holds `{name}/`:

```
docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD":/models \\
  {CONTAINER} tritonserver --model-repository=/models
```

Without a GPU leave out `--gpus all`. HTTP is on port 8000, gRPC on 8001, metrics on 8002.

| tensor | | |
| --- | --- | --- |
| `{IMAGE}` | uint8 (N, {height}, {width}, 3) | {order.upper()} frames, N up to {served.max_batch}; 0 to 255, other sizes resized bicubically first |
| `{SCORE}` | float32 (N, 1) | abnormal probability of the frame; anomalous from {card.threshold:g} on |
| `{ANOMALY_MAP}` | float32 (N, {height}, {width}) | the same, pixel by pixel; marked from {card.map_threshold:g} on |

{card.threshold_from} Triton gives numbers, not verdicts: the client compares. Both thresholds are parameters in
`config.pbtxt`, with all their digits, and in `{served.version}/{CARD}`.

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
result = client.infer("{name}", [image], model_version="{served.version}")  # whose threshold is below
score = result.as_numpy("{SCORE}")[0, 0]
verdict = "good" if score < {card.threshold!r} else "defect"
print(verdict, "score", score, "highest on the map", result.as_numpy("{ANOMALY_MAP}").max())
```

## Versions

`fbclip calibrate` and `fbclip adapt` change the bundle and not this model. Export again into the same repository after
that: it adds the next version, with a threshold of its own (`threshold_{served.version}` is version {served.version}'s; `threshold` the newest's), and
leaves older versions and what you changed in `config.pbtxt` alone. Triton loads the {LOADED} newest, and gives the newest to
clients that name none. A threshold is its version's: clients ask for both by the same number, or compare `model_version`
of the answer. To go back, let `version_policy` name the version: `specific {{ versions: [ N ] }}`. Then load the model
again (`--model-control-mode=explicit` or `poll`), or start Triton again. Remove versions that nobody asks for: their
folders are all there is of them.

## Tune

In `config.pbtxt`: requests wait up to {QUEUE_DELAY_US / 1000:g} ms for others to share their batch (`dynamic_batching`); a second
`count` of the `instance_group` overlaps copying with computing and takes the memory twice. `perf_analyzer -m {name}`
measures it. On GPUs from Ampere on, ONNX Runtime computes float32 products in TF32 unless told otherwise, which
moves the scores a little.
{"" if served.is_plan else plan}"""
