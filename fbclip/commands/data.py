"""`fbclip data`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fbclip.commands.groups import JsonReport
from fbclip.commands.mount import mounted, option

LAYOUT = (
    "Published layout of the folders: meta, visa, real-iad, dagm, kolektorsdd, isic, tn3k, headct, clinicdb, colondb, "
    "kvasir, endo, brainmri, br35h, btad, mpdd, dtd-synthetic, mvtec, images-masks, folder or csv. Default: recognised."
)


@mounted()
def data(
    path: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of a data set, or its index (meta.json, CSV).")],
    layout: Annotated[str | None, option(LAYOUT, metavar="NAME")] = None,
    json: JsonReport = None,
) -> None:
    """Check a data set: its layout, classes, broken files, missing masks."""
    from fbclip.data.inspect import inspect, print_report, write_report
    from fbclip.data.layouts import open_dataset
    from fbclip.files import require_file
    from fbclip.terminal import make_console

    require_file(json)
    console = make_console(stderr=json == "-")
    report = inspect(open_dataset(path, layout), console)
    print_report(report, console)
    if json:
        write_report(report, json)
    if report.wrong:
        raise typer.Exit(2)
