"""`fbclip serve`: address, pipeline and page put together, and a clean end."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from fbclip.errors import UsageError
from fbclip.runtime.guard import Access
from fbclip.runtime.live_infer import Stream, insist_on_all, make_pipeline, print_summary
from fbclip.runtime.monitor import Monitor
from fbclip.runtime.pipeline import LiveSummary, Pipeline
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.server import create_app
from fbclip.runtime.sinks_network import Metrics
from fbclip.runtime.sources import open_source
from fbclip.runtime.uploads import InTurn
from fbclip.stopping import StopRequest
from fbclip.terminal import say

MAX_CONNECTIONS = 100
GRACE_S = 3  # for requests under way when the server stops
POLL_S = 0.25


@dataclass(frozen=True)
class Address:
    """Where to listen, and the secret that clients need; None for none."""

    host: str
    port: int
    token: str | None


def serve(predictor: Predictor, stream: Stream | None, address: Address, console: Console) -> None:
    """Serve a page on a stream, or without one for uploads alone, until SIGINT or SIGTERM.

    A source that ends leaves the page running: what it showed stays to be seen.

    Raises:
        UsageError: an address that can't be listened on, or needs a token.
        FBClipError: of the source or the model, which end the server too; frames that could not be inspected, or a
            sink that failed at the end.
    """
    predictor.backend = InTurn(predictor.backend)
    with ExitStack() as stack:
        listening = stack.enter_context(listen(address.host, address.port))
        ip, port = listening.getsockname()[:2]
        access = Access(ip, port, address.token)
        monitor = Monitor(stream.events if stream else None)
        pipeline = None
        if stream:
            source = stack.enter_context(open_source(stream.source, stream.capture))
            metrics = Metrics(lambda: source.counters)
            pipeline = make_pipeline(source, predictor, stream, console, [monitor, metrics])
        else:
            metrics = Metrics(dict)
        app = create_app(predictor, access, monitor, pipeline, metrics)
        say(console, f"serving on {_url(ip, port)}")
        summary = _run(listening, app, pipeline)
    if summary:
        print_summary(summary, console)
        insist_on_all(summary)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: no such address here, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host} --port {port} can't be listened on: {error}; choose others") from error


def _url(ip: str, port: int) -> str:
    """What to type into a browser."""
    address = ip_address(ip)
    host = socket.gethostname() if address.is_unspecified else f"[{ip}]" if address.version == 6 else ip
    return f"http://{host}:{port}"


def _run(listening: socket.socket, app: FastAPI, pipeline: Pipeline | None) -> LiveSummary | None:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=MAX_CONNECTIONS,
        ws_max_size=1024,  # viewers send a word
        ws_per_message_deflate=False,  # pictures don't get smaller
        timeout_graceful_shutdown=GRACE_S,
    )
    server = uvicorn.Server(config)
    # threads of their own, so that the main thread, which Python gives the signals, is never held
    with StopRequest(None) as stop, ThreadPoolExecutor(2, "serve") as pool:
        web = pool.submit(server.run, [listening])
        running = pool.submit(pipeline.run) if pipeline else None
        while not (stop.signal or web.done() or (running and running.done() and running.exception())):
            wait([web], POLL_S)
        if pipeline:
            pipeline.stop()
            wait([running] if running else [])  # viewers see how it ends
        server.should_exit = True
    web.result()
    return running.result() if running else None
