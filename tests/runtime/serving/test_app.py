"""The server by real requests over real sockets."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import schemathesis
from conftest import Run
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from fbclip import Predictor
from fbclip.errors import UsageError
from fbclip.runtime.backends import Backend
from fbclip.runtime.serving.access import PROBES, Access
from fbclip.runtime.serving.feed import Feed
from fbclip.runtime.serving.run import listen
from fbclip.runtime.serving.schemas import EventBody
from fbclip.runtime.serving.uploads import InTurn, UploadLimits
from helpers.delivered import drawn_verdict
from helpers.serving import GOOD, SCRATCH, TOKEN, Server, command, news, png, running, until
from helpers.waiting import PATIENCE_S, eventually


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as started:
        yield started


def test_a_prediction_is_the_predictors(server: Server) -> None:
    expected = Predictor(threshold=0.6)(SCRATCH)
    status, found = server.predict(SCRATCH.read_bytes(), "?overlay=1&map=true", Content_Type="image/jpeg")
    assert status == 200
    assert found["score"] == pytest.approx(expected.score, abs=1e-6)
    assert found["is_anomalous"] and found["threshold"] == 0.6
    assert [r["box"] for r in found["regions"]] == [list(r.box) for r in expected.regions]
    assert (found["height"], found["width"]) == expected.anomaly_map.shape
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["map_png"]))))
    assert np.abs(grey / 65535 - expected.anomaly_map).max() < 1e-5
    overlay = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["overlay_png"]))))
    assert overlay.shape == expected.overlay().shape
    assert np.abs(overlay.astype(int) - expected.overlay()).max() <= 1
    plain = server.predict(SCRATCH.read_bytes())[1]
    assert plain["overlay_png"] is None and plain["map_png"] is None


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 60_000), (60_000, 1), (3, 700), (2000, 1500)])
def test_images_of_any_shape(server: Server, size_hw: tuple[int, int]) -> None:
    status, found = server.predict(png(*size_hw), "?overlay=1&map=1")
    assert status == 200
    assert (found["height"], found["width"]) == size_hw
    picture = Image.open(io.BytesIO(base64.b64decode(found["overlay_png"])))
    assert max(picture.size) < 1500  # 1280, and the bar above it


def chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 65536 + 1):
        yield bytes(65536)


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"not an image", "image/png", 422, "no image"),
        (b"", "image/png", 422, "empty"),
        (SCRATCH.read_bytes()[:5000], "image/jpeg", 422, "can't be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/eps", 422, "no image"),
        (SCRATCH.read_bytes(), "multipart/form-data; boundary=x", 415, "multipart/form-data"),
        (png(1001, 1000), "image/png", 413, "1,000,000 pixels"),
        (png(1, 65_536), "image/png", 413, "65,535 pixels"),
        (png(65_536, 1), "image/png", 413, "65,535 pixels"),
        (bytes(400_001), "image/png", 413, "400,000 bytes"),
        (chunks(800_000), "image/png", 413, "400,000 bytes"),
    ],
    ids=["text", "empty", "cut", "eps", "multipart", "pixels", "width", "height", "bytes", "chunked"],
)
def test_what_is_not_taken(body: bytes | Iterator[bytes], kind: str, status: int, message: str) -> None:
    with running(limits=UploadLimits(upload_bytes=400_000, upload_pixels=1_000_000), live=False) as server:
        headers = (
            {"Content_Type": kind}
            if isinstance(body, bytes)
            else {"Content_Type": kind, "Transfer_Encoding": "chunked"}
        )
        found, problem = server.predict(body, **headers)
        assert found == status
        assert message in problem["detail"]
        assert "\n" not in problem["detail"]
        assert server.json("/v1/status")["uploads"] == 0
        assert server.predict(png(8, 8))[0] == 200


def test_a_body_that_takes_too_long() -> None:
    with running(limits=UploadLimits(upload_seconds=0.05, queue=1), live=False) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx"
            )
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", server.port)) as cut:
            cut.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx"
            )
        # the one place is free again; here, too, a body may take too long
        eventually(lambda: server.predict(png(8, 8))[0] == 200)


class Held(Backend):
    """A backend that waits to be let go on."""

    device = "cpu"

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.go_on = threading.Event()
        self.calls: list[str] = []

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        assert self.go_on.wait(PATIENCE_S)
        self.calls.append(threading.current_thread().name)
        results: tuple[NDArray[np.float32], NDArray[np.float32]] = self.backend.run(images)
        return results

    def close(self) -> None:
        self.backend.close()


def test_a_full_queue_says_so() -> None:
    predictor = Predictor()
    held = Held(predictor.backend)
    predictor.backend = held
    with (
        running(limits=UploadLimits(queue=3), live=False, predictor=predictor) as server,
        ThreadPoolExecutor(3) as clients,
    ):
        waiting = [clients.submit(server.predict, png(8, 8)) for _ in range(3)]
        eventually(lambda: server.json("/v1/status")["uploads"] == 3)  # answered meanwhile
        status, problem = server.predict(png(8, 8))
        assert (status, problem["detail"]) == (429, "at most 3 images are taken at once: try again in a second")
        held.go_on.set()
        assert [client.result()[0] for client in waiting] == [200] * 3
        assert server.predict(png(8, 8))[0] == 200


def test_camera_and_uploads_take_turns_in_one_thread() -> None:
    held = Held(Predictor().backend)
    shared = InTurn(held)
    image = np.zeros((1, 192, 192, 3), np.uint8)
    with ThreadPoolExecutor(4) as threads:
        runs = [threads.submit(shared.run, image) for _ in range(4)]
        held.go_on.set()
        assert [run.result()[0].shape for run in runs] == [(1,)] * 4
    assert len(held.calls) == 4 and len(set(held.calls)) == 1


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        ("/", "GET", {}, 200),
        ("/", "GET", {"Host": "localhost:1"}, 200),
        ("/", "GET", {"Host": "[::1]:1"}, 200),
        ("/", "GET", {"Host": "127.0.0.1"}, 200),
        ("/", "GET", {"Host": "evil.example"}, 400),
        ("/", "GET", {"Host": "127.0.0.1.evil.example"}, 400),
        ("/", "GET", {"Host": "localhost.evil.example"}, 400),
        ("/", "GET", {"Host": "192.168.0.7"}, 400),
        ("/v1/threshold", "PUT", {}, 200),
        ("/v1/threshold", "PUT", {"Origin": "http://evil.example"}, 403),
        ("/v1/threshold", "PUT", {"Origin": "null"}, 403),
        ("/v1/threshold", "PUT", {"Origin": "http://localhost:1", "Host": "localhost:1"}, 200),
        ("/v1/threshold", "PUT", {"Origin": "http://localhost:2", "Host": "localhost:1"}, 403),
        ("/v1/status", "GET", {"Origin": "http://evil.example"}, 200),  # no one else's script may read the answer
        ("/login", "GET", {}, 404),
        ("/v1/events/1/picture", "GET", {}, 404),
        ("/v1/events/..%2f..%2fetc%2fpasswd/picture", "GET", {}, 404),
        ("/v1/events/999999999999999999999999/picture", "GET", {}, 404),
        ("/v1/events/one/picture", "GET", {}, 422),
        ("/..%2fserver.py", "GET", {}, 404),
        ("/web/app.js", "GET", {}, 404),
        ("/docs", "GET", {}, 404),
    ],
)
def test_who_may_ask_without_a_token(
    server: Server, path: str, method: str, headers: dict[str, str], status: int
) -> None:
    body = b'{"threshold": 0.6}' if method == "PUT" else None
    assert server.ask(path, method, body, Content_Type="application/json", **headers)[0] == status


def test_other_sites_can_not_watch(server: Server) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        server.watch(origin="http://evil.example")
    with pytest.raises(InvalidStatus, match="403"):
        address = socket.create_connection(("127.0.0.1", server.port))
        connect("ws://evil.example/v1/live", sock=address)
    with server.watch(origin=server.url) as viewer:
        assert news(viewer)[0]["status"]["viewers"] == 1


def test_nothing_is_served_without_the_token() -> None:
    with running(token=TOKEN) as server:
        api = json.loads(server.ask("/openapi.json", Authorization=f"Bearer {TOKEN}")[1])
        pages = ["/", "/api", "/app.js", "/api.js", "/style.css", "/icon.svg", "/openapi.json", "/nowhere"]
        paths = [*((path, "GET") for path in pages), ("/logout", "POST")]
        paths += [(path.replace("{id}", "1"), method.upper()) for path, ways in api["paths"].items() for method in ways]
        paths = [(path, method) for path, method in paths if path not in PROBES]
        assert len(paths) == 15
        wrong: list[dict[str, str]] = [
            {},
            {"Authorization": "Bearer " + TOKEN[:-1]},
            {"Authorization": TOKEN},
            {"Authorization": "Basic " + TOKEN},
            {"Cookie": f"fbclip_{server.port}={TOKEN}"},
            {"Cookie": f"fbclip_{server.port}="},
        ]
        with ThreadPoolExecutor(8) as clients:  # wrong tokens are answered late
            asked = [(path, method, headers) for path, method in paths for headers in wrong]
            answers = [clients.submit(server.ask, path, method, **headers) for path, method, headers in asked]
            for (path, method, headers), answer in zip(asked, answers, strict=True):
                assert answer.result()[0] == 401, (path, method, headers)
        assert server.ask("/", Accept="text/html")[0] == 303  # to the login
        for headers in wrong:
            with pytest.raises(InvalidStatus, match="403"):
                server.watch(additional_headers=headers)
        with server.watch(additional_headers={"Authorization": f"Bearer {TOKEN}"}) as viewer:
            assert news(viewer)[0]["status"]["login"]
        assert server.ask("/login")[0] == 200
        assert server.ask("/login", "POST", b"token=" + TOKEN[1:].encode())[0] == 403
        assert server.ask("/login", "POST", b"token=" + bytes(5000))[0] == 413
        assert server.ask("/login", "POST", b"token=" + TOKEN.encode(), Origin="http://evil.example")[0] == 403


def is_live(message: dict[str, Any]) -> bool:
    """Whether a message says so; the status comes once a second only."""
    return "status" in message and message["status"]["pipeline"]["source"]["state"] == "live"


def test_watching(server: Server) -> None:
    with server.watch() as viewer:
        message, picture = until(viewer, is_live)
        assert picture is None and message["result"] is None
        viewer.send("next")
        server.belt.parts.put(GOOD)
        message, picture = until(viewer, lambda m: m["picture"])  # asks for nothing more until it has drawn this
        assert not message["result"]["is_anomalous"]
        assert picture and Image.open(io.BytesIO(picture)).format == "JPEG"
        for part in (SCRATCH, SCRATCH, GOOD, SCRATCH):
            server.belt.parts.put(part)
        eventually(lambda: len(server.json("/v1/events")) == 2)
        viewer.send("next")
        message, _ = until(viewer, lambda m: m["picture"])
        assert message["result"]["source"] == "belt, brushed-steel-scratch"
        assert message["result"]["is_anomalous"]
        assert [alarm for _, _, alarm in message["scores"]] == [True, True, False, True]
        assert [event["index"] for event in message["events"]] == [1, 4]
        assert message["age_ms"] > 0
    newest = server.json("/v1/events")[0]
    assert (newest["id"], newest["index"], newest["is_anomalous"]) == (2, 4, True)
    status, picture = server.ask("/v1/events/2/picture")
    assert status == 200 and Image.open(io.BytesIO(picture)).size == (720, 523)


def test_a_threshold_is_for_camera_and_uploads(server: Server) -> None:
    def verdicts(threshold: float) -> tuple[bool, bool]:
        server.json(
            "/v1/threshold", "PUT", json.dumps({"threshold": threshold}).encode(), Content_Type="application/json"
        )
        server.belt.parts.put(SCRATCH)
        message, _ = until(viewer, lambda m: m["picture"])
        viewer.send("next")
        return message["result"]["is_anomalous"], server.predict(SCRATCH.read_bytes())[1]["is_anomalous"]

    with server.watch() as viewer:
        assert verdicts(0.99) == (False, False)
        assert verdicts(0.5) == (True, True)
    for wrong in (b'{"threshold": 1.5}', b'{"threshold": NaN}', b"{}", b"nonsense", b'{"threshold": "x"}'):
        status, problem = server.ask("/v1/threshold", "PUT", wrong, Content_Type="application/json")
        assert status == 422 and isinstance(json.loads(problem)["detail"], str)
    assert server.json("/v1/status")["threshold"] == 0.5


def test_pictures_show_the_verdict_that_a_least_area_leaves() -> None:
    predictor = Predictor(min_area=10**6)
    predictor.backend = InTurn(predictor.backend)
    with running(predictor=predictor) as server, server.watch() as viewer:
        found = server.predict(SCRATCH.read_bytes(), "?overlay=1")[1]
        server.belt.parts.put(SCRATCH)
        message, live = until(viewer, lambda m: m["picture"])
        assert live and found["score"] >= found["threshold"]
        assert not found["is_anomalous"] and not message["result"]["is_anomalous"]
        for data in (base64.b64decode(found["overlay_png"]), live):
            assert drawn_verdict(np.asarray(Image.open(io.BytesIO(data)))) == "good"


def test_too_many_viewers() -> None:
    with running(limits=UploadLimits(viewers=1)) as server:
        with server.watch() as first, server.watch() as second:
            assert news(first)[0]["status"]
            with pytest.raises(Exception, match="1013"):
                second.recv(timeout=PATIENCE_S)
        eventually(lambda: server.json("/v1/status")["viewers"] == 0)
        with server.watch() as later:
            assert news(later)[0]["status"]


def test_the_command(tmp_path: Path) -> None:
    for number, part in enumerate([GOOD] * 3 + [SCRATCH] * 3 + [GOOD] * 3):
        (tmp_path / f"{number}.jpg").write_bytes(part.read_bytes())
    video = cv2.VideoWriter(str(tmp_path / "belt.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (720, 480))
    for number in range(9):
        video.write(cv2.imread(str(tmp_path / f"{number}.jpg")))
    video.release()

    def ask(url: str) -> Any:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return json.load(answer) if "metrics" not in url else answer.read().decode()

    arguments = ("belt.avi", "--events", "kept", "--vote", "2/3", "--json", "results.jsonl", "--threshold", "0.6")
    with command(tmp_path, *arguments) as server:
        url = server.url
        assert ask(url + "/healthz") == {"status": "ok"}
        eventually(lambda: ask(url + "/v1/status")["pipeline"]["frames"] == 9)
        eventually(lambda: ask(url + "/v1/status")["pipeline"]["source"]["state"] == "ended")
        assert ask(url + "/v1/status")["pipeline"]["alarms"] == 1
        events = eventually(lambda: ask(url + "/v1/events"))
        assert [event["index"] for event in events] == [4]
        assert "fbclip_source_frames_total 9.0" in ask(url + "/metrics")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "result" for line in lines) == 9
    with command(tmp_path, *arguments) as server:  # events of earlier runs are there from the start
        again = ask(server.url + "/v1/events")
        assert any(event["index"] == 4 and event["time"] == events[0]["time"] for event in again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--token: 0.0.0.0 is an address that other machines reach"),
        (["--port", "{taken}"], "in use"),
        (["picture.jpg"], "SOURCE is a camera"),
        (["--events", "kept"], "SOURCE is left out, which --events can't be used with"),
    ],
)
def test_wrong_usage_is_one_line(fbclip: Run, arguments: list[str], message: str) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        error = fbclip("serve", "--port", "0", *(a.format(taken=port) for a in arguments), code=2).stderr
    assert error.startswith("fbclip: ") and error.count("\n") == 1
    assert message in error


def test_addresses_and_tokens() -> None:
    for address in ("0.0.0.0", "::", "192.168.0.7", "::ffff:192.168.0.7"):
        with pytest.raises(UsageError, match="which needs a token of"):
            Access(address, 8000, None)
        assert Access(address, 8000, TOKEN).needs_token
    for address in ("127.0.0.1", "127.9.9.9", "::1"):
        assert not Access(address, 8000, None).needs_token
    with pytest.raises(UsageError, match="16 characters or more, of ASCII; got 15"):
        Access("0.0.0.0", 8000, TOKEN[:15])
    with pytest.raises(UsageError, match="can't be listened on"):
        listen("no.such.host.invalid", 0)


def test_the_api_keeps_its_word() -> None:
    """Requests made from the description; answers, statuses and errors are as described, none is 5xx."""
    with running(limits=UploadLimits(upload_seconds=2)) as server:
        server.belt.parts.put(SCRATCH)
        eventually(lambda: server.json("/v1/events"))
        api = schemathesis.openapi.from_url(server.url + "/openapi.json")
        checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
        tried = set()

        for operation in api.get_all_operations():
            case_of = operation.ok().as_strategy() | operation.ok().as_strategy(GenerationMode.NEGATIVE)

            @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=case_of)
            def call(case: schemathesis.Case) -> None:
                tried.add(case.path)
                case.call_and_validate(checks=checks, timeout=PATIENCE_S)

            call()
        assert tried >= {"/v1/predict", "/v1/status", "/v1/threshold", "/v1/events", "/healthz", "/metrics"}


def test_events_that_are_torn_are_not_shown(tmp_path: Path) -> None:
    whole = {"alarms": [3], "frames": [{"index": 3, "file": "3.jpg"}]}
    for number, text in enumerate(["{", "[]", '{"alarms": []}', json.dumps(whole), "\xff"]):
        (tmp_path / f"event-{number}").mkdir()
        (tmp_path / f"event-{number}" / "event.json").write_text(text, "latin-1")
    region = {"box": [1, 2, 3, 4], "peak": 0.9, "area": 4}
    record = {
        "source": "belt",
        "index": 3,
        "time": 1.0,
        "score": 0.9,
        "threshold": 0.6,
        "is_anomalous": True,
        "alarm": True,
        "regions": [region, {**region, "length": 2.5, "mean": 0.8, "length_mm": 0.5, "place": [0.5, -0.1]}],
        "timings_ms": {"model": 30.0},
    }
    written = [
        {"score": "x"},
        {"score": float("nan")},
        {"index": 0.5},
        {"source": 5},
        {"regions": [{"box": [1]}]},
        {"regions": [{**region, "length": None}]},
        {"regions": [{**region, "place": [0.5]}]},
        {"regions": [{**region, "place": 0.5}]},
        {"timings_ms": []},
    ]
    for number, changes in enumerate([*written, {}]):
        event = tmp_path / f"event-{100 + number}"
        event.mkdir()
        (event / "event.json").write_text(
            json.dumps({"alarms": [3], "frames": [{**record, **changes}]}).replace('"index": 0.5', '"index": 3.0')
        )
        (event / "overlay.jpg").write_bytes(GOOD.read_bytes())
    assert [alarm.result["score"] for alarm in Feed(tmp_path).alarms] == [0.9]
    assert Feed(tmp_path / "not there yet").alarms == []


def test_events_of_earlier_versions_are_shown(tmp_path: Path) -> None:
    """They know nothing of weak regions and verdicts."""
    region = {"box": [1, 2, 3, 4], "peak": 0.9, "area": 4}
    frame = {"index": 3, "source": "camera#3", "time": 1.0, "score": 0.9, "threshold": 0.5, "is_anomalous": True}
    frame |= {"regions": [region], "alarm": True, "timings_ms": {}}
    (tmp_path / "event").mkdir()
    (tmp_path / "event" / "event.json").write_text(json.dumps({"alarms": [3], "frames": [frame]}))
    (tmp_path / "event" / "overlay.jpg").write_bytes(b"")
    (alarm,) = Feed(tmp_path).alarms
    shown = EventBody.model_validate(alarm.to_dict())
    assert (shown.verdict, shown.regions[0].weak, shown.overruled) == ("defect", False, None)
