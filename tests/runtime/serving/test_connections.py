"""The server among people who have no token, and programs that don't speak as they should."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fbclip import Predictor
from fbclip.errors import FBClipError
from fbclip.runtime.backends import Backend
from fbclip.runtime.serving import access as guard
from fbclip.runtime.serving import connections
from fbclip.runtime.serving.connections import PER_ADDRESS, RESERVE, origin_of
from fbclip.runtime.serving.run import LINES, short_log
from fbclip.runtime.serving.uploads import InTurn, UploadLimits
from helpers.serving import GOOD, SCRATCH, TOKEN, Server, command, news, png, running
from helpers.waiting import PATIENCE_S, eventually

OWNER = {"Authorization": f"Bearer {TOKEN}"}
SLOW_S = 0.4  # for PATIENCE_S in tests: longer than anything here takes


@pytest.fixture
def server() -> Iterator[Server]:
    with running(token=TOKEN) as started:
        yield started


def call(port: int, source: str = "127.0.0.1") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE_S, (source, 0))
    connection.settimeout(PATIENCE_S)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed it; what it said before is skipped."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def ask(port: int, request: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to bytes that may be no request."""
    with call(port) as connection:
        connection.sendall(request)
        answer = b""
        while not (length := re.search(rb"(?i)content-length: (\d+)\r\n(?:.+\r\n)*?\r\n", answer)) or len(
            answer
        ) < length.end() + int(length[1]):
            got = connection.recv(65536)
            assert got, answer
            answer += got
        return int(answer[9:12]), answer[length.end() :]


def request(line: str, *headers: str, body: bytes = b"", host: str = "localhost", token: str | None = TOKEN) -> bytes:
    lines = [f"{line} HTTP/1.1", f"Host: {host}", *headers]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


# Connections ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [100, 400])
def test_silent_connections_keep_nobody_out(server: Server, number: int) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(call(server.port)) for _ in range(number)]
        for _ in range(5):
            assert server.ask("/v1/status", **OWNER)[0] == 200
        eventually(lambda: sum(not is_closed(connection) for connection in silent) <= PER_ADDRESS)
        with server.watch(additional_headers=OWNER) as viewer:
            assert news(viewer)[0]["status"]


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"", b""),
        (b"GET /login HTTP/1.1\r\nHost: x\r\nX-Long: ", b"a"),
        (request("POST /v1/predict", "Content-Length: 9999999", token=None), b"a"),
        (request("POST /login", "Content-Length: 4000", token=None), b"a"),
        (request("GET /login", token=None), b"G"),
        (request("GET /v1/live", "Upgrade: websocket", "Connection: upgrade", token=None), b"a"),
    ],
    ids=["silent", "half a head", "a body without token", "half a login", "half a second head", "no handshake"],
)
def test_a_stranger_does_not_stay(server: Server, monkeypatch: pytest.MonkeyPatch, first: bytes, drip: bytes) -> None:
    monkeypatch.setattr(connections, "PATIENCE_S", SLOW_S)
    with call(server.port) as stranger:
        stranger.sendall(first)

        def is_gone() -> bool:
            try:
                stranger.setblocking(True)
                stranger.sendall(drip)
            except OSError:
                return True
            return is_closed(stranger)

        eventually(is_gone)
    assert server.ask("/healthz", **OWNER)[0] == 200


def test_who_has_the_token_may_take_longer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE_S", SLOW_S)
    image = png(8, 8)
    with call(server.port) as slow, call(server.port) as stranger, server.watch(additional_headers=OWNER) as viewer:
        slow.sendall(request("POST /v1/predict", "Content-Type: image/png", f"Content-Length: {len(image)}"))
        eventually(lambda: is_closed(stranger))  # whose time was up
        slow.sendall(image)
        slow.setblocking(True)
        assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
        assert news(viewer)[0]["status"]["viewers"] == 1


def test_each_address_makes_room_for_itself_first(server: Server) -> None:
    with ExitStack() as stack:
        few = [stack.enter_context(call(server.port, "127.0.0.3")) for _ in range(3)]
        many = [stack.enter_context(call(server.port, "127.0.0.2")) for _ in range(PER_ADDRESS + 5)]
        eventually(lambda: [is_closed(connection) for connection in many[:6]] == [True] * 5 + [False])
        assert not any(map(is_closed, few + many[5:]))


def test_strangers_at_many_addresses_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_PLACES", 32)
    with running(token=TOKEN) as server, ExitStack() as stack, server.watch(additional_headers=OWNER) as viewer:
        silent = [stack.enter_context(call(server.port, f"127.0.1.{number}")) for number in range(1, 61)]
        assert server.ask("/v1/status", **OWNER)[0] == 200
        eventually(lambda: sum(not is_closed(connection) for connection in silent) <= 32)
        assert is_closed(silent[0]) and not is_closed(silent[-1])
        assert news(viewer)[0]["status"]


def test_too_many_requests_of_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_PLACES", 32)
    with running(token=TOKEN, limits=UploadLimits(viewers=24)) as server, ExitStack() as stack:
        for _ in range(24):  # three quarters of the places
            news(stack.enter_context(server.watch(additional_headers=OWNER)))
        status, problem = server.ask("/v1/status", **OWNER)
        assert status == 503 and "too many requests" in json.loads(problem)["detail"]
        with call(server.port) as stranger:
            stranger.sendall(request("GET /v1/status", token=None))
            assert stranger.recv(100).startswith(b"HTTP/1.1 401 ")


def test_addresses_are_counted_by_whose_they_are() -> None:
    assert origin_of("192.168.0.7") == origin_of("::ffff:192.168.0.7") == "192.168.0.7"
    assert origin_of("2001:db8::1") == origin_of("2001:db8::ffff:1%eth0") != origin_of("2001:db8:0:1::1")
    assert origin_of("<script>") == "unknown"


@pytest.mark.parametrize(
    ("soft", "hard", "places"), [(160, 160, 160 - RESERVE), (96, 4096, 256), (4096, 4096, 256), (95, 95, None)]
)
def test_places_follow_from_the_limit_on_open_files(soft: int, hard: int, places: int | None) -> None:
    limits = f"ulimit -Sn {soft}; ulimit -Hn {hard}; exec"
    code = "from fbclip.runtime.serving.connections import room; print(room())"
    done = subprocess.run(
        ["bash", "-c", f'{limits} "$@"', "", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{places}\n") if places else "ulimit -n is 95" in done.stderr


def test_descriptors_are_kept_for_the_sinks(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    arguments = ["--watch", "in", "--events", "kept", "--json", "results.jsonl", "--threshold", "0.6"]
    results = tmp_path / "results.jsonl"

    def lines(kind: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        return [line for line in found if line["kind"] == kind]

    with command(tmp_path, *arguments, token=TOKEN, files=160, log="log") as server, ExitStack() as stack:
        eventually(lambda: server.ask("/v1/status", **OWNER)[0] == 200)
        for _ in range(200):
            stack.enter_context(call(server.port))
        for number in range(3):
            (tmp_path / f"{number}.jpg").write_bytes(SCRATCH.read_bytes())
            (tmp_path / f"{number}.jpg").rename(tmp_path / "in" / f"{number}.jpg")
            assert server.ask("/v1/status", **OWNER)[0] == 200
        eventually(lambda: len(lines("result")) == 3)
        sinks = server.json("/v1/status", **OWNER)["pipeline"]["sinks"]
        assert {name: sink["state"] for name, sink in sinks.items()} == dict.fromkeys(sinks, "working")
        assert sinks.keys() >= {"events", "json"}
    assert any((tmp_path / "kept").glob("*/event.json"))
    assert (tmp_path / "log").stat().st_size < 5000


# The log -------------------------------------------------------------------------------------------------------------


def test_the_log_stays_short(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with short_log():
        for _ in range(3 * LINES):
            assert ask(server.port, b"nonsense\r\n\r\n")[0] == 400
        logging.getLogger("asyncio").error("socket.accept() out of system resource\nsocket: %s", 5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == LINES + 1
    assert all(re.match(r"\d\d:\d\d:\d\d server: ", line) for line in said)


# Tokens and logins ---------------------------------------------------------------------------------------------------


def login(server: Server, token: str = TOKEN) -> tuple[int, str]:
    """Status, and the cookie that is set."""
    with call(server.port) as connection:
        body = f"token={token}".encode()
        connection.sendall(request("POST /login", f"Content-Length: {len(body)}", body=body, token=None))
        answer = connection.recv(65536).decode()
    cookie = re.search(r"set-cookie: ([^;]*);", answer)
    return int(answer[9:12]), cookie[1] if cookie else ""


def test_guessing_is_slowed_and_the_owner_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "HOLD_S", PATIENCE_S)
    monkeypatch.setattr(connections, "PATIENCE_S", 2 * PATIENCE_S)
    monkeypatch.setattr(connections, "GRACE_S", 0.5)  # answers that are held wait no longer either
    with running(token=TOKEN) as server:
        for _ in range(20):  # of a login that has ended, which is no guess
            assert server.ask("/v1/status", Cookie=f"fbclip_{server.port}=old")[0] == 401
        for number in range(guard.FREE_TRIES):  # at once
            wrong = f"wrong-token-{number:05}"
            if number % 2:
                assert server.ask("/v1/status", Authorization=f"Bearer {wrong}")[0] == 401
            else:
                assert login(server, wrong)[0] == 403
        with call(server.port) as bearer, call(server.port) as form:
            bearer.sendall(request("GET /v1/status", token="wrong-token-00000"))
            form.sendall(request("POST /login", "Content-Length: 9", body=b"token=abc", token=None))
            assert server.ask("/v1/status", **OWNER)[0] == 200
            status, cookie = login(server)
            assert status == 303
            assert server.ask("/v1/status", Cookie=cookie)[0] == 200
            for held in (bearer, form):
                held.setblocking(False)
                with pytest.raises(BlockingIOError):
                    held.recv(1)
    assert [r.getMessage() for r in caplog.records if "wrong tokens from 127.0.0.1" in r.getMessage()] == [
        f"more than 5 wrong tokens from 127.0.0.1: answers take {PATIENCE_S:g} s now"
    ]


def test_a_wrong_token_is_answered_in_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HOLD_S", 0.05)
    for _ in range(2 * guard.FREE_TRIES):
        assert server.ask("/v1/status", Authorization="Bearer wrong-token-12345")[0] == 401


def test_logging_out_ends_the_login(server: Server) -> None:
    (_, first), (_, second) = login(server), login(server)
    assert first != second
    with server.watch(additional_headers={"Cookie": first}) as viewer:
        news(viewer)
        assert server.ask("/logout", "POST", Cookie=first)[0] == 303
        viewer.send("next")
        with pytest.raises(ConnectionClosed, match="1008"):
            while viewer.recv(timeout=PATIENCE_S):
                viewer.send("next")
    assert server.ask("/v1/status", Cookie=first)[0] == 401
    with pytest.raises(InvalidStatus, match="403"):
        server.watch(additional_headers={"Cookie": first})
    assert server.ask("/v1/status", Cookie=second)[0] == 200


def test_logins_are_few_and_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SESSIONS", 2)
    cookies = [login(server)[1] for _ in range(2)]
    assert server.ask("/v1/status", Cookie=cookies[0])[0] == 200  # the second was used longer ago
    cookies.append(login(server)[1])
    assert [server.ask("/v1/status", Cookie=cookie)[0] for cookie in cookies] == [200, 401, 200]
    monkeypatch.setattr(guard, "SESSION_S", -1.0)
    assert server.ask("/v1/status", Cookie=cookies[0])[0] == 401


# Answers -------------------------------------------------------------------------------------------------------------

WEBSOCKET = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
CHUNKED = ("Content-Type: image/png", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + bytes(70_000), 400),
        (request("GET /v1/status", "Host: other"), 400),
        (request("GET /v1/status/", host="["), 404),
        (request("GET /v1/status", host="[", token=None), 401),
        (request("POST /v1/predict", "Origin: http://["), 403),
        (request("POST /login", "Origin: http://[::1", token=None), 403),
        (request("POST /v1/predict", "Content-Length: abc"), 400),
        (request("POST /v1/predict", "Content-Length: -5"), 400),
        (request("POST /v1/predict", "Content-Length: 5", "Content-Length: 6"), 400),
        (request("POST /v1/predict", "Content-Type: image/png", f"Content-Length: {'9' * 20}"), 413),
        (request("PUT /v1/threshold", f"Content-Length: {'9' * 20}"), 413),
        (request("POST /v1/predict", "Transfer-Encoding: gzip"), 400),
        (request("POST /v1/predict", *CHUNKED, body=b"zz\r\nhello\r\n"), 400),
        (request("POST /v1/predict", *CHUNKED, body=b"-5\r\nhello\r\n", token=None), 400),
        (request("GET /nowhere"), 404),
        (request("GET /v1/status/"), 404),
        (request("GET http://evil.example/nowhere"), 404),
        (request("GET /v1/events/%00/picture"), 422),
        (request("GET /v1/events/%ED%A0%80/picture"), 422),
        (request(f"GET /v1/events/{'9' * 5000}/picture"), 422),
        (request("POST /v1/predict?overlay=%ED%A0%80", "Content-Length: 0"), 422),
        (request("POST /v1/predict", "Content-Type: \xff", "Content-Length: 0"), 415),
        (request("DELETE /v1/status"), 405),
        (request("TRACE /"), 405),
        (request("PUT /v1/threshold", "Content-Length: 3", body=b"\xff\xfe{"), 422),
        (request("PUT /v1/threshold", "Content-Length: 4000", body=b"[" * 4000), 422),
        (request("GET /v1/live", *WEBSOCKET, KEY, token=None), 403),
        (request("GET /elsewhere", *WEBSOCKET, KEY), 404),
        (request("GET /v1/live", *WEBSOCKET), 404),
        (request("GET /v1/live", *WEBSOCKET, "Sec-WebSocket-Key: x"), 404),
        (request("GET /v1/live", *WEBSOCKET[:2], KEY, "Sec-WebSocket-Version: 8"), 404),
        (request("GET /v1/live", *WEBSOCKET, KEY, f"X: {'a' * 9000}"), 404),
        (request("GET /v1/live", *WEBSOCKET, KEY, "Content-Length: 4", body=b"abcd"), 404),
        (request("POST /v1/live", *WEBSOCKET, KEY), 404),
        (request("GET /nowhere", "Upgrade: h2c", "Connection: Upgrade"), 404),
    ],
)
def test_every_refusal_has_the_one_form(
    server: Server, sent: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    found, body = ask(server.port, sent)
    assert found == status, body
    problem = json.loads(body)
    assert problem.keys() == {"detail"}
    assert problem["detail"] and "\n" not in problem["detail"]
    assert server.ask("/healthz", **OWNER)[0] == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_an_odd_handshake_is_a_handshake(server: Server) -> None:
    odd = {f"X-{number}": "1" for number in range(200)} | {"Sec-WebSocket-Protocol": "\xff,,"}
    with server.watch(additional_headers={**OWNER, **odd}) as viewer:
        assert news(viewer)[0]["status"]


def test_a_binary_answer_of_a_viewer(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.watch(additional_headers=OWNER) as viewer:
        news(viewer)
        viewer.send(b"next")
        with pytest.raises(ConnectionClosed, match="1003"):
            viewer.recv(timeout=PATIENCE_S)
    eventually(lambda: server.json("/v1/status", **OWNER)["viewers"] == 0)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "threshold", ['"0.5"', "true", "null", "[0.5]", "NaN", "Infinity", "-Infinity", "1e400", "-1e-9", "1.0000001"]
)
def test_a_threshold_is_a_number(server: Server, threshold: str) -> None:
    body = f'{{"threshold": {threshold}}}'.encode()
    status, problem = server.ask("/v1/threshold", "PUT", body, **OWNER)
    assert status == 422 and json.loads(problem)["detail"].startswith(("threshold: ", "body: "))
    assert server.json("/v1/status", **OWNER)["threshold"] == 0.6


@pytest.mark.parametrize(("sent", "kept"), [("-0.0", "0.0"), ("0", "0.0"), ("1", "1.0"), ("0.25", "0.25")])
def test_a_threshold_is_kept_without_sign(server: Server, sent: str, kept: str) -> None:
    server.json("/v1/threshold", "PUT", f'{{"threshold": {sent}}}'.encode(), **OWNER)
    assert f'"threshold":{kept},' in server.ask("/v1/status", **OWNER)[1].decode()


class Failing(Backend):
    """A backend that fails as it is told to."""

    device = "cpu"

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.error: Exception | None = None

    def run(self, images: Any) -> Any:
        if self.error:
            raise self.error
        return self.backend.run(images)

    def close(self) -> None:
        self.backend.close()


def test_a_model_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    predictor = Predictor()
    failing = Failing(predictor.backend)
    predictor.backend = InTurn(failing)
    with short_log(), running(live=False, predictor=predictor) as server:
        assert server.json("/v1/status")["fault"] is None
        failing.error = FBClipError("the model gives nan:\nsee fbclip doctor")
        assert server.predict(png(8, 8)) == (503, {"detail": "the model gives nan: see fbclip doctor"})
        assert server.json("/v1/status")["fault"] == "the model gives nan: see fbclip doctor"
        assert server.predict(b"no image")[0] == 422  # says nothing of the model
        assert server.json("/v1/status")["fault"]
        failing.error = RuntimeError("not foreseen\nby anybody")
        status, problem = server.predict(png(8, 8))
        assert status == 500 and problem.keys() == {"detail"}
        assert server.json("/v1/status")["fault"] == "RuntimeError"
        failing.error = None
        assert server.predict(png(8, 8))[0] == 200
        assert server.json("/v1/status")["fault"] is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "RuntimeError: not foreseen by anybody (test_connections.py:" in line


def test_it_ends_at_once_among_viewers_that_sleep(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with command(tmp_path, "--watch", "in", token=TOKEN, log="log") as server, ExitStack() as stack:
        (tmp_path / "0.jpg").write_bytes(GOOD.read_bytes())
        (tmp_path / "0.jpg").rename(tmp_path / "in" / "0.jpg")
        eventually(lambda: server.json("/v1/status", **OWNER)["pipeline"]["frames"] == 1)
        viewers = [stack.enter_context(call(server.port)) for _ in range(4)]
        for viewer in viewers:
            viewer.sendall(request("GET /v1/live", *WEBSOCKET, KEY))
        upload = stack.enter_context(call(server.port))
        upload.sendall(request("POST /v1/predict", "Content-Type: image/png", "Content-Length: 9999", body=b"half"))
        eventually(
            lambda: (
                (server.json("/v1/status", **OWNER)["viewers"], server.json("/v1/status", **OWNER)["uploads"]) == (4, 1)
            )
        )
    assert "server:" not in (tmp_path / "log").read_text()


def test_the_largest_picture_takes_little_memory(tmp_path: Path) -> None:
    def memory_mb(name: str) -> float:
        lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    with command(tmp_path) as server:
        server.predict(png(480, 640), "?overlay=1&map=1")
        before = memory_mb("VmRSS")
        server.json("/v1/threshold", "PUT", b'{"threshold": 0}')  # all of it is one region
        assert server.predict(png(5000, 5000), "?overlay=1&map=1")[0] == 200
        assert memory_mb("VmHWM") - before < 600
        assert memory_mb("VmRSS") - before < 150
