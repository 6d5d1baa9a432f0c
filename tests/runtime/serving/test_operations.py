"""What those who run the server ask it: is it well, what inspects, what has it counted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from fbclip import Predictor, __version__, calibrate
from fbclip.assets import EMBEDDED
from fbclip.runtime.backends import Backend, Results
from fbclip.runtime.serving import app, connections
from fbclip.runtime.serving.run import listen
from fbclip.runtime.serving.uploads import InTurn
from helpers.serving import GOOD, SCRATCH, TOKEN, command, png, running
from helpers.waiting import PATIENCE_S, eventually

OWNER = {"Authorization": f"Bearer {TOKEN}"}


def health(server: Any, path: str, **headers: str) -> tuple[int, str]:
    status, body = server.ask(path, **headers)
    answer = json.loads(body)
    assert answer.keys() == {"status"}
    return status, answer["status"]


@pytest.mark.parametrize("token", [TOKEN, None])
def test_health_is_told_to_everybody_by_any_name(token: str | None) -> None:
    with running(token=token) as server:
        eventually(lambda: health(server, "/readyz") == (200, "ok"))
        for headers in ({}, {"Host": "10.1.2.3:8000"}, {"Host": "evil.example"}, {"Authorization": "Bearer wrong"}):
            assert health(server, "/healthz", **headers) == (200, "ok")
            assert health(server, "/readyz", **headers) == (200, "ok")
        for path in ("/v1/status", "/healthz/", "/healthz/x", "//healthz", "/HEALTHZ"):  # and nothing else is
            assert server.ask(path, Host="evil.example")[0] in (400, 401)
        assert server.ask("/healthz", "HEAD") == server.ask("/readyz", "HEAD") == (200, b"")
        assert server.ask("/healthz", "POST", b"x", Host="evil.example")[0] in (400, 401)


def test_a_camera_that_is_gone_is_no_reason_to_restart() -> None:
    with running() as server:
        eventually(lambda: health(server, "/readyz") == (200, "ok"))
        for state in ("lost", "blind", "connecting", "ended"):
            server.belt.turn(state)
            assert health(server, "/healthz") == (200, "ok")
            assert health(server, "/readyz") == (503, f"the source is {state}")
        server.belt.turn("live")
        assert health(server, "/readyz") == (200, "ok")


class Stuck(Backend):
    """A model that does not come back before it is let go, or gives no probability."""

    def __init__(self, score: float = 0.5) -> None:
        self.device, self.score = "cpu", score
        self.entered, self.let_go = threading.Event(), threading.Event()

    def run(self, images: NDArray[np.uint8]) -> Results:
        self.entered.set()
        assert self.let_go.wait(PATIENCE_S)
        return np.full(1, self.score, np.float32), np.full((1, 9, 9), 0.1, np.float32)

    def close(self) -> None:
        """Nothing to release."""


def test_a_model_that_hangs_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, model = Predictor(), Stuck()
    predictor.backend = InTurn(model)
    with running(token=TOKEN, predictor=predictor) as server:
        server.belt.parts.put(GOOD)
        assert model.entered.wait(PATIENCE_S)
        assert health(server, "/healthz") == (200, "ok")  # it may take its time
        monkeypatch.setattr(app, "HANGS_S", 0.0)
        assert health(server, "/healthz") == health(server, "/readyz") == (503, "the model hangs")
        model.let_go.set()
        eventually(lambda: health(server, "/healthz") == (200, "ok"))


def test_a_model_that_fails_is_not_ready() -> None:
    predictor, model = Predictor(), Stuck(float("nan"))
    predictor.backend = InTurn(model)
    model.let_go.set()
    with running(predictor=predictor, live=False) as server:
        assert health(server, "/readyz") == (200, "ok")
        assert server.predict(png(8, 8))[0] == 503
        assert health(server, "/readyz") == (503, "the model fails")
        assert health(server, "/healthz") == (200, "ok")  # another start loads the same model


def test_who_asks_for_health_stays_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else connections of a stranger would be kept as the owner's are."""
    monkeypatch.setattr(connections, "PATIENCE_S", 0.4)
    with running(token=TOKEN) as server:
        with connections.socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as stranger:
            stranger.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert stranger.recv(100).startswith(b"HTTP/1.1 200 ")
            while stranger.recv(4096):  # until it is closed
                pass
        assert health(server, "/healthz") == (200, "ok")


def test_health_waits_for_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it take what the owner's requests need: it is answered where all places are busy."""
    monkeypatch.setattr(connections.Connections, "is_busy", lambda self: True)
    with running(token=TOKEN) as server:
        assert server.ask("/v1/status", **OWNER)[0] == 503
        assert health(server, "/healthz") == (200, "ok")


def scrape(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {sample.name: sample for family in families for sample in family.samples}


def test_the_command_with_metrics_at_an_address_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "in").mkdir()
    shutil.copy(SCRATCH, tmp_path / "in")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    arguments = ("--watch", "in", "--metrics", f"127.0.0.1:{port}", "--json", "r.jsonl")
    with command(tmp_path, *arguments, token=TOKEN) as server:
        url = f"http://127.0.0.1:{port}/metrics"
        eventually(lambda: scrape(url)["fbclip_results_total"].value == 1)
        found = scrape(url)
        assert server.ask("/metrics")[0] == 401
        page = server.ask("/metrics", **OWNER)[1].decode()
        status = server.json("/v1/status", **OWNER)["model"]
    assert found["fbclip_build_info"].labels == {"version": __version__}
    model = found["fbclip_model_info"].labels
    assert (model["bundle"], model["sha256"]) == (status["name"], status["sha256"])
    assert (model["memory"], model["calibrated"], model["device"]) == ("", "", "cpu")
    for name, value in {"rejected": 0, "overruled": 0, "sink_lost": 0, "sink_delivered": 1, "anomalies": 1}.items():
        assert found[f"fbclip_{name}_total"].value == value
    assert 'fbclip_sink_lost_total{sink="json"} 0.0' in page
    assert 'fbclip_source_up{source="in"} 1.0' in page


def test_metrics_of_a_server_of_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with command(tmp_path, "--metrics", port):
        assert scrape(f"http://127.0.0.1:{port}/metrics")["fbclip_model_info"].labels["bundle"] == EMBEDDED.stem


def test_the_status_names_the_bundle_and_when_it_was_calibrated(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "line3.fbclip"))
    (tmp_path / "good").mkdir()
    picture = np.asarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3)), np.uint8)
    for number in range(4):
        Image.fromarray(np.roll(picture, number, 0)).save(tmp_path / "good" / f"{number}.png")
    calibrate(bundle, tmp_path / "good", false_alarm_rate=0.2)
    with Predictor(bundle) as predictor:
        predictor.backend = InTurn(predictor.backend)
        with running(predictor=predictor, live=False) as server:
            model = server.json("/v1/status")["model"]
    assert model["name"] == "line3"
    assert model["sha256"] == predictor.bundle.sha256
    made = json.loads((bundle / "calibration.json").read_text())["made"]
    assert model["calibration"] == {"made": made, "good_images": 4, "false_alarm_rate": 0.2}
    assert made[:2] == "20" and made.endswith("+00:00")


def test_infer_has_metrics_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "in").mkdir()
    shutil.copy(SCRATCH, tmp_path / "in")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    line = [
        Path(sys.executable).with_name("fbclip"),
        "infer",
        "--watch",
        "in",
        "--metrics",
        f"0.0.0.0:{port}",
        "--no-save",
    ]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def found() -> float:
        try:
            return scrape(f"http://127.0.0.1:{port}/metrics")["fbclip_results_total"].value
        except OSError:
            return 0

    try:
        eventually(found)
    finally:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143, said


def test_the_log_of_a_server_is_json_to_the_last_line(tmp_path: Path) -> None:
    with command(tmp_path, "--log-format", "json", token=TOKEN) as server:
        for _ in range(6):
            assert server.ask("/v1/status", Authorization="Bearer wrong")[0] == 401
    log = tmp_path / "serve.log"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (guesses,) = (line for line in lines if line.get("logger") == "fbclip.serve")
    assert guesses["level"] == "warning" and "wrong tokens from 127.0.0.1" in guesses["message"]
    assert TOKEN not in log.read_text()
