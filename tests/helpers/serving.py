"""A server with a pipeline whose parts a test puts down one by one, and clients of it."""

from __future__ import annotations

import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import ClientConnection, connect

from fbclip import Predictor
from fbclip.assets import SAMPLES
from fbclip.images import read_image
from fbclip.runtime.live.alarm import Alarm
from fbclip.runtime.live.pipeline import Pipeline
from fbclip.runtime.live.records import Frame, Notice
from fbclip.runtime.live.sinks.metrics import Prometheus
from fbclip.runtime.serving.access import Access
from fbclip.runtime.serving.app import create_app
from fbclip.runtime.serving.connections import WebServer
from fbclip.runtime.serving.feed import Feed
from fbclip.runtime.serving.run import listen
from fbclip.runtime.serving.uploads import InTurn, UploadLimits
from helpers.waiting import PATIENCE_S, eventually

GOOD, SCRATCH = (SAMPLES / f"brushed-steel-{name}.jpg" for name in ("good", "scratch"))
TOKEN = "not-a-secret-1234"


class Belt:
    """A source whose parts the test puts down one by one."""

    name = "belt"
    live = True
    still = False
    total = None

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
    predictor: Predictor = field(default=None)  # type: ignore[assignment]  # of one in this process
    belt: Belt = field(default=None)  # type: ignore[assignment]
    pid: int = 0  # of one in another

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
    token: str | None = None,
    limits: UploadLimits | None = None,
    live: bool = True,
    predictor: Predictor | None = None,
    alarm: Alarm | None = None,
) -> Iterator[Server]:
    belt, feed, predictor = Belt(), Feed(), predictor or shared_predictor()
    predictor.set_threshold(0.6)
    metrics = Prometheus(lambda: belt.counters)
    pipeline = Pipeline(belt, predictor, [feed, metrics], alarm) if live else None
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = create_app(predictor, Access("127.0.0.1", port, token), feed, pipeline, metrics, limits)
    server = WebServer(app)
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


@contextmanager
def command(
    folder: Path, *arguments: object, token: str | None = None, files: int | None = None, log: str = "serve.log"
) -> Iterator[Server]:
    """`fbclip serve`, installed. Ends by SIGTERM, with exit code 0.

    Args:
        files: that it may open at once.
        log: what it says, in the folder.
    """
    environment = {name: value for name, value in os.environ.items() if name != "FBCLIP_TOKEN"}
    limit = f"ulimit -n {files};" if files else ""
    line = [str(Path(sys.executable).with_name("fbclip")), "serve", "--port", "0", *map(str, arguments)]
    with (folder / log).open("w") as said:
        process = subprocess.Popen(
            ["bash", "-c", f'{limit} exec "$@"', "", *line],
            cwd=folder,
            env={**environment, **({"FBCLIP_TOKEN": token} if token else {}), "COLUMNS": "160"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )

    def address() -> str:
        assert process.poll() is None, (folder / log).read_text()
        lines = (folder / log).read_text().splitlines()
        return next((found[0] for line in lines if (found := re.search(r"(?<=serving on )[^\s\"]+", line))), "")

    try:
        url = eventually(address)
        yield Server(url, int(url.rsplit(":", 1)[1]), pid=process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, (folder / log).read_text()
        assert "Traceback" not in (folder / log).read_text()
    finally:
        process.kill()
        process.wait()


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
