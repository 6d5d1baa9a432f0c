"""What the commands share: options, and the console they print to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

BundleOption = Annotated[Path | None, typer.Option(help="Bundle folder; the embedded default model if left out.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, tensorrt (an engine) or ort-tensorrt.")]
RoiOption = Annotated[str | None, typer.Option(help="Inspect only x0,y0,x1,y1 in pixels, or a mask picture.")]


def make_console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)
