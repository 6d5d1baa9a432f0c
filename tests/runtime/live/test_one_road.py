"""Images, folders and videos go the road of cameras."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray
from PIL import Image

from fbclip import calibrate, evaluate
from fbclip.assets import SAMPLES
from fbclip.backend import Backend
from fbclip.errors import FBClipError, UsageError
from fbclip.runtime.live import pipeline as pipelines
from fbclip.runtime.live.pipeline import Pipeline
from fbclip.runtime.live.run import insist_on_all
from fbclip.runtime.live.sources import open_source
from fbclip.runtime.predictor import Predictor
from helpers.live import IMAGE, PATIENT, Background, Frames, Memory
from helpers.tiny import tiny_bundle
from helpers.video import write_video
from helpers.waiting import eventually


class Counting(Backend):
    """A backend that tells how many images it is given at once."""

    def __init__(self, backend: Any) -> None:
        self.device, self._backend = backend.device, backend
        self.batches: list[int] = []

    def run(self, images: NDArray[np.uint8]) -> Any:
        self.batches.append(len(images))
        return self._backend.run(images)

    def close(self) -> None:
        self._backend.close()


def picture(value: int, size: tuple[int, int] = (64, 48)) -> NDArray[np.uint8]:
    image = np.full((size[1], size[0], 3), value, np.uint8)
    image[size[1] // 2 :] = value // 2
    return image


def put(folder: Path, *values: int) -> None:
    folder.mkdir(parents=True)
    for number, value in enumerate(values):
        Image.fromarray(picture(value)).save(folder / f"{number:02}.png")


def test_several_at_once_give_the_results_of_one_by_one_in_order(tmp_path: Path) -> None:
    put(tmp_path / "in", 40, 80, 120, 160, 200)
    found = []
    for batch in (1, 2):
        predictor, sink = Predictor(batch=batch), Memory()
        predictor.backend = counting = Counting(predictor.backend)
        Pipeline(open_source(str(tmp_path / "in")), predictor, [sink], limits=PATIENT, batch=batch).run()
        assert counting.batches == ([1] * 5 if batch == 1 else [2, 2, 1])
        found.append([(record.frame.name, record.prediction.score) for record in sink.results])
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    assert [score for _, score in found[0]] == pytest.approx([score for _, score in found[1]], abs=1e-5)


def test_stills_have_no_alarm_over_time(tmp_path: Path) -> None:
    """Each is its own: no vote, no notices of alarms, and none that is unusable inherits the one before."""
    values = [250, 0, 250, 20]
    sink = Memory()
    predictor = Predictor(tiny_bundle(tmp_path), threshold=0.5)
    images = [picture(value) if value else np.zeros((48, 64, 3), np.uint8) for value in values]
    summary = Pipeline(Frames(images, still=True), predictor, [sink], limits=PATIENT).run()
    assert [record.prediction.verdict for record in sink.results] == ["defect", "unusable", "defect", "good"]
    assert [record.alarm for record in sink.results] == [True, False, True, False]
    assert not sink.told("alarm") and not sink.told("source")
    assert summary.status.alarms == 2


def test_the_first_sink_that_fails_ends_a_run_of_stills() -> None:
    failing, other = Memory("disk", faults=10**9), Memory("other")
    source = Frames([IMAGE] * 1000, still=True)
    summary = Pipeline(source, Predictor(), [failing, other], limits=PATIENT).run()
    assert len(other.results) < 100 and source.closed.is_set()
    with pytest.raises(FBClipError, match="No space left on device"):
        insist_on_all(summary)


def test_large_pictures_are_in_memory_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "LARGE", 1000)  # pixels
    sink = Memory()
    delivered: list[int] = []
    taken: list[int] = []

    class Watched(Frames):
        def __iter__(self) -> Any:
            for frame in super().__iter__():
                taken.append(frame.index)
                assert len(sink.results) == frame.index  # all before are delivered when the next is read
                yield frame

    lock = threading.Lock()
    write = sink.write

    def slowly(record: Any) -> None:
        with lock:
            write(record)
            delivered.append(record.frame.index)

    sink.write = slowly  # type: ignore[method-assign]
    Pipeline(Watched([IMAGE] * 6, still=True), Predictor(), [sink], limits=PATIENT).run()
    assert taken == delivered == list(range(6))


def test_a_folder_and_a_video_have_one_record(fbclip: Run, tmp_path: Path) -> None:
    put(tmp_path / "in", 90)
    write_video(tmp_path / "belt.avi", ["good"])
    fbclip("infer", "in", "--json", "a.jsonl", "--csv", "a.csv")
    fbclip("infer", "belt.avi", "--json", "b.jsonl", "--csv", "b.csv")
    records = [
        next(record for record in map(json.loads, (tmp_path / name).open()) if record["kind"] == "result")
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert list(records[0]) == list(records[1])
    assert list(records[0]["timings_ms"]) == list(records[1]["timings_ms"])
    heads = [next(csv.reader((tmp_path / name).open())) for name in ("a.csv", "b.csv")]
    assert heads[0] == heads[1]


def test_pictures_of_alarms_are_kept_of_a_video_and_of_a_watched_folder(fbclip: Run, tmp_path: Path) -> None:
    write_video(tmp_path / "belt.avi", ["good"] * 2 + ["scratch"] * 2 + ["good"])
    done = fbclip("infer", "belt.avi", "--json", "r.jsonl")
    kept = sorted(path.name for path in (tmp_path / "runs/infer/exp").iterdir())
    assert kept == ["belt-000002.jpg", "belt-000003.jpg"]
    assert "pictures are in runs/infer/exp" in done.stdout
    named = [record["overlay"] for record in map(json.loads, (tmp_path / "r.jsonl").open()) if record.get("overlay")]
    assert sorted(Path(path).name for path in named) == kept
    (tmp_path / "in").mkdir()
    for name in ("good", "scratch"):
        (tmp_path / "in" / f"{name}.jpg").write_bytes((SAMPLES / f"brushed-steel-{name}.jpg").read_bytes())
    fbclip("infer", "--watch", "in", "--max-frames", 2)
    (one,) = (tmp_path / "runs/infer/exp2").iterdir()
    assert one.name.startswith("scratch-")
    fbclip("infer", "belt.avi", "--no-save")
    assert not (tmp_path / "runs/infer/exp3").exists()


def test_a_file_that_holds_something_else_is_not_added_to(fbclip: Run, tmp_path: Path) -> None:
    put(tmp_path / "in", 90)
    (tmp_path / "notes.json").write_text('{"colour": "red"}\n')
    error = fbclip("infer", "in", "--json", "notes.json", "--no-save", code=2).stderr
    assert "holds no JSON lines of results; choose another file" in error
    assert (tmp_path / "notes.json").read_text() == '{"colour": "red"}\n'


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture counts as a large one."""
    monkeypatch.setattr(pipelines, "LARGE", 1000)  # pixels


class Ahead(Counting):
    """A backend that asks for the next batch before it gives out what it has, as TensorRT's does."""

    def run_each(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[Any]:
        before = None
        for images in batches:
            if before is not None:
                yield self.run(before)
            before = images
        if before is not None:
            yield self.run(before)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_large_pictures_wait_for_no_batch(batch: int, tmp_path: Path) -> None:
    sink, predictor = Memory(), Predictor(tiny_bundle(tmp_path), batch=batch)
    predictor.backend = Ahead(predictor.backend)
    with Background(Pipeline(Frames([IMAGE] * 5, still=True), predictor, [sink], limits=PATIENT, batch=batch)) as run:
        assert run.result().status.frames == 5
    assert sink.indices == list(range(5))


@pytest.mark.usefixtures("large")
def test_a_stream_of_large_pictures_may_be_left(tmp_path: Path) -> None:
    put(tmp_path / "in", 40, 80, 120)
    before = set(threading.enumerate())
    for record in Predictor(tiny_bundle(tmp_path)).stream(str(tmp_path / "in")):
        assert record.frame.name.endswith("00.png")
        break
    eventually(lambda: set(threading.enumerate()) <= before)


@pytest.mark.usefixtures("large")
def test_a_model_that_fails_on_a_large_picture_ends_the_run(tmp_path: Path) -> None:
    class Broken(Counting):
        def run(self, images: NDArray[np.uint8]) -> Any:
            raise FBClipError("the GPU fell off")

    predictor = Predictor(tiny_bundle(tmp_path))
    predictor.backend = Broken(predictor.backend)
    run = Background(Pipeline(Frames([IMAGE] * 5, still=True), predictor, [], limits=PATIENT))
    with run, pytest.raises(FBClipError, match="fell off"):
        run.result()


def test_what_a_stream_leaves_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "in", 40, 80)
    predictor = Predictor(tiny_bundle(tmp_path), roi=(0, 0, 500, 500))
    assert list(predictor.stream(str(tmp_path / "in"))) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "skipped" in caplog.messages[0] and "00.png" in caplog.messages[0]


def test_json_and_csv_are_two_files(fbclip: Run, tmp_path: Path) -> None:
    put(tmp_path / "in", 90)
    error = fbclip("infer", "in", "--json", "o", "--csv", "./o", "--no-save", code=2).stderr
    assert error == "fbclip: --csv: JSON lines and a CSV table are two files; got o for both\n"
    assert not (tmp_path / "o").exists()


def test_nothing_to_inspect_is_not_the_samples(tmp_path: Path) -> None:
    for call in (lambda: open_source([]), lambda: Predictor().stream([])):
        with pytest.raises(UsageError, match="nothing to inspect"):
            call()
    bundle = tiny_bundle(tmp_path)
    for good in ([], iter(()), np.zeros((8, 8, 3), np.uint8), [np.zeros((8, 8, 3))]):
        with pytest.raises(UsageError, match=r"no images|frames are"):
            calibrate(bundle, good)
    with pytest.raises(UsageError, match="no images"):
        evaluate(None, [])
