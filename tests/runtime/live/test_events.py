from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fbclip import files
from fbclip.errors import FBClipError, UsageError
from fbclip.images import encode_image
from fbclip.runtime.live.records import Frame, Notice, Record
from fbclip.runtime.live.sinks.events import AFTER, BEFORE, LONGEST, UNSAVED, EventRecorder, event_folders, parse_size
from helpers.disks import tiny_disk
from helpers.predicted import predicted

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def result(index: int, began: bool = False, image: np.ndarray = NOISE) -> Record:
    score = 0.9 if began else 0.1
    frame = Frame(image, f"camera 0 #{index}", index, float(index), 1.7e9 + index)
    anomaly_map = np.full(image.shape[:2], score, np.float32)
    return Record(frame, predicted(score, anomaly_map, image), began, began, {})


def indices(event: Path) -> list[int]:
    return [frame["index"] for frame in json.loads((event / "event.json").read_text())["frames"]]


def test_the_frames_around_an_alarm(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path / "events", 10**7)
    for i in range(60):
        recorder.write(result(i, began=i == 30))
    recorder.close()
    (event,) = event_folders(tmp_path / "events")
    assert indices(event) == list(range(30 - BEFORE, 30 + AFTER + 1))
    described = json.loads((event / "event.json").read_text())
    assert described["alarms"] == [30]
    assert described["frames"][BEFORE]["alarm"] is True
    for frame in described["frames"]:
        assert Image.open(event / frame["file"]).size == (64, 48)
    assert Image.open(event / "overlay.jpg").size[0] >= 320


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(0, 150), max_size=12))
def test_every_alarm_is_in_an_event_with_its_surroundings(alarms: set[int]) -> None:
    tiny = np.zeros((2, 2, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        recorder = EventRecorder(Path(folder), 10**9)
        for i in range(151):
            recorder.write(result(i, i in alarms, tiny))
        recorder.close()
        told: list[int] = []
        for event in event_folders(Path(folder)):
            shown = indices(event)
            assert shown == list(range(shown[0], shown[-1] + 1))
            assert len(shown) <= LONGEST
            told += json.loads((event / "event.json").read_text())["alarms"]
            first = json.loads((event / "event.json").read_text())["alarms"][0]
            assert shown[0] == max(0, first - BEFORE)
        assert sorted(told) == sorted(alarms)


def test_oldest_first_out(tmp_path: Path) -> None:
    bound = 10**6
    noise = np.random.default_rng(1).integers(0, 256, (120, 160, 3), np.uint8)
    recorder = EventRecorder(tmp_path, bound)
    for i in range(400):
        recorder.write(result(i, began=i % 40 == 20, image=noise))
    recorder.close()
    kept = event_folders(tmp_path)
    assert sum(file.stat().st_size for event in kept for file in event.iterdir()) <= bound
    assert recorder.saved == 10
    assert 1 < len(kept) < 10
    assert [json.loads((event / "event.json").read_text())["alarms"][0] for event in kept] == [
        20 + 40 * i for i in range(10 - len(kept), 10)
    ]


def test_an_event_larger_than_the_bound_keeps_what_is_nearest(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (400, 600, 3), np.uint8)  # 200 kB as JPEG
    recorder = EventRecorder(tmp_path, 10**6)
    for i in range(40):
        recorder.write(result(i, began=i == 20, image=noise))
    recorder.close()
    (event,) = event_folders(tmp_path)
    assert 20 in indices(event)
    assert 1 <= len(indices(event)) < BEFORE
    assert sum(file.stat().st_size for file in event.iterdir()) <= 10**6


def test_a_full_disk_is_reported_and_survived(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", "150k"):
        folder, ballast = tmp_path / "disk" / "events", tmp_path / "disk" / "ballast"
        recorder = EventRecorder(folder, 10**7)
        ballast.write_bytes(bytes(120_000))
        for i in range(BEFORE + AFTER):
            recorder.write(result(i, began=i == BEFORE))
        failing = result(BEFORE + AFTER)
        for _ in range(3):  # the pipeline tries the same result again
            with pytest.raises(FBClipError, match=r"the disk is full: can't write .*events"):
                recorder.write(failing)
            assert list(folder.iterdir()) == []
        ballast.unlink()
        recorder.write(failing)
        recorder.close()
        (event,) = event_folders(folder)
        assert indices(event) == list(range(BEFORE + AFTER + 1))


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "all" / "events"
    recorder = EventRecorder(folder, 10**7)
    for i in range(BEFORE + AFTER + 1):
        if i == BEFORE + 5:
            folder.parent.rename(tmp_path / "gone")
        recorder.write(result(i, began=i == BEFORE))
    recorder.close()
    (event,) = event_folders(folder)
    assert indices(event) == list(range(BEFORE + AFTER + 1))


def test_events_wait_in_bounded_memory_while_the_disk_takes_none(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path / "events", 10**7)
    (tmp_path / "events").rmdir()
    (tmp_path / "events").touch()  # a file, in which no folder can be made
    for i in range(400):
        try:
            recorder.write(result(i, began=i % 40 == 20))
        except UsageError:
            continue
    assert recorder.lost == 10 - UNSAVED
    (tmp_path / "events").unlink()
    recorder.close()
    assert len(event_folders(tmp_path / "events")) == UNSAVED


def test_a_camera_that_leaves_ends_the_event(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path, 10**7)
    recorder.write(result(0))
    recorder.write(result(1, began=True))
    recorder.notify(Notice(0.0, "source", "camera 0", "lost", "unplugged", {}))
    assert indices(event_folders(tmp_path)[0]) == [0, 1]


def test_leftovers_of_a_killed_run_go_and_what_another_run_writes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "NEW_S", 0.0)
    (tmp_path / ".fbclip-killed.tmp").mkdir()
    (tmp_path / ".fbclip-killed.tmp" / "000001.jpg").write_bytes(b"half")
    (tmp_path / "notes").mkdir()  # somebody else's
    with files.new_folder(tmp_path / "event") as living:
        files._swept.clear()
        EventRecorder(tmp_path, 10**7)
        assert {path.name for path in tmp_path.iterdir()} == {"notes", living.name}
    assert event_folders(tmp_path) == []


def test_pictures_keep_their_colours(tmp_path: Path) -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    shown = np.asarray(Image.open(io.BytesIO(encode_image(red))))
    assert shown[..., 0].mean() > 180 > 60 > shown[..., 2].mean()


def test_sizes() -> None:
    assert (parse_size("500MB"), parse_size("1.5 gb")) == (500 * 10**6, 1_500_000_000)
    for text in ("500", "1PB", "-1MB", "MB"):
        with pytest.raises(UsageError, match="a size is a number with"):
            parse_size(text)


def test_a_folder_that_cannot_hold_events(fbclip: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UsageError, match=r"can't write .*taken"):
        EventRecorder(tmp_path / "taken", 10**7)
    with pytest.raises(UsageError, match="at least 1MB"):
        EventRecorder(tmp_path / "e", 1000)
