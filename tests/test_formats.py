"""Bundles, memories, calibrations and line files of every format ever written: today's code says of them what theirs did."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from fbclip.bundle import Bundle
from fbclip.manifest import ADDED, FORMAT
from fbclip.runtime.calibration import Calibration

RECORDED = Path(__file__).parent / "recorded" / "formats"
WRITTEN: dict[str, Any] = json.loads((RECORDED / "recorded.json").read_text())


@pytest.fixture(params=WRITTEN)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """What was recorded of an archive, which is unpacked where commands run."""
    entry = WRITTEN[request.param]
    with tarfile.open(RECORDED / entry["file"]) as archive:
        archive.extractall(tmp_path, filter="data")
    for name in ("part.png", "good.png"):
        shutil.copy(RECORDED / name, tmp_path)
    return entry


def results(text: str) -> list[dict[str, Any]]:
    return [record for line in text.splitlines() if (record := json.loads(line))["kind"] == "result"]


def test_a_file_of_every_format_is_kept() -> None:
    formats = set()
    for path in RECORDED.glob("*.tar.xz"):
        with tarfile.open(path) as archive:
            formats.add(json.load(archive.extractfile("part.fbclip/manifest.json"))["format"])  # type: ignore[arg-type]
    assert formats == {*ADDED, FORMAT}


def test_scores_are_as_they_were(written: dict[str, Any], fbclip: Run) -> None:
    images = [result["image"] for result in written["results"]]
    said = fbclip("infer", *images, "--bundle", "part.fbclip", *written["options"], "--json", "-", "--no-save").stdout
    for before, now in zip(written["results"], results(said), strict=True):
        # 2e-6: another order of sums in another release of ONNX Runtime
        assert now["score"] == pytest.approx(before["score"], abs=2e-6)
        assert now["threshold"] == pytest.approx(written["threshold"], abs=1e-9)
        assert now["is_anomalous"] == before["is_anomalous"]
        assert [region["box"] for region in now["regions"]] == before["boxes"]


@pytest.mark.parametrize("written", ["format3", "format4", "format4-tiles"], indirect=True)  # line files came then
def test_a_line_file_is_read(written: dict[str, Any], fbclip: Run, tmp_path: Path) -> None:
    (now,) = results(fbclip("infer", "--config", "line.toml", *written["options"], "--json", "-").stdout)
    assert now["source"] == "part.png"
    assert now["score"] == pytest.approx(written["results"][0]["score"], abs=2e-6)
    assert not (tmp_path / "runs").exists(), "the file says save = false"


def test_memory_and_calibration_are_of_the_bundle(tmp_path: Path) -> None:
    """Read by the library, and not passed over."""
    with tarfile.open(RECORDED / "format4.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    bundle = Bundle.load(tmp_path / "part.fbclip")
    memory, calibration = bundle.memory(), Calibration.load(bundle)
    assert memory and calibration
    assert (len(memory.about.references), memory.about.reach, memory.about.place) == (4, 1, (None, None, None))
    assert (calibration.count, calibration.memory, calibration.tiles) == (20, memory.sha256, None)
