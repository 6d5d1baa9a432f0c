"""Frames without the part: a verdict of their own, never good and never a defect, in all that a run tells."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from fbclip.errors import FBClipError, ImageError, UsageError
from fbclip.images import read_image
from fbclip.runtime.live.alarm import Alarm, Drift, Vote
from fbclip.runtime.live.pipeline import Pipeline
from fbclip.runtime.live.records import HUGE_SIDE, Frame, Record
from fbclip.runtime.live.run import Inspection, insist_on_all, inspect, make_pipeline, status_text
from fbclip.runtime.live.sinks import Saving, SinkOptions, make_sinks
from fbclip.runtime.live.sources import open_source
from fbclip.runtime.live.status import Summary
from helpers.live import PATIENT, Frames, Memory
from helpers.missing import Missing, gap, part
from helpers.predicted import predicted
from helpers.stream_faults import Camera, filming
from helpers.tiny import tiny_bundle
from helpers.video import write_video

BLACK = np.zeros((48, 64, 3), np.uint8)


@pytest.fixture
def predictor(tmp_path: Path) -> Missing:
    return Missing(tiny_bundle(tmp_path), threshold=1.0)


def ran(
    predictor: Missing, pictures: list[NDArray[np.uint8]], alarm: Alarm | None = None, live: bool = True
) -> tuple[Memory, Summary]:
    sink = Memory()
    return sink, Pipeline(Frames(pictures, live=live), predictor, [sink], alarm, PATIENT).run()


def test_gaps_between_parts_are_told_and_are_no_fault(predictor: Missing) -> None:
    sink, summary = ran(predictor, [part(90), gap(), gap(), part(91), gap(), BLACK, part(92), gap()])
    verdicts = [record.prediction.verdict for record in sink.results]
    assert verdicts == ["good", "absent", "absent", "good", "absent", "unusable", "good", "absent"]
    assert sink.told("source") == [("pictures", "blind"), ("pictures", "live")]  # of the black one alone
    status = summary.status
    assert (status.frames, status.absent, status.unusable, status.anomalous) == (8, 4, 1, 0)
    assert (status.verdict, summary.absence) == ("absent", "")
    text = status_text(status).plain
    assert "unusable 1 · absent 4" in text
    assert " · absent · no alarm" in text  # no score, which says nothing of a part
    insist_on_all(summary)


def test_an_alarm_outlasts_a_gap_unless_asked(predictor: Missing) -> None:
    predictor.set_threshold(0.3)
    pictures = [gap(20), part(200), gap(20), BLACK, part(20), gap(200), BLACK, part(20)]  # bright ones are defects
    for alarm_on, expected in (
        ("", [0, 1, 1, 1, 0, 0, 0, 0]),
        ("absent", [1, 1, 1, 1, 0, 1, 1, 0]),
        ("unusable", [0, 1, 1, 1, 0, 0, 1, 0]),
        ("absent, unusable", [1, 1, 1, 1, 0, 1, 1, 0]),
    ):
        sink, summary = ran(predictor, pictures, Alarm(alarm_on=alarm_on or None))
        assert [record.alarm for record in sink.results] == list(map(bool, expected)), alarm_on
        assert summary.status.anomalous == 1
    assert "1 of the last 1 frames anomalous, this one absent" in next(
        n.message for n in sink.notices if n.state == "on"
    )


def test_frames_without_the_part_have_no_place_in_a_vote(predictor: Missing) -> None:
    predictor.set_threshold(0.3)
    pictures = [part(200), gap(20), gap(20), part(200), gap(20), part(20), part(20)]
    sink, _ = ran(predictor, pictures, Alarm(Vote(2, 2)))
    assert [record.alarm for record in sink.results] == [False, False, False, True, True, False, False]


def test_drift_is_of_parts_alone() -> None:
    rng = np.random.default_rng(0)
    good, elsewhere = rng.normal(0.3, 0.05, 400), rng.normal(0.1, 0.05, 4000)
    nothing = np.zeros((1, 1), np.float32)
    for kind in ({"absent": True}, {"unusable": "black"}):
        alarm = Alarm(Vote(), Drift(good), "absent,unusable")
        for score in elsewhere:
            alarm.decide(predicted(float(score), nothing, **kind))
        assert alarm.drift and (alarm.drift.windows, alarm.drift.state, alarm.on) == (0, "steady", True)
    for score in elsewhere:  # of parts the same would be drift
        alarm.decide(predicted(float(score), nothing))
    assert alarm.drift and alarm.drift.state == "drifting"


def test_a_run_without_any_part_has_inspected_nothing(predictor: Missing) -> None:
    for live in (True, False):
        _, summary = ran(predictor, [gap()] * 3, Alarm(alarm_on="absent"), live)
        with pytest.raises(FBClipError, match=r"^no image was inspected: the part was in none of 3 frames$") as told:
            insist_on_all(summary)
        assert told.value.exit_code == 1
    _, summary = ran(predictor, [gap(), BLACK, gap()])
    with pytest.raises(FBClipError, match="the part was in none of 3 frames, and 1 of them are unusable"):
        insist_on_all(summary)
    _, summary = ran(predictor, [gap(), BLACK])
    with pytest.raises(FBClipError, match="no image was inspected: the last frame is black"):
        insist_on_all(summary)


def test_a_stream_in_python_raises_what_is_asked_for(predictor: Missing, tmp_path: Path) -> None:
    video = tmp_path / "belt.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"FFV1"), 10, (64, 48))  # lossless
    for picture in (part(), gap(), part()):
        writer.write(picture[..., ::-1])
    writer.release()
    assert [record.alarm for record in predictor.stream(video)] == [False, False, False]
    records = list(predictor.stream(video, alarm_on="absent"))
    assert [(record.prediction.verdict, record.alarm) for record in records] == [
        ("good", False), ("absent", True), ("good", False),
    ]  # fmt: skip
    Image.fromarray(part()).save(tmp_path / "part.png")
    with pytest.raises(UsageError, match="a vote is over time") as told:
        list(predictor.stream(tmp_path / "part.png", alarm_on=["absent"]))
    assert told.value.option == "alarm_on"
    with pytest.raises(UsageError, match="got 'good'"):
        list(predictor.stream(video, alarm_on="absent,good"))


def test_stills_without_the_part_are_told(predictor: Missing, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, picture in (("a", part(20)), ("b", gap()), ("c", BLACK), ("d", gap()), ("e", part(200))):
        Image.fromarray(picture).save(folder / f"{name}.png")
    predictor.set_threshold(0.3)
    sinks = SinkOptions(json=str(tmp_path / "r.jsonl"), csv=tmp_path / "r.csv", saving=Saving(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    told = io.StringIO()
    source = open_source([str(folder)])
    with pytest.raises(
        ImageError, match="3 of 5 images could not be inspected; the part is not in 2 of these"
    ) as error:
        inspect(predictor, source, Inspection([str(folder)], sinks=sinks), Console(file=told, width=200))
    assert error.value.exit_code == 2
    assert f"absent: the part is not in {folder / 'b.png'}" in told.getvalue()
    assert "5 images: 1 with defects, 1 good, 1 unusable, 2 absent" in told.getvalue()
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").open()]
    expected = ["good", "absent", "unusable", "absent", "defect"]
    assert [line["verdict"] for line in lines] == expected
    assert [line["is_anomalous"] for line in lines] == [False, True, True, True, True]  # not known to be good
    assert [line["alarm"] for line in lines] == [False, False, False, False, True]
    assert lines[1]["regions"] == []
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows] == expected
    assert [row["reason"] for row in rows] == ["", "no_part", "black", "no_part", ""]
    assert len(list((tmp_path / "out").iterdir())) == 5
    bar = read_image(tmp_path / "out" / "b.jpg")[3, 3].astype(int)
    assert np.ptp(bar) < 40, "neither green nor red"


def test_pictures_of_a_stream_are_of_what_votes(predictor: Missing, tmp_path: Path) -> None:
    """While an alarm is on, nobody wants a day of pictures of an empty belt."""
    predictor.set_threshold(0.3)
    pictures = [part(200), gap(), BLACK, part(20)]
    for alarm_on, kept in (("", [0]), ("absent", [0, 1]), ("unusable", [0, 2])):
        folder = tmp_path / f"out-{alarm_on}"
        folder.mkdir()
        kinds = frozenset(filter(None, [alarm_on]))
        inspection = Inspection("0", sinks=SinkOptions(saving=Saving(folder)), alarm_on=kinds, limits=PATIENT)
        make_pipeline(Frames(pictures, live=True), predictor, inspection).run()
        assert sorted(path.name for path in folder.iterdir()) == [f"pictures#{n}-{n:06}.jpg" for n in kept]


def test_metrics_count_them_apart(predictor: Missing) -> None:
    from fbclip.runtime.live.sinks.metrics import Prometheus

    metrics = Prometheus(dict)
    Pipeline(Frames([part(), gap(), gap(), BLACK], live=True), predictor, [metrics], limits=PATIENT).run()
    text = metrics.render()[0].decode()
    for line in ("results_total 4", "absent_total 2", "unusable_total 1", "anomalies_total 0", "score_count 1"):
        assert f"\nfbclip_{line}.0\n" in text


def test_an_event_of_an_absent_part(predictor: Missing, tmp_path: Path) -> None:
    sinks = SinkOptions(events=tmp_path / "events")
    inspection = Inspection("0", sinks=sinks, alarm_on=frozenset({"absent"}), limits=PATIENT)
    make_pipeline(Frames([part(), gap(), part()], live=True), predictor, inspection).run()
    (event,) = (tmp_path / "events").iterdir()
    described = json.loads((event / "event.json").read_text())
    assert described["alarms"] == [1]
    assert [frame["verdict"] for frame in described["frames"]] == ["good", "absent", "good"]


def large(height: int, width: int) -> Record:
    image = np.full((height, width, 3), 90, np.uint8)
    image[:, : width // 2] = 180
    prediction = predicted(0.9, np.zeros((height, width), np.float32), image, timings_ms={"model": 1.0})
    frame = Frame(image, "line#0", 0, time.monotonic(), time.time())
    return Record(frame, prediction, True, True, {"model": 1.0})


def test_pictures_of_very_large_frames_are_bounded(tmp_path: Path) -> None:
    shown = large(1300, 20_000)  # 26 megapixels
    picture = shown.draw()
    assert picture.shape[1] == HUGE_SIDE and shown.draw(HUGE_SIDE) is picture
    assert shown.draw(1280).shape[1] == 1280
    assert large(1200, 20_000).draw().shape[1] == 20_000
    options = SinkOptions(events=tmp_path / "events", saving=Saving(tmp_path))
    for sink in make_sinks(options, Frames([], live=True)):
        sink.write(replace(shown, overlay=str(tmp_path / "line.jpg")))
        sink.close()
    assert read_image(tmp_path / "line.jpg").shape[1] == HUGE_SIDE
    (event,) = (tmp_path / "events").iterdir()
    kept = {path.name: read_image(path).shape for path in event.glob("*.jpg")}
    assert len(kept) == 2 and {shape[1] for shape in kept.values()} == {HUGE_SIDE}
    assert any(shape[0] == round(1300 * HUGE_SIDE / 20_000) for shape in kept.values())  # the frame itself


def test_tiles_are_drawn_if_asked(fbclip: Run, tmp_path: Path) -> None:
    Image.fromarray(np.kron(part(), np.ones((12, 12, 1), np.uint8))).save(tmp_path / "a.png")
    for more in ([], ["--show-tiles"]):
        fbclip("infer", "a.png", "--bundle", tiny_bundle_at(tmp_path), "--tiles", "2x2", *more)
    without, shown = (read_image(tmp_path / "runs" / "infer" / name / "a.jpg") for name in ("exp", "exp2"))
    changed = np.abs(without.astype(int) - shown).max(axis=2) > 60
    assert 0.001 < changed.mean() < 0.05  # thin lines


def tiny_bundle_at(folder: Path) -> Path:
    path = folder / "tiny.fbclip"
    return path if path.exists() else tiny_bundle(folder)


@pytest.fixture
def mjpeg_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with filming(Camera(), "http") as port:
        yield f"http://127.0.0.1:{port}/video"


def test_warm_up_by_its_names(fbclip: Run, mjpeg_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "line.toml").write_text("[infer]\nskip_first = 3\n")
    bundle = tiny_bundle(tmp_path)
    for arguments, variable in (
        (["--warm-up", 3], ""),
        (["--skip-first", 3], ""),
        (["--config", "line.toml"], ""),
        ([], "FBCLIP_INFER_WARM_UP"),
        ([], "FBCLIP_INFER_SKIP_FIRST"),
    ):
        with monkeypatch.context() as environment:
            if variable:
                environment.setenv(variable, "3")
            done = fbclip("infer", mjpeg_url, "--bundle", bundle, "--max-frames", 1, "--json", "-", *arguments)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        ended = next(record for record in records[::-1] if record["kind"] == "source")
        assert ended["counters"]["warm_up"] == 3, (arguments, variable)
        assert ", 3 left out to warm up" in done.stderr
    done = fbclip("infer", mjpeg_url, "--bundle", bundle, "--max-frames", 1, "--json", "-")
    assert "warm_up" not in done.stdout and "warm up" not in done.stderr
    assert "--warm-up N" in fbclip("infer", "-h").stdout and "--skip-first" not in fbclip("infer", "-h").stdout


def on_a_belt(at: tuple[int, int] | None) -> NDArray[np.uint8]:
    """A part with holes on a belt, its corner at (x, y), or the belt alone: uint8 (240, 320, 3)."""
    rng = np.random.default_rng(0)
    picture = np.clip(rng.normal(60, 3, (240, 320)), 0, 255).astype(np.uint8)
    if at:
        face = np.full((140, 180), 170, np.uint8)
        for x, y, radius in zip(
            rng.integers(15, 165, 12), rng.integers(15, 125, 12), rng.integers(4, 14, 12), strict=True
        ):
            cv2.circle(face, (int(x), int(y)), int(radius), int(rng.integers(20, 120)), -1)
        picture[at[1] : at[1] + 140, at[0] : at[0] + 180] = face
    return np.repeat(picture[..., None], 3, axis=2)


def test_the_command_with_parts_that_move(fbclip: Run, tmp_path: Path) -> None:
    """The whole way: gaps on a belt raise nothing; asked for, they raise an alarm, with pictures and an event."""
    Image.fromarray(on_a_belt((70, 50))).save(tmp_path / "part.png")
    places = [(70, 50), None, (85, 60), (60, 45), None, None, (75, 55)]
    writer = cv2.VideoWriter(str(tmp_path / "belt.avi"), cv2.VideoWriter.fourcc(*"FFV1"), 10, (320, 240))
    for at in places:
        writer.write(on_a_belt(at))
    writer.release()
    common = ("belt.avi", "--bundle", tiny_bundle(tmp_path), "--threshold", 1, "--align", "part.png", "--save")
    done = fbclip("infer", *common, "--json", "calm.jsonl")
    assert ": 0 anomalous, 0 alarms, 3 absent" in done.stdout
    done = fbclip("infer", *common, "--alarm-on", "absent", "--json", "r.jsonl", "--csv", "r.csv", "--events", "events")
    assert ": 0 anomalous, 2 alarms, 3 absent" in done.stdout
    calm, asked = ([json.loads(line) for line in (tmp_path / name).open()] for name in ("calm.jsonl", "r.jsonl"))
    for lines in (calm, asked):
        verdicts = [line["verdict"] for line in lines if line["kind"] == "result"]
        assert verdicts == ["good" if at else "absent" for at in places]
    assert [line["kind"] for line in calm if line["kind"] in ("alarm", "drift")] == []
    assert [line["state"] for line in asked if line["kind"] == "alarm"] == ["on", "off"] * 2
    with (tmp_path / "r.csv").open() as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["" if at else "no_part" for at in places]
    kept = [len(list((tmp_path / "runs" / "infer" / name).iterdir())) for name in ("exp", "exp2")]
    assert kept == [0, 3]
    assert len(list((tmp_path / "events").iterdir())) == 1
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(on_a_belt((80, 50))).save(folder / "a.png")
    Image.fromarray(on_a_belt(None)).save(folder / "b.png")
    still = fbclip("infer", "in", *common[1:], code=2)
    assert "absent: the part is not in in/b.png" in still.stdout
    assert "2 images: 0 with defects, 1 good, 1 absent" in still.stdout
    assert still.stderr == "fbclip: 1 of 2 images could not be inspected; the part is not in 1 of these\n"
    (folder / "a.png").unlink()
    gone = fbclip("infer", "--watch", "in", *common[1:], "--duration", 3, code=1)
    assert gone.stderr == "fbclip: no image was inspected: the part was in none of 1 frames\n"


def test_the_command_takes_kinds(fbclip: Run, tmp_path: Path) -> None:
    write_video(tmp_path / "belt.avi", ["good"])
    fbclip("infer", "belt.avi", "--alarm-on", "absent,unusable", "--bundle", tiny_bundle(tmp_path), "--threshold", 1)
    wrong = fbclip("serve", "0", "--alarm-on", "absent;unusable", code=2).stderr
    assert wrong.startswith(
        "fbclip: --alarm-on: an alarm is raised by defects, and if asked by absent or unusable frames"
    )
    assert "got 'absent;unusable'" in wrong and wrong.count("\n") == 1
    assert (
        "SOURCE is left out, which --alarm-on, --warm-up"
        in fbclip("serve", "--alarm-on", "absent", "--skip-first", 3, code=2).stderr
    )
