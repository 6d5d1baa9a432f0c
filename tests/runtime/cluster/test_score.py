"""`fbclip score`: the same bits as `fbclip infer`, nothing lost and nothing doubled."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fbclip import Predictor
from fbclip.assets import SAMPLES
from fbclip.runtime.host import cores
from helpers.tiny import tiny_bundle
from helpers.waiting import eventually

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = Path(sys.executable).with_name("fbclip")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """120 small pictures in two folders, one of which can't be read."""
    draw = np.random.default_rng(3)
    for number in range(119):
        place = tmp_path / "archive" / f"day{number % 2}" / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (40, 60, 3), np.uint8)).save(place)
    (tmp_path / "archive" / "day0" / "broken.png").write_bytes(b"nothing")
    return tmp_path / "archive"


def rows_of(out: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(out / "rows").to_pylist()
    return sorted(rows, key=lambda row: str(row["source"]))


def tables(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "rows").glob("*.parquet")}


def test_rows_are_the_records_of_infer(fbclip: Run, tmp_path: Path) -> None:
    """To the bit, on as many cores: how ONNX Runtime shares a product out decides in which order it adds."""
    done = fbclip("score", SAMPLES, "--out", "scores", "--workers", "2", "--save-maps")
    assert "4 images" in done.stdout and "3 defect, 1 good" in done.stdout
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # commands inherit it
    try:
        fbclip("infer", SAMPLES, "--json", "records.jsonl", "--no-save")
        predictor = Predictor()
    finally:
        os.sched_setaffinity(0, before)
    records = {
        record["source"]: record for record in map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    }
    rows = rows_of(tmp_path / "scores")
    assert len(rows) == len(records) == 4
    for row in rows:
        record = records[row["source"]]
        for name in ("score", "threshold", "is_anomalous", "verdict", "overruled", "unusable", "memory"):
            assert row[name] == record[name], name
        shown = [{n: v for n, v in region.items() if v is not None} for region in row["regions"]]  # type: ignore[attr-defined]
        assert [{**region, "peak": np.float32(region["peak"])} for region in shown] == [
            {**region, "peak": np.float32(region["peak"])} for region in record["regions"]
        ]
        kept = np.load(io.BytesIO(row["map"]))  # type: ignore[arg-type]
        np.testing.assert_array_equal(kept, predictor(str(row["source"])).model_map)
    assert Image.open(tmp_path / "scores" / "worst.jpg").width > 400
    assert Image.open(tmp_path / "scores" / "histogram.png").size == (1200, 640)
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["verdicts"] == {"defect": 3, "good": 1}
    assert summary["worst"][0]["source"].endswith("brushed-steel-scratch.jpg")


def test_a_second_run_does_only_what_is_missing(fbclip: Run, archive: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    again = ("score", archive, "--bundle", bundle, "--out", tmp_path / "scores", "--workers", "2")
    done = fbclip(*again)
    assert "1 could not be read" in done.stdout and "broken.png is no image" in done.stdout
    before = tables(tmp_path / "scores")
    rows = rows_of(tmp_path / "scores")
    assert len(rows) == 120
    assert [row["source"] for row in rows if row["error"]] == [str(archive / "day0" / "broken.png")]
    assert all(row["verdict"] is None for row in rows if row["error"])

    fbclip(*again)
    assert tables(tmp_path / "scores") == before

    times = {row["source"]: row["time"] for row in rows}
    shutil.copy(archive / "day0" / "000.png", archive / "day1" / "0555.png")
    (archive / "day0" / "002.png").unlink()
    changed = fbclip(*again)
    after = tables(tmp_path / "scores")
    assert "removed: of images that changed, are gone" in changed.stdout
    assert 0 < len(dict(before.items() & after.items())) < len(before)
    rows = rows_of(tmp_path / "scores")
    names = [Path(str(row["source"])).name for row in rows]
    assert len(names) == len(set(names)) == 120
    assert "0555.png" in names and "002.png" not in names
    again_judged = {Path(str(row["source"])).name for row in rows if times.get(row["source"]) != row["time"]}
    assert again_judged <= {"0555.png", "broken.png"}, "rows of other pictures are kept as they are"


def test_a_damaged_table_is_made_again(fbclip: Run, archive: Path, tmp_path: Path) -> None:
    again = ("score", archive, "--bundle", tiny_bundle(tmp_path), "--out", "scores", "--workers", "1")
    fbclip(*again)
    victim = sorted((tmp_path / "scores" / "rows").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-9])
    assert "parquet: made again" in fbclip(*again).stdout
    assert len(rows_of(tmp_path / "scores")) == 120


def test_results_of_another_bundle_are_not_mixed(fbclip: Run, archive: Path, tmp_path: Path) -> None:
    fbclip("score", archive / "day1", "--bundle", tiny_bundle(tmp_path), "--out", "scores")
    before = tables(tmp_path / "scores")
    for arguments in ([archive], [archive / "day1", "--threshold", "0.9"], [archive / "day1", "--save-maps"]):
        other = fbclip("score", *arguments, "--out", "scores", "--bundle", "tiny.fbclip", code=2)
        assert "choose another folder" in other.stderr and len(other.stderr.splitlines()) == 1
    assert "choose another folder" in fbclip("score", archive / "day1", "--out", "scores", code=2).stderr
    assert tables(tmp_path / "scores") == before


@pytest.fixture
def running(archive: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command at work on an archive, with one table written."""
    arguments = ["score", archive, "--out", tmp_path / "scores", "--workers", "2"]
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    eventually(lambda: list(tmp_path.glob("scores/rows/*.parquet")) or process.poll() is not None)
    yield process
    process.kill()
    process.communicate()


def test_a_killed_worker_loses_nothing(running: subprocess.Popen[str], tmp_path: Path) -> None:
    psutil.Process(running.pid).children()[0].kill()
    said, told = running.communicate()
    assert running.returncode == 0, said + told
    names = [row["source"] for row in rows_of(tmp_path / "scores")]
    assert len(names) == len(set(names)) == 120


def test_ctrl_c_keeps_what_is_done(running: subprocess.Popen[str], archive: Path, tmp_path: Path, fbclip: Run) -> None:
    children = psutil.Process(running.pid).children()
    running.send_signal(signal.SIGINT)
    _, told = running.communicate()
    assert running.returncode == 130
    assert "stopped by SIGINT" in told and "goes on" in told
    psutil.wait_procs(children, 10)
    assert not any(child.is_running() for child in children)
    kept = tables(tmp_path / "scores")
    assert "of them done before" in fbclip("score", archive, "--out", "scores", "--workers", "2").stdout
    assert kept.items() <= tables(tmp_path / "scores").items()
    assert len(rows_of(tmp_path / "scores")) == 120


def test_calibrate_and_adapt_go_on_from_it(fbclip: Run, tmp_path: Path) -> None:
    for number, name in enumerate(("brushed-steel-good.jpg", "fabric-stain.jpg")):
        picture = Image.open(SAMPLES / name)
        for turn in range(3):
            picture.rotate(90 * turn, expand=True).resize((300 + number, 200)).save(tmp_path / f"{turn}-{name}.png")
    copies = [tmp_path / f"{turn}-brushed-steel-good.jpg.png" for turn in range(3)]
    fbclip("score", *copies, "--out", "scores", "--workers", "1")
    fbclip("calibrate", "scores", "--name", "rows")
    fbclip("calibrate", *copies, "--name", "pictures")
    by_rows, by_pictures = (
        json.loads((tmp_path / f"{n}.fbclip/calibration.json").read_text()) for n in ("rows", "pictures")
    )
    assert {**by_rows, "made": by_pictures["made"]} == by_pictures
    fbclip("adapt", "scores", "--out", "rows2.fbclip")
    fbclip("adapt", *copies, "--out", "pictures2.fbclip")
    contents = [(tmp_path / f"{name}2.fbclip/memory.npz").read_bytes() for name in ("rows", "pictures")]
    assert contents[0] == contents[1]
    refused = fbclip("calibrate", "scores", "--bundle", "rows2.fbclip", code=2)
    assert "was scored with others" in refused.stderr


def test_tables_of_pictures_are_scored(fbclip: Run, tmp_path: Path) -> None:
    pictures = sorted(SAMPLES.glob("*.jpg"))
    table = pa.table({"image": [path.read_bytes() for path in pictures], "name": [path.name for path in pictures]})
    pq.write_table(table, tmp_path / "all.parquet")
    fbclip("score", "all.parquet", "--column", "image", "--out", "scores", "--workers", "1", "--cores", cores())
    predictor = Predictor()
    assert [row["score"] for row in rows_of(tmp_path / "scores")] == [predictor(path).score for path in pictures]


def test_what_it_needs_is_said(fbclip: Run, tmp_path: Path) -> None:
    assert "GPUs are shared out by a cluster" in fbclip("score", SAMPLES, "--out", "s", "--gpus", "1", code=2).stderr
    (tmp_path / "s").write_text("a file")
    assert "s" in fbclip("score", SAMPLES, "--out", "s", code=2).stderr
    refused = fbclip("score", SAMPLES, "--out", "t", "--address", "http://u:SECRET@no:1", code=2)
    assert "--address: a cluster is" in refused.stderr and "SECRET" not in refused.stderr


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 of its own, and the query that leads to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield f"?endpoint_override=http://{host}:{port}&region=us-east-1"
    server.stop()


def test_archives_and_results_lie_in_s3(fbclip: Run, store: str, tmp_path: Path) -> None:
    from pyarrow.fs import FileSystem

    system, _ = FileSystem.from_uri(f"s3://line{store}&allow_bucket_creation=true")
    system.create_dir("line")
    for path in [*SAMPLES.glob("*.jpg")]:
        with system.open_output_stream(f"line/2026/{path.stem} #1 ä%20.jpg") as stream:
            stream.write(path.read_bytes())
    for name in ("2026/.hidden/x.jpg", "2026/notes.txt"):
        with system.open_output_stream(f"line/{name}") as stream:
            stream.write(b"none")
    again = (
        "score",
        f"s3://line/2026{store}",
        "--out",
        f"s3://line/scores{store}",
        "--workers",
        "1",
        "--cores",
        cores(),
    )
    assert "3 defect, 1 good" in fbclip(*again).stdout
    assert "4 of them done before" in fbclip(*again).stdout
    rows = pq.read_table("line/scores/rows", filesystem=system).to_pylist()
    predictor = Predictor()
    for row in rows:
        name = row["source"].removeprefix("s3://line/2026/").split(" #1")[0]
        assert row["score"] == predictor(SAMPLES / f"{name}.jpg").score
    assert len(rows) == 4
    gone = fbclip("score", f"s3://other/2026{store}", "--out", "x", code=2)
    assert "can't be listed" in gone.stderr and "endpoint" not in gone.stderr
    refused = fbclip("score", f"s3://line/2026{store}0", "--out", f"s3://line/scores{store}", code=2)
    assert "can't be listed" in refused.stderr or "of another store" in refused.stderr
    fbclip("adapt", f"s3://line/scores{store}", "--shots", 1, "--positions", 0, "--out", "m.fbclip")


def test_no_login_is_written_anywhere(fbclip: Run, store: str, tmp_path: Path) -> None:
    from pyarrow.fs import FileSystem

    system, _ = FileSystem.from_uri(f"s3://line{store}&allow_bucket_creation=true")
    for name in ("line", "line/d@other", "other"):
        system.create_dir(name)
    pictures = sorted(SAMPLES.glob("*.jpg"))
    for place, path in (("line/d@other/q?1.jpg", pictures[0]), ("other/q?1.jpg", pictures[1])):
        with system.open_output_stream(place) as stream:
            stream.write(path.read_bytes())
    table = pa.table({"image": [path.read_bytes() for path in pictures]})
    pq.write_table(table, "line/t.parquet", filesystem=system)
    login = "s3://AKIAKEY:TOPSECRET@line"
    done = [
        fbclip("score", f"{login}/d@other{store}", "--out", "names", "--workers", 1, "--cores", cores()),
        fbclip("score", f"{login}/t.parquet{store}", "--out", "table", "--workers", 1),
        fbclip("score", "s3://AKIAKEY:TOP/SECRET@line/x", "--out", "none", code=2),
    ]
    assert not any("SECRET" in each.stdout + each.stderr for each in done)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or path.suffix == ".onnx" or b"SECRET" not in path.read_bytes()
    (row,) = rows_of(tmp_path / "names")
    assert (row["source"], row["score"]) == ("s3://line/d@other/q?1.jpg", Predictor()(pictures[0]).score)
    assert not any("SECRET" in str(row) for row in rows_of(tmp_path / "table"))


def test_a_folder_of_results_is_of_one_archive(fbclip: Run, archive: Path, tmp_path: Path) -> None:
    bundle, out = tiny_bundle(tmp_path), archive / "scores"
    fbclip("score", archive, "--bundle", bundle, "--out", out, "--workers", 1)
    fbclip("score", f"{archive}/", "--bundle", bundle, "--out", out)
    assert len(rows_of(out)) == 120, "the pictures of the results are none of the archive"
    for place in ("one", "two"):
        shutil.copytree(archive / "day1", tmp_path / place / "archive")
    inside = [COMMAND, "score", "archive", "--bundle", str(bundle), "--out", str(tmp_path / "x"), "--workers", "1"]
    subprocess.run(inside, cwd=tmp_path / "one", check=True, capture_output=True)
    other = subprocess.run(inside, cwd=tmp_path / "two", capture_output=True, text=True)
    assert other.returncode == 2 and "is of another archive" in other.stderr
    (tmp_path / "x" / "rows" / "mine.parquet").write_bytes(b"a user's own")
    subprocess.run(inside, cwd=tmp_path / "one", check=True, capture_output=True)
    assert (tmp_path / "x" / "rows" / "mine.parquet").exists()
    (tmp_path / "x" / "score.json").unlink()
    assert "no score.json" in fbclip("score", tmp_path / "one", "--bundle", bundle, "--out", "x", code=2).stderr
    assert "empty name" in fbclip("score", archive, "--out", "", code=2).stderr


def test_two_commands_do_not_share_a_folder(running: subprocess.Popen[str], archive: Path, fbclip: Run) -> None:
    assert "another command writes" in fbclip("score", archive, "--out", "scores", code=2).stderr
    assert "is not finished" in fbclip("calibrate", "scores", "--name", "c", code=2).stderr


def test_a_cluster_that_loses_a_machine_loses_no_row(archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = Path(__file__).with_name("lose_a_node.py")
    out = tmp_path / "scores"
    done = subprocess.run(
        [sys.executable, script, COMMAND, str(archive / "day0"), str(out)],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(out)
    assert len({row["source"] for row in rows}) == len(rows) == 61
    assert {(row["bundle"], row["device"], row["precision"]) for row in rows if not row["error"]} == {
        (rows[0]["bundle"], "cpu", "fp32")
    }
