from __future__ import annotations

import csv
import json
import os
import select
import signal
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from fbclip.errors import FBClipError, UsageError
from fbclip.runtime import prediction
from fbclip.runtime.live.records import Record
from fbclip.runtime.live.sinks import SinkOptions, make_sinks, window
from fbclip.runtime.live.sinks.events import EventRecorder, event_folders
from fbclip.runtime.live.sinks.lines import OLDER, LineFile
from fbclip.runtime.live.sinks.metrics import Prometheus
from fbclip.runtime.live.sinks.video import Video
from fbclip.runtime.live.sinks.webhook import Webhook
from fbclip.runtime.live.sinks.window import Window
from fbclip.runtime.serving.feed import Feed
from helpers.delivered import drawn_verdict, has_outlines, let_off, notice, result
from helpers.disks import largest_file, read_only, tiny_disk
from helpers.live import Frames
from helpers.stream_faults import bound, serving
from helpers.waiting import PATIENCE_S, eventually

CAMERA = Frames([], live=True)


def killed(work: Callable[[Callable[[int], None]], None], least: int, seconds: float) -> int:
    """Run `work` in a process of its own and kill -9 it; the last number it had acknowledged.

    Args:
        least: numbers that it acknowledges before, however slow the machine is.
        seconds: that it lives on then.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # the whole work happens between two forks: imports would take longer than it does
        try:
            work(lambda number: _acknowledge(writer, number))
        finally:
            os._exit(1)
    os.close(writer)
    read = b""
    while len(read) < 8 * least and select.select([reader], [], [], PATIENCE_S)[0] and (more := os.read(reader, 8)):
        read += more
    time.sleep(seconds)  # how long the process may live, not a wait for something
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with os.fdopen(reader, "rb") as numbers:
        read += numbers.read()
    return int.from_bytes(read[len(read) // 8 * 8 - 8 :][:8], "little", signed=True) if len(read) >= 8 else -1


def _acknowledge(writer: int, number: int) -> None:
    os.write(writer, number.to_bytes(8, "little", signed=True))


def test_json_lines_hold_results_and_notices(tmp_path: Path) -> None:
    (sink,) = make_sinks(SinkOptions(json=str(tmp_path / "logs" / "live.jsonl")), CAMERA)
    sink.write(result(3, 0.75, alarm=True))
    sink.notify(notice())
    lines = (tmp_path / "logs" / "live.jsonl").read_text().splitlines()  # flushed without close
    first, second = map(json.loads, lines)
    assert (first["kind"], first["source"], first["index"], first["alarm"]) == ("result", "camera:0", 3, True)
    (region,) = first["regions"]
    assert region["length"] == pytest.approx(56.15, abs=0.01)  # across, from corner to corner
    expected = {"box": [60, 100, 100, 140], "peak": 0.75, "area": 1600, "weak": False, "mean": 0.75}
    assert {name: region[name] for name in expected} == expected
    assert (second["kind"], second["state"], second["counters"]["dropped"]) == ("source", "lost", 2)
    sink.close()


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    options = SinkOptions(json=str(folder / "live.jsonl"), csv=folder / "live.csv", video=folder / "live.avi")
    made = make_sinks(options, CAMERA)
    for index in range(2):
        for sink in made:
            sink.write(result(index))
        if index == 0:
            folder.rename(tmp_path / "gone")
    for sink in made:
        sink.close()
    for place, index in ((tmp_path / "gone", 0), (folder, 1)):
        assert json.loads((place / "live.jsonl").read_text())["index"] == index
        with (place / "live.csv").open(newline="") as file:
            assert [int(row["index"]) for row in csv.DictReader(file)] == [index]
        assert len(frames_of(place / "live.avi")) == 1


def test_processes_that_write_lines_to_one_file_lose_and_tear_none(tmp_path: Path) -> None:
    """Also while either puts the file aside, and gives back the beginning of a line for which there was no room."""
    program = (
        "import sys; from pathlib import Path; from fbclip.runtime.live.sinks.lines import LineFile\n"
        "lines = LineFile(Path(sys.argv[1]), 'header', limit=20_000, keep=1000)\n"
        "for number in range(500): lines.append(f'{sys.argv[2]} {number} ' + 'x' * (number * 7919 % 2000) + ' end')"
    )
    path = tmp_path / "live.csv"
    writers = [subprocess.Popen([sys.executable, "-c", program, path, letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    written: dict[str, list[int]] = {"a": [], "b": []}
    for file in sorted(tmp_path.iterdir(), key=lambda file: -int(file.suffix[1:]) if file != path else 0):
        head, *lines = file.read_text().splitlines()
        assert head == "header"
        for line in lines:
            letter, number, _, end = line.split(" ")
            assert end == "end"
            written[letter].append(int(number))
    assert written == {letter: list(range(500)) for letter in "ab"}


def test_json_lines_go_to_standard_output() -> None:
    program = (
        "from helpers.delivered import *; from helpers.live import Frames; from fbclip.runtime.live.sinks import *\n"
        "(sink,) = make_sinks(SinkOptions(json='-'), Frames([], live=True)); sink.write(result(5)); sink.notify(notice()); sink.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True
    )
    assert [json.loads(line)["kind"] for line in done.stdout.splitlines()] == ["result", "source"]


def test_kill_at_random_times_tears_at_most_the_line_under_way(tmp_path: Path) -> None:
    path, random = tmp_path / "live.jsonl", Random(0)
    acknowledged: list[int] = []
    for run in range(40):

        def work(acknowledge: Callable[[int], None], run: int = run) -> NoReturn:
            lines = LineFile(path, limit=200_000, keep=5000)  # some are killed while the file is put aside
            number = 0
            while True:
                lines.append(
                    json.dumps(
                        {"kind": "test", "run": run, "number": number, "padding": "x" * (number * 7919 % 20_000)}
                    )
                )
                acknowledge(number)
                number += 1

        acknowledged.append(killed(work, random.randrange(20), random.uniform(0.0, 0.02)))
    assert sum(acknowledged) > 200, "too few lines to mean anything"
    files = sorted(tmp_path.iterdir(), key=lambda file: -int(file.suffix[1:]) if file != path else 0)
    assert len(files) > 3
    written: dict[int, list[int]] = {run: [] for run in range(len(acknowledged))}
    torn: list[str] = []
    for line in "".join(file.read_text() for file in files).splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            torn.append(line)  # the numbers below say that it was a last one: none is missing
            continue
        written[record["run"]].append(record["number"])
    assert len(torn) <= len(acknowledged)
    for numbers, last in zip(written.values(), acknowledged, strict=True):
        assert numbers == list(range(len(numbers)))
        assert len(numbers) in (last + 1, last + 2)  # one more may be written than acknowledged


def test_a_torn_tail_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    path.write_text('{"kind": "a", "number": 0}\n{"num')
    lines = LineFile(path)
    lines.append('{"number": 1}')
    lines.append('{"number": 2}')
    assert path.read_text() == '{"kind": "a", "number": 0}\n{"num\n{"number": 1}\n{"number": 2}\n'
    lines.close()


def test_full_files_are_put_aside_and_the_oldest_removed(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    lines = LineFile(path, limit=30, keep=2)
    for number in range(10):
        lines.append(f"{number:09d}")  # three to a file
    lines.append("x" * 100)  # longer than a file may be, and whole all the same
    lines.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["live.jsonl", "live.jsonl.1", "live.jsonl.2"]
    assert path.read_text() == "x" * 100 + "\n"
    assert (tmp_path / "live.jsonl.1").read_text() == "000000009\n"
    assert (tmp_path / "live.jsonl.2").read_text() == "000000006\n000000007\n000000008\n"


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    lines = LineFile(path)
    lines.append("one")
    path.rename(tmp_path / "taken")
    lines.append("two")
    path.unlink()
    lines.append("three")
    lines.close()
    assert ((tmp_path / "taken").read_text(), path.read_text()) == ("one\n", "three\n")


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    lines = LineFile(path)
    with largest_file(100_000):
        lines.append("a" * 70_000)
        for _ in range(3):
            with pytest.raises(FBClipError, match=r"live\.jsonl: File too large"):
                lines.append("b" * 70_000)
            assert path.stat().st_size == 70_001
    lines.append("c" * 70_000)
    lines.close()
    assert path.read_text() == "a" * 70_000 + "\n" + "c" * 70_000 + "\n"


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_full_disk_is_reported_and_recovers(tmp_path: Path, kind: str) -> None:
    with tiny_disk(tmp_path, "64k"):
        path = tmp_path / "live"
        (sink,) = make_sinks(SinkOptions(**{kind: str(path) if kind == "json" else path}), CAMERA)
        (tmp_path / "ballast").write_bytes(bytes(40_000))
        written = []
        with pytest.raises(FBClipError, match=r"^the disk is full: can't write .*/live;"):
            for index in range(1000):
                sink.write(result(index))
                written.append(index)
        (tmp_path / "ballast").unlink()
        sink.write(result(1000))
        sink.close()
        text = path.read_text()
        rows = map(json.loads, text.splitlines()) if kind == "json" else csv.DictReader(text.splitlines())
        assert [int(row["index"]) for row in rows] == [*written, 1000]


def test_csv_rows_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "live.csv"
    for index in range(2):  # started twice
        (sink,) = make_sinks(SinkOptions(csv=path), CAMERA)
        sink.write(result(index, 0.75, alarm=bool(index), name='a "strange", name'))
        sink.notify(notice())
        sink.close()
    assert path.read_text().count("source") == 1
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["alarm"] for row in rows] == ["False", "True"]
    first = rows[0]
    assert (first["source"], first["score"], first["regions"]) == ('a "strange", name', "0.75", "1")
    assert (first["largest_peak"], first["model_ms"], first["is_anomalous"]) == ("0.75", "30.0", "True")


def test_a_table_of_an_earlier_release_keeps_its_columns(tmp_path: Path) -> None:
    older, newer = tmp_path / "older.csv", tmp_path / "newer.csv"
    older.write_text(f"{','.join(OLDER)}\n")
    taught = result()
    taught = replace(taught, prediction=replace(taught.prediction, memory="0123456789ab"))
    for path in (older, newer):
        (sink,) = make_sinks(SinkOptions(csv=path), CAMERA)
        sink.write(taught)
        sink.close()
    rows = {path: list(csv.reader(path.read_text().splitlines())) for path in (older, newer)}
    assert [len(row) for row in rows[older]] == [len(OLDER)] * 2
    assert rows[newer][0] == [*OLDER, "memory"] and rows[newer][1][-1] == "0123456789ab"


def test_csv_of_other_columns_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("part,verdict\n7,good\n")
    with pytest.raises(UsageError, match="does not begin with 'time,index,source"):
        make_sinks(SinkOptions(csv=path), CAMERA)
    assert path.read_text() == "part,verdict\n7,good\n"


def frames_of(path: Path) -> list[tuple[int, int]]:
    """(width, height) of each frame that can be read."""
    capture = cv2.VideoCapture(str(path))
    sizes = []
    while (read := capture.read())[0]:
        sizes.append((read[1].shape[1], read[1].shape[0]))
    capture.release()
    return sizes


def test_a_video_that_can_not_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    with read_only(folder), pytest.raises(UsageError, match="Read-only file system; choose another place"):
        make_sinks(SinkOptions(video=folder / "live.avi"), CAMERA)


def test_video_begins_anew_with_another_size_and_another_run(tmp_path: Path) -> None:
    path = tmp_path / "live.avi"
    for _ in range(2):
        (sink,) = make_sinks(SinkOptions(video=path, video_fps=5), CAMERA)
        for index, size in enumerate([(320, 320), (320, 320), (401, 333), (320, 320)]):
            sink.write(result(index, size=size))
        sink.close()
    parts = [tmp_path / f"live{suffix}.avi" for suffix in ("", "-2", "-3", "-4", "-5", "-6")]
    assert sorted(tmp_path.iterdir()) == sorted(parts)
    sizes = [frames_of(part) for part in parts]
    assert [len(part) for part in sizes] == [2, 1, 1, 2, 1, 1]
    height, width = result(size=(401, 333)).prediction.overlay().shape[:2]
    assert sizes[1] == sizes[4] == [(width, height)]


def test_every_picture_shows_the_results_own_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, delivered in (("defect", result(score=0.75, alarm=True, size=(1280, 960))), ("good", let_off())):
        assert name == ("defect" if delivered.prediction.is_anomalous else "good")
        pictures = pictures_of(delivered, tmp_path / name, monkeypatch)
        assert len(pictures) == 4
        for kind, picture in pictures.items():
            assert (drawn_verdict(picture), has_outlines(picture)) == (name, name == "defect"), kind


def pictures_of(delivered: Record, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, NDArray[np.uint8]]:
    """What each sink with pictures makes of a result, RGB."""
    shown: list[NDArray[np.uint8]] = []
    for name in ("namedWindow", "resizeWindow", "setWindowTitle", "destroyWindow"):
        monkeypatch.setattr(cv2, name, lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda _, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda _: -1)
    monkeypatch.setattr(window, "_is_shown", lambda: True)
    monkeypatch.setattr(window, "require_window", lambda: None)
    feed = Feed()
    made = [Video(folder / "live.avi", 10), Window(), EventRecorder(folder / "events", 10**7), feed]
    for sink in made:
        sink.write(delivered)
    for sink in made:
        sink.close()
    (event,) = event_folders(folder / "events")
    pictures = {
        "video": cv2.VideoCapture(str(folder / "live.avi")).read()[1],
        "window": shown[0],
        "event": cv2.imread(str(event / "overlay.jpg")),
        "page": cv2.imdecode(np.frombuffer(feed.picture(delivered), np.uint8), cv2.IMREAD_COLOR),
    }
    return {kind: np.asarray(picture[..., ::-1]) for kind, picture in pictures.items()}


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The longest side asked for, of every overlay that is drawn."""
    made: list[int | None] = []
    draw = prediction.draw_overlay

    def counted(prediction: Any, longest: int | None = None, **options: Any) -> NDArray[np.uint8]:
        made.append(longest)
        return draw(prediction, longest, **options)

    monkeypatch.setattr(prediction, "draw_overlay", counted)
    return made


@pytest.mark.parametrize(("size", "drawn"), [((640, 480), [None]), ((1920, 1080), [None, 1280])])
def test_sinks_share_a_picture(
    size: tuple[int, int],
    drawn: list[int | None],
    drawings: list[int | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures_of(result(score=0.75, alarm=True, size=size), tmp_path, monkeypatch)
    assert drawings == drawn  # the page's is another where the frame is larger


def test_a_picture_is_drawn_once_for_all_who_ask_at_the_same_time(drawings: list[int | None]) -> None:
    delivered = result(size=(1920, 1080))
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda _: delivered.draw(), range(8)))
    assert len(drawings) == 1
    assert all(picture is pictures[0] for picture in pictures)


def test_no_picture_is_drawn_that_nobody_looks_at(drawings: list[int | None], tmp_path: Path) -> None:
    made = make_sinks(SinkOptions(json=str(tmp_path / "live.jsonl"), csv=tmp_path / "live.csv"), CAMERA)
    for sink in [*made, EventRecorder(tmp_path / "events", 10**7), Feed()]:
        sink.write(result(score=0.75))  # no alarm began
        sink.close()
    assert drawings == []


def test_killed_video_plays_up_to_the_last_second(tmp_path: Path) -> None:
    path = tmp_path / "live.avi"

    def work(acknowledge: Callable[[int], None]) -> NoReturn:
        video = Video(path, 10)
        delivered = result()
        index = 0
        while True:
            video.write(delivered)
            acknowledge(index)
            index += 1

    last = killed(work, 100, 0)
    assert last > 20
    assert last + 1 - len(frames_of(path)) <= 10  # frames of the smallest size there is: more of them wait for a block


def test_video_leaves_room_on_the_disk(tmp_path: Path) -> None:
    with tiny_disk(tmp_path, "150m"):
        video = Video(tmp_path / "live.avi", 10)
        with pytest.raises(OSError, match="less than 200 MB left, no video"):
            video.write(result())
        assert list(tmp_path.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=300m", tmp_path], check=True)
        video.write(result())
        video.close()
        assert len(frames_of(tmp_path / "live.avi")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SinkOptions(video=Path("x.mp4")), "pass x.avi"),
        (SinkOptions(video=Path("x.avi"), video_fps=0), "more than 0"),
        (SinkOptions(video=Path("Ri\udcdf.avi")), "a name that is no UTF-8"),
        (SinkOptions(json="/proc/nothing/x.jsonl"), "can't write"),
        (SinkOptions(json="x.jsonl", log_keep=0), "1 file put aside"),
        (SinkOptions(webhook="ftp://host/"), "http or https; got ftp"),
        (SinkOptions(webhook="https://user:secret@host/"), "no user and password"),
        (SinkOptions(mqtt="broker:1883"), "mqtt or mqtts"),
        (SinkOptions(mqtt="mqtt://u:secret@host:99999"), "no valid host or port"),
        (SinkOptions(mqtt="mqtt://u:secret#@host"), "no valid host or port: in a user or password write /"),
        (SinkOptions(mqtt="mqtt://host/a/#"), "no # or"),
        (SinkOptions(metrics=("127.0.0.1", -1)), "can't serve metrics"),
    ],
)
def test_wrong_options_say_what_to_do(
    options: SinkOptions, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        make_sinks(options, CAMERA)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "options"),
    [("paho", SinkOptions(mqtt="mqtt://host")), ("prometheus_client", SinkOptions(metrics=("127.0.0.1", 1)))],
)
def test_a_missing_package_is_named_by_its_extra(
    package: str, options: SinkOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    extra = "mqtt" if package == "paho" else "metrics"
    with pytest.raises(UsageError, match=rf"pip install 'fbclip\[{extra}\]'"):
        make_sinks(options, CAMERA)


def test_window_without_display_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    cure = "pip install opencv-python" if not cv2.currentUIFramework() else "run on a desktop"
    with pytest.raises(UsageError, match=f"{cure}.*fbclip serve.*record a video"):
        make_sinks(SinkOptions(show=True), CAMERA)


def test_no_sink_stays_open_when_a_later_one_fails(tmp_path: Path) -> None:
    def is_open() -> bool:
        found = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # it was the listing's own
                found.append(descriptor.readlink())
        return any(tmp_path in path.parents for path in found)

    kept = make_sinks(SinkOptions(json=str(tmp_path / "a.jsonl")), CAMERA)
    assert is_open()
    kept[0].close()
    with pytest.raises(UsageError):
        make_sinks(SinkOptions(json=str(tmp_path / "a.jsonl"), csv=tmp_path / "b.csv", webhook="nonsense"), CAMERA)
    assert not is_open()


class Receiver(HTTPServer):
    """Answers with `answers` in turn, then 204; keeps the bodies it said yes to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hook)
        self.answers: list[int] = []
        self.taken: list[dict[str, object]] = []


class Hook(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        code = self.server.answers.pop(0) if self.server.answers else 204
        if code == 0:
            self.wfile.write(b"garbage")
            return
        if code == 204:  # kept before the answer, after which the sender goes on and the test looks
            self.server.taken.append(json.loads(body))
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        raise AssertionError("the body is lost")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("no_proxy", "*")
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_webhook_gets_notices_and_the_result_of_an_alarm(receiver: Receiver) -> None:
    hook = Webhook(f"http://127.0.0.1:{receiver.server_port}/hook?token=secret", PATIENCE_S)
    hook.write(result(0))
    hook.write(raised := result(1, 0.75, alarm=True))
    alarm = notice("alarm", "on", wall=raised.frame.wall)
    receiver.answers = [503, 302, 0]
    for message in ("answered 503 Service Unavailable", "answered 302 Found", "no answer .* as HTTP has it"):
        with pytest.raises(OSError, match=message) as caught:
            hook.notify(alarm)
        assert "secret" not in str(caught.value)
    assert receiver.taken == []
    hook.notify(alarm)
    hook.notify(notice("source", "lost"))
    hook.notify(notice("alarm", "off"))  # whose result was lost while the server was away
    hook.close()
    assert receiver.taken[0] == {**alarm.to_dict(), "result": raised.to_dict()}
    told = [(message["kind"], message["state"], "result" in message) for message in receiver.taken]
    assert told == [("alarm", "on", True), ("source", "lost", False), ("alarm", "off", False)]


@pytest.mark.parametrize("answer", ["HTTP/1.0 404 No {}\r\n\r\n", "{}\r\n\r\n", "HTTP/1.0 x{}\r\n\r\n"])
def test_no_token_comes_back_with_a_servers_words(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers repeat what they were asked."""
    monkeypatch.setenv("no_proxy", "*")

    class Echo(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(answer.format(self.rfile.readline().decode()[:-2]).encode())

    with serving(Echo) as port:
        hook = Webhook(f"http://127.0.0.1:{port}/hook/secret 1?token=secret#secret")
        with pytest.raises(OSError, match=r"the webhook at 127\.0\.0\.1") as caught:
            hook.notify(notice())
        assert "secret" not in str(caught.value)


def test_webhook_without_server_is_an_error_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with bound() as silent:  # nobody listens there
        hook = Webhook(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        for _ in range(2):
            with pytest.raises(OSError, match="no answer of the webhook at 127"):
                hook.notify(notice())


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    before = set(threading.enumerate())
    totals = {"frames": 10, "dropped": 3, "reconnects": 1}
    metrics = Prometheus(lambda: totals, ("127.0.0.1", 0))
    assert metrics.own
    for index, score in enumerate((0.2, 0.3, 0.75)):
        metrics.write(result(index, score, alarm=score >= 0.5))
    metrics.notify(notice("source", "live"))
    metrics.notify(notice("sink", "failing", "mqtt"))
    metrics.notify(notice("drift", "drifting"))
    metrics.notify(notice("run", "started", "fbclip"))
    totals["dropped"] = 4
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.own.port}/metrics", timeout=PATIENCE_S) as answer:
        served = samples(answer.read().decode())
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    assert samples(body.decode())["fbclip_results_total"] == 3
    expected = {
        "fbclip_results_total": 3,
        "fbclip_anomalies_total": 1,
        "fbclip_alarms_total": 1,
        "fbclip_alarm": 1,
        "fbclip_threshold": 0.5,
        "fbclip_last_score": 0.75,
        "fbclip_score_count": 3,
        "fbclip_score_bucket 0.5": 2,
        "fbclip_age_seconds_bucket 0.02": 0,
        "fbclip_age_seconds_bucket +Inf": 3,
        "fbclip_stage_seconds_count model": 3,
        "fbclip_source_frames_total": 10,
        "fbclip_source_dropped_total": 4,
        "fbclip_source_up camera:0": 1,
        "fbclip_sink_up mqtt": 0,
        "fbclip_drifting": 1,
    }
    assert {name: served[name] for name in expected} == expected
    assert served["fbclip_stage_seconds_sum model"] == pytest.approx(0.09)
    metrics.close()
    eventually(lambda: set(threading.enumerate()) <= before)  # what answers a request ends in its own time


def test_a_taken_metrics_port_is_an_error(receiver: Receiver) -> None:
    with pytest.raises(UsageError, match=f"127.0.0.1:{receiver.server_port}.*choose another port"):
        make_sinks(SinkOptions(metrics=("127.0.0.1", receiver.server_port)), CAMERA)
