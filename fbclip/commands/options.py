"""What the commands share: options, and the console they print to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

if TYPE_CHECKING:
    from rich.console import Console

BundleOption = Annotated[Path | None, typer.Option(help="Bundle folder; the embedded default model if left out.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, tensorrt (an engine) or ort-tensorrt.")]
ClipOption = Annotated[str | None, typer.Option(help="open_clip model name, or a model configuration (.json).")]
WeightsOption = Annotated[str | None, typer.Option(help="Pretrained tag of that name, or a weights file.")]
LayersOption = Annotated[str | None, typer.Option(help="Blocks whose tokens are used, like 1,6,12,18,24.")]
SizeOption = Annotated[int | None, typer.Option(help="Side of the model's square input in pixels.")]
PIPE_WIDTH = 1000  # characters: a pipe has no width, and a name that is broken there is lost to who looks for it
RoiOption = Annotated[str | None, typer.Option(help="Inspect only x0,y0,x1,y1 in pixels, or a mask picture.")]


class Command(TyperCommand):
    """A command that says which of its options an error of the library is about."""

    def invoke(self, ctx: Any) -> Any:
        from fbclip.errors import FBClipError

        try:
            return super().invoke(ctx)
        except FBClipError as error:
            for parameter in self.params:
                if parameter.name == error.option:
                    is_option = isinstance(parameter, TyperOption)
                    error.flag = max(parameter.opts, key=len) if is_option else error.option.upper()
            raise


def make_console(stderr: bool = False) -> Console:
    """Where people read: no text can colour the terminal or move its cursor there, and a reader who leaves is an error.

    Rich lets escape codes through, and where the reader of a console left it sends standard output nowhere, another's
    JSON lines perhaps, and ends the thread that printed.
    """
    from rich.console import Console
    from rich.text import Text

    from fbclip.terminal import CONTROLS

    class Harmless(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(text.translate(CONTROLS), **options)

        def on_broken_pipe(self) -> None:
            raise

    console = Harmless(stderr=stderr, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def parse_threshold(text: str) -> float | None:
    from fbclip.errors import UsageError

    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise UsageError(f"--threshold is auto or a probability between 0 and 1; got {text!r}") from error


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    from fbclip.errors import UsageError

    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--feature-layers takes numbers with commas, like 1,6,12,18,24; got {text!r}") from error


def parse_frame_size(text: str | None) -> tuple[int, int] | None:
    import re

    from fbclip.errors import UsageError

    if text is None:
        return None
    if not (sides := re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", text)):
        raise UsageError(f"--frame-size is HEIGHTxWIDTH in pixels, like 1080x1920; got {text!r}")
    return int(sides[1]), int(sides[2])


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """`WIDTHxHEIGHT` in pixels.

    Raises:
        UsageError: no such size.
    """
    import re

    from fbclip.errors import UsageError

    if text is None:
        return None
    if not (sides := re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", text)):
        raise UsageError(f"a resolution is WIDTHxHEIGHT in pixels, like 1280x720; got {text!r}", option="resolution")
    return int(sides[1]), int(sides[2])


def find_checkpoint(name: str, option: str) -> Path:
    """The file of a checkpoint, given by its name, by a run's folder, or as nano: the embedded model.

    Needs no torch, so that a wrong name is told at once.

    Raises:
        UsageError: there is none.
    """
    from fbclip.assets import EMBEDDED, NANO
    from fbclip.errors import UsageError

    if name in ("nano", EMBEDDED.stem):
        return NANO
    for path in (Path(name), Path(name, "checkpoint.safetensors")):
        if path.is_file():
            return path
    raise UsageError(
        f"no checkpoint at {name}: {option} takes its file, a run's folder, or nano for the embedded model"
    )


def need_train_extra() -> None:
    from importlib.util import find_spec

    from fbclip.errors import UsageError

    if missing := [
        name
        for name in ("torch", "open_clip", "onnx", "onnxscript", "safetensors", "accelerate", "matplotlib")
        if find_spec(name) is None
    ]:
        raise UsageError(
            f"this command needs {', '.join(missing)}, which the runtime does without: "
            f"pip install 'fbclip[train]' on the machine that exports"
        )
