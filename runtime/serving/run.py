"""`fbclip serve`: address, pipeline and page put together, and a clean end."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address

from rich.console import Console

from fbclip.errors import UsageError
from fbclip.logs import Plain, make_handler
from fbclip.runtime.live.console import NoticeLog, print_summary
from fbclip.runtime.live.pipeline import Pipeline
from fbclip.runtime.live.run import Inspection, insist_on_all, make_pipeline
from fbclip.runtime.live.sinks.metrics import Prometheus
from fbclip.runtime.live.sources import open_source
from fbclip.runtime.live.status import Summary
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.serving.access import Access
from fbclip.runtime.serving.app import create_app
from fbclip.runtime.serving.connections import WebServer
from fbclip.runtime.serving.feed import Feed
from fbclip.runtime.serving.uploads import InTurn
from fbclip.stopping import StopRequest
from fbclip.terminal import say

POLL_S = 0.25
WAITING = 1024  # connections that the system holds until they are taken: where they overflow, a client waits seconds
LOGGERS = ("uvicorn", "asyncio", "websockets", "fbclip.serve")
REFUSED = "ASGI callable returned without completing handshake."  # uvicorn, of each WebSocket that is turned away
LINES, MINUTE_S = 10, 60.0  # of the log: so many a minute of each kind, whatever strangers do


@dataclass(frozen=True)
class Endpoint:
    """Where to listen.

    Attributes:
        token: the secret that clients need; None for none.
        metrics: host and port where Prometheus fetches its metrics without it; None for the page's alone.
    """

    host: str
    port: int
    token: str | None
    metrics: tuple[str, int] | None = None


def serve(predictor: Predictor, inspection: Inspection | None, endpoint: Endpoint, console: Console) -> None:
    """Serve a page on a stream, or without one for uploads alone, until SIGINT or SIGTERM.

    A source that ends leaves the page running: what it showed stays to be seen.

    Raises:
        UsageError: an address that can't be listened on, or needs a token.
        FBClipError: of the source or the model, which end the server too; frames that could not be inspected, or a
            sink that failed at the end.
    """
    predictor.backend = InTurn(predictor.backend)
    with ExitStack() as stack:
        listening = stack.enter_context(listen(endpoint.host, endpoint.port))
        ip, port = listening.getsockname()[:2]
        access = Access(ip, port, endpoint.token)
        feed = Feed(inspection.sinks.events if inspection else None)
        pipeline = None
        if inspection:
            source = stack.enter_context(open_source(inspection.source, inspection.capture))
            if source.still:
                raise UsageError(f"what is watched is a camera, stream, video or folder; {source.name} is images")
            metrics = stack.enter_context(_metrics(lambda: source.counters, endpoint))
            pipeline = make_pipeline(source, predictor, inspection, NoticeLog(console), feed, metrics)
        else:
            metrics = stack.enter_context(_metrics(dict, endpoint))
            metrics.describe(predictor)
        server = WebServer(create_app(predictor, access, feed, pipeline, metrics))
        stack.enter_context(short_log())
        say(console, f"serving on {_url(ip, port)}")
        summary = _run(listening, server, pipeline)
    if summary:
        print_summary(summary, console)
        insist_on_all(summary)


@contextmanager
def _metrics(counters: Callable[[], Mapping[str, int]], endpoint: Endpoint) -> Iterator[Prometheus]:
    """The page's metrics; at an address of their own too, until the server stops, if the endpoint has one."""
    metrics = Prometheus(counters)
    own = metrics.listen(endpoint.metrics) if endpoint.metrics else None
    try:
        yield metrics
    finally:
        if own:
            own.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: no such address here, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=WAITING)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{host}, port {port}, can't be listened on: {error}; choose others", option="host") from error


def _url(ip: str, port: int) -> str:
    """What to type into a browser."""
    address = ip_address(ip)
    host = socket.gethostname() if address.is_unspecified else f"[{ip}]" if address.version == 6 else ip
    return f"http://{host}:{port}"


def _run(listening: socket.socket, server: WebServer, pipeline: Pipeline | None) -> Summary | None:
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


@contextmanager
def short_log() -> Iterator[None]:
    """Warnings and errors of the server and the libraries under it as single lines, and few."""
    handler = make_handler(_OneLine())
    handler.addFilter(_Few())
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True


class _OneLine(Plain):
    """As notices are on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{time.strftime('%H:%M:%S')} server: {super().format(record)}"


class _Few(logging.Filter):
    """Lets `LINES` a minute of each place in the code pass, and says how many more there were."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[tuple[str, int], tuple[float, int]] = {}  # when the minute began, and how many came in it

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg == REFUSED:
            return False
        kind, now = (record.pathname, record.lineno), time.monotonic()
        began, number = self._passed.get(kind, (now, 0))
        if now - began >= MINUTE_S:
            if number > LINES:
                record.msg = f"({number - LINES} more of these were left out) {record.msg}"
            began, number = now, 0
        self._passed[kind] = began, number + 1
        return number < LINES
