"""Which images a model is trained on and which judge it meanwhile, and how a model remembers both. Needs no torch.

Images count as the same where their files have the same bytes: copies fall on one side of the split, whatever they are
called, and an evaluation can tell which of its images a model has seen.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fbclip.data.dataset import Dataset, Item, file_digest, parallel_map
from fbclip.errors import UsageError

SHARE = 0.2  # held out where nothing else is asked for
FEWEST = 2  # good and defective images each, below which held-out figures say nothing
DIGITS = 12  # hexadecimal, of an image's SHA-256: 10⁵ images against 10⁴ meet by chance once in 10⁵ times
MOST = 10_000  # digests of each kind that a model carries: 80 kB


@dataclass(frozen=True)
class Seen:
    """Images that a model has seen, by the first `DIGITS` of the SHA-256 of their files.

    Attributes:
        trained: images that it was trained on; of more than `MOST`, those with the lowest digests.
        chosen_by: images that only chose among its checkpoints.
        images: how many it was trained on in all.
    """

    trained: frozenset[str] = field(default=frozenset(), repr=False)
    chosen_by: frozenset[str] = field(default=frozenset(), repr=False)
    images: int = 0

    @classmethod
    def of(cls, trained: Iterable[str], chosen_by: Iterable[str]) -> Seen:
        """From whole digests."""
        used = frozenset(digest[:DIGITS] for digest in trained)
        return cls(used, frozenset(digest[:DIGITS] for digest in chosen_by) - used, len(used))

    @property
    def complete(self) -> bool:
        """Whether every image that it was trained on is known."""
        return len(self.trained) >= self.images

    def __or__(self, later: Seen) -> Seen:
        """What a model has seen whose training went on with other images."""
        trained = self.trained | later.trained
        images = self.images + later.images - len(self.trained & later.trained)
        return Seen(trained, (self.chosen_by | later.chosen_by) - trained, images)

    def count(self, digests: Iterable[str]) -> tuple[int, int]:
        """How many of these images it was trained on, and how many chose among its checkpoints."""
        short = [digest[:DIGITS] for digest in digests]
        return sum(d in self.trained for d in short), sum(d in self.chosen_by for d in short)

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "trained": _packed(self.trained), "chosen_by": _packed(self.chosen_by)}

    @classmethod
    def from_dict(cls, values: Any, where: Path) -> Seen:
        """
        Raises:
            UsageError: not what `to_dict` gives.
        """
        try:
            images, trained, chosen_by = values["images"], _unpacked(values["trained"]), _unpacked(values["chosen_by"])
            if type(images) is not int or images < len(trained):
                raise ValueError(f"{images!r} images")
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{where} doesn't say in an intelligible way what the model was trained on ({error!r}); export it again"
            ) from error
        return cls(trained, chosen_by, images)


def _packed(digests: frozenset[str]) -> str:
    return base64.b64encode(bytes.fromhex("".join(sorted(digests)[:MOST]))).decode()


def _unpacked(text: str) -> frozenset[str]:
    digits = base64.b64decode(text, validate=True).hex()
    if len(digits) % DIGITS or len(digits) > MOST * DIGITS:
        raise ValueError(f"{len(digits)} digits")
    return frozenset(digits[start : start + DIGITS] for start in range(0, len(digits), DIGITS))


@dataclass(frozen=True)
class Split:
    """A data set for training: its test split, as in the paper, in two parts.

    Attributes:
        trained, held_out: the images of each.
        unused: images of the train split, which no part takes.
        seen: what a model will have seen that is trained on one and judged by the other.
        fingerprint: of the test split, as evaluations stamp it.
        too_few: why nothing is held out though something should be; empty otherwise.
    """

    name: str
    trained: tuple[Item, ...]
    held_out: tuple[Item, ...]
    unused: int
    seen: Seen
    fingerprint: str
    too_few: str = ""

    def lines(self, before: Seen) -> list[str]:
        """The split for a person.

        Args:
            before: what the model has seen that is trained further.
        """
        whole = len(self.trained) + len(self.held_out)
        if self.held_out:
            good, defective = _kinds(self.held_out)
            lines = [
                f"{good} good and {defective} defective of {whole} images are held out to choose the best checkpoint; "
                f"a share of 0 trains on all"
            ]
        else:
            lines = [f"trained on all {whole} images of the test split; " + (self.too_few or "none is held out")]
        if known := before.count(self.seen.chosen_by)[0]:
            lines.append(f"{known} held-out images were trained on before: the figures on them are too good")
        if self.unused:
            lines.append(f"{self.unused} images of the train split are not used: training takes the test split")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run compares."""
        sizes = {"trained": len(self.trained), "held_out": len(self.held_out)}
        return {"name": self.name, "fingerprint": self.fingerprint, **sizes}


def split(data: Dataset, share: float) -> Split:
    """Hold out a share of the test split, of every class its share of good and of defective images.

    The images' digests decide, so that the same images are held out whatever they are called and wherever they lie;
    copies of one image are on one side. It reads every file once.

    Args:
        share: 0..1; 0 holds out nothing.

    Raises:
        UsageError: as `Dataset.for_training`.
    """
    items = data.for_training()
    files = dict.fromkeys(file for item in items for file in (item.image, item.mask) if file is not None)
    digests = dict(zip(files, parallel_map(file_digest, files), strict=True))
    strata: dict[tuple[str, int], set[str]] = {}
    for item in items:
        if digests[item.image] != "missing":
            strata.setdefault((item.class_name, item.label), set()).add(digests[item.image])
    chosen = {digest for images in strata.values() for digest in sorted(images)[: int(share * len(images) + 0.5)]}
    held_out = tuple(item for item in items if digests[item.image] in chosen)
    trained = tuple(item for item in items if digests[item.image] not in chosen)
    too_few = ""
    if share and (min(_kinds(held_out)) < FEWEST or min(_kinds(trained)) < 1):
        good, defective = _kinds(items)
        too_few = f"{share:.0%} of {good} good and {defective} defective are too few to judge by"
        trained, held_out = items, ()
    seen = Seen.of(*([digests[i.image] for i in part if digests[i.image] != "missing"] for part in (trained, held_out)))
    unused = len(data.select("train").items)
    fingerprint = data.select("test").fingerprint(digests)
    return Split(data.name, trained, held_out, unused, seen, fingerprint, too_few)


def _kinds(items: Iterable[Item]) -> tuple[int, int]:
    """Good and defective images."""
    labels = [item.label for item in items]
    return labels.count(0), len(labels) - labels.count(0)
