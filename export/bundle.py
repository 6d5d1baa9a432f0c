"""Checkpoint to bundle: text features, graphs, the proof that they agree."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL
import torch
from numpy.typing import NDArray

import fbclip
from fbclip.bundle import DYNAMIC, GRAPHS, IMAGE, TEXT, VARIANTS, Bundle, Manifest, require_place, save
from fbclip.errors import DeviceError, ParityError
from fbclip.export.graph import OPSET, DeployedModel, write_onnx
from fbclip.export.parity import (
    BUDGETS,
    Parity,
    Proof,
    Reference,
    Taught,
    compare,
    compare_taught,
    run_reference,
)
from fbclip.export.precision.float32_islands import widen
from fbclip.export.precision.half import Halver
from fbclip.export.precision.int8 import Feed, Quantization, Quantizer
from fbclip.export.report import Steps, draw_parity
from fbclip.export.stages import compare_stages
from fbclip.export.tensorrt_rules import check_graph
from fbclip.export.variants import write_variant
from fbclip.manifest import MemoryLayout
from fbclip.memory import Tensors
from fbclip.model.backend import TorchBackend
from fbclip.model.config import Config
from fbclip.model.network import FBCLIP
from fbclip.resample import BLUR_SIGMA, in_order, resize
from fbclip.runtime import host
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend
from fbclip.runtime.backends.providers import available

SEARCH_IMAGES = 4  # that deviate most; what must stay float32 is looked for on them
# A graph of more bytes that deviates by less of its budget is not compared stage by stage, which takes two more runs.
LARGE_GRAPH, COMPARED_FROM = 2**28, 0.1


@dataclass(frozen=True)
class Deployment:
    """How a model is deployed.

    Attributes:
        name: of the model.
        half: also write the float16 graph.
        quantization: how to write the 8-bit graph as well; None for none.
        frame_size: height and width of the camera's frames, resized in the graph; None for the model's own square.
        channel_order: of the images that the graphs take, "rgb" or "bgr".
        threshold: scores from here on are anomalous, 0..1.
        provenance: where the weights come from.
    """

    name: str
    half: bool = False
    quantization: Quantization | None = None
    frame_size: tuple[int, int] | None = None
    channel_order: str = "rgb"
    threshold: float = 0.5
    provenance: Mapping[str, Any] = field(default_factory=dict)


def export_bundle(
    model: FBCLIP, out: Path, proof: Proof, deployment: Deployment, steps: Steps | None = None
) -> tuple[Bundle, list[Parity]]:
    """Write a bundle and prove it: every graph is run in ONNX Runtime against the torch model.

    Args:
        model: taken apart on the way, not to be used afterwards.
        out: the folder to write.
        proof: images; brought to `frame_size` beforehand where there is one.
        steps: told each; None for silence.

    Raises:
        GraphError: a graph that TensorRT would not take.
        ParityError: a graph deviates past its budget. In both cases nothing is written.
        BundleError, UsageError: `out` is something else than a bundle, or can't be written.
    """
    require_place(out)
    config = model.config
    size_hw = deployment.frame_size or (config.image_size, config.image_size)
    proof = replace(proof, frames=[resize(frame, size_hw) for frame in proof.frames])
    trained = TorchBackend(model)
    text = trained.text.numpy()
    steps = steps or Steps()
    with steps(f"running the torch model on {len(proof.frames)} image{'s' * (len(proof.frames) > 1)}"):
        reference, taught = run_reference(trained, proof, config.image_size)
    writer = GraphWriter(model, text, proof, reference, taught, deployment, steps)

    def write_files(folder: Path) -> Manifest:
        writer.write_float(folder)
        if deployment.half:
            writer.write_half(folder)
        if deployment.quantization:
            writer.write_quantized(folder, deployment.quantization)
        writer.write_variants(folder)
        seconds = {step: round(took, 1) for step, took in steps.seconds.items()}
        report = {p.precision: p.to_dict() for p in writer.parities} | {"variants": writer.variants, "seconds": seconds}
        (folder / "parity.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        draw_parity(folder / "parity.jpg", proof, reference, writer.parities)
        return _manifest(config, deployment, writer.parities)

    return save(out, text, write_files), writer.parities


def _manifest(config: Config, deployment: Deployment, parities: list[Parity]) -> Manifest:
    return Manifest(
        name=deployment.name,
        image_size=config.image_size,
        grid=config.grid,
        feature_layers=config.feature_layers,
        mean=config.clip.mean,
        std=config.clip.std,
        prompts=config.prompts,
        blur_sigma=BLUR_SIGMA,
        threshold=deployment.threshold,
        precisions=tuple(p.precision for p in parities),
        opset=OPSET,
        frame_size=deployment.frame_size,
        channel_order=deployment.channel_order,
        int8=deployment.quantization.form if deployment.quantization else None,
        memory=MemoryLayout(config.memory_layers, config.memory_shape.groups, config.memory_shape.width),
        provenance={
            **deployment.provenance,
            "clip": config.clip.name,
            "noun": config.noun,
            "fbclip": fbclip.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "pillow": PIL.__version__,  # whose resize a graph of whole frames repeats
        },
        parity={p.precision: p.summary() for p in parities},
    )


class GraphWriter:
    """Writes graphs and lets none pass that TensorRT would not take or that deviates past its budget.

    Attributes:
        parities: of the portable graphs that passed.
        variants: of those for one provider, by their file: the provider's device, and how far they are from the model.
    """

    def __init__(
        self,
        model: FBCLIP,
        text: NDArray[np.float32],
        proof: Proof,
        reference: Reference,
        taught: Taught,
        deployment: Deployment,
        steps: Steps,
    ) -> None:
        self.text, self.proof, self.reference, self.steps = text, proof, reference, steps
        self.taught, self.neutral = taught, Tensors.neutral(model.config.memory_shape)
        self.threshold, self.channel_order = deployment.threshold, deployment.channel_order
        self.frame_size = deployment.frame_size or (model.config.image_size, model.config.image_size)
        self.memory_shape = model.config.memory_shape
        self.model = model
        self.inputs = [in_order(frame, self.channel_order) for frame in proof.frames]
        self.parities: list[Parity] = []
        self.variants: dict[str, dict[str, Any]] = {}

    def write_float(self, folder: Path) -> None:
        """Write the model as it is trained; pass it or raise ParityError, as the others do. It has no weights after this."""
        deployed = DeployedModel(self.model, self.frame_size, self.channel_order)

        def write(path: Path, islands: Collection[str]) -> None:
            write_onnx(deployed, torch.from_numpy(self.text), path)
            self.model.to("meta")  # gigabytes, which no graph needs any more

        self.judge(self.measure("fp32", folder, write))

    def write_half(self, folder: Path) -> None:
        """Type the float32 graph's products float16; where that deviates too far, leave some float32 by measurement."""
        self.write_lower("fp16", folder, Halver(folder / GRAPHS["fp32"]))

    def write_quantized(self, folder: Path, quantization: Quantization) -> None:
        """Quantise the float32 graph's products; where that deviates too far, leave some float32 by measurement."""
        frames = (resize(frame, self.frame_size) for frame in quantization.calibration)
        others = {TEXT: self.text, **self.neutral.named()}
        inputs: list[Feed] = [{IMAGE: in_order(frame, self.channel_order)[None], **others} for frame in frames]
        with tempfile.TemporaryDirectory(dir=folder) as working:
            quantizer = Quantizer(folder / GRAPHS["fp32"], quantization.form, inputs, Path(working))
            self.write_lower("int8", folder, quantizer, quantization.form != DYNAMIC)

    def write_lower(self, precision: str, folder: Path, maker: Halver | Quantizer, for_tensorrt: bool = True) -> None:
        """Write a graph of lower precision; past its budget look for what must stay float32, by a graph for each trial."""
        parity = self.measure(precision, folder, maker.write, for_tensorrt=for_tensorrt)
        if parity.overrun > 1:
            where = f", first in {parity.diverges_first}" if parity.diverges_first else ""
            self.steps.say(
                f"{precision} deviates by {parity.overrun:.2f} of its budget{where}; looking for what must stay float32"
            )
            tried = range(len(self.inputs)) if parity.auroc else parity.by_deviation[:SEARCH_IMAGES]
            first = parity.diverges_first if precision == "fp16" else None
            with tempfile.TemporaryDirectory(dir=folder) as working:
                trial = Path(working, "trial.onnx")

                def overrun(islands: Collection[str]) -> float:
                    maker.write(trial, islands)
                    return self.compare(precision, trial, tried).overrun

                islands = widen(precision, maker.parts, overrun, first, self.steps.say)
            parity = self.measure(precision, folder, maker.write, islands, for_tensorrt)
        self.judge(parity)

    def write_variants(self, folder: Path) -> None:
        """Write the graphs once more for one provider each, under the same budgets: as a batch of two, with a memory."""
        for (device, precision), name in VARIANTS.items():
            if precision not in {parity.precision for parity in self.parities}:
                continue
            path = folder / name
            with self.steps(f"writing {name}"):
                nodes = write_variant(device, folder / GRAPHS[precision], path)
                give_back_memory()
            with self.steps(f"running {name} in ONNX Runtime"), self.start(path, device) as backend:
                found = compare_taught(backend, self.inputs[0], self.taught, mirrored=True)
            give_back_memory()
            if found.overrun(precision) > 1:
                raise ParityError(
                    f"{name} must stay within the budget of {precision}, {BUDGETS[precision]}, of the torch model; it "
                    f"deviates by {found.score_max:.2g} and {found.map_max:.2g} (99.9 %: {found.map_p999:.2g}), so no "
                    f"bundle was written"
                )
            self.variants[name] = {"device": backend.device, "nodes": nodes, **asdict(found)}

    def start(self, graph: Path, device: str) -> OnnxRuntimeBackend:
        """A graph on the device that it is for where ONNX Runtime was built for it and it works, else on the CPU."""
        if device in available():
            try:
                return OnnxRuntimeBackend(graph, self.text, device, self.memory_shape)
            except DeviceError as error:
                self.steps.say(f"  on the cpu: {error}")
        return OnnxRuntimeBackend(graph, self.text, "cpu", self.memory_shape)

    def measure(
        self,
        precision: str,
        folder: Path,
        write: Callable[[Path, Collection[str]], None],
        islands: tuple[str, ...] = (),
        for_tensorrt: bool = True,
    ) -> Parity:
        """Write a graph and measure it; prove that TensorRT takes it where it is meant to."""
        path = folder / GRAPHS[precision]
        with self.steps(f"writing {path.name}"):
            write(path, islands)
            give_back_memory()
        with self.steps(f"checking {path.name}"):
            nodes = check_graph(path, for_tensorrt)
        with self.steps(f"running {path.name} in ONNX Runtime"):
            parity = self.compare(precision, path, range(len(self.inputs)))
        stages = []
        size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
        if precision != "fp32" and (size < LARGE_GRAPH or parity.overrun > COMPARED_FROM):
            worst = self.inputs[parity.by_deviation[0]][None]
            feed: Feed = {IMAGE: worst, TEXT: self.text, **self.neutral.named()}
            with self.steps(f"comparing {path.name} with {GRAPHS['fp32']} stage by stage"):
                stages = compare_stages(precision, folder / GRAPHS["fp32"], path, feed)
            give_back_memory()
        seconds = round(self.steps.seconds[f"writing {path.name}"], 1)
        return replace(parity, stages=tuple(stages), islands=islands, nodes=nodes, size_bytes=size, seconds=seconds)

    def compare(self, precision: str, path: Path, indices: Sequence[int]) -> Parity:
        """A graph on some images of the proof, in ONNX Runtime, against the torch model."""
        with OnnxRuntimeBackend(path, self.text, "cpu", self.memory_shape) as backend:  # a session holds gigabytes
            images, reference = [self.inputs[i] for i in indices], self.reference.part(indices)
            parity = compare(precision, backend, self.proof.part(indices), images, reference, self.threshold)
            with_memory = compare_taught(backend, self.inputs[0], self.taught)
        give_back_memory()
        return replace(parity, memory=with_memory)

    def judge(self, parity: Parity) -> None:
        require_within(parity, parity.precision)
        self.parities.append(parity)


def give_back_memory() -> None:
    """Give what is no longer needed back to the system: glibc keeps gigabytes of it in pieces."""
    gc.collect()
    host.give_back_memory()


def require_within(parity: Parity, graph: str) -> None:
    """Raise ParityError if a graph deviates past its budget."""
    if parity.overrun > 1:
        where = f", first in {parity.diverges_first}" if parity.diverges_first else ""
        labelled = ""
        if parity.memory and parity.precision != "int8" and parity.memory.overrun(parity.precision) > 1:
            found = parity.memory
            labelled = (
                f", with a memory by {found.score_max:.2g} and {found.map_max:.2g} (99.9 %: {found.map_p999:.2g})"
            )
        if parity.auroc and parity.auroc_budget:
            before, after = parity.auroc
            labelled += f", and the AUROC by {after - before:+.4f} (at most {parity.auroc_budget:.2g})"
        raise ParityError(
            f"{graph} must stay within {parity.score_budget:g} (score) and {parity.map_budget:g} (map) of the torch "
            f"model; it deviates by {parity.score.max:.2g} and {parity.map_deviation:.2g}{labelled}{where}, "
            f"so no bundle was written"
        )
