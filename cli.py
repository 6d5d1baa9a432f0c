"""The command line. Options and help only; the work is imported inside the commands, so that help is instant."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fbclip.commands.bench import bench
from fbclip.commands.export import export
from fbclip.commands.infer import infer
from fbclip.commands.options import BundleOption, Command, DeviceOption, RoiOption, make_console
from fbclip.commands.serve import serve
from fbclip.commands.train import eval_, train
from fbclip.main import main

app = typer.Typer(
    name="fbclip",
    help="Find defects on objects never seen before: FB-CLIP, deployed.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        import logging

        logging.basicConfig(level=logging.INFO)  # TensorRT's messages, among others
    if version:
        import fbclip

        typer.echo(f"fbclip {fbclip.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:  # no_args_is_help would leave out fbclip --debug, and fails in typer 0.16.0
        typer.echo(context.get_help())
        raise typer.Exit(2)


app.command(cls=Command)(infer)
app.command(cls=Command)(serve)
app.command(cls=Command)(export)
app.command(cls=Command)(bench)
app.command(cls=Command)(train)
app.command(name="eval", cls=Command)(eval_)


@app.command(cls=Command)
def data(
    path: Annotated[Path, typer.Argument(help="Folder of a data set, or its index (meta.json, CSV).")],
    layout: Annotated[str | None, typer.Option(help="Published layout, like visa; recognised if left out.")] = None,
    json: Annotated[str | None, typer.Option(help="Write the report to this file, or - for standard output.")] = None,
) -> None:
    """Say what a data set is, and whether training and evaluation on it would be right."""
    from fbclip.data.inspect import inspect, print_report, write_report
    from fbclip.data.layouts import open_dataset
    from fbclip.files import require_file

    require_file(json)
    console = make_console(stderr=json == "-")
    report = inspect(open_dataset(path, layout), console)
    print_report(report, console)
    if json:
        write_report(report, json)
    if report.wrong:
        raise typer.Exit(2)


@app.command(cls=Command)
def calibrate(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="[BUNDLE] GOOD...",
            help="The bundle, or none to calibrate a copy of the embedded one; then images, folders, globs, videos or "
            "cameras (0, rtsp://…) that show good parts.",
        ),
    ],
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of good parts that may raise a false alarm: 0.05 needs 19 images, 0.01 needs 99. Left out: 0.01, "
            "or the lowest that fewer images allow."
        ),
    ] = None,
    defects: Annotated[
        list[str] | None, typer.Option(help="Images of defective parts: adds the expected miss rate.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Take each Nth image or frame: neighbours are too alike.")] = 1,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Images or frames to take; a camera needs it.")] = None,
    skip_first: Annotated[int, typer.Option(min=0, help="Leave out N frames after each connect to a camera.")] = 0,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or int8: what will inspect.")] = "auto",
    roi: RoiOption = None,
    name: Annotated[
        str | None, typer.Option(help="Calibrate a copy of the bundle here, NAME.fbclip: one for each product line.")
    ] = None,
) -> None:
    """Set the threshold from good parts alone, with a stated rate of false alarms."""
    from fbclip.folders import list_images
    from fbclip.runtime.calibrate import calibrate, choose_bundle, good_images, report, write
    from fbclip.runtime.predictor import Predictor
    from fbclip.runtime.roi import Roi
    from fbclip.terminal import say as print_line

    console = make_console()
    say = partial(print_line, console)
    bundle, path, places = choose_bundle(source, name)
    images = good_images(places, every, max_frames, say, skip_first)
    defective = list_images(defects, say) if defects else []
    region = Roi.parse(roi) if roi else None
    predictor = Predictor(bundle, device=device, precision=precision, calibrated=False, roi=region)
    calibration, good, bad = calibrate(predictor, images, false_alarm_rate, defective, console)
    report(calibration, good, bad, say)
    write(calibration, bad.scores, bundle, path, say)
    say(f"wrote {path / 'calibration.json'} and its picture, calibration.png: use it with --bundle {path}")
    if good.skipped or bad.skipped:
        raise typer.Exit(2)


@app.command(cls=Command)
def doctor(
    bundle: BundleOption = None,
    json: Annotated[str | None, typer.Option(help="Write the report to this file, or - for standard output.")] = None,
) -> None:
    """Say what works on this machine and what is missing, with the cure."""
    from fbclip.files import require_file
    from fbclip.runtime.doctor.examine import examine, print_report, works, write_report

    require_file(json)
    console = make_console(stderr=json == "-")
    with console.status("looking") as status:
        checks = examine(bundle, say=lambda topic: status.update(f"looking at {topic}"))
    print_report(checks, console)
    if json:
        write_report(checks, json)
    if not works(checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
