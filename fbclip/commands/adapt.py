"""`fbclip adapt`: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fbclip.commands.calibrate import TargetGroup
from fbclip.commands.groups import AreaGroup
from fbclip.commands.mount import mounted, option


@dataclass(frozen=True)
class LearningGroup:
    """How the good parts are learned."""

    PANEL: ClassVar[str] = "Learning"
    mode: Annotated[
        str,
        option(
            "whiten: mean and covariance of all patches; nearest: the nearest of remembered patches; auto: by trial on "
            "defects drawn on the good parts.",
            metavar="NAME",
        ),
    ] = "whiten"
    orientation: Annotated[
        str | None,
        option(
            "How parts may lie: fixed, flips (mirror images too), any (turned by 90° as well). Default: flips; fixed with "
            "--positions.",
            metavar="NAME",
        ),
    ] = None
    positions: Annotated[
        str,
        option(
            "For parts that lie in place, boards, prints: compare each place with the same one, give or take N patches "
            "(0 to 2). One good image is enough then.",
            metavar="off|N",
        ),
    ] = "off"
    weight: Annotated[
        float | None,
        option("Weight of the zero-shot model beside what was learned. Default: 0.2.", metavar="NUMBER"),
    ] = None


@mounted(first=("bundle", "positions", "add", "forget", "out"))
def adapt(
    target: TargetGroup,
    learning: LearningGroup,
    area: AreaGroup,
    good: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE] GOOD...",
            help="The bundle, then images, folders or globs of good parts: two or more, better four to sixteen.",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        option(
            "Take N of the images, spread over them. Default: all, 64 at most.",
            metavar="N",
            min=1,
            panel=LearningGroup.PANEL,
        ),
    ] = None,
    add: Annotated[bool, option("Go on from what was learned; the old images aren't needed.", "--add")] = False,
    forget: Annotated[bool, option("Forget what was learned: zero-shot again.", "--forget")] = False,
    out: Annotated[Path | None, option("Write into a copy of the bundle, NAME.fbclip.", metavar="PATH")] = None,
) -> None:
    """Teach a bundle from a handful of good parts what this line makes."""
    from fbclip.parsing import parse_positions
    from fbclip.tasks import adapt
    from fbclip.terminal import make_console, say

    console = make_console()
    done = adapt(
        target.bundle,
        good or [],
        shots=shots,
        mode=learning.mode,
        orientation=learning.orientation,
        positions=parse_positions(learning.positions),
        weight=learning.weight,
        add=add,
        forget=forget,
        out=out,
        device=target.device,
        precision=target.precision,
        console=console,
        **area.settings(),
    )
    path = done.bundle.path
    if done.memory:
        say(console, f"wrote {path / 'memory.npz'} and its picture, memory.jpg: use it with --bundle {path}")
    if done.skipped:
        raise typer.Exit(2)
