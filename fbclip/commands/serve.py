"""`fbclip serve`: a page to watch a stream, and predictions over HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import typer

from fbclip.commands.groups import AreaGroup, BundleGroup, SinkGroup, SourceGroup, VerdictGroup
from fbclip.commands.mount import NOTHING, mounted, option, refuse
from fbclip.errors import require_package


@dataclass(frozen=True)
class ServerGroup:
    """Where the page is."""

    PANEL: ClassVar[str] = "Server"
    host: Annotated[
        str, option("Address to listen on, 0.0.0.0 for all. One that others reach needs --token.", metavar="ADDRESS")
    ] = "127.0.0.1"
    port: Annotated[int, option("Port to listen on; 0 takes a free one.", metavar="N", min=0, max=65535)] = 8000
    token: Annotated[
        str | None,
        option(
            "Password that every client must send (16 characters or more); better given in the file that "
            "FBCLIP_TOKEN_FILE names, or as FBCLIP_TOKEN.",
            metavar="TEXT",
            envvar="FBCLIP_TOKEN",
        ),
    ] = None


@mounted(first=("bundle", "threshold", "host", "port", "token"))
def serve(
    context: typer.Context,
    model: BundleGroup,
    verdict: VerdictGroup,
    area: AreaGroup,
    server: ServerGroup,
    reading: SourceGroup,
    results: SinkGroup,
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="A camera's number, /dev/video0, csi://0, a video file, rtsp://…, http://…. Default: none; only "
            "images that are sent are inspected.",
        ),
    ] = None,
) -> None:
    """Watch a camera in a browser, and inspect images that are sent."""
    for package in ("fastapi", "uvicorn", "websockets", "prometheus_client"):
        require_package(package, "serve")
    from fbclip.runtime.live.alarm import Vote, parse_kinds
    from fbclip.runtime.live.run import Inspection
    from fbclip.runtime.serving.run import Endpoint, serve
    from fbclip.terminal import make_console, say

    console = make_console(stderr=results.json == "-", service=True)
    texts = reading.texts(source)
    inspection = None
    if texts or reading.watch:
        vote, alarm_on = Vote.parse(verdict.vote), parse_kinds(verdict.alarm_on)
        inspection = Inspection(texts, reading.capture, replace(results.sinks, metrics=None), vote, alarm_on)
    else:
        refuse(context, NOTHING, verdict, reading, results)
    with verdict.predictor(model, area) as predictor:
        if verdict.threshold == "auto":
            say(console, predictor.explain_threshold())
        say(console, predictor.explain_device(), fields={"kind": "model", **predictor.identity})
        serve(predictor, inspection, Endpoint(server.host, server.port, server.token, results.place), console)
