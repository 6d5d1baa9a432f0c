"""The deployment contract: a folder `NAME.fbclip/` with a manifest, text features and graphs.

Needs neither torch nor ONNX. Written to a temporary sibling and renamed, so half a bundle is never found under
its name; every file's SHA-256 is in the manifest and checked before the file is used, also of the files that a graph
takes weights from. Bundles come from others: whatever is in one, it is read or refused in one line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fbclip.assets import EMBEDDED
from fbclip.engines import Engine, Platform, RtxEngine, RtxPlatform
from fbclip.errors import BundleError, DeviceError, UsageError
from fbclip.files import new_folder, recover, require_writable, sha256, take_place
from fbclip.manifest import (
    ANOMALY_MAP,
    BATCH_AXIS,
    DYNAMIC,
    FORMAT,
    GRAPHS,
    IMAGE,
    NAME,
    SCORE,
    STATIC,
    TEXT,
    VARIANTS,
    Manifest,
)
from fbclip.memory import Memory
from fbclip.untrusted import (
    MIB,
    external_files,
    one_line,
    parse_array,
    read_bytes,
)

__all__ = [
    "ANOMALY_MAP",
    "BATCH_AXIS",
    "DYNAMIC",
    "FORMAT",
    "GRAPHS",
    "IMAGE",
    "SCORE",
    "STATIC",
    "SUFFIX",
    "TEXT",
    "VARIANTS",
    "Bundle",
    "Manifest",
    "checked_name",
    "require_place",
    "save",
]

SUFFIX = ".fbclip"
MOST_MANIFEST = MOST_TEXT = MIB  # bytes of manifest.json and text.npy; usual are 2,000 and 6,000
UNIT = 1e-3  # how far the length of a text feature may be from 1


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        path: its folder.
        manifest: what it holds.
        text: text features float32 (2, E), normal then abnormal.
        sha256: of its manifest, which has the hashes of all files that the export wrote.
    """

    path: Path
    manifest: Manifest
    text: NDArray[np.float32]
    sha256: str

    @classmethod
    def load(cls, path: str | Path | None = None) -> Bundle:
        """Load a bundle, or the embedded default model's.

        Graphs are checked when they are asked for. A link is followed once: where it leads elsewhere later, all files
        are still those of the one folder.

        Raises:
            BundleError: missing, damaged, of another format, with impossible values, or with files that leave the folder.
        """
        folder = EMBEDDED if path is None else _without_links(Path(path))
        manifest_path = folder / "manifest.json"
        with suppress(OSError, ValueError):
            recover(folder)
        try:
            manifest_path.lstat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(
                f"a bundle is a folder with a manifest.json; {folder} has none: {_cure(folder)}", option="bundle"
            ) from error
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder} can't be read: {one_line(error)}") from error
        try:
            content = read_bytes(_inside(folder, manifest_path), MOST_MANIFEST)
        except BundleError:
            raise
        except ValueError as error:
            raise BundleError(f"{manifest_path} is no fbclip manifest: {error}; export the bundle again") from error
        manifest = Manifest.from_json(content, manifest_path)
        text = _text_features(_checked(folder, manifest, "text.npy"))
        return cls(folder, manifest, text, hashlib.sha256(content).hexdigest())

    @property
    def name(self) -> str:
        """Its own: that of its folder, without suffix. `manifest.name` is the model's, which copies share."""
        return self.path.resolve().name.removesuffix(SUFFIX) or self.manifest.name

    def graph(self, precision: str) -> Path:
        """The ONNX file of a precision, checked against its hash.

        Raises:
            BundleError: not in this bundle, or damaged.
        """
        return self._verified(self.graph_files(precision))

    def graph_for(self, device: str, precision: str) -> Path:
        """The graph that ONNX Runtime runs best on a device: its variant, and the portable one where there is none.

        Raises:
            BundleError: not in this bundle, or damaged.
        """
        portable = self.graph_files(precision)
        variant = VARIANTS.get((device, precision))
        if variant is None or variant not in self.manifest.files:
            return self._verified(portable)
        return self._verified([variant, *self._named_in(variant), *portable])

    def graph_files(self, precision: str) -> list[str]:
        """Names of the graph's file and, after it, of those beside it with its weights.

        Raises:
            BundleError: not in this bundle, damaged, or with weights in files that the manifest doesn't list.
        """
        if precision not in self.manifest.precisions:
            option = "" if precision == "fp32" else f" --{precision}"
            raise BundleError(
                f"{self.path} has no {precision} graph (it has {', '.join(self.manifest.precisions)}); "
                f"export it with fbclip export{option}"
            )
        graph = GRAPHS[precision]
        beside = {name for name in self.manifest.files if name.startswith(f"{graph}.")}
        return [graph, *sorted(beside | self._named_in(graph))]

    def graph_sha256(self, precision: str) -> str:
        """The hash of a graph; of the hashes of its files where its weights lie beside it."""
        hashes = [self.manifest.files[name] for name in self.graph_files(precision)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def model_sha256(self, precision: str) -> str:
        """The hash of all that makes the scores of a precision: graph and text features."""
        parts = self.graph_sha256(precision), self.manifest.files["text.npy"]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def verify(self) -> None:
        """Check every file against its hash, those that nobody asks for too.

        Raises:
            BundleError: one is missing or damaged.
        """
        self._verified(self.manifest.files)

    @property
    def calibration(self) -> Path:
        """The file that `fbclip calibrate` writes; it need not be there.

        Raises:
            BundleError: a link leads out of the bundle.
        """
        return self.inside("calibration.json")

    @property
    def memory_file(self) -> Path:
        """The file that `fbclip adapt` writes; it need not be there.

        Raises:
            BundleError: a link leads out of the bundle.
        """
        return self.inside("memory.npz")

    def memory(self, path: Path | None = None) -> Memory | None:
        """What good parts taught this model, from its own file, or another bundle's of the same model.

        Returns:
            The memory; None where it has no file of its own.

        Raises:
            BundleError: damaged, altered, or of another model than the bundle holds now; or the bundle can't have one.
        """
        own = self.memory_file
        if path is None and not os.path.lexists(own):
            return None
        path = path or own
        if (shape := self.manifest.memory_shape) is None:
            raise BundleError(f"{self.path} has no inputs for a memory, so {path} is none of its: export it again")
        memory = Memory.load(path, shape)
        self.require_own(memory, str(path))
        return memory

    def require_own(self, memory: Memory, name: str) -> None:
        """Raise BundleError unless this model was taught a memory, which is called `name` in the message."""
        if memory.about.precision not in self.manifest.precisions or (
            memory.about.model_sha256 != self.model_sha256(memory.about.precision)
        ):
            raise BundleError(
                f"{name} is of another model than {self.path} holds now: run fbclip adapt again, or delete it"
            )

    @property
    def engines(self) -> Path:
        """The folder of what devices make of the graphs: plans, their sidecars, caches; it need not be there.

        Raises:
            BundleError: a link leads out of the bundle.
        """
        return self.inside("engines")

    def inside(self, name: str) -> Path:
        """The path of a file or folder in the bundle that the manifest doesn't list, to be read or written.

        Raises:
            BundleError: a link leads out of the bundle.
        """
        return _inside(self.path, self.path / name)

    def engine(self, precision: str, here: Platform | RtxPlatform, batch: int = 1) -> tuple[Path, Engine]:
        """A plan that runs here and its sidecar; the plan is not opened, only its hash is checked.

        Args:
            precision: of the graph it was built from.
            here: the device and the library.
            batch: images at once that it must take.

        Raises:
            DeviceError: no plan for this device; names the command that builds one.
            BundleError: the plan or a sidecar is damaged, or leads out of the bundle.
        """
        graph_sha256 = self.graph_sha256(precision)
        rebuild = f"{here.COMMAND} --bundle {self.path} --precision {precision}"
        kind = RtxEngine if isinstance(here, RtxPlatform) else Engine
        names = (sidecar.name for sidecar in self.inside(here.FOLDER).glob("*.json"))
        sidecars = sorted(names, key=lambda name: (name != f"{here.engine_name(precision)}.json", name))
        found, strange = [], []
        for name in sidecars:  # one that is damaged, or of a later release, is no reason to refuse another
            try:
                path = self.inside(f"{here.FOLDER}/{name}")
                found.append((path.with_suffix(".plan"), kind.load(path)))
            except BundleError as error:
                strange.append(error)
        others = sorted({engine.precision for _, engine in found} - {precision})
        candidates = [(plan, engine) for plan, engine in found if engine.precision == precision]
        if not candidates and strange:
            raise strange[0]
        if not candidates:
            there = f" (it has {', '.join(others)})" if others else ""
            raise DeviceError(
                f"{self.path} has no {precision} {here.LIBRARY} engine{there}; build it here with {rebuild}"
            )
        refusals = [engine.mismatch(here, graph_sha256) for _, engine in candidates]
        if None not in refusals:
            raise DeviceError(f"{candidates[0][0].name} {refusals[0]}: run {rebuild}")
        plan, engine = candidates[refusals.index(None)]
        low, usual, high = engine.options.batch
        if not low <= batch <= high:
            wider = f"{rebuild} --batch {min(low, batch)},{usual},{max(high, batch)}"
            raise DeviceError(f"{plan.name} takes {low} to {high} images at once, not {batch}: run {wider}")
        if not _inside(self.path, plan).is_file() or sha256(plan) != engine.plan_sha256:
            raise BundleError(f"{plan} is missing or damaged: run {rebuild}")
        return plan, engine

    def _named_in(self, graph: str) -> set[str]:
        """The files that a graph takes weights from, all of which the manifest must list; none where it isn't there."""
        path = _inside(self.path, self.path / graph)
        if not path.is_file():
            return set()
        try:
            names = external_files(path)
            if strange := names - self.manifest.files.keys():
                raise ValueError(
                    f"it takes weights from {one_line(sorted(strange)[0], 60)!r}, which isn't in the manifest"
                )
        except ValueError as error:
            _checked(self.path, self.manifest, graph)  # says so where it is damaged
            raise BundleError(f"{path} is no graph of this bundle: {error}; export the bundle again") from error
        return names

    def _verified(self, names: Iterable[str]) -> Path:
        """The path of the first of some files, each checked against its hash."""
        first, *_ = [_checked(self.path, self.manifest, name) for name in dict.fromkeys(names)]
        return first


def save(path: Path, text: NDArray[np.float32], write_files: Callable[[Path], Manifest]) -> Bundle:
    """Write a bundle atomically: killed at any moment, it leaves the old one or the new one under its name.

    Args:
        path: the folder to make; an older bundle there is replaced once the new one is whole.
        text: float32 (2, E).
        write_files: writes graphs and reports into the folder it is given and returns the manifest, without
            `files`; what it raises leaves nothing behind.

    Raises:
        BundleError: another thing is at `path`, or the new bundle is none that could be loaded.
        FBClipError, UsageError: see `fbclip.files.write_error`.
    """
    path = require_place(path)
    with new_folder(path) as folder:
        np.save(folder / "text.npy", text)
        manifest = write_files(folder)
        files = {f.relative_to(folder).as_posix(): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        values = {**asdict(manifest), "files": files}
        text_of_it = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / "manifest.json").write_bytes(text_of_it.encode("utf-8", "replace"))  # a file's name may be no Unicode
        bundle = Bundle.load(folder)
        take_place(folder, path)
    return replace(bundle, path=path)


def require_place(path: Path) -> Path:
    """Where a bundle will be written, links followed: said before the work, not after it.

    Raises:
        BundleError: something else than a bundle is there.
        FBClipError, UsageError: it can't be written; see `fbclip.files.write_error`.
    """
    try:
        path = path.resolve()
        require_writable(path.parent)
        recover(path)
    except (OSError, RuntimeError) as error:  # links in a circle, a name that is too long
        raise BundleError(f"a bundle can't be {path}: {one_line(error)}; choose another place", option="out") from error
    if path.exists() and not (path / "manifest.json").is_file():
        raise BundleError(
            f"a bundle is written to a new folder or in place of another; {path} is neither", option="out"
        )
    return path


def checked_name(name: str) -> str:
    """A name for a bundle or for its copy, without suffix.

    Raises:
        UsageError: none that is a plain file name everywhere, Triton's repositories included.
    """
    name = name.removesuffix(SUFFIX)
    if refusal := NAME.refuse(name):
        raise UsageError(f"a name {refusal}; got {name!r}", option="name")
    return name


def _text_features(path: Path) -> NDArray[np.float32]:
    """Text features float32 (2, E) of length 1 (docs/method.md): a bundle with others would score, and wrongly."""
    try:
        text = parse_array(read_bytes(path, MOST_TEXT))
    except ValueError as error:
        raise BundleError(f"{path} holds no array: {error}; export the bundle again") from error
    if text.ndim != 2 or text.shape[0] != 2 or text.dtype != np.float32:
        raise BundleError(f"text features are float32 (2, E); {path} holds {text.dtype} {text.shape}")
    lengths = np.linalg.norm(text.astype(np.float64), axis=1)
    if not (abs(lengths - 1) <= UNIT).all():  # nor where they are NaN
        raise BundleError(
            f"text features have length 1; those in {path} have {lengths[0]:g} and {lengths[1]:g}: "
            f"export the bundle again"
        )
    return text


def _checked(folder: Path, manifest: Manifest, name: str) -> Path:
    """The path of a file that the manifest lists, if it is inside the bundle and unchanged."""
    path = _inside(folder, folder / name)
    try:
        if name not in manifest.files or not path.is_file():
            raise BundleError(f"{folder} lacks {name}; copy the whole folder, or export it again")
        found = sha256(path)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror or error}; copy the whole folder again") from error
    if found != manifest.files[name]:
        raise BundleError(
            f"{path} is damaged (SHA-256 {found[:12]}…, the manifest says {manifest.files[name][:12]}…); "
            f"copy or export the bundle again"
        )
    return path


def _cure(folder: Path) -> str:
    """What to do where a bundle is not there."""
    if (near := folder.with_name(f"{folder.name}{SUFFIX}")).is_dir():
        return f"did you mean {near}?"
    return "make one with fbclip calibrate (a copy of the embedded one) or fbclip export"


def _without_links(folder: Path) -> Path:
    """Where a path leads now; as it is given where no link is in it."""
    try:
        leads_to = folder.resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, which reading it tells
        return folder
    return folder if leads_to == Path(os.path.abspath(folder)) else leads_to  # noqa: PTH100  # which follows none


def _inside(folder: Path, path: Path) -> Path:
    """A path, if no link leads out of the bundle."""
    try:
        leads_to = path.resolve()
        inside = leads_to.is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # links in a circle
        raise BundleError(f"{path} can't be read: {one_line(error)}") from error
    if not inside:
        raise BundleError(f"paths in a bundle stay inside it; {path} leads to {leads_to}")
    return path
