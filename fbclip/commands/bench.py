"""`fbclip bench`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fbclip.commands.options import BundleOption, ClipOption, WeightsOption, make_console, parse_frame_size


def bench(
    bundle: BundleOption = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="With commas: torch-reference, torch, torch-compile, onnxruntime, onnxruntime-cuda, "
            "onnxruntime-tensorrt, tensorrt; all; those that run here, without torch-compile, if left out."
        ),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Of the bundle, with commas; all it has if left out.")] = None,
    batch: Annotated[str, typer.Option(help="Images per run, with commas.")] = "1",
    frame_size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of the frames in memory; resizing is timed, too.")
    ] = None,
    runs: Annotated[int, typer.Option(min=3, help="Timed runs of each, at least.")] = 50,
    profile: Annotated[bool, typer.Option("--profile", help="Also list the costliest operators by stage.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="What torch runs: the bundle's; the embedded model's if left out.")
    ] = None,
    clip: ClipOption = None,
    clip_weights: WeightsOption = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two bench.json, before and after: what changed beyond noise.")
    ] = None,
    fail_over: Annotated[
        str | None, typer.Option(help="With --compare: exit with 1 where something is slower by more, like 5%.")
    ] = None,
    json: Annotated[str | None, typer.Option(help="Also write bench.json here, or - for standard output.")] = None,
    project: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/bench"),
    name: Annotated[str, typer.Option(help="Name of this run.")] = "exp",
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Write into the run's folder if it is there.")] = False,
) -> None:
    """Time backends side by side, with deviation and distance to the machine's limit; compare recorded runs."""
    from fbclip.bundle import Bundle
    from fbclip.errors import UsageError
    from fbclip.files import new_run, require_file, write_text
    from fbclip.runtime.bench.compare import compare_files
    from fbclip.runtime.bench.report import show, to_json, write_bench
    from fbclip.runtime.bench.run import Options, bench
    from fbclip.terminal import say

    console = make_console(stderr=json == "-")
    if compare:
        raise typer.Exit(compare_files(*compare, fail_over, console))
    if fail_over:
        raise UsageError("--fail-over goes with --compare; got none")
    options = Options(
        _names(backends),
        _names(precision),
        _batches(batch),
        parse_frame_size(frame_size),
        runs,
        profile,
        checkpoint,
        clip,
        clip_weights,
        torch="fbclip.model.backend",
    )
    loaded = Bundle.load(bundle)
    require_file(json)
    folder = new_run(project, name, exist_ok)
    report = bench(loaded, options, console)
    show(report, console)
    if missing := write_bench(report, folder):
        say(console, f"no chart and page without {' and '.join(missing)}: pip install 'fbclip[eval]'")
    if json:
        write_text(to_json(report), json)
    say(console, f"results are in {folder}")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _batches(text: str) -> tuple[int, ...]:
    from fbclip.errors import UsageError

    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError:
        batches = (0,)
    if min(batches) < 1:
        raise UsageError(f"--batch takes numbers from 1 with commas, like 1,4; got {text!r}")
    return batches
