"""`fbclip bench`: its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from fbclip.commands.groups import BundleOption, MemoryOption, RunGroup, TilesGroup, frame_hw
from fbclip.commands.mount import mounted, option
from fbclip.parsing import parse_names, parse_numbers

if TYPE_CHECKING:
    from fbclip.runtime.bench.run import Options


@dataclass(frozen=True)
class TimingGroup:
    """What is timed."""

    PANEL: ClassVar[str] = "What is timed"
    backends: Annotated[
        str | None,
        option(
            "With commas: torch-reference, torch, torch-captured, torch-compile, onnxruntime, onnxruntime-cuda, "
            "onnxruntime-tensorrt, tensorrt, tensorrt-rtx; or all. Default: those that work here, except "
            "torch-compile and onnxruntime-tensorrt, which compile for long.",
            metavar="NAME,…",
        ),
    ] = None
    precision: Annotated[
        str | None, option("Graphs of the bundle, with commas. Default: all it has.", metavar="NAME,…")
    ] = None
    batch: Annotated[
        str, option("Images at once, with commas, like 1,4.", "--batch", "--batch-size", metavar="N,…")
    ] = "1"
    resolution: Annotated[
        str | None,
        option("Width and height of the frames in memory: resizing them is timed, too.", metavar="WxH"),
    ] = None
    frame_size: Annotated[str | None, option("", metavar="HxW", hidden=True)] = None
    memory: MemoryOption = "auto"
    runs: Annotated[int, option("Timed runs of each, at least.", metavar="N", min=3)] = 50
    profile: Annotated[bool, option("Also list the costliest operators by stage.", "--profile")] = False


@dataclass(frozen=True)
class TorchGroup:
    """What torch runs."""

    PANEL: ClassVar[str] = "Timings of torch"
    checkpoint: Annotated[
        Path | None,
        option("Checkpoint of the same model, for the torch timings. Default: the embedded one.", metavar="PATH"),
    ] = None
    clip: Annotated[
        str | None, option("CLIP model of an official checkpoint: its name in open_clip, or .json.", metavar="NAME")
    ] = None
    clip_weights: Annotated[
        str | None, option("Weights of that CLIP model: a pretrained tag, or a file.", metavar="TAG|PATH")
    ] = None


@mounted(first=("bundle", "backends", "precision", "batch", "compare"))
def bench(
    timing: TimingGroup,
    torch: TorchGroup,
    tiles: TilesGroup,
    run: RunGroup,
    bundle: BundleOption = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        option("Two bench.json, before and after: say what changed beyond noise.", metavar="PATH PATH"),
    ] = None,
    fail_over: Annotated[
        str | None,
        option(
            "With --compare: exit with code 1 where something is slower by more than this, like 5%.",
            metavar="PERCENT",
            panel="Comparison",
        ),
    ] = None,
    json: Annotated[
        str | None,
        option("Also write bench.json here, or - for standard output.", metavar="PATH", panel=RunGroup.PANEL),
    ] = None,
) -> None:
    """Time the ways to run the model side by side, compare their results, and say how near the machine's limit they are."""
    from fbclip.bundle import Bundle
    from fbclip.errors import UsageError
    from fbclip.files import require_file, write_text
    from fbclip.runtime.bench.compare import compare_files
    from fbclip.runtime.bench.report import show, to_json, write_bench
    from fbclip.runtime.bench.run import bench
    from fbclip.terminal import make_console, say

    console = make_console(stderr=json == "-")
    if compare:
        raise typer.Exit(compare_files(*compare, fail_over, console))
    if fail_over:
        raise UsageError("--fail-over goes with --compare; got none")
    options = _options(timing, torch, tiles)
    loaded = Bundle.load(bundle)
    require_file(json)
    folder = run.folder("bench")
    report = bench(loaded, options, console)
    show(report, console)
    if missing := write_bench(report, folder):
        say(console, f"no chart and page without {' and '.join(missing)}: pip install 'fbclip[eval]'")
    if json:
        write_text(to_json(report), json)
    say(console, f"results are in {folder}")


def _options(timing: TimingGroup, torch: TorchGroup, tiles: TilesGroup) -> Options:
    from fbclip.runtime.bench.run import Options

    return Options(
        parse_names(timing.backends) if timing.backends else None,
        parse_names(timing.precision) if timing.precision else None,
        parse_numbers(timing.batch, "images at once are numbers from 1 with commas, like 1,4", "batch"),
        frame_hw(timing.resolution, timing.frame_size),
        timing.runs,
        timing.profile,
        timing.memory,
        tiles.cut(),
        torch.checkpoint,
        torch.clip,
        torch.clip_weights,
        torch="fbclip.model.backend",
    )
