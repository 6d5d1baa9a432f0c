"""What good parts taught a bundle: its `memory.npz`, and the tensors that the graph takes of it. Needs numpy alone."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fbclip.engines import Precision
from fbclip.errors import BundleError, ImageError, UsageError
from fbclip.files import replacing
from fbclip.untrusted import MIB, Line, Range, Sha256, build, one_line, one_of, parse_array, parse_json

Array = NDArray[np.float32]

# Names of the graph's tensors of a memory, for the exporter and for every runtime; `Tensors` has them in this order.
MEMORY_INPUTS = ("memory_matrix", "memory_places", "memory_bank", "memory_weights")
FEATURES, LOGITS = "features", "logits"  # outputs: what patches are known by, and the zero-shot logits

REACH = 2  # patches: the furthest that positions may look around
FAR = 1e30  # a squared distance beyond all others; float32 holds sums of it
TOP_SHARE = 0.01  # of the patches, whose mean is the map's part of the score
NEAREST_ZERO = 1e-6  # squared distances below count as this: their logarithm is finite

# How a memory knows what is good: by mean and covariance of all patches, by the nearest of some remembered patches, or
# by what is usual at each place.
WHITEN, NEAREST, POSITIONS = "whiten", "nearest", "positions"
MODES = (WHITEN, NEAREST, POSITIONS)
FIXED, FLIPS, ANY = "fixed", "flips", "any"
ORIENTATIONS = (FIXED, FLIPS, ANY)

SHRINKAGE = 0.1  # of a covariance towards a multiple of the identity (docs/method.md, section 11)
SLOPE = 4.0  # of the logit over the logarithm of the squared distance
MEMORY_LINE = 0.5  # scores and map values of a bundle with a memory are anomalous from here on
MOST_REFERENCES = 10_000
MOST_VIEWS = 1 + 256  # of a frame that have expectations of their own
MOST_PLACES = 1 << 25  # numbers of all those expectations: 270 MB as float64
MOST_SUM = 1e6  # of a feature over all references
MOST_LOGIT = 1000.0  # of a reference, and of a line
MOST_ABOUT = 4 * MIB  # bytes of the description; a reference takes 200 of them
ABOUT = "about.json"
NONE_OF = {"tiles": None, "align": None, "views": 1}  # fields of a memory of whole frames as they lie


class Weight(IntEnum):
    """Places in the tensor of weights."""

    MAP_ZERO_SHOT = 0  # map logit = MAP_ZERO_SHOT * zero-shot + MAP_MEMORY * log(squared distance) + MAP_OFFSET
    MAP_MEMORY = 1
    MAP_OFFSET = 2
    SCORE_CLASS = 3  # score logit = SCORE_CLASS * class token's + SCORE_TOP * mean of the highest + SCORE_OFFSET
    SCORE_TOP = 4
    SCORE_OFFSET = 5
    REACH = 6  # patches around its own place that one is compared with; 0 for its own alone
    PLACES_FAR = 7  # added to distances to `places`: 0, or FAR where the bank alone counts


class Shape(NamedTuple):
    """Of a model's features: side of the grid, groups of layers, numbers of a group."""

    grid: int
    groups: int
    width: int

    @property
    def features(self) -> int:
        """Numbers of a patch, F."""
        return self.groups * self.width

    @property
    def top(self) -> int:
        """How many patches are the highest."""
        return int(np.ceil(TOP_SHARE * self.grid**2))

    def grouped(self, features: NDArray[Any]) -> NDArray[Any]:
        """Features (..., F) -> (G, ..., W)."""
        parts: NDArray[Any] = np.stack(np.split(features, self.groups, axis=-1))
        return parts

    @property
    def numbers(self) -> int:
        """In all tensors of a memory."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a memory's tensors, by the names of the graph's inputs."""
        matrix = (self.groups, self.width, self.width)
        shapes = (matrix, (self.grid**2, self.features), (self.width,), (len(Weight),))
        return dict(zip(MEMORY_INPUTS, shapes, strict=True))


@dataclass(frozen=True)
class Tensors:
    """A memory as the graph takes it, float32, of one shape for any number of references.

    Attributes:
        matrix: (G, W, W), what the features of each group are multiplied with: whitening, or the bank's tokens in columns.
        places: (L, F), what is expected at each place, after that product.
        bank: (W,), squared length of each of the bank's tokens and of a patch's; FAR where there is none.
        weights: see `Weight`.
    """

    matrix: Array
    places: Array
    bank: Array
    weights: Array

    @classmethod
    def neutral(cls, shape: Shape) -> Tensors:
        """The memory of nothing: with it the results are the zero-shot ones, bit for bit."""
        weights = np.zeros(len(Weight), np.float32)
        weights[[Weight.MAP_ZERO_SHOT, Weight.SCORE_CLASS]] = 1
        return cls(
            np.zeros((shape.groups, shape.width, shape.width), np.float32),
            np.zeros((shape.grid**2, shape.features), np.float32),
            np.full(shape.width, FAR, np.float32),
            weights,
        )

    def checked(self, shape: Shape) -> Tensors:
        """These tensors, if they are those of a shape.

        Raises:
            UsageError: they are not.
        """
        found = {name: (str(value.dtype), value.shape) for name, value in self.named().items()}
        if found != {name: ("float32", wanted) for name, wanted in shape.shapes().items()}:
            raise UsageError(f"a memory for this model is float32 {shape.shapes()}; got {found}")
        return self

    def named(self) -> dict[str, Array]:
        """By the names of the graph's inputs."""
        return dict(zip(MEMORY_INPUTS, (self.matrix, self.places, self.bank, self.weights), strict=True))


Sums = Mapping[str, NDArray[Any]]  # float32 or float64


@dataclass(frozen=True)
class Recipe:
    """How a memory is learned: see `fbclip.memory.About`."""

    mode: str
    orientation: str
    reach: int
    weight: float


@dataclass(frozen=True)
class Reference:
    """A good part that a memory was learned from.

    Attributes:
        name: of its file.
        sha256: of its pixels, as `fbclip.images.pixels_sha256` has it.
        score: its own score logit where all others taught the memory (leave-one-out), before the memory's line is taken off.
        peak: the same of the highest value of its map.
        odd: it stands out among the others and does not count for the lines.
    """

    name: Line
    sha256: Sha256
    score: Annotated[float, Range(-MOST_LOGIT, MOST_LOGIT)]
    peak: Annotated[float, Range(-MOST_LOGIT, MOST_LOGIT)]
    odd: bool


@dataclass(frozen=True)
class About:
    """What a memory says of itself.

    Attributes:
        mode: one of `MODES`.
        orientation: in which views each reference was shown, one of `ORIENTATIONS`.
        reach: patches around its own place that one is compared with; 0 unless the mode is "positions".
        weight: of the zero-shot logit beside the memory's.
        map_line, score_line: logits that are taken off, so that 0.5 is the line between good and anomalous.
        references: the good parts.
        model_sha256: `Bundle.model_sha256` of `precision`.
        precision, device: what looked at them.
        roi: the region of interest that they were looked at in, or None for all of them.
        tiles, align: the tiles that they were cut into, and the part that they were aligned to, or None (see
            `fbclip.runtime.view.Place`).
        views: of a frame that have expectations of their own, in the mode "positions": the whole frame and each tile. 1
            where all have the same.
        arrays: SHA-256 of each array's file in the archive.
        format: of the file.
    """

    mode: Annotated[str, one_of(*MODES)]
    orientation: Annotated[str, one_of(*ORIENTATIONS)]
    reach: Annotated[int, Range(0, REACH)]
    weight: Annotated[float, Range(0, 1000)]
    map_line: Annotated[float, Range(-MOST_LOGIT, MOST_LOGIT)]
    score_line: Annotated[float, Range(-MOST_LOGIT, MOST_LOGIT)]
    references: Annotated[tuple[Reference, ...], Range(1, MOST_REFERENCES)]
    model_sha256: Sha256
    precision: Precision
    device: Line
    roi: Line | None
    arrays: Mapping[str, Sha256] = field(default_factory=dict)
    format: Annotated[int, Range(1, 1)] = 1
    tiles: Line | None = None
    align: Line | None = None
    views: Annotated[int, Range(1, MOST_VIEWS)] = 1

    @property
    def place(self) -> tuple[str | None, str | None, str | None]:
        """The fields of `fbclip.runtime.view.Place`."""
        return self.roi, self.tiles, self.align

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.mode, self.orientation, self.reach, self.weight)


@dataclass(frozen=True)
class Memory:
    """What good parts taught.

    Attributes:
        about: the description.
        sums: what was added up over the references, by `fbclip.learning`: enough to go on from without their images.
        shape: of the features.
    """

    about: About
    sums: Sums
    shape: Shape

    @cached_property
    def tensors(self) -> Tensors:
        """As the graph takes it; the whole frame's where each view has its own."""
        return self._with_lines(prepare(self.about.recipe, self.shape, self.sums))

    def tensors_of(self, view: int) -> Tensors:
        """As the graph takes it for a view of a frame: 0 is the whole, 1 the first tile."""
        if view not in self._tensors:  # two threads may both make it, alike
            made = prepare(self.about.recipe, self.shape, of_view(self.sums, view))
            self._tensors.setdefault(view, self._with_lines(made))
        return self._tensors[view]

    @cached_property
    def _tensors(self) -> dict[int, Tensors]:
        return {0: self.tensors}

    def _with_lines(self, made: Tensors) -> Tensors:
        about = self.about
        made.weights[Weight.MAP_OFFSET] = -about.map_line
        made.weights[Weight.SCORE_OFFSET] = about.map_line - about.score_line
        return made

    def require_views(self, count: int) -> None:
        """Raise ImageError unless a frame of this many views is one of those that it was learned from."""
        if self.about.mode == POSITIONS and count != self.about.views:
            raise ImageError(
                f"memory {self.name} knows each place of frames with {self.about.views - 1} tiles; this frame has "
                f"{count - 1}: inspect frames of the size that was learned from, or adapt again",
                option="tiles",
            )

    @property
    def sha256(self) -> str:
        """Of all that makes it: another memory has another."""
        return hashlib.sha256(_text(self.about)).hexdigest()

    @property
    def name(self) -> str:
        """The first twelve digits of its hash, for people and records."""
        return self.sha256[:12]

    def explain(self, precision: str | None = None) -> str:
        """One line for a person."""
        about = self.about
        how = f"{about.mode} ±{about.reach}" if about.mode == POSITIONS else about.mode
        text = f"memory {self.name} of {len(about.references)} good parts ({how})"
        if precision not in (None, about.precision):
            text += f"; learned in {about.precision}, and {precision} may differ: adapt in {precision}"
        return text

    @classmethod
    def load(cls, path: Path, shape: Shape) -> Memory:
        """Read a memory's file; nothing in it is unpickled, nothing is read before its size is bounded.

        Raises:
            BundleError: missing, damaged, altered, or of another model's shape.
        """
        try:
            return cls._read(path, shape)
        # zipfile's own: RuntimeError for a member that is encrypted, EOFError for one that ends early
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, UsageError) as error:
            raise BundleError(
                f"{path} is no memory of this model: {one_line(error)}; run fbclip adapt again"
            ) from error

    @classmethod
    def _read(cls, path: Path, shape: Shape) -> Memory:
        if not path.is_file():
            raise ValueError("it is no file")
        shapes = sum_shapes(shape, MOST_VIEWS)
        if (size := path.stat().st_size) > (most := MOST_ABOUT + sum(map(_most, shapes.values()))):
            raise ValueError(f"it has at most {most:,} bytes; got {size:,}")  # zipfile lists whatever is in it
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            names = {name.removesuffix(".npy") for name in members.keys() - {ABOUT}}
            if ABOUT not in members or len(members) != len(archive.infolist()) or not names <= shapes.keys():
                raise ValueError(f"it holds {one_line(', '.join(sorted(members)), 80)}")
            for name, info in members.items():
                most = MOST_ABOUT if name == ABOUT else _most(shapes[name.removesuffix(".npy")])
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
                    raise ValueError(f"{name} is compressed, or has more than {most:,} bytes")
            described = parse_json(archive.read(ABOUT))
            about = build(About, {**NONE_OF, **described} if isinstance(described, dict) else described)
            shapes = sum_shapes(shape, about.views)
            if about.views > 1 and (about.mode != POSITIONS or math.prod(shapes["places"]) > MOST_PLACES):
                raise ValueError(f"it has {about.views} views in the mode {about.mode}")
            if too_large := [name for name in names if members[f"{name}.npy"].file_size > _most(shapes[name])]:
                raise ValueError(f"{too_large[0]} has more than {_most(shapes[too_large[0]]):,} bytes")
            if about.arrays.keys() != names:
                raise ValueError("its arrays aren't those of its description")
            contents = {name: archive.read(f"{name}.npy") for name in about.arrays}  # in the order that names it
        if {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()} != dict(about.arrays):
            raise ValueError("its arrays aren't those of its description")
        sums = {name: parse_array(content) for name, content in contents.items()}
        if about.mode == POSITIONS:
            required = {"count", "places", "pairs", "products"}
        else:
            required = {"count", "total", "products"} if about.mode == WHITEN else {"tokens"}
        if sums.keys() != required:
            raise ValueError(f"{about.mode} needs {', '.join(sorted(required))}; it has {', '.join(sorted(sums))}")
        for name, values in sums.items():
            fits = len(values.shape) == len(shapes[name]) and all(
                side == most or (name == "tokens" and 1 <= side <= most)
                for side, most in zip(values.shape, shapes[name], strict=True)
            )
            if name == "places" and np.abs(values).max(initial=0) > MOST_SUM:
                raise ValueError(f"places are sums of features of length 1; got {np.abs(values).max():g}")
            if not fits or values.dtype not in (np.float32, np.float64) or not np.isfinite(values).all():
                raise ValueError(f"{name} is finite and {shapes[name]}; got {values.dtype} {values.shape}")
        memory = cls(about, sums, shape)
        with np.errstate(all="ignore"):
            if not all(np.isfinite(value).all() for value in memory.tensors.named().values()):
                raise ValueError("what was added up gives no finite numbers")
        return memory

    def save(self, path: Path) -> None:
        """Write the file whole, or leave the older one.

        Raises:
            FBClipError, UsageError: it can't be written; see `fbclip.files.write_error`.
        """
        with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, values in self.sums.items():
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), _npy(values))
            archive.writestr(zipfile.ZipInfo(ABOUT), _text(self.about))


def prepare(recipe: Recipe, shape: Shape, sums: Sums) -> Tensors:
    """What was added up by a recipe as the graph takes it, before its lines are taken off.

    Raises:
        UsageError: sums that no covariance has.
    """
    made = Tensors.neutral(shape)
    weights = made.weights
    weights[[Weight.MAP_ZERO_SHOT, Weight.SCORE_CLASS]] = recipe.weight
    weights[Weight.MAP_MEMORY], weights[Weight.SCORE_TOP] = SLOPE, 1
    weights[Weight.REACH] = recipe.reach
    if recipe.mode == NEAREST:
        weights[Weight.PLACES_FAR] = FAR
        tokens = sums["tokens"].astype(np.float32)
        made.matrix[:, :, : len(tokens)] = shape.grouped(tokens).transpose(0, 2, 1)
        # squared length of a patch: its features of each layer have length 1, and so have the tokens'
        made.bank[: len(tokens)] = 2 * np.square(tokens.astype(np.float64)).sum(axis=-1)
        return made
    if recipe.mode == POSITIONS:
        expected = of_view(sums, 0)["places"] / sums["count"]
        covariance = sums["products"] / sums["pairs"]
    else:
        mean = sums["total"] / sums["count"]
        expected = np.broadcast_to(mean, (shape.grid**2, shape.features))
        centre = shape.grouped(mean)
        covariance = sums["products"] / sums["count"] - centre[:, :, None] * centre[:, None, :]
    matrix = np.stack([whitening(each) for each in covariance]).astype(np.float32)
    places = np.matmul(shape.grouped(expected.astype(np.float32)), matrix)
    return replace(made, matrix=matrix, places=np.concatenate(list(places), axis=-1))


def whitening(covariance: NDArray[np.floating]) -> NDArray[np.floating]:
    """The matrix that decorrelates by a covariance (W, W), after shrinking it towards a multiple of the identity
    (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004).

    Raises:
        UsageError: none that is positive definite then.
    """
    width = len(covariance)
    scale = np.trace(covariance) / width
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * max(float(scale), 1e-9) * np.eye(width)
    try:
        matrix: NDArray[np.floating] = np.linalg.inv(np.linalg.cholesky(shrunk)).T
    except np.linalg.LinAlgError as error:
        raise UsageError("what these images taught is no covariance: adapt again") from error
    return matrix


def probability(logits: Any) -> Any:
    """The sigmoid of one logit or an array of them, however large."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64)))


def require_places(shape: Shape, views: int) -> None:
    """Raise UsageError where so many views of a frame can't each have places of their own."""
    most = min(MOST_VIEWS, MOST_PLACES // (shape.grid**2 * shape.features))
    if views > most:
        raise UsageError(
            f"where positions count, a frame of this model has at most {most - 1} tiles; got {views - 1}: choose larger ones, "
            f"or one memory for all of them, whiten",
            option="positions",
        )


def of_view(sums: Sums, view: int) -> Sums:
    """The sums of a view, where each has places of its own: places (V, L, F) -> (L, F)."""
    if "places" not in sums or sums["places"].ndim == 2:
        return sums
    return {**sums, "places": sums["places"][view]}


def sum_shapes(shape: Shape, views: int = 1) -> dict[str, tuple[int, ...]]:
    """The largest shape of each array that a memory may hold."""
    each = (shape.grid**2, shape.features)
    return {
        "count": (1,),
        "total": (shape.features,),
        "products": (shape.groups, shape.width, shape.width),
        "places": each if views == 1 else (views, *each),
        "pairs": (1,),
        "tokens": (shape.width, shape.features),
    }


def _most(shape: tuple[int, ...]) -> int:
    """Bytes of an array's file in the archive, with headers."""
    return 8 * math.prod(shape) + 10_000


def hashes(sums: Sums) -> dict[str, str]:
    """SHA-256 of each array's file in the archive."""
    return {name: hashlib.sha256(_npy(values)).hexdigest() for name, values in sums.items()}


def _npy(values: NDArray[np.floating]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _text(about: About) -> bytes:
    # what a memory of whole frames doesn't have is left out: it keeps the name that older releases gave it
    values = {name: value for name, value in asdict(about).items() if NONE_OF.get(name, ...) != value}
    return (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
