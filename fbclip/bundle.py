"""The deployment contract: a folder `NAME.fbclip/` with a manifest, text features and graphs.

Needs neither torch nor ONNX. Written to a temporary sibling and renamed, so half a bundle is never found under
its name; every file's SHA-256 is in the manifest and checked before the file is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.engines import Engine, Platform
from fbclip.errors import BundleError, DeviceError
from fbclip.files import sha256

FORMAT = 3
ADDED = {
    1: {"frame_size": None, "int8": None},
    2: {"int8": None},
}  # fields that an older format lacks, and what its bundles mean
EMBEDDED = Path(__file__).parent / "assets" / "fbclip-nano.fbclip"
GRAPHS = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
DYNAMIC, STATIC = "dynamic", "static"  # forms of the 8-bit graph
# the float32 graph as ONNX Runtime runs it best on a CPU; its weights are in the file of "fp32"
CPU_GRAPH = "model.cpu.onnx"

# Names of the graph's tensors and axes, for the exporter and for every runtime.
IMAGE, TEXT, SCORE, ANOMALY_MAP = "image", "text", "score", "anomaly_map"
BATCH_AXIS = "batch"


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        name: of the model.
        image_size: side S of the model's square input in pixels.
        grid: patches along a side.
        feature_layers: blocks whose tokens are used, from 1.
        frame_size: height and width of the images that the graphs take and of their maps; None for S and S.
        channel_order: of those images, "rgb" or "bgr".
        int8: form of the 8-bit graph: "dynamic" (for CPUs) or "static" (for TensorRT too); None where there is none.
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

    name: str
    image_size: int
    grid: int
    feature_layers: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    prompts: tuple[str, str]
    blur_sigma: float
    threshold: float
    precisions: tuple[str, ...]
    opset: int
    frame_size: tuple[int, int] | None = None
    channel_order: str = "rgb"
    int8: str | None = None
    score_kind: str = "class_token"
    files: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images that the graphs take, and of their maps."""
        return self.frame_size or (self.image_size, self.image_size)

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        try:
            values = json.loads(text)
            found = values["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{where} is no fbclip manifest: {error!r}; export the bundle again") from error
        if isinstance(found, int) and found in ADDED:
            values = {**ADDED[found], **values, "format": FORMAT}
        elif found != FORMAT:
            newer = isinstance(found, int) and found > FORMAT
            cure = "upgrade with pip install -U fbclip" if newer else "run fbclip export again"
            formats = ", ".join(map(str, (*ADDED, FORMAT)))
            raise BundleError(f"{where} has bundle format {found}; this fbclip reads {formats}: {cure}")
        names = {f.name for f in fields(cls)}
        if (missing := names - values.keys()) or (extra := values.keys() - names):
            raise BundleError(
                f"{where} does not match its format: missing {sorted(missing)}, extra "
                f"{sorted(extra) if not missing else []}; export the bundle again"
            )
        tuples = ("feature_layers", "mean", "std", "prompts", "precisions", "frame_size")
        return cls(**{**values, **{name: tuple(values[name]) for name in tuples if values[name] is not None}})


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        path: its folder.
        manifest: what it holds.
        text: text features float32 (2, E), normal then abnormal.
    """

    path: Path
    manifest: Manifest
    text: NDArray[np.float32]

    @classmethod
    def load(cls, path: str | Path | None = None) -> Bundle:
        """Load a bundle, or the embedded default model's.

        Graphs are checked when they are asked for.

        Raises:
            BundleError: missing, damaged, of another format, or with files that leave the folder.
        """
        folder = EMBEDDED if path is None else Path(path)
        manifest_path = folder / "manifest.json"
        if not manifest_path.is_file():
            raise BundleError(
                f"a bundle is a folder with a manifest.json; {folder} has none: make one with fbclip export"
            )
        manifest = Manifest.from_json(manifest_path.read_text(), manifest_path)
        text_path = _checked(folder, manifest, "text.npy")
        try:
            text = np.load(text_path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BundleError(f"{text_path} holds no array: {error}; export the bundle again") from error
        if text.ndim != 2 or text.shape[0] != 2 or text.dtype != np.float32:
            raise BundleError(f"text features are float32 (2, E); {text_path} holds {text.dtype} {text.shape}")
        return cls(folder, manifest, text)

    def graph(self, precision: str) -> Path:
        """The ONNX file of a precision, checked against its hash.

        Raises:
            BundleError: not in this bundle, or damaged.
        """
        for name in self._graph_files(precision):
            _checked(self.path, self.manifest, name)
        return self.path / GRAPHS[precision]

    def cpu_graph(self) -> Path:
        """The float32 graph for ONNX Runtime's CPU provider; the portable one in a bundle that was exported without it.

        Raises:
            BundleError: damaged.
        """
        portable = self.graph("fp32")
        return _checked(self.path, self.manifest, CPU_GRAPH) if CPU_GRAPH in self.manifest.files else portable

    def graph_sha256(self, precision: str) -> str:
        """The hash of a graph; of the hashes of its files where its weights lie beside it."""
        hashes = [self.manifest.files.get(name, "") for name in self._graph_files(precision)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def model_sha256(self, precision: str) -> str:
        """The hash of all that makes the scores of a precision: graph and text features."""
        parts = self.graph_sha256(precision), self.manifest.files["text.npy"]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def calibration(self) -> Path:
        """The file that `fbclip calibrate` writes; it need not be there.

        Raises:
            BundleError: a link leads out of the bundle.
        """
        return _inside(self.path, self.path / "calibration.json")

    @property
    def engines(self) -> Path:
        """The folder of what devices make of the graphs: plans, their sidecars, caches."""
        return self.path / "engines"

    def engine(self, precision: str, here: Platform, batch: int = 1) -> tuple[Path, Engine]:
        """A TensorRT plan that runs here and its sidecar; the plan is not opened, only its hash is checked.

        Args:
            precision: of the graph it was built from.
            here: the device and TensorRT.
            batch: images at once that it must take.

        Raises:
            DeviceError: no plan for this device; names the command that builds one.
            BundleError: the plan or a sidecar is damaged, or leads out of the bundle.
        """
        graph_sha256 = self.graph_sha256(precision)
        rebuild = f"fbclip export --engine --bundle {self.path} --precision {precision}"
        sidecars = sorted(self.engines.glob("*.json"), key=lambda s: (s.stem != here.engine_name(precision), s.name))
        found = [(sidecar.with_suffix(".plan"), Engine.load(_inside(self.path, sidecar))) for sidecar in sidecars]
        others = sorted({engine.precision for _, engine in found} - {precision})
        candidates = [(plan, engine) for plan, engine in found if engine.precision == precision]
        if not candidates:
            there = f" (it has {', '.join(others)}: pass --precision)" if others else ""
            raise DeviceError(f"{self.path} has no {precision} TensorRT engine{there}; build it here with {rebuild}")
        refusals = [engine.mismatch(here, graph_sha256) for _, engine in candidates]
        if None not in refusals:
            raise DeviceError(f"{candidates[0][0].name} {refusals[0]}: run {rebuild}")
        plan, engine = candidates[refusals.index(None)]
        low, usual, high = engine.options.batch
        if not low <= batch <= high:
            wider = f"{min(low, batch)},{usual},{max(high, batch)}"
            raise DeviceError(
                f"{plan.name} takes {low} to {high} images at once, not {batch}: run {rebuild} --batch {wider}"
            )
        if not _inside(self.path, plan).is_file() or sha256(plan) != engine.plan_sha256:
            raise BundleError(f"{plan} is missing or damaged: run {rebuild}")
        return plan, engine

    def _graph_files(self, precision: str) -> list[str]:
        """The graph's file and, beside it, its external data."""
        if precision not in self.manifest.precisions:
            option = "" if precision == "fp32" else f" --{precision}"
            raise BundleError(
                f"{self.path} has no {precision} graph (it has {', '.join(self.manifest.precisions)}); "
                f"export it with fbclip export{option}"
            )
        graph = GRAPHS[precision]
        return [graph, *sorted(name for name in self.manifest.files if name.startswith(f"{graph}."))]


def save(path: Path, text: NDArray[np.float32], write_files: Callable[[Path], Manifest]) -> Bundle:
    """Write a bundle atomically.

    Args:
        path: the folder to make; an older bundle there is replaced once the new one is whole.
        text: float32 (2, E).
        write_files: writes graphs and reports into the folder it is given and returns the manifest, without
            `files`; what it raises leaves nothing behind.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path / "manifest.json").is_file():
        raise BundleError(f"--out must be a new folder or a bundle to replace; {path} is neither")
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        np.save(folder / "text.npy", text)
        manifest = write_files(folder)
        files = {f.relative_to(folder).as_posix(): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        values = {**asdict(manifest), "files": files}
        (folder / "manifest.json").write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
        folder.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(old / path.name)
            folder.rename(path)
            shutil.rmtree(old)
        else:
            folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Bundle.load(path)


def _checked(folder: Path, manifest: Manifest, name: str) -> Path:
    """The path of a file that the manifest lists, if it is inside the bundle and unchanged."""
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or "\\" in name:
        raise BundleError(f"paths in a bundle stay inside it; {folder} lists {name!r}")
    path = _inside(folder, folder / name)
    if not path.is_file() or name not in manifest.files:
        raise BundleError(f"{folder} lacks {name}; copy the whole folder, or export it again")
    if (found := sha256(path)) != manifest.files[name]:
        raise BundleError(
            f"{path} is damaged (SHA-256 {found[:12]}…, the manifest says {manifest.files[name][:12]}…); "
            f"copy or export the bundle again"
        )
    return path


def _inside(folder: Path, path: Path) -> Path:
    """A path, if no link leads out of the bundle."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"paths in a bundle stay inside it; {path} leads to {path.resolve()}")
    return path
