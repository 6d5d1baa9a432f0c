"""From what a model sees of good parts to a memory, and what the memory says of them (docs/method.md, section 11).

Torch-free: features come from a bundle's graph (`Backend.describe`). Shapes: V views of an image, L patches, F features of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fbclip.errors import UsageError
from fbclip.memory import (
    FAR,
    MOST_LOGIT,
    NEAREST,
    NEAREST_ZERO,
    POSITIONS,
    SLOPE,
    WHITEN,
    Array,
    Memory,
    Recipe,
    Reference,
    Shape,
    Sums,
    Tensors,
    Weight,
    of_view,
    prepare,
    probability,
)
from fbclip.resample import upsampling_matrix

# A line lies so many deviations above the mean of the references' leave-one-out logits; a few references underestimate the
# deviation, so it is never less than the floor. Chosen on rendered parts (benchmarks/few_shot.py), where 2 to 5 % of good
# parts are beyond the score's.
SCORE_DEVIATIONS, MAP_DEVIATIONS, FLOOR = 1.5, 2.0, 0.3
STANDS_OUT = 6.0  # such deviations of the others, above their mean: a reference that is odd
LEAST_OTHERS = 3  # references that a comparison with the others needs
SKETCH = 64  # numbers that a patch is sketched by while the bank's tokens are chosen


# Of a picture as it is: for each view of it, the whole and then its tiles, features (L, F) and zero-shot logits (1 + L,).
# Called anew each time: what a model sees of many tiles isn't kept.
Views = Callable[[], Iterable[tuple[Array, Array]]]


def one_view(features: Array, logits: Array) -> Views:
    """Of a picture that is looked at whole, features (L, F) and logits (1 + L,)."""
    return lambda: [(features, logits)]


class Seen(NamedTuple):
    """What the model sees of a reference.

    Attributes:
        name: of its file.
        sha256: of its pixels.
        views: of the picture as it is.
        sums: of all that was looked at of it, see `add_up`.
        moved: views of copies that are moved a little, where it is the only one.
    """

    name: str
    sha256: str
    views: Views
    sums: Sums
    moved: tuple[Views, ...] = ()


@dataclass(frozen=True)
class Judged:
    """What a memory says of an image: logits, before its lines are taken off.

    Attributes:
        patches: (L,).
        score, peak: of the image, and of the highest pixel of its map.
    """

    patches: Array
    score: float
    peak: float


@dataclass(frozen=True)
class Learned:
    """What references taught.

    Attributes:
        sums: for `Memory`.
        references: the old ones, then the new ones in their order.
        map_line, score_line: as in `About`.
        judged: what the memory says of each new reference where the others alone taught it; of a single one's moved
            copies instead.
    """

    sums: Sums
    references: tuple[Reference, ...]
    map_line: float
    score_line: float
    judged: tuple[Judged, ...]


def learn(
    recipe: Recipe,
    shape: Shape,
    image_size: int,
    seen: Sequence[Seen],
    old: Memory | None = None,
    tell: Callable[[], None] | None = None,
) -> Learned:
    """Learn from references.

    Args:
        image_size: side S of the model's input, for the maps' peaks.
        seen: two or more; one with moved copies, or where there is an old memory.
        old: to go on from; it has the same recipe.
        tell: called whenever a reference is judged by the others.

    Raises:
        UsageError: one reference that nothing can be compared with, or logits beyond what a memory may hold.
    """
    own = [one.sums for one in seen]
    before = [old.sums] if old else []
    whole = together(recipe, shape, [*before, *own])
    if len(before) + len(own) > 1:
        judged = []
        for index, one in enumerate(seen):
            others = together(recipe, shape, [*before, *own[:index], *own[index + 1 :]])
            judged.append(judge_views(recipe, shape, image_size, others, one.views))
            if tell:
                tell()
        fresh = [Reference(one.name, one.sha256, j.score, j.peak, False) for one, j in zip(seen, judged, strict=True)]
        references = mark_odd((*(old.about.references if old else ()), *fresh))
        usual = [each for each in references if not each.odd]
        scores, peaks = [each.score for each in usual], [each.peak for each in usual]
    elif seen[0].moved:
        judged = [judge_views(recipe, shape, image_size, whole, views) for views in seen[0].moved]
        scores, peaks = [each.score for each in judged], [each.peak for each in judged]
        references = (Reference(seen[0].name, seen[0].sha256, max(scores), max(peaks), False),)
    else:
        raise UsageError("a memory is learned from two good parts or more; got one", option="good")
    map_line, score_line = line(peaks, MAP_DEVIATIONS), line(scores, SCORE_DEVIATIONS)
    logits = [map_line, score_line, *(logit for each in references for logit in (each.score, each.peak))]
    if not all(abs(logit) <= MOST_LOGIT for logit in logits):  # nor what is no number
        raise UsageError(
            f"the references' logits are within {MOST_LOGIT:g}; these aren't with a weight of {recipe.weight:g}: lower it",
            option="weight",
        )
    return Learned(whole, references, map_line, score_line, tuple(judged))


def line(logits: Sequence[float], deviations: float) -> float:
    """Where good ends, from leave-one-out logits of good parts: so many deviations above their mean."""
    spread = np.std(logits, ddof=1) if len(logits) > 1 else 0.0
    return float(np.mean(logits) + deviations * np.hypot(spread, FLOOR))


def mark_odd(references: Sequence[Reference]) -> tuple[Reference, ...]:
    """References that stand out among the others, one after the other, the highest first: probably defects."""
    marked = [replace(each, odd=False) for each in references]
    while True:
        usual = [i for i, each in enumerate(marked) if not each.odd]
        if len(usual) <= LEAST_OTHERS:
            return tuple(marked)
        highest = max(usual, key=lambda i: marked[i].score)
        others = [marked[i].score for i in usual if i != highest]
        if marked[highest].score < np.mean(others) + STANDS_OUT * np.hypot(np.std(others, ddof=1), FLOOR):
            return tuple(marked)
        marked[highest] = replace(marked[highest], odd=True)


def judge_views(recipe: Recipe, shape: Shape, image_size: int, sums: Sums, views: Views) -> Judged:
    """What the memory of such sums says of a picture that is looked at whole, or in tiles as well.

    With tiles the score is the logit of the mean of odds of all views, as `fbclip.runtime.tiles` has it. The peak is of
    the highest tile and as if the whole's highest pixel were there: at most log 2 above what the map reaches. The patches
    are the whole's.
    """
    found: list[Judged] = []
    memory = prepare(recipe, shape, of_view(sums, 0))
    for number, (features, logits) in enumerate(views()):
        if number and recipe.mode == POSITIONS:
            memory = prepare(recipe, shape, of_view(sums, number))
        found += judge(recipe, shape, image_size, memory, features[None], logits[None])
    whole, *tiles = found
    if not tiles:
        return whole
    scores, peaks = np.array([each.score for each in found]), [each.peak for each in tiles]
    return Judged(
        whole.patches,
        float(np.logaddexp.reduce(scores) - np.log(len(scores))),
        float(np.logaddexp(whole.peak, max(peaks)) - np.log(2)),
    )


def judge(
    recipe: Recipe, shape: Shape, image_size: int, memory: Tensors, features: Array, logits: Array
) -> list[Judged]:
    """What a memory says of images, features (B, L, F) and zero-shot logits (B, 1 + L), as the graph computes it."""
    rise = upsampling_matrix(image_size, shape.grid)
    found = []
    for each, zero_shot in zip(features, logits, strict=True):
        squared = np.maximum(squared_distance(shape, memory, each), NEAREST_ZERO)
        patches = recipe.weight * zero_shot[1:] + SLOPE * np.log(squared)
        top = float(np.sort(patches)[-shape.top :].mean())
        # the map's pixels are of probabilities: near its highest patch they are what they will be at the line
        middle = float(patches.max())
        for _ in range(2):
            grid = probability(patches - middle).reshape(shape.grid, shape.grid)
            peak = float((rise @ grid @ rise.T).max())
            middle += float(np.log(peak / (1 - peak)))
        found.append(Judged(patches.astype(np.float32), recipe.weight * float(zero_shot[0]) + top, middle))
    return found


def squared_distance(shape: Shape, memory: Tensors, features: Array) -> Array:
    """How far each patch (L, F) is from what the memory expects there: (L,), as `fbclip.model.memory` computes it."""
    parts = np.matmul(shape.grouped(features), memory.matrix)  # (G, L, W)
    z = np.concatenate(list(parts), axis=-1)
    near = (memory.bank - 2 * parts.sum(axis=0)).min(axis=-1)
    own = np.square(z - memory.places).sum(axis=-1)
    if reach := int(memory.weights[Weight.REACH]):
        around = np.square(z).sum(-1)[:, None] - 2 * z @ memory.places.T + np.square(memory.places).sum(-1)
        rows, cols = np.divmod(np.arange(shape.grid**2), shape.grid)
        away = np.maximum(abs(rows[:, None] - rows), abs(cols[:, None] - cols))
        own = np.minimum(own, np.where(away <= reach, around, FAR).min(axis=-1).clip(0))
    nearest: Array = np.minimum(own + memory.weights[Weight.PLACES_FAR], near).astype(np.float32)
    return nearest


def add_up(recipe: Recipe, shape: Shape, views: Array) -> Sums:
    """What one reference adds to a memory: features (V, L, F) of its views, the picture as it is first."""
    if recipe.mode == NEAREST:
        return {"tokens": coreset(views.reshape(-1, shape.features), shape.width)}
    if recipe.mode == WHITEN:
        patches = views.reshape(-1, shape.features)
        return {
            "count": np.array([len(patches)], np.float64),
            "total": patches.sum(axis=0, dtype=np.float64),
            "products": _products(shape, patches),
        }
    # how a patch differs from its neighbours is how it differs where the part lies a little aside
    grid = views[0].reshape(shape.grid, shape.grid, shape.features)
    steps = grid[:, 1:] - grid[:, :-1], grid[1:] - grid[:-1]
    pairs = np.concatenate([step.reshape(-1, shape.features) for step in steps])
    return {
        "count": np.ones(1),
        "places": views[0],
        "pairs": np.array([len(pairs)], np.float64),
        "products": _products(shape, pairs),
    }


def _products(shape: Shape, rows: Array) -> Array:
    """Sums of products (G, W, W) of rows (n, F)."""
    parts = shape.grouped(rows)
    products: Array = np.matmul(parts.transpose(0, 2, 1), parts)
    return products


def of_tiles(recipe: Recipe, shape: Shape, parts: Sequence[Sums]) -> Sums:
    """What one reference adds to a memory, from what each view of it adds: where positions count, each view has its own."""
    whole = together(recipe, shape, parts)
    if recipe.mode != POSITIONS:
        return whole
    return {**whole, "count": np.ones(1), "places": np.stack([part["places"] for part in parts])}


def together(recipe: Recipe, shape: Shape, parts: Sequence[Sums]) -> Sums:
    """What several references add up to."""
    if recipe.mode == NEAREST:
        return {"tokens": coreset(np.concatenate([part["tokens"] for part in parts]), shape.width)}
    return {name: np.stack([part[name] for part in parts]).sum(axis=0, dtype=np.float64) for name in parts[0]}


def coreset(tokens: Array, count: int) -> Array:
    """So many tokens (M, F) that none of the others is far from all of them: the furthest, again and again.

    As PatchCore chooses its memory (Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022,
    arXiv:2106.08265), on random projections.
    """
    if len(tokens) <= count:
        return tokens
    random = np.random.default_rng(0).standard_normal((tokens.shape[1], SKETCH), np.float32)
    sketch = tokens @ random / np.sqrt(SKETCH)
    chosen = [int(np.square(sketch - sketch.mean(0)).sum(-1).argmin())]
    far = np.full(len(tokens), np.inf, np.float32)
    while len(chosen) < count:
        far = np.minimum(far, np.square(sketch - sketch[chosen[-1]]).sum(-1))
        chosen.append(int(far.argmax()))
    return tokens[chosen]
