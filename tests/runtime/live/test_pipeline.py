from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import fbclip
from fbclip.errors import FBClipError, ImageError, UsageError
from fbclip.parsing import parse_resolution
from fbclip.runtime.backends import Backend
from fbclip.runtime.live import delivery
from fbclip.runtime.live.alarm import Alarm, Vote
from fbclip.runtime.live.console import status_text
from fbclip.runtime.live.pipeline import Limits, Pipeline, ahead
from fbclip.runtime.live.records import Frame, Notice, Record
from fbclip.runtime.live.run import run
from fbclip.runtime.live.sources import CaptureOptions, open_source
from fbclip.runtime.live.timing import WINDOW, Percentiles
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.roi import Roi
from fbclip.terminal import make_console
from helpers.live import IMAGE, PATIENT, QUICK, STRIPE, Background, Frames, Memory
from helpers.video import write_video
from helpers.waiting import PATIENCE_S, eventually

SAMPLES = Path(fbclip.__file__).parent / "assets" / "samples"
IMAGE[STRIPE] = 60


def frames(*steps: int | Callable[[], object]) -> Iterator[NDArray[np.uint8]]:
    """So many pictures, or a wait until something is so, one after the other."""
    for step in steps:
        if isinstance(step, int):
            yield from [IMAGE] * step
        else:
            eventually(step)


class Brightness(Backend):
    """A backend whose score is the picture's first pixel."""

    device = "cpu"

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.threads.add(threading.get_ident())
        maps = images[..., 0].astype(np.float32) / 255
        return maps[:, 0, 0], maps

    def close(self) -> None:
        pass


def predictor(**options: Any) -> Predictor:
    made = Predictor(threshold=0.5, **options)
    made.backend = Brightness()
    return made


def grey(value: int) -> NDArray[np.uint8]:
    picture = np.full((48, 64, 3), value, np.uint8)
    picture[STRIPE] = value // 2
    return picture


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """Threads that the test began have ended with it; those of others may end when they like."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("no_thread_stays")
def test_results_are_the_predictors_own_in_order_and_each_stage_has_its_thread() -> None:
    images = [np.asarray(Image.open(path)) for path in sorted(SAMPLES.glob("*.jpg"))]
    predict, sink = Predictor(), Memory()
    summary = Pipeline(Frames(images), predict, [sink], limits=PATIENT).run()
    assert sink.indices == [0, 1, 2, 3]
    for image, result in zip(images, sink.results, strict=True):
        alone = predict(image)
        assert result.prediction.score == alone.score
        assert (result.prediction.anomaly_map == alone.anomaly_map).all()
        assert result.prediction.regions == alone.regions
        assert list(result.timings_ms) == ["read", "wait", "preprocess", "model", "postprocess"]
    assert summary.status.frames == 4
    assert summary.status.anomalous == sum(result.prediction.is_anomalous for result in sink.results)
    assert (sink.closed, len(sink.threads)) == (1, 1)


def test_the_model_has_one_thread_which_is_not_the_sinks() -> None:
    predict, sink = predictor(), Memory()
    Pipeline(Frames([IMAGE] * 20), predict, [sink], limits=PATIENT).run()
    assert isinstance(predict.backend, Brightness)
    assert len(predict.backend.threads) == 1
    assert not predict.backend.threads & sink.threads


def test_a_file_waits_for_a_slow_sink_and_loses_nothing() -> None:
    source, slow = Frames([IMAGE] * 200), Memory("slow")
    slow.gate.clear()
    pipeline = Pipeline(source, predictor(), [slow], limits=Limits(room=4, close_s=PATIENCE_S, stuck_s=PATIENCE_S))
    with Background(pipeline) as run:
        assert slow.entered.wait(PATIENCE_S)
        eventually(lambda: pipeline.status().sinks["slow"].waiting == 4)
        # in the sink 1, waiting 4, and one in each of the stages' hands and between them
        assert run.settled(lambda: source.taken) <= 1 + 4 + 6
        slow.gate.set()
        summary = run.result()
    assert slow.indices == list(range(200))
    assert summary.status.sinks["slow"].dropped == 0


def test_a_camera_does_not_wait_for_a_sink_that_hangs() -> None:
    hanging, other = Memory("hanging"), Memory("other")
    hanging.gate.clear()
    source = Frames(frames(1, hanging.entered.is_set, 99, lambda: other.told("sink")), live=True)
    summary = Pipeline(
        source, predictor(), [hanging, other], limits=Limits(close_s=2.0, pauses_s=QUICK, stuck_s=0.0)
    ).run()
    assert summary.status.frames == 100
    state = summary.status.sinks["hanging"]
    assert (state.state, state.delivered) == ("failing", 0)
    assert state.dropped > 100  # the one in its hands too, and the notice of the end
    assert other.told("sink") == [("hanging", "failing")]
    hanging.gate.set()


def test_a_failing_sink_is_reported_once_recovers_and_gets_what_waited() -> None:
    failing, other = Memory("disk", faults=5), Memory("other")
    Pipeline(Frames([IMAGE] * 8), predictor(), [failing, other], limits=PATIENT).run()
    assert failing.indices == other.indices == list(range(8))
    assert other.told("sink") == [("disk", "failing"), ("disk", "working")]
    assert "No space left" in next(n for n in other.notices if n.state == "failing").message
    assert not failing.told("sink")


def test_a_sink_that_fails_for_ever_stops_nothing() -> None:
    for live in (False, True):
        failing, other = Memory("disk", faults=10**9), Memory("other")
        limits = Limits(room=4, close_s=2.0, pauses_s=QUICK)
        began = time.monotonic()
        source = Frames(frames(50, lambda other=other: other.indices[-1:] == [49]), live)
        summary = Pipeline(source, predictor(), [failing, other], limits=limits).run()
        assert time.monotonic() - began < PATIENCE_S
        assert summary.status.frames == 50
        assert other.indices[-1] == 49
        assert summary.status.sinks["disk"].dropped >= 50 - 4
        assert eventually(lambda failing=failing: failing.closed) == 1


def test_a_status_that_nobody_can_read_stops_nothing() -> None:
    tried = threading.Event()

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            tried.set()
            raise BrokenPipeError

    console = make_console()
    console.file = Gone()
    summary, _ = run(Pipeline(Frames(frames(1, tried.is_set, 1)), predictor(), []), console, log_s=0.0)
    assert summary.status.frames == 2


def test_a_faulty_sink_skips_what_it_chokes_on() -> None:
    faulty, other = Memory("faulty", faults=3, error=KeyError("colour")), Memory("other")
    Pipeline(Frames([IMAGE] * 8), predictor(), [faulty, other], limits=PATIENT).run()
    assert faulty.indices == list(range(3, 8))
    assert other.told("sink") == [("faulty", "failing"), ("faulty", "working")]
    assert "KeyError: 'colour'" in next(n for n in other.notices if n.state == "failing").message


def test_notices_do_not_fill_the_memory_of_a_sink_that_hangs() -> None:
    hanging = Memory("hanging")
    hanging.gate.clear()
    queue = delivery.Delivery(hanging, 4, False, lambda *_: None)
    frame = Frame(IMAGE, "", 0, 0.0, 0.0)
    queue.put(Record(frame, predictor()(IMAGE), False, False, {}))
    assert hanging.entered.wait(PATIENCE_S)
    for i in range(3 * delivery.NOTICES):
        queue.put(Notice(float(i), "source", "camera", "lost", "", {}))
    assert queue.status().waiting == delivery.NOTICES
    hanging.gate.set()
    queue.drain(time.monotonic() + PATIENCE_S)
    queue.wait_drained()
    queue.close()
    queue.join()
    assert [notice.time for notice in hanging.notices] == list(range(2 * delivery.NOTICES, 3 * delivery.NOTICES))


def test_a_sink_that_answered_late_is_not_stuck_any_more() -> None:
    told: list[str] = []

    def report(queue: delivery.Delivery, notice: Notice) -> None:
        told.append(notice.state)
        if notice.state == "working":
            queue.put(notice)  # as another thread may at this very moment

    late = Memory("late")
    late.gate.clear()
    queue = delivery.Delivery(late, 4, False, report)
    result = Record(Frame(IMAGE, "", 0, 0.0, 0.0), predictor()(IMAGE), False, False, {})
    queue.put(result)
    assert late.entered.wait(PATIENCE_S)
    queue._busy_since = time.monotonic() - delivery.STUCK_S - 1
    queue.put(result)
    late.gate.set()
    queue.drain(time.monotonic() + PATIENCE_S)
    queue.wait_drained()
    queue.close()
    queue.join()
    assert told == ["failing", "working"]
    assert len(late.results) == 2


@pytest.mark.usefixtures("no_thread_stays")
def test_stop_ends_a_camera_that_shows_nothing() -> None:
    source, sink = Frames([IMAGE] * 3, live=True, waits=True), Memory()
    pipeline = Pipeline(source, predictor(), [sink], limits=PATIENT)
    with Background(pipeline) as run:
        eventually(lambda: len(sink.results) == 3)
        pipeline.stop()
        summary = run.result()
    assert summary.status.frames == 3
    assert summary.status.source.state == "connecting"  # a camera says itself when it is live
    assert sink.notices[-1].state == "ended"


@pytest.mark.usefixtures("no_thread_stays")
def test_limits() -> None:
    sink = Memory()
    limits = Limits(max_frames=4, close_s=PATIENCE_S)
    assert Pipeline(Frames([IMAGE] * 9), predictor(), [sink], limits=limits).run().status.frames == 4
    waiting = Frames([IMAGE], live=True, waits=True)
    assert Pipeline(waiting, predictor(), [], limits=Limits(duration=0.1)).run().seconds < PATIENCE_S / 2


@pytest.mark.usefixtures("no_thread_stays")
def test_what_breaks_the_model_ends_the_run_and_closes_everything() -> None:
    class Broken(Brightness):
        def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            raise FBClipError("the GPU fell off")

    predict, source, sink = predictor(), Frames([IMAGE], live=True, waits=True), Memory()
    predict.backend = Broken()
    with pytest.raises(FBClipError, match="fell off"):
        Pipeline(source, predict, [sink], limits=PATIENT).run()
    assert source.closed.is_set()
    assert sink.closed == 1


def test_frames_that_do_not_fit() -> None:
    predict, odd = predictor(roi=Roi.parse("0,0,64,48")), np.zeros((20, 20, 3), np.uint8)
    sink = Memory()
    summary = Pipeline(Frames([IMAGE, odd, odd, IMAGE]), predict, [sink], limits=PATIENT).run()
    assert (sink.indices, summary.status.rejected) == ([0, 3], 2)
    assert sink.told("source") == [("pictures", "lost"), ("pictures", "live")]
    assert "reaches beyond" in summary.rejection
    with pytest.raises(ImageError, match="reaches beyond"):  # a camera's frames stay as they are
        Pipeline(Frames([odd] * 3, live=True), predict, [Memory()]).run()


def test_alarms_are_raised_once_and_told() -> None:
    values = [10, 200, 200, 200, 10, 10, 10, 200, 200]
    sink = Memory()
    source = Frames([grey(v) for v in values])
    summary = Pipeline(source, predictor(), [sink], Alarm(Vote(2, 3)), PATIENT).run()
    assert [result.alarm for result in sink.results] == [False, False, True, True, True, False, False, False, True]
    assert [result.frame.index for result in sink.results if result.alarm_began] == [2, 8]
    assert summary.status.alarms == 2
    assert [state for _, state in sink.told("alarm")] == ["on", "off", "on"]


def test_the_threshold_moves_at_once_and_the_status_is_plain_values() -> None:
    sink = Memory()
    pipeline = Pipeline(Frames([grey(100)] * 5), predictor(), [sink], limits=PATIENT)
    pipeline.predictor.threshold = 0.3
    done = pipeline.run().status
    status = json.loads(json.dumps(done.to_dict()))
    assert all(result.prediction.is_anomalous for result in sink.results)
    assert status["threshold"] == 0.3
    assert status["score"] == pytest.approx(100 / 255)
    for ages in (status["age_ms"], status["sinks"]["memory"]["age_ms"], *status["stages_ms"].values()):
        assert 0 <= ages["p50"] <= ages["p95"] <= ages["p99"]
    assert sink.results[0].to_dict()["timings_ms"].keys() == {"read", "wait", "preprocess", "model", "postprocess"}
    line = status_text(done).plain
    assert "0.392 ≥ 0.300" in line
    assert "ALARM" in line


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(0, 2 * WINDOW))
def test_percentiles_are_of_the_last_values(values: list[float], before: int) -> None:
    window = Percentiles()
    for _ in range(before):
        window.add(1e9)
    for value in values:
        window.add(value)
    kept = ([1e9] * before + values)[-WINDOW:]
    assert window.summary() == {f"p{q}": round(float(np.percentile(kept, q)), 2) for q in (50, 95, 99)}


def test_ahead_is_one_item_ahead_and_hands_errors_on() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(3):
            made.append(i)
            yield i
        raise ValueError("no more")

    coming = ahead(items(), "test")
    assert next(coming) == 0
    assert len(made) <= 2
    with pytest.raises(ValueError, match="no more"):
        list(coming)


def test_what_is_a_stream(tmp_path: Path) -> None:
    video, folder, image = tmp_path / "a.avi", tmp_path / "3d", tmp_path / "3d" / "a.png"
    write_video(video, ["good"])
    folder.mkdir()
    Image.fromarray(IMAGE).save(image)
    for texts, live, still in (
        ([str(video)], False, False),
        ([str(video), str(image)], False, False),
        ("0", True, False),
        (["/dev/video7"], True, False),
        ([str(folder)], False, True),
        ([str(image), str(folder)], False, True),
    ):
        source = open_source(texts)
        assert (source.live, source.still) == (live, still)
    watched = open_source([str(folder)], CaptureOptions(watch=True))
    assert (watched.live, watched.still) == (False, False)
    for wrong, watch in ((["0", "a.png"], False), (["a.png", "0"], False), (["in", "out"], True)):
        with pytest.raises(UsageError, match="inspected alone"):
            open_source(wrong, CaptureOptions(watch=watch))
    with pytest.raises(UsageError, match="folder to watch is missing"):
        open_source([], CaptureOptions(watch=True))
    assert parse_resolution("1280x720") == (1280, 720)
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        parse_resolution("720p")


def records(text: str, kind: str) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, text.splitlines()) if record["kind"] == kind]


def test_the_command_on_a_video(fbclip: Run, tmp_path: Path) -> None:
    write_video(tmp_path / "belt.avi", ["good"] * 4 + ["scratch"] * 4 + ["good"] * 4)
    done = fbclip("infer", "belt.avi", "--vote", "2/3", "--json", "r.jsonl", "--csv", "r.csv", "--events", "events")
    text = (tmp_path / "r.jsonl").read_text()
    results = records(text, "result")
    assert [result["index"] for result in results] == list(range(12))
    assert [result["is_anomalous"] for result in results] == [False] * 4 + [True] * 4 + [False] * 4
    assert [result["alarm"] for result in results] == [False] * 5 + [True] * 4 + [False] * 3
    assert [notice["state"] for notice in records(text, "alarm")] == ["on", "off"]
    assert [notice["state"] for notice in records(text, "run")] == ["started", "ended"]
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 13
    (event,) = (tmp_path / "events").iterdir()
    assert json.loads((event / "event.json").read_text())["alarms"] == [5]
    assert "12 frames in" in done.stdout
    assert "4 anomalous, 1 alarms" in done.stdout


def test_limits_and_regions_of_the_command(fbclip: Run, tmp_path: Path) -> None:
    write_video(tmp_path / "belt.avi", ["scratch"] * 9)
    done = fbclip("infer", "belt.avi", "--every", 2, "--max-frames", 3, "--min-area", 10**6, "--json", "-")
    results = records(done.stdout, "result")
    assert [result["index"] for result in results] == [0, 2, 4]
    assert not any(result["is_anomalous"] for result in results)
    assert all(result["score"] >= result["threshold"] for result in results)
    wrong = fbclip("infer", "belt.avi", "--roi", "0,0,5000,50", code=2)
    assert "9 frames could not be inspected: the region 0,0,5000,50 reaches beyond the frame" in wrong.stderr


def test_a_full_disk_ends_in_an_error(fbclip: Run, tmp_path: Path) -> None:
    write_video(tmp_path / "belt.avi", ["good"] * 3)
    done = fbclip("infer", "belt.avi", "--json", "/dev/full", "--csv", "r.csv", code=1)
    assert "sink failing (json): the disk is full: can't write /dev/full" in done.stdout
    assert "json lost 6 results and notices: the disk is full" in done.stdout
    assert done.stderr == "fbclip: results are missing in json, which failed till the end\n"
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_and_closes_everything(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    command = [
        Path(sys.executable).with_name("fbclip"), "infer", "--watch", "in", "--json", "-", "--csv", "r.csv",
        "--events", "events",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    ) as process:
        assert process.stdout
        assert process.stderr
        seen = [process.stdout.readline()]
        Image.open(SAMPLES / "brushed-steel-scratch.jpg").save(tmp_path / "part.jpg")
        (tmp_path / "part.jpg").rename(folder / "part.jpg")
        while '"kind": "result"' not in seen[-1]:
            assert seen[-1], "it ended"
            seen.append(process.stdout.readline())
        process.send_signal(number)
        rest, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == f"fbclip: stopped by {number.name}; what was inspected is written"
    text = "".join(seen) + rest
    assert records(text, "run")[-1]["state"] == "ended"
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 2
    (event,) = (tmp_path / "events").iterdir()  # of an alarm that the end cut short
    assert (event / "event.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vote", "2/3"], "--vote"),
        (["--alarm-on", "absent"], "SOURCE is images, which --alarm-on can't be used with"),
        (["--camera", "0", "--alarm-on", "good"], "--alarm-on: an alarm is raised by defects"),
        (["--camera", "0", "--alarm-on", ""], "--alarm-on: an alarm is raised by defects"),
        (["--show-tiles"], "--tiles: tiles are drawn on the pictures of an inspection in tiles; got no tiles"),
        (["--tiles", "2x2", "--show-tiles", "--no-save"], "--save: tiles are drawn on the pictures"),
        (["--warm-up", "2"], "--warm-up: first frames are left out of cameras"),
        (["--events", "e"], "--events"),
        (["--camera", "0", "--batch", "2"], "--batch: several images at once are for files"),
        (["0", "a.png"], "inspected alone"),
        (["--camera", "0", "--vote", "3/2"], "--vote: a vote is K/N"),
        (["--camera", "0", "--events-size", "big"], "--events-size: a size is a number"),
        (["--camera", "0", "--resolution", "720p"], "--resolution: a resolution is WIDTHxHEIGHT"),
        (["--camera", "0", "--events", "e", "--events-size", "1KB"], "--events-size: events take at least 1MB"),
    ],
)
def test_wrong_usage_is_one_line(fbclip: Run, arguments: list[str], message: str) -> None:
    error = fbclip("infer", *arguments, code=2).stderr
    assert message in error
    assert error.count("\n") == 1
