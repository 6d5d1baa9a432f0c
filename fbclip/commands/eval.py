"""`fbclip eval`: its options."""

from __future__ import annotations

import signal
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from fbclip.checkpoints import find_checkpoint, require_training_packages
from fbclip.commands.adapt import LearningGroup
from fbclip.commands.data import LAYOUT
from fbclip.commands.groups import BundleGroup, ModelGroup, RunGroup, TilesGroup
from fbclip.commands.mount import is_chosen, is_given, mounted, option
from fbclip.parsing import parse_names, parse_positions, parse_seeds, parse_threshold

if TYPE_CHECKING:
    from fbclip.runtime.evaluation.evaluate import Subject
    from fbclip.runtime.evaluation.few_shot import FewShot


@dataclass(frozen=True)
class TestGroup:
    """What is measured, and how."""

    PANEL: ClassVar[str] = "Data and measures"
    threshold: Annotated[
        str,
        option(
            "Scores from here on are defects: 0 to 1, or auto: the calibrated one, else the bundle's; 0.5 for a "
            "checkpoint.",
            metavar="NUMBER",
        ),
    ] = "auto"
    classes: Annotated[str | None, option("Only these classes, like bottle,cable.", metavar="NAME,…")] = None
    layout: Annotated[str | None, option(LAYOUT, metavar="NAME")] = None
    batch: Annotated[
        int,
        option(
            "Images per call of the model: faster on a GPU, more memory.",
            "--batch",
            "--batch-size",
            metavar="N",
            min=1,
        ),
    ] = 1
    workers: Annotated[
        int,
        option(
            "Images at once on a CPU, which share its cores: more a second than one on all of them.", metavar="N", min=1
        ),
    ] = 1
    report: Annotated[bool, option("Write no report.html.")] = True
    shots: Annotated[
        int | None,
        option(
            "Few-shot: teach N good training images of each class first, drawn at random; nothing is written into the "
            "bundle.",
            metavar="N",
        ),
    ] = None
    seed: Annotated[
        str, option("With --shots: number of the draw, or of several for their mean, like 0,1,2,3,4.", metavar="N,…")
    ] = "0"


@mounted(first=("bundle", "checkpoint", "threshold", "classes", "shots"))
def eval_(
    context: typer.Context,
    path: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Data sets: folders, or an index file.")],
    deployed: BundleGroup,
    model: ModelGroup,
    test: TestGroup,
    learning: LearningGroup,
    tiles: TilesGroup,
    run: RunGroup,
    checkpoint: Annotated[
        Path | None,
        option("Evaluate this checkpoint in torch: fbclip's FILE, nano, or an official one.", metavar="PATH"),
    ] = None,
) -> None:
    """Measure a deployed bundle or a checkpoint on the test splits of data sets."""
    from fbclip.data.layouts import open_dataset
    from fbclip.errors import Interrupted
    from fbclip.runtime.evaluation.evaluate import evaluate, to_evaluate
    from fbclip.runtime.evaluation.html import require_report, write_report
    from fbclip.runtime.evaluation.tables import show, stamp, write_results
    from fbclip.runtime.host import share_cores
    from fbclip.terminal import make_console, say

    if test.report:
        require_report()
    if checkpoint and not is_chosen(context, "bundle"):
        deployed = replace(deployed, bundle=None)
    checkpoint = _checkpoint(checkpoint, deployed, model)
    few_shot = _few_shot(context, test, learning, checkpoint)
    classes = parse_names(test.classes) if test.classes else None
    tests = [to_evaluate(open_dataset(place, test.layout), classes, few_shot) for place in path]
    with share_cores(test.workers):
        subject = _subject(checkpoint, deployed, model, test, few_shot, tiles)
    folder = run.folder("eval")
    console = make_console()
    say(console, subject.threshold_from)
    with subject.backend:
        evaluation = evaluate(subject, tests, test.batch, console, few_shot, test.workers)
    stamped = stamp(evaluation)
    show(evaluation, console, stamped["warnings"])
    write_results(evaluation, stamped, folder)
    if test.report:
        write_report(evaluation, stamped, folder / "report.html")
    say(console, f"results are in {folder}")
    if not evaluation.complete:
        raise Interrupted("stopped by Ctrl-C; the results hold the classes that were finished", signal.SIGINT)
    if evaluation.skipped:
        raise typer.Exit(2)


def _checkpoint(checkpoint: Path | None, deployed: BundleGroup, model: ModelGroup) -> Path | None:
    """The checkpoint to evaluate; None for a bundle.

    Raises:
        UsageError: both, or options of one with the other.
    """
    from fbclip.errors import UsageError

    if checkpoint and deployed.bundle:
        raise UsageError("eval takes a --checkpoint or a --bundle; got both")
    if checkpoint is None:
        if model != ModelGroup():
            raise UsageError("--clip, --clip-weights, --image-size and --feature-layers go with --checkpoint; got none")
        return None
    if deployed.memory not in ("auto", "off"):
        raise UsageError("a checkpoint has no memory of good parts; got --memory: export it, pass --bundle")
    if deployed.precision not in ("auto", "fp32"):
        raise UsageError(
            f"a checkpoint runs in fp32; got --precision {deployed.precision}: export it with --fp16, pass --bundle"
        )
    return find_checkpoint(checkpoint)


def _few_shot(
    context: typer.Context, test: TestGroup, learning: LearningGroup, checkpoint: Path | None
) -> FewShot | None:
    """What is taught before each class; None for the model as it is.

    Raises:
        UsageError: options that don't go together.
    """
    from fbclip.errors import UsageError
    from fbclip.runtime.adapt import WEIGHT, Choice
    from fbclip.runtime.evaluation.few_shot import FewShot

    if test.shots is None:
        names = ("seed", *(field.name for field in fields(learning)))
        if given := [f"--{name}" for name in names if is_given(context, name)]:
            raise UsageError(f"{', '.join(given)} {'goes' if len(given) == 1 else 'go'} with --shots; got none")
        return None
    if checkpoint:
        raise UsageError("--shots teaches a bundle; got a checkpoint: export it, and pass --bundle")
    weight = WEIGHT if learning.weight is None else learning.weight
    choice = Choice(learning.mode, learning.orientation, parse_positions(learning.positions), weight)
    return FewShot(test.shots, parse_seeds(test.seed), choice)


def _subject(
    checkpoint: Path | None,
    deployed: BundleGroup,
    model: ModelGroup,
    test: TestGroup,
    few_shot: FewShot | None,
    tiles: TilesGroup,
) -> Subject:
    from fbclip.errors import UsageError
    from fbclip.runtime.evaluation.evaluate import bundle_subject

    threshold = parse_threshold(test.threshold)
    if checkpoint is None:
        return bundle_subject(
            deployed.bundle,
            deployed.device,
            deployed.precision,
            threshold,
            test.batch,
            few_shot,
            deployed.memory,
            tiles.cut(),
        )
    if test.workers > 1:
        raise UsageError("--workers share the cores of a bundle; got a checkpoint: export it, and pass --bundle")
    if tiles.cut():
        raise UsageError("--tiles are for a bundle; got a checkpoint: export it, and pass --bundle")
    require_training_packages()
    from fbclip.training.evaluation import checkpoint_subject

    return checkpoint_subject(
        checkpoint, model.clip, model.clip_weights, model.image_size, model.layers, deployed.device, threshold
    )
