"""The few-shot protocol: references drawn at random from the good training images of a class teach what is judged on its
test images. Nothing is written into the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from fbclip.data.dataset import Dataset, Item
from fbclip.errors import ImageError, UsageError
from fbclip.images import pixels_sha256, read_image
from fbclip.memory import POSITIONS, Memory
from fbclip.resample import resize
from fbclip.runtime.adapt import MOST_SHOTS, Choice, teach
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.sight import find_blindness
from fbclip.terminal import warn

T = TypeVar("T")


@dataclass(frozen=True)
class FewShot:
    """What is drawn, and how it is learned.

    Attributes:
        shots: references of each class.
        seeds: of the draws; the figures are the mean over them.
        choice: how a memory is learned.

    Raises:
        UsageError: values that aren't possible.
    """

    shots: int
    seeds: tuple[int, ...] = (0,)
    choice: Choice = field(default_factory=Choice)

    def __post_init__(self) -> None:
        least = 1 if self.choice.candidates[0].mode == POSITIONS else 2
        if not _whole(self.shots) or not least <= self.shots <= MOST_SHOTS:
            one = "" if least == 1 else "; one is enough only where positions count"
            raise UsageError(f"references are {least} to {MOST_SHOTS}{one}; got {self.shots!r:.50}", option="shots")
        if not self.seeds or len({*self.seeds}) < len(self.seeds) or not all(_whole(s) and s >= 0 for s in self.seeds):
            raise UsageError(
                f"seeds are different whole numbers from 0, like 0,1,2,3,4; got {self.seeds!r:.50}", option="seed"
            )

    @property
    def description(self) -> Mapping[str, Any]:
        """Plain values for the stamp; of a mode that is chosen by trial each draw's memory says which it is."""
        recipes = self.choice.candidates
        how = asdict(recipes[0] if len(recipes) == 1 else self.choice)
        return {"shots": self.shots, "seeds": list(self.seeds), **how}

    def explain(self) -> str:
        """A part of a sentence, for a person."""
        count = len(self.seeds)
        over = f"mean ± standard deviation of {count} draws" if count > 1 else "one draw"
        return f"{self.shots} good training images of each class teach a memory; {over}"


@dataclass(frozen=True)
class References:
    """A draw of one class: its files, and the pixels' hashes, as the model sees them."""

    paths: tuple[Path, ...]
    digests: frozenset[str]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def drawn(ordered: Sequence[T], shots: int, seed: int) -> list[T]:
    """So many of the images, at random: the same for the same order and seed, and those of fewer shots are among them."""
    return [ordered[place] for place in np.random.default_rng(seed).permutation(len(ordered))[:shots]]


def good_training_images(data: Dataset, class_name: str) -> list[Item]:
    """What references are drawn from, in a stable order."""
    items = data.select("train", class_name).items
    return sorted((item for item in items if not item.label), key=lambda item: data.relative(item.image))


def draw(data: Dataset, class_name: str, shots: int, seed: int, image_size: int, console: Console) -> References:
    """The references of a class. Files that can't be read or show nothing, and copies, are reported; others take their place.

    Raises:
        UsageError: there are too few.
    """
    items = good_training_images(data, class_name)
    found: dict[str, Path] = {}
    for item in drawn(items, len(items), seed):
        if len(found) == shots:
            break
        try:
            image = resize(read_image(item.image), image_size)
        except ImageError as error:
            warn(console, f"no reference: {error}")
            continue
        if find_blindness(image[None]) is None:
            found.setdefault(pixels_sha256(image), item.image)
        else:
            warn(console, f"no reference: {item.image} shows nothing")
    require_enough(data, class_name, len(found), shots)
    return References(tuple(found.values()), frozenset(found))


def require_enough(data: Dataset, class_name: str, count: int, shots: int) -> None:
    """Raise UsageError where a class has fewer good training images than references are wanted."""
    if count < shots:
        raise UsageError(
            f"{shots} references are drawn from the good training images of each class; {class_name} of {data.root} has "
            f"{count}: take fewer, or evaluate other classes",
            option="shots",
        )


def learn(predictor: Predictor, references: References, choice: Choice) -> Memory:
    """Teach a predictor, which judges by it from now on."""
    quiet = Console(quiet=True)  # the bars of what is going on stay as they are
    memory = teach(predictor, references.paths, choice, None, quiet).memory
    predictor.set_memory(memory)
    return memory
