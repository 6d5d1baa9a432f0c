"""Checkpoint to bundle: text features, graphs, the proof that they agree."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL
import torch
from numpy.typing import NDArray

import fbclip
from fbclip.bundle import CPU_GRAPH, GRAPHS, Bundle, Manifest, save
from fbclip.errors import ParityError
from fbclip.export.backend import TorchBackend
from fbclip.export.check import check_graph
from fbclip.export.cpu import write_cpu_graph
from fbclip.export.graph import OPSET, DeployedModel, write_onnx
from fbclip.export.half import HalfWeights, widen
from fbclip.export.parity import Differences, Parity, Proof, Reference, Say, compare, overrun, run_reference
from fbclip.export.report import draw_parity
from fbclip.export.stages import compare_stages
from fbclip.image import BLUR_SIGMA, in_order, resize
from fbclip.model import FBCLIP
from fbclip.runtime.backends import OnnxRuntimeBackend

SEARCH_IMAGES = 4  # that drift most; what must stay float32 is looked for on them


@dataclass(frozen=True)
class Deployment:
    """How a model is deployed.

    Attributes:
        name: of the model.
        half: also write the float16 graph.
        frame_size: height and width of the camera's frames, resized in the graph; None for the model's own square.
        channel_order: of the images that the graphs take, "rgb" or "bgr".
        threshold: scores from here on are anomalous, 0..1.
        provenance: where the weights come from.
    """

    name: str
    half: bool = False
    frame_size: tuple[int, int] | None = None
    channel_order: str = "rgb"
    threshold: float = 0.5
    provenance: Mapping[str, Any] = field(default_factory=dict)


def export_bundle(
    model: FBCLIP, out: Path, proof: Proof, deployment: Deployment, say: Say = lambda line: None
) -> tuple[Bundle, list[Parity]]:
    """Write a bundle and prove it: every graph is run in ONNX Runtime against the torch model.

    Args:
        model: taken apart on the way, not to be used afterwards.
        out: the folder to write.
        proof: images; brought to `frame_size` beforehand where there is one.
        say: told each step.

    Raises:
        GraphError: a graph that TensorRT would not take.
        ParityError: a graph drifts past its budget. In both cases nothing is written.
    """
    config = model.config
    size_hw = deployment.frame_size or (config.image_size, config.image_size)
    proof = replace(proof, frames=[resize(frame, size_hw) for frame in proof.frames])
    trained = TorchBackend(model)
    text = trained.text.numpy()
    say(f"running the torch model on {len(proof.frames)} images")
    reference = run_reference(trained, proof, config.image_size)
    gate = Gate(model, text, proof, reference, deployment, say)

    def write_files(folder: Path) -> Manifest:
        gate.write_graph("fp32", folder)
        gate.write_cpu(folder)
        if deployment.half:
            gate.write_half(folder)
        report = {p.precision: p.to_dict() for p in gate.parities}
        (folder / "parity.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        draw_parity(folder / "parity.jpg", proof, reference, gate.parities)
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
            precisions=tuple(p.precision for p in gate.parities),
            opset=OPSET,
            frame_size=deployment.frame_size,
            channel_order=deployment.channel_order,
            provenance={
                **deployment.provenance,
                "clip": config.clip.name,
                "noun": config.noun,
                "fbclip": fbclip.__version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "pillow": PIL.__version__,  # whose resize a graph of whole frames repeats
            },
            parity={p.precision: p.summary() for p in gate.parities},
        )

    return save(out, text, write_files), gate.parities


class Gate:
    """Writes graphs and lets none pass that TensorRT would not take or that drifts past its budget.

    Attributes:
        parities: of the graphs that passed.
    """

    def __init__(
        self,
        model: FBCLIP,
        text: NDArray[np.float32],
        proof: Proof,
        reference: Reference,
        deployment: Deployment,
        say: Say,
    ) -> None:
        self.text, self.proof, self.reference, self.say = text, proof, reference, say
        self.threshold = deployment.threshold
        self.deployed = DeployedModel(model, deployment.frame_size, deployment.channel_order)
        self.inputs = [in_order(frame, deployment.channel_order) for frame in proof.frames]
        self.parities: list[Parity] = []

    def write_graph(self, precision: str, folder: Path, islands: tuple[str, ...] = ()) -> None:
        """Write the model as it is typed, measure it, and let it pass or raise ParityError."""
        self.judge(self.measure(precision, folder, islands))

    def write_cpu(self, folder: Path) -> None:
        """Write the float32 graph once more as a CPU runs it best, under the same budget."""
        path = folder / CPU_GRAPH
        self.say(f"writing {path.name}")
        write_cpu_graph(self.deployed, torch.from_numpy(self.text), path, folder / GRAPHS["fp32"])
        require_within(self.run("fp32", path), path.name)

    def write_half(self, folder: Path) -> None:
        """Type the products float16; where that drifts too far, widen the float32 islands by measurement."""
        weights = HalfWeights(self.deployed.visual)
        weights.apply()
        parity = self.measure("fp16", folder)
        if parity.overrun <= 1:
            return self.judge(parity)
        first = parity.diverges_first
        where = f", first in {first}" if first else ""
        self.say(f"fp16 drifts by {parity.overrun:.1f} of its budget{where}; looking for what must stay float32")
        worst = parity.by_drift[:SEARCH_IMAGES]
        islands = widen(weights, lambda: self.overrun_in_torch(worst), first, self.say)
        return self.write_graph("fp16", folder, islands)

    def measure(self, precision: str, folder: Path, islands: tuple[str, ...] = ()) -> Parity:
        path = folder / GRAPHS[precision]
        self.say(f"writing {path.name}")
        start = time.perf_counter()
        write_onnx(self.deployed, torch.from_numpy(self.text), path)
        seconds = time.perf_counter() - start
        nodes = check_graph(path)
        parity = self.run(precision, path)
        stages = []
        if precision != "fp32":
            worst = self.inputs[parity.by_drift[0]][None]
            stages = compare_stages(folder / GRAPHS["fp32"], path, self.text, worst)
        size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
        return replace(
            parity, stages=tuple(stages), islands=islands, nodes=nodes, size_bytes=size, seconds=round(seconds, 1)
        )

    def run(self, precision: str, path: Path) -> Parity:
        self.say(f"running {path.name} in ONNX Runtime")
        backend = OnnxRuntimeBackend(path, self.text, "cpu")  # kept no longer than this call: a session holds gigabytes
        return compare(precision, backend, self.proof, self.inputs, self.reference, self.threshold)

    def judge(self, parity: Parity) -> None:
        require_within(parity, parity.precision)
        self.parities.append(parity)

    @torch.no_grad()
    def overrun_in_torch(self, indices: Sequence[int]) -> float:
        """Drift in budgets by the torch model as it is typed, on some images: cheaper than a graph for each trial."""
        scores, maps = Differences(), Differences()
        for index in indices:
            image = self.inputs[index]
            score, anomaly_map = self.deployed(torch.from_numpy(image)[None], torch.from_numpy(self.text))
            scores.add(score.numpy(), self.reference.scores[index : index + 1])
            maps.add(anomaly_map[0].numpy(), self.reference.map(index, image.shape[:2]))
        return overrun("fp16", scores.max, maps.quantile(0.999))


def require_within(parity: Parity, graph: str) -> None:
    """Raise ParityError if a graph drifts past its budget."""
    if parity.overrun > 1:
        where = f", first in {parity.diverges_first}" if parity.diverges_first else ""
        raise ParityError(
            f"{graph} must stay within {parity.score_budget:g} (score) and {parity.map_budget:g} (map) of the torch "
            f"model; it drifts by {parity.score.max:.2g} and {parity.map_drift:.2g}{where}, so no bundle was written"
        )
