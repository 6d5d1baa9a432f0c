"""`fbclip calibrate`: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fbclip.commands.groups import DEVICE, WARM_UP, WARM_UP_NAMES, AreaGroup
from fbclip.commands.mount import mounted, option


@dataclass(frozen=True)
class TargetGroup:
    """What will inspect."""

    PANEL: ClassVar[str] = "Model and device"
    bundle: Annotated[
        Path | None,
        option(
            "Bundle to write into. Default: a copy of the embedded one in this folder.",
            metavar="PATH",
            envvar="FBCLIP_BUNDLE",
        ),
    ] = None
    device: Annotated[str, option(DEVICE, metavar="NAME")] = "auto"
    precision: Annotated[str, option("Graph that will inspect: auto, fp32, fp16 or int8.", metavar="NAME")] = "auto"


@dataclass(frozen=True)
class TakingGroup:
    """Which images of the sources are taken."""

    PANEL: ClassVar[str] = "Images taken"
    every: Annotated[int, option("Take every Nth image or frame: neighbours are too alike.", metavar="N", min=1)] = 1
    max_frames: Annotated[int | None, option("Take N images or frames; a camera needs it.", metavar="N", min=1)] = None
    skip_first: Annotated[int, option(WARM_UP, *WARM_UP_NAMES, metavar="N", min=0)] = 0


@mounted(first=("bundle", "false_alarm_rate", "defects", "roi", "name"))
def calibrate(
    target: TargetGroup,
    taking: TakingGroup,
    area: AreaGroup,
    good: Annotated[
        list[str],
        typer.Argument(
            metavar="GOOD...",
            help="Images, folders, globs, videos or cameras (0, rtsp://…) that show good parts.",
        ),
    ],
    false_alarm_rate: Annotated[
        float | None,
        option(
            "Share of good parts that may be called defective, like 0.01. n images allow 1/(n+1): 19 for 0.05, 99 for 0.01. "
            "Default: 0.01, or the lowest that fewer images allow.",
            metavar="RATE",
        ),
    ] = None,
    defects: Annotated[
        list[str] | None,
        option(
            "Images of defective parts, to learn how many would be missed; they don't change the threshold. May be given again.",
            metavar="PATH",
        ),
    ] = None,
    name: Annotated[
        str | None,
        option("Calibrate a copy of the bundle here, NAME.fbclip: one for each product line.", metavar="NAME"),
    ] = None,
) -> None:
    """Set the threshold from good parts alone, with a stated rate of false alarms."""
    from fbclip.tasks import calibrate
    from fbclip.terminal import make_console, say

    console = make_console()
    done = calibrate(
        target.bundle,
        good,
        false_alarm_rate=false_alarm_rate,
        defects=defects,
        device=target.device,
        precision=target.precision,
        every=taking.every,
        max_frames=taking.max_frames,
        skip_first=taking.skip_first,
        name=name,
        console=console,
        **area.settings(),
    )
    path = done.bundle.path
    say(console, f"wrote {path / 'calibration.json'} and its picture, calibration.png: use it with --bundle {path}")
    if done.good.skipped or done.defects.skipped:
        raise typer.Exit(2)
