"""`fbclip adapt`: a handful of good parts teach a bundle what is usual on this line. Seconds, and neither torch nor a data set.

What is learned and how is `fbclip.learning`; here images become what it learns from, and a picture of what it found.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fbclip.backend import Described
from fbclip.bundle import Bundle
from fbclip.data.procedural import add_defect
from fbclip.errors import ImageError, UsageError
from fbclip.files import replacing, write_error
from fbclip.images import encode_image, pixels_sha256
from fbclip.learning import Judged, Learned, Seen, add_up, judge, learn, of_tiles, one_view, together
from fbclip.memory import (
    ANY,
    FIXED,
    FLIPS,
    MEMORY_LINE,
    MODES,
    ORIENTATIONS,
    POSITIONS,
    REACH,
    WHITEN,
    About,
    Memory,
    Recipe,
    hashes,
    prepare,
    probability,
    require_places,
)
from fbclip.metrics import image_metrics
from fbclip.resample import resize, upsampling_matrix
from fbclip.runtime.inputs import as_frame
from fbclip.runtime.prediction import Prediction
from fbclip.runtime.predictor import Predictor, Prepared
from fbclip.runtime.sight import EXPLAINED
from fbclip.runtime.target import ADAPTED, CALIBRATED, Say
from fbclip.terminal import printable, progress, say, warn

T = TypeVar("T")

AUTO = "auto"
WEIGHT = 0.2  # of the zero-shot logit beside the memory's; chosen on rendered parts (benchmarks/few_shot.py)
ADVISED = 4  # references; fewer know little of what varies
MOST_SHOTS = 64  # references at once, which are in memory together
VIEWS = {FIXED: 1, FLIPS: 4, ANY: 8}
MOVED = ((1 / 64, 1 / 96, 1.05), (-1 / 96, 1 / 64, 0.95))  # of the sides, and of the brightness: a part that lies aside
DEFECTS = 3  # drawn on each reference where the mode is chosen by trial
VARIETY = 1.5  # of those defects, see `fbclip.data.procedural.ProceduralDefects`
DEFECTIVE = 0.3  # share of a patch from which it counts as defective
TAUGHT_TILES = (
    16  # of a reference that teach a memory which all tiles share: a hundred times more patches than it needs
)
PANEL, PANELS = 240, 24  # pixels of a picture's panels, and how many references it shows


@dataclass(frozen=True)
class Choice:
    """How a memory is to be learned.

    Attributes:
        mode: one of `MODES`, or "auto": by trial on the references and defects drawn on them.
        orientation: views of each reference: "fixed" as it is, "flips" its four mirror images, "any" turned by 90° as well.
            None: flips, and fixed where positions count.
        positions: patches within which a part's features lie in place; None where they don't.
        weight: of the zero-shot logit beside the memory's.

    Raises:
        UsageError: values that don't go together.
    """

    mode: str = WHITEN
    orientation: str | None = None
    positions: int | None = None
    weight: float = WEIGHT

    def __post_init__(self) -> None:
        if self.mode not in (AUTO, *MODES):
            raise UsageError(f"a mode is {', '.join((AUTO, *MODES))}; got {self.mode!r}", option="mode")
        if self.orientation not in (None, *ORIENTATIONS):
            raise UsageError(
                f"an orientation is {', '.join(ORIENTATIONS)}; got {self.orientation!r}", option="orientation"
            )
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight <= 1000:
            raise UsageError(f"a weight is 0 to 1000; got {self.weight!r:.50}", option="weight")
        reach = self.positions
        whole = isinstance(reach, int) and not isinstance(reach, bool)
        if reach is not None and not (whole and 0 <= reach <= REACH):
            raise UsageError(f"positions are off, or 0 to {REACH} patches; got {reach!r}", option="positions")
        if reach is not None and (self.orientation not in (None, FIXED) or self.mode not in (WHITEN, POSITIONS)):
            raise UsageError(
                "parts whose positions count are compared as they lie: with positions the orientation is fixed, and the "
                f"mode is left out; got {self.mode} and {self.orientation}",
                option="positions",
            )

    @property
    def candidates(self) -> list[Recipe]:
        """What is tried: one recipe, unless the mode is chosen by trial."""
        if self.positions is not None or self.mode == POSITIONS:
            return [Recipe(POSITIONS, FIXED, 1 if self.positions is None else self.positions, self.weight)]
        if self.mode != AUTO:
            return [Recipe(self.mode, self.orientation or FLIPS, 0, self.weight)]
        orientations = [self.orientation] if self.orientation else [FLIPS, FIXED]
        tried = [Recipe(WHITEN, orientation, 0, self.weight) for orientation in orientations]
        return tried if self.orientation in (FLIPS, ANY) else [*tried, Recipe(POSITIONS, FIXED, 1, self.weight)]


@dataclass(frozen=True)
class Picture:
    """A reference on its way.

    Attributes:
        name: of its file.
        sha256: of its pixels.
        batch: what the graph takes of the whole, uint8 (1, H, W, 3).
        image: a small picture of what is inspected.
        tiles: how many there are; 0 where it is looked at as a whole.
        load: reads it again: pictures that have tiles are not kept.
    """

    name: str
    sha256: str
    batch: NDArray[np.uint8]
    image: NDArray[np.uint8]
    tiles: int
    load: Callable[[], Prepared]


@dataclass(frozen=True)
class Taught:
    """What `teach` found.

    Attributes:
        memory: what is to be written.
        learned: the references, with what the others alone say of each.
        pictures: of the new references, in their order.
        trials: by recipe, how well it told drawn defects from good patches (AUROC); empty where nothing was tried.
        skipped, copies: images that were left out: unreadable or showing nothing; seen before.
        seconds: that it took.
    """

    memory: Memory
    learned: Learned
    pictures: tuple[Picture, ...]
    trials: dict[Recipe, float]
    skipped: int
    copies: int
    seconds: float


def teach(
    predictor: Predictor,
    good: Sequence[Path | NDArray[np.uint8]],
    choice: Choice,
    old: Memory | None,
    console: Console,
) -> Taught:
    """Learn a memory from good parts. Nothing is written.

    Args:
        predictor: of the bundle, on the device and in the precision that will inspect; its memory makes no difference.
        good: paths, or frames uint8 (H, W, 3) RGB. Those that can't be read or show nothing are reported and left out.
        choice: how; with an old memory its own recipe.
        old: to go on from.

    Raises:
        BundleError, UsageError: too few images, the bundle has no inputs for a memory, or the old memory is of another
            model, region or precision.
    """
    start = time.perf_counter()
    shape, size = predictor.bundle.manifest.memory_shape, predictor.bundle.manifest.image_size
    if shape is None:
        raise UsageError(
            f"{predictor.bundle.path} has no inputs for a memory: export its checkpoint again with this release"
        )
    if old:
        predictor.require_fit(old)
    recipes = [old.about.recipe] if old else choice.candidates
    if predictor.view.tiles and len(recipes) > 1:
        raise UsageError(
            "a mode is tried on whole frames; with tiles choose whiten, nearest, or positions", option="mode"
        )
    pictures, skipped, copies = _pictures(predictor, good, old, console)
    views = _views_of(pictures, recipes[0], old)
    least = 1 if old or recipes[0].mode == POSITIONS else 2
    if len(pictures) < least:
        known = f" and {copies} known already, by their pixels" if copies else ""
        raise UsageError(
            f"a memory is learned from {least} good images or more; got {len(pictures)} new{known}: give others",
            option="good",
        )
    with progress(console) as bars:
        task = bars.add_task("good parts", total=len(pictures))
        alone = len(pictures) == 1 and old is None
        trials: dict[Recipe, list[Seen]] = {recipe: [] for recipe in recipes}
        drawn: list[tuple[Described, NDArray[np.float32]]] = []
        for number, picture in enumerate(pictures):
            if picture.tiles:
                trials[recipes[0]].append(_look_at_tiles(predictor, picture, recipes[0], alone, number))
            else:
                for recipe, seen in _look(predictor, picture, recipes, alone).items():
                    trials[recipe].append(seen)
            if len(recipes) > 1:
                drawn.append(_drawn(predictor, picture))
            bars.advance(task)
        results = {r: _trial(predictor, r, seen, drawn) for r, seen in trials.items()} if len(recipes) > 1 else {}
        recipe = max(results, key=lambda each: results[each]) if results else recipes[0]
        again = bars.add_task("each by the others", total=len(pictures)) if predictor.view.tiles else None
        tell = None if again is None else partial(bars.advance, again)
        learned = learn(recipe, shape, size, trials[recipe], old, tell)
    about = About(
        recipe.mode,
        recipe.orientation,
        recipe.reach,
        recipe.weight,
        learned.map_line,
        learned.score_line,
        learned.references,
        predictor.bundle.model_sha256(predictor.precision),
        predictor.precision,
        predictor.backend.device,
        arrays=hashes(learned.sums),
        views=views,
        **predictor.view.place._asdict(),
    )
    seconds = time.perf_counter() - start
    memory = Memory(about, learned.sums, shape)
    return Taught(memory, learned, tuple(pictures), results, skipped, copies, seconds)


def _pictures(
    predictor: Predictor, good: Sequence[Path | NDArray[np.uint8]], old: Memory | None, console: Console
) -> tuple[list[Picture], int, int]:
    """The references, and how many images were left out: unreadable or showing nothing, and copies."""
    known = {each.sha256 for each in old.about.references} if old else set()
    pictures: list[Picture] = []
    skipped = copies = 0
    for number, image in enumerate(good, start=1):
        name = printable(image) if isinstance(image, Path) else f"frame {number}"
        try:
            frame = as_frame(image, "rgb")
            shown = predictor.prepare(frame)
        except ImageError as error:
            skipped += 1
            warn(console, f"skipped: {error}")
            continue
        if shown.unusable or shown.absent:
            skipped += 1
            why = f"is {EXPLAINED[shown.unusable]}" if shown.unusable else "shows no part that it can be aligned to"
            warn(console, f"left out: {name} {why}")
            continue
        digest = pixels_sha256(frame)
        if digest in known:
            copies += 1
            continue
        known.add(digest)
        small, tiles = resize(shown.shown, (PANEL, PANEL)), len(shown.layout or ())
        load = partial(_prepared, predictor, image)
        pictures.append(Picture(name[:500], digest, shown.batch, small, tiles, load))
    return pictures, skipped, copies


def _prepared(predictor: Predictor, image: Path | NDArray[np.uint8]) -> Prepared:
    return predictor.prepare(as_frame(image, "rgb"))


def _views_of(pictures: Sequence[Picture], recipe: Recipe, old: Memory | None) -> int:
    """How many views of a frame have expectations of their own.

    Raises:
        UsageError: more than a memory holds, or frames of several sizes.
    """
    counts = sorted({1 + picture.tiles for picture in pictures})
    if recipe.mode != POSITIONS or not counts:
        return 1
    if len(counts) > 1 or (old and old.about.views != counts[0]):
        raise UsageError(
            f"where positions count, all frames have the same tiles; these have {counts[0] - 1} to {counts[-1] - 1}"
            + (f", the memory's {old.about.views - 1}" if old else ""),
            option="positions",
        )
    return counts[0]


def _look_at_tiles(predictor: Predictor, picture: Picture, recipe: Recipe, alone: bool, number: int) -> Seen:
    """What the model sees of a reference in tiles.

    Where all views share one memory, some of the tiles are enough to teach it: each reference shows others, so that all
    together show the whole part.
    """
    shape = predictor.bundle.manifest.memory_shape
    assert shape is not None
    if recipe.mode == POSITIONS:
        require_places(shape, 1 + picture.tiles)
        step, first = 1, 0
    else:
        step = max(1, picture.tiles // TAUGHT_TILES)
        first = number % step
    shown = picture.load()
    parts = []
    for place, view in enumerate(predictor.views(shown)):
        if place == 0 or (place - 1) % step == first:
            turned = [predictor.backend.describe(each).features for each in _views(view, VIEWS[recipe.orientation])]
            parts.append(add_up(recipe, shape, np.concatenate(turned)))
    return Seen(
        picture.name,
        picture.sha256,
        partial(_described_views, predictor, picture.load),
        of_tiles(recipe, shape, parts),
        tuple(partial(_described_views, predictor, picture.load, by) for by in MOVED) if alone else (),
    )


def _described_views(
    predictor: Predictor, load: Callable[[], Prepared], moved: tuple[float, float, float] | None = None
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What the model sees of each view of a frame, which may be moved before."""
    frame = load()
    if moved:
        frame = predictor.prepare(_moved(frame.image[None], *moved)[0])
    for view in predictor.views(frame):
        described = predictor.backend.describe(view)
        yield described.features[0], described.logits[0]


def _look(predictor: Predictor, picture: Picture, recipes: Iterable[Recipe], alone: bool) -> dict[Recipe, Seen]:
    """What the model sees of a reference, for each recipe."""
    shape = predictor.bundle.manifest.memory_shape
    assert shape is not None
    recipes = list(recipes)
    count = max(VIEWS[recipe.orientation] for recipe in recipes)
    described = [predictor.backend.describe(view) for view in _views(picture.batch, count)]
    features = np.concatenate([each.features for each in described])
    copies = [predictor.backend.describe(_moved(picture.batch, *by)) for by in MOVED] if alone else []
    return {
        recipe: Seen(
            picture.name,
            picture.sha256,
            one_view(described[0].features[0], described[0].logits[0]),
            add_up(recipe, shape, features[: VIEWS[recipe.orientation]]),
            tuple(one_view(each.features[0], each.logits[0]) for each in copies),
        )
        for recipe in recipes
    }


def _views(batch: NDArray[np.uint8], count: int) -> list[NDArray[np.uint8]]:
    """The first of a picture's views, each uint8 (1, H, W, 3): as it is, mirrored, and the same turned by 90°."""
    upright = [batch, batch[:, :, ::-1], batch[:, ::-1], batch[:, ::-1, ::-1]][:count]
    if count <= len(upright):
        return [np.ascontiguousarray(view) for view in upright]
    if batch.shape[1] != batch.shape[2]:
        raise UsageError(
            f"parts in any orientation are seen in square frames; this graph takes {batch.shape[1]}x{batch.shape[2]}: "
            f"choose flips or fixed",
            option="orientation",
        )
    return [np.ascontiguousarray(view) for view in (*upright, *(each.transpose(0, 2, 1, 3) for each in upright))]


def _moved(batch: NDArray[np.uint8], across: float, down: float, gain: float) -> NDArray[np.uint8]:
    """A picture moved by shares of its sides, its edges repeated, and brightened."""
    height, width = batch.shape[1:3]
    move = np.array([[1, 0, across * width], [0, 1, down * height]], np.float32)
    image = cv2.warpAffine(batch[0], move, (width, height), borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
    return (image * gain).clip(0, 255).astype(np.uint8)[None]


def _drawn(predictor: Predictor, picture: Picture) -> tuple[Described, NDArray[np.float32]]:
    """Defects drawn on a reference, each on its own copy: what the model sees of them, and the share (n, L) of each
    patch that is defective."""
    manifest = predictor.bundle.manifest
    size, patch = manifest.image_size, manifest.image_size // manifest.grid
    square = (resize(picture.batch[0], size) / 255).astype(np.float32)
    behind = (0.2 * square).astype(np.float32)
    whole, nothing = np.ones((size, size), np.uint8), np.zeros((size, size), np.uint8)
    rng = np.random.Generator(np.random.PCG64(int(picture.sha256[:8], 16)))  # the same for the same picture
    seen, shares = [], []
    for _ in range(DEFECTS):
        image, mask = add_defect(square.copy(), nothing, whole, behind, rng, VARIETY)
        pixels = (image * 255).round().clip(0, 255).astype(np.uint8)
        seen.append(predictor.backend.describe(resize(pixels, picture.batch.shape[1:3])[None]))
        shares.append(mask.reshape(manifest.grid, patch, manifest.grid, patch).mean((1, 3)).ravel())
    described = Described(*(np.concatenate(part) for part in zip(*seen, strict=True)))
    return described, np.stack(shares).astype(np.float32)


def _trial(
    predictor: Predictor, recipe: Recipe, seen: list[Seen], drawn: list[tuple[Described, NDArray[np.float32]]]
) -> float:
    """How well a recipe tells patches of drawn defects from good ones, each by a memory of the other references: AUROC."""
    shape, size = predictor.bundle.manifest.memory_shape, predictor.bundle.manifest.image_size
    assert shape is not None
    logits: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.bool_]] = []
    for index, (described, share) in enumerate(drawn):
        others = [each.sums for each in (*seen[:index], *seen[index + 1 :])]
        memory = prepare(recipe, shape, together(recipe, shape, others))
        judged = judge(recipe, shape, size, memory, described.features, described.logits)
        ((features, zero_shot),) = seen[index].views()
        judged += judge(recipe, shape, size, memory, features[None], zero_shot[None])
        share = np.vstack([share, np.zeros_like(share[:1])])
        clear = (share == 0) | (share > DEFECTIVE)
        logits.append(np.stack([each.patches for each in judged])[clear])
        labels.append((share > DEFECTIVE)[clear])
    return image_metrics(np.concatenate(labels).astype(int), np.concatenate(logits)).auroc or 0.0


def report(taught: Taught, console: Console) -> None:
    """What was learned, how each reference looks to the others, and what is doubtful."""
    memory, new = taught.memory, len(taught.pictures)
    about = memory.about
    for recipe, auroc in taught.trials.items():
        say(console, f"tried {_described(recipe)}: tells drawn defects from good patches with an AUROC of {auroc:.3f}")
    left_out = [f"{n} {what}" for n, what in ((taught.copies, "known already"), (taught.skipped, "unusable")) if n]
    say(
        console,
        f"{memory.explain()}: {_described(about.recipe)}; {new} learned in {taught.seconds:.1f} s"
        + (f" ({', '.join(left_out)} left out)" if left_out else ""),
    )
    say(console, f"scores of each where the others alone taught it (from {MEMORY_LINE:g} on it would be a defect):")
    for reference in about.references:
        score = probability(reference.score - about.score_line)
        line = f"  {score:.3f}  {reference.name}"
        if reference.odd:
            warn(console, f"{line}  stands out: look at it; if it has a defect, adapt again without it")
        elif score >= MEMORY_LINE:
            warn(console, f"{line}  beyond the line: look at it; if it has a defect, adapt again without it")
        else:
            say(console, line)
    if len(about.references) < ADVISED and about.mode != POSITIONS:
        warn(console, f"{ADVISED} good parts or more know better what varies; this memory has {len(about.references)}")


def _described(recipe: Recipe) -> str:
    if recipe.mode == POSITIONS:
        return (
            f"each place with the same one, give or take {recipe.reach} patches"
            if recipe.reach
            else "each place with the same one"
        )
    how = {WHITEN: "mean and covariance of all patches"}.get(recipe.mode, "nearest remembered patches")
    views = {FIXED: "as they lie", FLIPS: "and their mirror images", ANY: "in all orientations"}[recipe.orientation]
    return f"{how}, {views}"


def draw(taught: Taught, predictor: Predictor) -> bytes:
    """The new references, each with what the others alone say of it, as JPEG."""
    manifest, about = predictor.bundle.manifest, taught.memory.about
    rise = upsampling_matrix(manifest.image_size, manifest.grid, PANEL)
    judged = taught.learned.judged[: len(taught.pictures)]
    cells = [
        _cell(picture, each, about, rise, predictor)
        for picture, each in list(zip(taught.pictures, judged, strict=False))[:PANELS]
    ]
    columns = min(4, len(cells))
    blank = np.full_like(cells[0], 255)
    cells += [blank] * (-len(cells) % columns)
    rows = [np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return encode_image(np.vstack(rows).astype(np.uint8))


def _cell(
    picture: Picture, judged: Judged, about: About, rise: NDArray[np.float32], predictor: Predictor
) -> NDArray[np.uint8]:
    """One reference beside its heat map, its name below."""
    side = predictor.bundle.manifest.grid
    patches = probability(judged.patches.reshape(side, side) - about.map_line)
    heat = (rise @ patches @ rise.T).astype(np.float32)
    overlay = Prediction(
        score=float(probability(judged.score - about.score_line)),
        threshold=MEMORY_LINE,
        anomaly_map=heat,
        model_map=heat,
        regions=(),
        timings_ms={},
        image=picture.image,
    ).overlay()
    shown = cv2.resize(
        overlay, (PANEL, round(PANEL * overlay.shape[0] / overlay.shape[1])), interpolation=cv2.INTER_AREA
    )
    photograph = np.pad(picture.image, ((len(shown) - PANEL, 0), (0, 0), (0, 0)), constant_values=255)
    caption = np.full((24, 2 * PANEL, 3), 255, np.uint8)
    name = printable(Path(picture.name).name).encode("ascii", "replace").decode()[-60:]
    cv2.putText(caption, name, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    cell = np.vstack([np.hstack([photograph, shown]), caption])
    return np.pad(cell, ((0, 6), (0, 6), (0, 0)), constant_values=255).astype(np.uint8)


def take(images: Sequence[T], count: int) -> list[T]:
    """So many of the images, spread over them."""
    if count >= len(images):
        return list(images)
    places = np.linspace(0, len(images) - 1, count).round().astype(int)
    return [images[i] for i in places]


def write(taught: Taught, picture: bytes, say: Say, bundle: Bundle) -> None:
    """Write the memory and its picture into a bundle, for `Target.write`; a calibration of other scores goes.

    Raises:
        FBClipError, UsageError: it can't be written; see `fbclip.files.write_error`.
    """
    taught.memory.save(
        bundle.memory_file
    )  # first, for a disk may be full; a calibration of another memory is set aside
    with replacing(bundle.inside("memory.jpg")) as file:
        file.write(picture)
    _drop(bundle, CALIBRATED, "the calibration was of other scores and is gone: run fbclip calibrate", say)


def forget(say: Say, bundle: Bundle) -> None:
    """Remove the memory, and the calibration that was made with it, for `Target.write`.

    Raises:
        UsageError: there is none.
    """
    if not os.path.lexists(bundle.memory_file):
        raise UsageError(f"{bundle.path} has no memory to forget", option="forget")
    _drop(bundle, CALIBRATED, "the calibration was of the memory's scores and is gone with it", say)
    _drop(bundle, ADAPTED, "the memory is forgotten: the model judges alone again", say)


def _drop(bundle: Bundle, names: Sequence[str], told: str, say: Say) -> None:
    paths = [path for name in names if os.path.lexists(path := bundle.inside(name))]
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise write_error(error, path) from error
    if paths:
        say(told)
