"""What all workers of an archive are told, wherever they are, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fbclip
from fbclip.bundle import Bundle
from fbclip.errors import FBClipError, UsageError
from fbclip.runtime.cluster.results import Receipt
from fbclip.runtime.cluster.scorer import Recipe


@dataclass(frozen=True)
class Job:
    """What workers do.

    Attributes:
        bundle: what judges.
        sha256: of it, as `bundle_sha256` has it.
        recipe: how it judges.
        out: path or address of the folder of results.
        maps: whether maps are kept.
    """

    bundle: Bundle
    sha256: str
    recipe: Recipe
    out: str
    maps: bool


def checked(job: Job, ready: dict[str, Any], who: str) -> None:
    """Insist that a worker judges by the same program and bundle.

    Raises:
        UsageError: it doesn't.
    """
    if ready["fbclip"] != fbclip.__version__:
        raise UsageError(f"all machines have one fbclip; {who} has {ready['fbclip']}, this is {fbclip.__version__}")
    if ready["bundle"] != job.sha256:
        raise UsageError(f"{who} has another bundle than {job.bundle.path}: it was changed meanwhile; start again")


def receipt_of(answer: dict[str, Any]) -> Receipt:
    """The receipt of `Scorer.score`.

    Raises:
        FBClipError: the part could not be done, for a reason that is the same the next time.
    """
    if "error" in answer:
        raise (UsageError if answer["exit_code"] == 2 else FBClipError)(answer["error"])
    return Receipt.from_json(answer["receipt"])
