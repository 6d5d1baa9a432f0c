"""The check of a GPU, in its form for machines without one: the real script, its parts in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from helpers.waiting import eventually

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu_check.py"
COMMAND = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu"]
pytestmark = pytest.mark.slow


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return report


def test_each_part_is_measured_left_out_or_failed_with_its_reason(golden_bundle: Path, tmp_path: Path) -> None:
    """The bundle of the large model is damaged, as it may be on its way to a machine: what needs it fails alone."""
    out = tmp_path / "out"
    copytree(golden_bundle, out / "recorded.fbclip")
    damaged = copytree(golden_bundle, tmp_path / "large.fbclip")
    (damaged / "text.npy").write_bytes((damaged / "text.npy").read_bytes()[:-1] + b"?")
    done = subprocess.run(
        [
            *COMMAND,
            "--out",
            out,
            "--bundle",
            damaged,
            "--parts",
            "card,rates,export,correct,times default cpu,times large",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = report_of(out)
    parts = report["parts"]
    status = {name: part["status"] for name, part in parts.items()}
    ok = {
        "card",
        "rates",
        "correct torch",
        "correct cpu fp32",
        "correct cpu fp16",
        "times default cpu fp32",
        "times large torch",
    }
    assert {name for name in status if status[name] == "ok"} == ok
    assert {name for name in status if status[name] == "failed"} == {"times large cpu fp32", "times large cpu fp16"}
    assert "is there already" in parts["export recorded"]["reason"]
    assert "CUDAExecutionProvider" in parts["correct cuda fp32"]["reason"]
    assert "is damaged" in parts["times large cpu fp32"]["reason"]
    assert f"failed: times large cpu fp32: {parts['times large cpu fp32']['reason']}" in done.stdout
    for part in ("correct torch", "correct cpu fp32"):
        assert all(max(f["score_off"], f["map_off"]) < 1e-5 for f in parts[part]["figures"])
    literal, eager, half = parts["times large torch"]["figures"]
    assert [f["kind"] for f in (literal, eager, half)] == ["torch-reference fp32", "torch fp32", "torch fp16"]
    assert literal["off_reference"] == 0 < eager["off_reference"] < 1e-5 < half["off_reference"] < 0.05
    rates = parts["rates"]["figures"][0]
    share = rates["gflop_large"] / eager["ms_an_image"] / rates["product_fp32_tflops"]
    assert eager["share_of_product_rate"] == pytest.approx(share)
    assert eager["times_reference"] == pytest.approx(literal["ms_an_image"] / eager["ms_an_image"])
    assert literal["first_result_s"] > literal["ms_an_image"] / 1e3


def test_training_is_measured(tmp_path: Path) -> None:
    subprocess.run([*COMMAND, "--out", tmp_path, "--parts", "train default"], check=True, capture_output=True)
    part = report_of(tmp_path)["parts"]["train default 96"]
    assert part["status"] == "ok", part
    (figures,) = part["figures"]
    assert figures["images_a_second"] > 0 and 0 <= figures["waiting_for_data"] < 1


def test_a_part_without_time_is_stopped_and_the_rest_left_out(tmp_path: Path) -> None:
    """The first part ends in time; the second would take longer than all have."""
    command = [*COMMAND, "--out", tmp_path, "--parts", "train,card", "--minutes", "0.05"]
    subprocess.run(command, check=True, capture_output=True)
    card, stopped, left_out = report_of(tmp_path)["parts"].values()
    assert card["status"] == "ok" and card["figures"][0]["cores"] > 0
    assert stopped["status"] == "failed" and stopped["reason"].startswith("stopped after its")
    assert (left_out["status"], left_out["reason"]) == ("skipped", "no time was left")


def test_an_interrupted_run_leaves_what_it_had_and_no_process(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", tmp_path, "--parts", "card,train default"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout and "card: ok" in running.stdout.readline()
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        eventually(lambda: bool(children.read_text()))
        (part,) = map(int, children.read_text().split())
        running.kill()
    eventually(lambda: not Path(f"/proc/{part}").exists())
    assert list(report_of(tmp_path)["parts"]) == ["card"]


def test_what_runs_is_exported_by_the_check_itself(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", tmp_path, "--parts", "export recorded,correct cpu"]
    subprocess.run(command, check=True, capture_output=True)
    parts = report_of(tmp_path)["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "ok"), parts
    (exported,) = parts["export recorded"]["figures"]
    assert exported["steps"]["writing model.cuda.fp16.onnx"] >= 0
