"""`fbclip doctor`: its options."""

from __future__ import annotations

import typer

from fbclip.commands.groups import BundleOption, JsonReport
from fbclip.commands.mount import mounted


@mounted()
def doctor(bundle: BundleOption = None, json: JsonReport = None) -> None:
    """Check what works on this machine, and say how to install what is missing."""
    from fbclip.files import require_file
    from fbclip.runtime.doctor.examine import examine, print_report, works, write_report
    from fbclip.terminal import make_console

    require_file(json)
    console = make_console(stderr=json == "-")
    with console.status("looking") as status:
        checks = examine(bundle, say=lambda topic: status.update(f"looking at {topic}"))
    print_report(checks, console)
    if json:
        write_report(checks, json)
    if not works(checks):
        raise typer.Exit(1)
