"""A server with a pipeline whose parts a test puts down one by one, and clients of it."""

from __future__ import annotations

import io
import json
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from waiting import PATIENCE_S
from websockets.sync.client import ClientConnection, connect

from fbclip import Predictor
from fbclip.reading import read_image
from fbclip.runtime.guard import Access
from fbclip.runtime.images import samples_folder
from fbclip.runtime.live import Frame, Notice
from fbclip.runtime.monitor import Monitor
from fbclip.runtime.pipeline import Pipeline
from fbclip.runtime.serve import listen
from fbclip.runtime.server import create_app
from fbclip.runtime.sinks_network import Metrics
from fbclip.runtime.uploads import InTurn, Limits

GOOD, SCRATCH = (samples_folder() / f"brushed-steel-{name}.jpg" for name in ("good", "scratch"))
TOKEN = "not-a-secret-1234"


class Belt:
    """A source whose parts the test puts down one by one."""

    name = "belt"
    live = True

    def __init__(self) -> None:
        self.parts: queue.Queue[Path | None] = queue.Queue()
        self.counters = {"frames": 0, "dropped": 0, "reconnects": 0}
        self.callback: Callable[[Notice], None] = lambda notice: None

    def listen(self, callback: Callable[[Notice], None]) -> None:
        self.callback = callback

    def turn(self, state: str) -> None:
        self.callback(Notice(time.time(), "source", "belt", state, f"the belt is {state}", self.counters))

    def __iter__(self) -> Iterator[Frame]:
        self.turn("live")
        while part := self.parts.get():
            index = self.counters["frames"]
            self.counters["frames"] += 1
            yield Frame(read_image(part), f"belt, {part.stem}", index, time.monotonic(), time.time())
        self.turn("ended")

    def close(self) -> None:
        self.parts.put(None)


@dataclass
class Server:
    url: str
    port: int
    predictor: Predictor
    belt: Belt

    def ask(
        self, path: str, method: str = "GET", body: bytes | Iterator[bytes] | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Status and body; underscores in header names become hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            # a body may be refused before all of it is sent; the answer says why
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, named, encode_chunked="Transfer-Encoding" in named)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Any:
        status, text = self.ask(path, method, body, **headers)
        assert status == 200, text
        return json.loads(text)

    def predict(self, image: bytes | Iterator[bytes], query: str = "", **headers: str) -> tuple[int, Any]:
        status, text = self.ask(f"/v1/predict{query}", "POST", image, **{"Content_Type": "image/png", **headers})
        return status, json.loads(text)

    def watch(self, **options: Any) -> ClientConnection:
        return connect(self.url.replace("http", "ws") + "/v1/live", open_timeout=PATIENCE_S, **options)


@cache
def shared_predictor() -> Predictor:
    predictor = Predictor()
    predictor.backend = InTurn(predictor.backend)
    return predictor


@contextmanager
def running(
    token: str | None = None, limits: Limits | None = None, live: bool = True, predictor: Predictor | None = None
) -> Iterator[Server]:
    belt, monitor, predictor = Belt(), Monitor(), predictor or shared_predictor()
    predictor.threshold = 0.6
    metrics = Metrics(lambda: belt.counters)
    pipeline = Pipeline(belt, predictor, [monitor, metrics]) if live else None
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = create_app(predictor, Access("127.0.0.1", port, token), monitor, pipeline, metrics, limits)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    with ThreadPoolExecutor(2) as threads:
        web = threads.submit(server.run, [listening])
        run = threads.submit(pipeline.run) if pipeline else None
        try:
            yield Server(f"http://127.0.0.1:{port}", port, predictor, belt)
        finally:
            server.should_exit = True
            if pipeline:
                pipeline.stop()
    web.result()
    if run:
        run.result()


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 90, 90)).save(file, "PNG")
    return file.getvalue()


def news(viewer: ClientConnection) -> tuple[dict[str, Any], bytes | None]:
    """The next message and its picture."""
    message = json.loads(viewer.recv(timeout=PATIENCE_S))
    return message, bytes(viewer.recv(timeout=PATIENCE_S)) if message["picture"] else None  # type: ignore[arg-type]


def until(viewer: ClientConnection, wanted: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any], bytes | None]:
    """Go on as a page does until a message is as wanted; it is not answered."""
    while True:
        message, picture = news(viewer)
        if wanted(message):
            return message, picture
        viewer.send("next")
