"""What is not known to be good is never called good: results that are no probabilities, and runs that saw nothing."""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from numpy.typing import NDArray
from PIL import Image

import fbclip
from fbclip import Predictor, load_checkpoint
from fbclip.errors import FBClipError, ImageError
from fbclip.export.parity import Proof, run_reference
from fbclip.model.backend import TorchBackend
from fbclip.resample import resize
from fbclip.runtime.backends import require_probabilities
from fbclip.runtime.live.alarm import Alarm, Vote
from fbclip.runtime.live.pipeline import Pipeline
from fbclip.runtime.live.records import Frame, Notice
from fbclip.runtime.live.run import insist_on_all, status_text
from fbclip.runtime.live.sources import open_source
from fbclip.runtime.live.status import Summary
from fbclip.runtime.roi import Roi
from fbclip.runtime.sight import find_blindness
from helpers.delivered import drawn_verdict
from helpers.live import PATIENT, Background, Frames, Memory
from helpers.predicted import predicted
from helpers.serving import GOOD, SCRATCH, running, until
from helpers.stream_faults import Camera, filming
from helpers.tiny import tiny_bundle
from helpers.waiting import eventually


@pytest.fixture
def nan_bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path, math.nan)


@pytest.mark.parametrize("gain", [math.nan, math.inf, -math.inf, 4.0, -1.0])
def test_a_model_without_probabilities_has_no_verdict(tmp_path: Path, gain: float) -> None:
    """nan is below every threshold, and -1 is, too."""
    with pytest.raises(FBClipError, match=r"the model gives .* for .*scratch.jpg, .*see fbclip doctor") as caught:
        Predictor(tiny_bundle(tmp_path, gain))(SCRATCH)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_one_pixel_or_one_image_of_a_batch_is_enough() -> None:
    scores, maps = np.full(3, 0.2, np.float32), np.full((3, 5, 7), 0.2, np.float32)
    require_probabilities(scores, maps, "abc")
    maps[1, 4, 6] = 1.0005  # what half precision makes of a sum of weights
    require_probabilities(scores, maps, "abc")
    for value in (np.nan, np.inf, -np.inf, 1.1, -0.1):
        maps[1, 4, 6] = value
        with pytest.raises(FBClipError, match=f"{value:g} for b"):
            require_probabilities(scores, maps, "abc")
    maps[1], scores[2] = 0.2, np.nan
    with pytest.raises(FBClipError, match="nan for c"):
        require_probabilities(scores, maps, "abc")


def test_a_prediction_of_nan_is_not_good() -> None:
    """Whoever makes one, past every check."""
    empty = np.zeros((1, 1), np.float32)
    made = predicted(math.nan, empty)
    assert made.is_anomalous and made.verdict == "defect"


def test_infer_ends_with_one_line(fbclip: Run, nan_bundle: Path, tmp_path: Path) -> None:
    done = fbclip("infer", SCRATCH, "--bundle", nan_bundle, "--json", "r.jsonl", "--csv", "r.csv", code=1)
    assert done.stderr.startswith("fbclip: the model gives nan for ") and done.stderr.count("\n") == 1
    assert "good" not in done.stdout
    assert (tmp_path / "r.jsonl").read_text() == ""


@pytest.mark.parametrize("command", [["calibrate", "{bundle}", "data/part/test/good"], ["eval", "data"], ["bench"]])
def test_nothing_is_learned_or_measured_of_it(
    fbclip: Run, nan_bundle: Path, tmp_path: Path, command: list[str]
) -> None:
    for kind, image in (("good", GOOD), ("scratch", SCRATCH)):
        (tmp_path / "data" / "part" / "test" / kind).mkdir(parents=True)
        for number in range(3):
            shutil.copy(image, tmp_path / "data" / "part" / "test" / kind / f"{number}.jpg")
    options = {
        "calibrate": ["--false-alarm-rate", "0.3"],
        "eval": ["--bundle", nan_bundle, "--no-report"],
        "bench": ["--bundle", nan_bundle, "--backends", "onnxruntime", "--runs", "3"],
    }
    done = fbclip(*(word.format(bundle=nan_bundle) for word in command), *options[command[0]], code=1)
    assert "the model gives nan for" in done.stderr and done.stderr.count("\n") == 1
    assert not (nan_bundle / "calibration.json").exists()
    assert not list(tmp_path.rglob("results.json"))


def test_a_run_ends_and_its_sinks_have_no_result(nan_bundle: Path) -> None:
    image = np.asarray(fbclip.images.read_image(SCRATCH))
    for live in (False, True):
        sink = Memory()
        with pytest.raises(FBClipError, match="nan for pictures#0"):
            Pipeline(Frames([image] * 3, live), Predictor(nan_bundle), [sink]).run()
        assert not sink.results and sink.closed


def test_a_client_is_told(nan_bundle: Path) -> None:
    with running(live=False, predictor=Predictor(nan_bundle)) as server:
        status, problem = server.predict(SCRATCH.read_bytes())
    assert status == 503
    assert list(problem) == ["detail"] and "the model gives nan" in problem["detail"]


def test_no_graph_is_compared_with_a_torch_model_that_gives_nan() -> None:
    model = load_checkpoint()
    with torch.no_grad():
        model.visual.scale_weights.fill_(np.nan)
    proof = Proof([np.zeros((8, 8, 3), np.uint8)], ("part.png",))
    with pytest.raises(FBClipError, match=r"nan for part.png"):
        run_reference(TorchBackend(model), proof, model.config.image_size)


# Frames that show nothing


def textured(level: int) -> NDArray[np.uint8]:
    """A dark or bright surface that can be seen, 64 x 48."""
    picture = np.full((48, 64, 3), level, np.uint8)
    picture[:, ::8] += 6
    return picture


def test_what_shows_nothing() -> None:
    rng = np.random.default_rng(0)
    capped = rng.normal(2, 2, (1080, 1920, 3)).clip(0, 255).astype(np.uint8)  # a covered lens, with a sensor's noise
    speck = np.full((192, 192, 3), 200, np.uint8)
    speck[90:93, 90:93] = 120
    for image, expected in (
        (np.zeros((48, 64, 3), np.uint8), "black"),
        (capped, "black"),
        (np.full((48, 64, 3), (0, 0, 255), np.uint8), "uniform"),  # no signal
        (np.full((1080, 1920, 3), 255, np.uint8), "uniform"),
        (rng.integers(254, 256, (48, 64, 3)).astype(np.uint8), "uniform"),  # overexposed
        (textured(4), None),
        (textured(240), None),
        (speck, None),
    ):
        assert find_blindness(resize(image, (192, 192))[None]) == expected
        if expected != "black" or image is not capped:  # which noise alone tells apart where nothing is averaged
            assert find_blindness(image[None]) == expected


@pytest.fixture
def dark(tmp_path: Path) -> Predictor:
    """By its threshold everything is good."""
    return Predictor(tiny_bundle(tmp_path), threshold=1.0)


def test_a_black_image_is_not_good(dark: Predictor) -> None:
    assert dark(textured(90)).verdict == "good"
    black = dark(np.zeros((48, 64, 3), np.uint8))
    assert (black.verdict, black.unusable, black.is_anomalous) == ("unusable", "black", True)
    record = black.to_dict()
    assert (record["verdict"], record["unusable"], record["is_anomalous"]) == ("unusable", "black", True)
    assert drawn_verdict(black.overlay()) != "good"


def test_a_region_of_interest_may_be_black_alone(tmp_path: Path) -> None:
    image = textured(90)
    image[:20, :20] = 0
    path = tiny_bundle(tmp_path)
    assert Predictor(path, threshold=1.0)(image).verdict == "good"
    assert Predictor(path, threshold=1.0, roi=Roi.parse("0,0,20,20"))(image).unusable == "black"


def test_stills_that_show_nothing_are_told(fbclip: Run, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 48), (255, 255, 255)).save(tmp_path / "in" / "white.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "in" / "black.png")
    for number in range(4):
        Image.fromarray(textured(80 + number)).save(tmp_path / "in" / f"{number}.png")
    done = fbclip(
        *("infer", "in", "--bundle", bundle, "--threshold", 1, "--no-save", "--json", "r.jsonl", "--csv", "r.csv"),
        code=2,  # as for files that can't be read: not all could be inspected
    )
    assert "unusable: in/black.png is black (below 10 of 255 grey levels" in done.stdout
    assert "unusable: in/white.png is of one colour" in done.stdout
    assert "6 images: 0 with defects, 4 good, 2 unusable" in done.stdout
    verdicts = {Path(r["source"]).name: r["verdict"] for r in map(json.loads, (tmp_path / "r.jsonl").open())}
    assert [name for name, verdict in verdicts.items() if verdict == "unusable"] == ["black.png", "white.png"]
    with (tmp_path / "r.csv").open() as file:
        rows = {Path(row["source"]).name: (row["verdict"], row["reason"]) for row in csv.DictReader(file)}
    assert rows["black.png"] == ("unusable", "black") and rows["0.png"] == ("good", "")
    done = fbclip("calibrate", bundle, "in", "--false-alarm-rate", 0.3)
    assert "left out: in/black.png is black" in done.stdout
    assert "4 good images (2 unusable left out)" in done.stdout


def test_a_camera_that_goes_black_is_a_state(dark: Predictor) -> None:
    """Told once when it begins and once when it ends; such frames have no vote, and no good verdict."""
    black, sink = np.zeros((48, 64, 3), np.uint8), Memory()
    pictures = [textured(90), black, black, black, textured(91), black, textured(92)]
    alarm = Alarm(Vote(1, 2))
    summary = Pipeline(Frames(pictures, live=True), dark, [sink], alarm, PATIENT).run()
    verdicts = [result.prediction.verdict for result in sink.results]
    assert verdicts == ["good", "unusable", "unusable", "unusable", "good", "unusable", "good"]
    assert sink.told("source") == [("pictures", state) for state in ("blind", "live", "blind", "live")]
    assert "pictures#1 is black" in next(n for n in sink.notices if n.state == "blind").message
    assert (summary.status.frames, summary.status.unusable, summary.status.anomalous, summary.absence) == (7, 4, 0, "")
    assert "unusable 4" in status_text(summary.status).plain
    insist_on_all(summary)


def test_an_alarm_stays_while_a_camera_is_black(dark: Predictor) -> None:
    dark.set_threshold(0.3)
    black, sink = np.zeros((48, 64, 3), np.uint8), Memory()
    pictures = [textured(200), black, black, textured(20)]
    Pipeline(Frames(pictures, live=True), dark, [sink], limits=PATIENT).run()
    assert [result.alarm for result in sink.results] == [True, True, True, False]


class Clocked(Frames):
    """A camera whose pictures come so many seconds after its start."""

    def __init__(self, pictures: list[tuple[float, NDArray[np.uint8]]], live: bool = True) -> None:
        super().__init__([picture for _, picture in pictures], live)
        self.times = [seconds for seconds, _ in pictures]

    def __iter__(self) -> Iterator[Frame]:
        began = time.monotonic() - 1000
        for frame, seconds in zip(super().__iter__(), self.times, strict=True):
            yield replace(frame, captured=began + seconds)


def test_a_camera_that_repeats_one_picture_is_frozen(dark: Predictor) -> None:
    still, other = textured(90), textured(90)
    other[47, 63] += 1  # one pixel, by one grey level: what the model is shown is the same
    times = [(0.0, still), (1.0, other), (2.0, still), (11.9, still), (12.1, still), (12.2, still), (12.3, other)]
    sink = Memory()
    summary = Pipeline(Clocked([*times, (13.0, other)]), dark, [sink], limits=PATIENT).run()
    assert [result.prediction.unusable for result in sink.results] == [None] * 4 + ["frozen"] * 2 + [None] * 2
    assert sink.told("source") == [("pictures", "blind"), ("pictures", "live")]
    insist_on_all(summary)
    frozen = Pipeline(Clocked(times[:5]), dark, [], limits=PATIENT).run()
    with pytest.raises(FBClipError, match=r"pictures showed nothing at the end: .*the same to the last bit for 10 s"):
        insist_on_all(frozen)
    calm = Pipeline(Clocked(times[:5], live=False), dark, [], limits=PATIENT).run()  # a file may hold one picture twice
    assert calm.status.unusable == 0


def test_files_that_can_not_be_read_and_results_that_are_lost(dark: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(textured(90)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    summary = Pipeline(open_source(str(folder)), dark, [Memory("json"), Memory("page")], limits=PATIENT).run()
    assert summary.status.frames == 1
    with pytest.raises(ImageError, match=r"1 of 2 images could not be inspected") as caught:
        insist_on_all(summary)
    assert caught.value.exit_code == 2
    (folder / "b.png").unlink()
    summary = Pipeline(open_source(str(folder)), dark, [Memory("json"), Memory("page")], limits=PATIENT).run()
    insist_on_all(summary)
    summary = with_dropped(summary, "page", 3)  # pictures that nobody saw
    insist_on_all(summary)
    summary = with_dropped(summary, "json", 2)
    with pytest.raises(FBClipError, match=r"results are missing in json \(2\)") as lost:
        insist_on_all(summary)
    assert lost.value.exit_code == 1


def with_dropped(summary: Summary, sink: str, count: int) -> Summary:
    """The same, where a sink lost so many."""
    sinks = {**summary.status.sinks, sink: replace(summary.status.sinks[sink], dropped=count)}
    return replace(summary, status=replace(summary.status, sinks=sinks))


def test_metrics_and_the_page_know_a_blind_camera(dark: Predictor, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "black.png")
    with running(predictor=dark) as server, server.watch() as viewer:
        dark.set_threshold(1.0)
        server.belt.parts.put(GOOD)
        until(viewer, lambda message: message["result"] is not None and message["result"]["verdict"] == "good")
        server.belt.parts.put(tmp_path / "black.png")
        viewer.send("next")
        message, _ = until(viewer, lambda message: message["result"]["verdict"] == "unusable")
        assert message["result"]["unusable"] == "black"
        eventually(lambda: server.json("/v1/status")["pipeline"]["source"]["state"] == "blind")
        text = server.ask("/metrics")[1].decode()
        assert 'fbclip_source_up{source="belt"} 0.0' in text
        assert "fbclip_unusable_total 1.0" in text and "fbclip_anomalies_total 0.0" in text


# Runs that saw nothing


def test_a_folder_in_which_nothing_arrives(fbclip: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = fbclip("infer", "--watch", "in", "--duration", 0.5, "--json", "r.jsonl", code=1)
    assert done.stderr == "fbclip: no image was inspected: none came from in\n"
    camera = fbclip("infer", "http://127.0.0.1:9/", "--duration", 0.5, code=1)
    assert "fbclip: no image was inspected: " in camera.stderr and camera.stderr.count("\n") == 1


def test_a_camera_of_which_every_picture_is_of_one_colour(
    fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overexposed(Camera):
        def pictures(self) -> Iterator[bytes]:
            buffer = io.BytesIO()
            Image.new("RGB", (64, 48), (255, 255, 255)).save(buffer, "JPEG")
            while not self.stopped.wait(self.interval):
                yield buffer.getvalue()

    monkeypatch.setenv("no_proxy", "*")
    bundle = tiny_bundle(tmp_path)
    with filming(Overexposed(), "http") as port:
        url = f"http://127.0.0.1:{port}/video"
        done = fbclip("infer", url, "--bundle", bundle, "--max-frames", 3, "--json", "r.jsonl", code=1)
    assert done.stderr.startswith("fbclip: no image was inspected: the last frame is of one colour")
    assert "0 anomalous, 0 alarms, 3 unusable" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in lines if line["kind"] == "result"] == ["unusable"] * 3
    assert "blind" in [line["state"] for line in lines if line["kind"] == "source"]


def test_a_source_that_is_lost_at_the_end(dark: Predictor) -> None:
    """A run of an hour that saw a minute is no success."""
    source = Frames([textured(90)], live=True, waits=True)
    pipeline = Pipeline(source, dark, [], limits=replace(PATIENT, lost_s=0.0))
    with Background(pipeline) as run:
        eventually(lambda: pipeline.status().frames == 1)
        source.callbacks[0](Notice(time.time(), "source", "pictures", "lost", "the plug is out", {}))
        pipeline.stop()
        summary = run.result()
    with pytest.raises(FBClipError, match="pictures showed nothing at the end: the plug is out"):
        insist_on_all(summary)
    back = replace(summary, absence="")
    insist_on_all(back)


def test_every_json_that_is_written_refuses_nan() -> None:
    """NaN is no JSON: what reads it elsewhere fails, or takes it for something else."""
    package = Path(fbclip.__file__).parent
    found = 0
    files = [Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names]
    for path in (file for file in files if file.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                assert "allow_nan=False" in ast.unparse(node), f"{path}: {ast.unparse(node)}"
                found += 1
    assert found > 20
    with pytest.raises(ValueError, match="not JSON compliant"):
        json.dumps(math.nan, allow_nan=False)
