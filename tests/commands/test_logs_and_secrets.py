"""What a service says, in which form; and secrets that come from files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from conftest import Run
from PIL import Image

COMMAND = Path(sys.executable).with_name("fbclip")
DATED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d) (INFO   |WARNING|ERROR  ) \S.*")
PLAIN = "4 images: 3 with defects, 1 good"


@pytest.fixture
def watched(tmp_path: Path) -> list[str]:
    """Arguments that inspect a stream which ends, with an alarm."""
    (tmp_path / "in").mkdir()
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "in" / "a.png")
    return ["infer", "--watch", "in", "--max-frames", "1", "--threshold", "0", "--no-save"]


def test_a_stream_without_a_terminal_has_dates_and_levels(fbclip: Run, watched: list[str]) -> None:
    done = fbclip(*watched)
    lines = done.stdout.splitlines()
    assert all(DATED.fullmatch(line) for line in lines), lines
    assert done.stderr == ""
    assert [line for line in lines if " WARNING alarm on (in): 1 of the last 1 frames" in line]
    assert [line for line in lines if " INFO    1 frames in " in line]


def test_images_are_told_plainly_unless_asked_otherwise(fbclip: Run) -> None:
    assert fbclip("infer", "--no-save").stdout.splitlines()[-1] == PLAIN
    lines = fbclip("infer", "--no-save", "--log-format", "text").stdout.splitlines()
    assert all(DATED.fullmatch(line) for line in lines)
    assert lines[-1].endswith(f" INFO    {PLAIN}")


def test_json_is_one_object_a_line(fbclip: Run, watched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBCLIP_LOG_FORMAT", "json")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    lines = [json.loads(line) for line in fbclip(*watched).stdout.splitlines()]
    for line in lines:
        assert list(line)[:3] == ["time", "level", "message"]
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(hours=5, minutes=45)
    (alarm,) = (line for line in lines if line.get("kind") == "alarm")
    assert (alarm["level"], alarm["state"], alarm["subject"]) == ("warning", "on", "in")
    assert alarm["counters"]["alarms"] == 1
    (model,) = (line for line in lines if line.get("kind") == "model")
    assert (model["bundle"], model["device"], len(model["sha256"])) == ("fbclip-nano", "cpu", 64)
    (summary,) = (line for line in lines if line.get("kind") == "summary")
    assert (summary["frames"], summary["anomalous"], summary["level"]) == (1, 1, "info")
    failed = fbclip("infer", "nowhere.png", code=2)  # the last line of all is of JSON too
    (error,) = map(json.loads, failed.stderr.splitlines())
    assert error["level"] == "error" and "there is no nowhere.png" in error["message"]


def test_quiet_leaves_warnings_and_errors(fbclip: Run, watched: list[str]) -> None:
    for quiet in (["--quiet"], ["-q"], ["--log-level", "warning"], ["-q", "--log-level", "debug"]):
        (line,) = fbclip(*watched, *quiet).stdout.splitlines()
        assert " WARNING alarm on (in)" in line
    assert fbclip(*watched, "--log-level", "error").stdout == ""
    assert fbclip("infer", "--no-save", "-q").stdout == ""
    assert fbclip("infer", "nowhere.png", "-q", code=2).stderr.startswith("fbclip: ")
    assert fbclip("doctor", "-q").stdout == ""


def test_quiet_says_what_could_not_be_inspected(fbclip: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "torn.png").write_bytes(b"no image")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "in" / "a.png")
    done = fbclip("infer", "in", "--no-save", "-q", code=2)
    assert "torn.png" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_levels_and_forms_are_checked(fbclip: Run, tmp_path: Path) -> None:
    assert "--log-format: auto or text or json; got 'xml'" in fbclip("infer", "--log-format", "xml", code=2).stderr
    (tmp_path / "line.toml").write_text('log-format = "json"\nquiet = true\n')
    assert fbclip("infer", "--config", "line.toml", "--no-save").stdout == ""


def test_a_log_that_nobody_reads_ends_the_command(tmp_path: Path, watched: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([COMMAND, *watched], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_log_takes_any_name(fbclip: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "in" / "two\nlines \x1b[31m.png")
    done = fbclip("infer", "--watch", "in", "--max-frames", 1, "--no-save", code=1)
    assert r"two\nlines \x1b[31m.png is black" in done.stdout
    assert all(DATED.fullmatch(line) for line in done.stdout.splitlines())


# Secrets


def secret(folder: Path, name: str, text: str, mode: int = 0o600) -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_source_with_a_password_comes_from_a_file(
    fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera = secret(tmp_path, "camera", "rtsp://operator:geheim@127.0.0.1:9/line\n")
    monkeypatch.setenv("FBCLIP_INFER_SOURCE_FILE", camera)
    done = fbclip("infer", "--duration", "0.3", "--json", "r.jsonl", code=1)
    assert "rtsp://127.0.0.1:9/line" in done.stdout
    said = done.stdout + done.stderr + (tmp_path / "r.jsonl").read_text()
    assert "geheim" not in said and "operator" not in said and "warning" not in done.stderr


def test_a_command_line_wins_over_a_file_and_a_file_over_the_configuration(
    fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "line.toml").write_text('[infer]\nsource = "configured.png"\n')
    monkeypatch.setenv("FBCLIP_CONFIG", "line.toml")
    monkeypatch.setenv("FBCLIP_INFER_SOURCE_FILE", secret(tmp_path, "camera", "filed.png"))
    assert "no filed.png" in fbclip("infer", code=2).stderr
    assert "no given.png" in fbclip("infer", "given.png", code=2).stderr


def test_no_other_program_inherits_what_came_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fbclip.commands.secrets import values_from_files

    monkeypatch.setenv("FBCLIP_TOKEN_FILE", secret(tmp_path, "token", " two words \r\n"))
    with values_from_files(["FBCLIP_SERVE_TOKEN", "FBCLIP_TOKEN"]) as files:
        assert os.environ["FBCLIP_TOKEN"] == " two words "
    assert files == [tmp_path / "token"]
    assert "FBCLIP_TOKEN" not in os.environ


def test_a_secret_that_everybody_can_read_is_warned_of(
    fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = secret(tmp_path, "token", "short", 0o644)
    monkeypatch.setenv("FBCLIP_TOKEN_FILE", token)
    warning, error = fbclip("serve", "--port", 0, code=2).stderr.splitlines()
    assert (
        warning
        == f"fbclip: warning: everybody on this machine can read {token}, which holds a secret: chmod 640 {token}"
    )
    assert error.startswith("fbclip: --token: a token has 16 characters")
    assert "short" not in warning + error
    (tmp_path / "token").chmod(0o640)
    assert len(fbclip("serve", "--port", 0, code=2).stderr.splitlines()) == 1
    monkeypatch.delenv("FBCLIP_TOKEN_FILE")
    for text, warned in (("rtsp://u:p@nowhere.invalid:99999/", True), ("rtsp://nowhere.invalid:99999/", False)):
        secret(tmp_path, "line.toml", f'source = "{text}"', 0o644)
        assert ("everybody" in fbclip("infer", "--config", "line.toml", code=2).stderr) == warned
    broker = 'port = 0\nhost = "0.0.0.0"\nmqtt = "mqtt://line:geheim@broker/line1"'
    secret(tmp_path, "line.toml", f"[serve]\n{broker}", 0o644)
    warning, error = fbclip("serve", "--config", "line.toml", code=2).stderr.splitlines()
    assert "everybody on this machine can read line.toml" in warning and "geheim" not in warning + error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FBCLIP_TOKEN_FILE names a file with the value; {path} can't be read: No such file or directory"),
        (b"", "of 1 to 65536 bytes of text; {path} holds none"),
        (b"\n", "{path} holds none"),
        (b"x" * 65537, "{path} holds none"),
        (b"\xff", "in UTF-8; {path} is none"),
    ],
)
def test_files_that_hold_no_value(
    fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("FBCLIP_TOKEN_FILE", str(path))
    error = fbclip("serve", "--port", 0, code=2).stderr
    assert message.format(path=path) in error and error.count("\n") == 1


def test_a_value_comes_from_one_place(fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBCLIP_TOKEN_FILE", secret(tmp_path, "token", "0123456789abcdef"))
    monkeypatch.setenv("FBCLIP_TOKEN", "0123456789abcdef")
    assert "got FBCLIP_TOKEN and FBCLIP_TOKEN_FILE" in fbclip("serve", "--port", 0, code=2).stderr
    monkeypatch.setenv("FBCLIP_INFER_CAMRA_FILE", "x")
    assert "the nearest is FBCLIP_INFER_CAMERA_FILE" in fbclip("infer", code=2).stderr
