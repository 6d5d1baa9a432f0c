from __future__ import annotations

import json
from pathlib import Path

import golden
import numpy as np
import onnx
import pytest
from conftest import Run

from fbclip.bundle import ANOMALY_MAP, EMBEDDED, IMAGE, SCORE, TEXT, Bundle
from fbclip.errors import BundleError, ParityError
from fbclip.export import bundle as exporter
from fbclip.export import graph as graphs

EXPECTED = golden.arrays()
OPERATORS = json.loads((golden.DATA / "onnx_operators.json").read_text())


def export_arguments(folder: Path) -> list[object]:
    return [
        "export",
        "--clip",
        folder / "clip.json",
        "--clip-weights",
        folder / "clip.pt",
        "--checkpoint",
        folder / "official.pth",
        "--image-size",
        golden.IMAGE_SIZE,
        "--feature-layers",
        ",".join(map(str, golden.FEATURE_LAYERS)),
        "--parity-images",
        folder / "raw.png",
    ]


def test_from_an_official_checkpoint_to_the_recorded_map(fbclip: Run, golden_files: Path, tmp_path: Path) -> None:
    fbclip(*export_arguments(golden_files), "--fp16", "--out", "b.fbclip")
    for precision, score_budget, map_budget in (("fp32", 1e-5, 1e-5), ("fp16", 2e-3, 5e-3)):
        fbclip(
            "infer",
            golden_files / "raw.png",
            "--bundle",
            "b.fbclip",
            "--precision",
            precision,
            "--json",
            f"{precision}.jsonl",
            "--save-map",
            "--map-size",
            "model",
            "--name",
            precision,
        )
        record = json.loads((tmp_path / f"{precision}.jsonl").read_text())
        assert abs(record["score"] - EXPECTED["raw_image_score"]) <= score_budget
        assert np.abs(np.load(tmp_path / record["map"]) - EXPECTED["raw_anomaly_map"]).max() <= map_budget
    check_graphs(Bundle.load(tmp_path / "b.fbclip"))


def check_graphs(bundle: Bundle) -> None:
    for precision in ("fp32", "fp16"):
        graph = onnx.load(bundle.graph(precision))
        onnx.checker.check_model(graph, full_check=True)
        operators = {node.op_type for node in graph.graph.node}
        assert all(OPERATORS[name]["supported"] for name in operators)
        assert [i.name for i in graph.graph.input] == [IMAGE, TEXT]
        assert [o.name for o in graph.graph.output] == [SCORE, ANOMALY_MAP]
        assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
        types = {t.data_type for t in graph.graph.initializer}
        assert onnx.TensorProto.DOUBLE not in types
        assert (onnx.TensorProto.FLOAT16 in types) == (precision == "fp16")


def test_no_options_export_the_embedded_model_anew(fbclip: Run, tmp_path: Path) -> None:
    fbclip("export")
    new, embedded = Bundle.load(tmp_path / "fbclip-nano.fbclip"), Bundle.load()
    values = onnx.load(new.graph("fp32")).graph.value_info
    empty = [
        v.name for v in values for d in v.type.tensor_type.shape.dim if d.HasField("dim_value") and not d.dim_value
    ]
    assert not empty  # with one feature layer; ONNX Runtime 1.23 and TensorRT don't take tensors of no size
    assert np.allclose(new.text, embedded.text, atol=1e-6)
    assert new.manifest.prompts == embedded.manifest.prompts
    assert new.manifest.image_size == embedded.manifest.image_size
    scores = []
    for bundle in ("fbclip-nano.fbclip", EMBEDDED):
        done = fbclip("infer", "--bundle", bundle, "--json", "-", "--no-save")
        scores.append([json.loads(line)["score"] for line in done.stdout.splitlines()])
    assert np.allclose(*scores, atol=1e-5)


def test_another_noun_changes_the_text_only(golden_files: Path) -> None:
    model = golden.model(golden_files)
    before = model.encode_text()
    model.set_noun("metal nut")
    assert "metal nut without defect." in model.config.prompts[0]
    assert (model.encode_text() - before).abs().max() > 1e-3


def test_a_graph_that_drifts_is_refused(golden_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exporter.BUDGETS, "fp32", (0.0, 0.0))
    model = golden.model(golden_files)
    with pytest.raises(ParityError, match="was not written"):
        exporter.export_bundle(model, tmp_path / "b.fbclip", [EXPECTED["raw_image"]], "b")
    assert list(tmp_path.iterdir()) == []


def test_weights_beside_a_graph_that_is_too_large(
    golden_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "EXTERNAL_DATA_FROM", 0)
    bundle, _ = exporter.export_bundle(golden.model(golden_files), tmp_path / "b.fbclip", [EXPECTED["raw_image"]], "b")
    data = bundle.path / "model.onnx.data"
    assert data.stat().st_size > bundle.graph("fp32").stat().st_size
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="is damaged"):
        bundle.graph("fp32")
