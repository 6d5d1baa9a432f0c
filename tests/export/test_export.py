from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Run, export_arguments
from PIL import Image

from fbclip import Predictor, load_checkpoint
from fbclip.assets import EMBEDDED
from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT, VARIANTS, Bundle
from fbclip.errors import BundleError, ImageError, ParityError
from fbclip.export import graph as graphs
from fbclip.export import parity
from fbclip.export.bundle import Deployment, export_bundle
from fbclip.export.stages import compare_stages, first_diverging
from fbclip.memory import FEATURES, LOGITS, MEMORY_INPUTS, Tensors
from fbclip.resample import resize
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend
from fbclip.runtime.doctor import probes
from helpers import golden

EXPECTED = golden.arrays()
PROOF = parity.Proof([EXPECTED["raw_image"]], ("raw.png",))


def test_from_an_official_checkpoint_to_the_recorded_map(
    fbclip: Run, golden_files: Path, golden_bundle: Path, tmp_path: Path
) -> None:
    for precision, score_budget, map_budget in (("fp32", 1e-5, 1e-5), ("fp16", 2e-3, 5e-3), ("int8", 2e-2, 5e-2)):
        fbclip(
            "infer",
            golden_files / "raw.png",
            "--bundle",
            golden_bundle,
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
    bundle = Bundle.load(golden_bundle)
    check_graphs(bundle)
    check_cpu_graph(bundle)
    check_cuda_graphs(bundle)
    check_report(bundle)
    check_taps(bundle, tmp_path)


def check_graphs(bundle: Bundle) -> None:
    for precision in ("fp32", "fp16", "int8"):
        graph = onnx.load(bundle.graph(precision))
        onnx.checker.check_model(graph, full_check=True)
        assert [i.name for i in graph.graph.input] == [IMAGE, TEXT, *MEMORY_INPUTS]
        assert [o.name for o in graph.graph.output] == [SCORE, ANOMALY_MAP, FEATURES, LOGITS]
        assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
        types = {t.data_type for t in graph.graph.initializer}
        assert onnx.TensorProto.DOUBLE not in types
        assert (onnx.TensorProto.FLOAT16 in types) == (precision == "fp16")
        assert str(Path.cwd()).encode() not in graph.SerializeToString()  # nor any path of this machine


def check_cpu_graph(bundle: Bundle) -> None:
    """Every attention is fused, every weight of some size is the portable graph's, and the numbers are the same."""
    graph = onnx.load(bundle.graph_for("cpu", "fp32"), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MultiHeadAttention"] == 6 + 2 * 3 * len(golden.FEATURE_LAYERS)  # blocks; branches by views
    assert all(w.data_location == onnx.TensorProto.EXTERNAL for w in graph.initializer if np.prod(w.dims) > 10_000)
    places = {e.value for w in graph.initializer for e in w.external_data if e.key == "location"}
    assert places == {bundle.graph("fp32").name}
    check_same_numbers(bundle)


def check_same_numbers(bundle: Bundle) -> None:
    images = resize(EXPECTED["raw_image"], bundle.manifest.image_size)[None].repeat(2, axis=0)
    portable, ours = (
        OnnxRuntimeBackend(p, bundle.text, "cpu", bundle.manifest.memory_shape).run(images)
        for p in (bundle.graph("fp32"), bundle.graph_for("cpu", "fp32"))
    )
    assert all(np.abs(a - b).max() <= 1e-6 for a, b in zip(portable, ours, strict=True))


def check_cuda_graphs(bundle: Bundle) -> None:
    """The same on a GPU, where all inputs of the separation attention stay one batch."""
    for precision in ("fp32", "fp16"):
        graph = onnx.load(bundle.graph_for("cuda", precision), load_external_data=False).graph
        kinds = Counter(node.op_type for node in graph.node)
        assert (kinds["MultiHeadAttention"], kinds["Softmax"]) == (6 + 2, 2)  # the spatial view's are over windows
        assert len(graph.node) < 0.9 * len(onnx.load(bundle.graph(precision)).graph.node)
        places = {e.value for w in graph.initializer for e in w.external_data if e.key == "location"}
        assert places == {bundle.graph(precision).name}
        assert bundle.path.joinpath(VARIANTS["cuda", precision]).stat().st_size < 300_000


def check_report(bundle: Bundle) -> None:
    report = json.loads((bundle.path / "parity.json").read_text())
    assert report["fp32"]["map"]["max"] < report["fp16"]["map"]["p999"] < 1e-3
    assert report["fp16"]["within"]
    assert report["fp16"]["islands"] == []
    assert report["fp16"]["worst_image"] == "raw.png"
    stages = report["fp16"]["stages"]
    assert list(stages) == [
        "input",
        "patch embedding",
        *(f"block {number}" for number in range(1, 7)),
        "foreground mask",
        "views",
        "separation",
        "scores",
        "memory",
        "map",
    ]
    assert stages["patch embedding"] == stages["foreground mask"] == 0
    for precision in ("fp32", "fp16"):
        found, (score_budget, map_budget) = report[precision]["memory"], parity.BUDGETS[precision]
        assert 0 < found["score_max"] <= score_budget
        assert 0 < found["map_p999"] <= map_budget
        assert found["features"] <= (1e-5 if precision == "fp32" else 5e-3)
    assert 0 < report["int8"]["memory"]["features"] < 1
    assert 0 < stages["block 1"] < stages["block 6"] < 1e-2
    for (device, precision), name in VARIANTS.items():
        found, (score_budget, map_budget) = report["variants"][name], parity.BUDGETS[precision]
        assert (found["device"], found["images"]) == ("cpu", 1)  # there is no GPU to prove `device` on
        assert device in name
        assert found["score_max"] <= score_budget
        assert 0 < found["map_p999"] <= map_budget
    assert all(took >= 0 for took in report["seconds"].values())
    assert "writing model.cuda.fp16.onnx" in report["seconds"]
    assert bundle.manifest.parity["fp16"]["map_p999"] == report["fp16"]["map"]["p999"]
    assert Image.open(bundle.path / "parity.jpg").size[0] > 800


def check_taps(bundle: Bundle, folder: Path) -> None:
    """A fault in one block is found there."""
    graph = onnx.load(bundle.graph("fp16"))
    bias = next(i for i in graph.graph.initializer if i.name == "adaptable.visual.tower.blocks.2.mlp.c_proj.bias_fp16")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float16(1), bias.name))
    faulty = folder / "faulty.onnx"
    onnx.save(graph, faulty)
    image = resize(EXPECTED["raw_image"], golden.IMAGE_SIZE)[None]
    shape = bundle.manifest.memory_shape
    assert shape
    feed = {IMAGE: image, TEXT: bundle.text, **Tensors.neutral(shape).named()}
    assert first_diverging(compare_stages("fp16", bundle.graph("fp32"), faulty, feed)) == "block 3"
    assert [f.name for f in folder.glob("*.tapped*")] == []


def test_whole_frames_of_a_camera(fbclip: Run, golden_files: Path, tmp_path: Path) -> None:
    frame_hw = (123, 201)
    (tmp_path / "set/good").mkdir(parents=True)
    (tmp_path / "set/defective").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        coarse = rng.integers(0, 256, (7, 9, 3), np.uint8)
        frame = Image.fromarray(coarse).resize(frame_hw[::-1], Image.Resampling.BICUBIC)
        frame.save(tmp_path / f"set/{'defective' if number % 2 else 'good'}/{number}.png")
    (tmp_path / "set/good/broken.png").write_text("no image")
    arguments = export_arguments(golden_files)[:-2]
    options = ["--resolution", "201x123", "--channel-order", "bgr", "--parity-images", "set"]
    done = fbclip(*arguments, *options, "--out", "frames.fbclip")
    assert "broken.png is no image" in done.stdout
    bundle = Bundle.load(tmp_path / "frames.fbclip")
    assert (bundle.manifest.frame_size, bundle.manifest.channel_order) == (frame_hw, "bgr")
    summary = bundle.manifest.parity["fp32"]
    assert summary["images"] == 4
    assert summary["auroc"][0] == summary["auroc"][1]
    assert summary["map_max"] < 1e-5  # against Pillow's resize of the same frames

    predictor = Predictor(bundle)
    image = np.asarray(Image.open(tmp_path / "set/good/0.png"))
    prediction = predictor(image)
    assert prediction.anomaly_map.shape == prediction.model_map.shape == frame_hw
    swapped = predictor(np.ascontiguousarray(image[..., ::-1]), channel_order="bgr")
    assert swapped.score == prediction.score
    with pytest.raises(ImageError, match=r"takes frames of 123x201 .* got 201x123"):
        predictor(np.ascontiguousarray(image.transpose(1, 0, 2)))
    assert 0 < probes.inference(str(bundle.path))["score"] < 1  # fbclip doctor's sample image is of another size
    done = fbclip("eval", "set", "--bundle", "frames.fbclip", code=2)
    assert "for no frame size" in done.stderr


@pytest.mark.parametrize("size", ["1080", "0x10", "10x", "1920x1080x3", "-1x5"])
def test_frame_sizes_that_are_none(fbclip: Run, size: str) -> None:
    assert "HEIGHTxWIDTH" in fbclip("export", f"--frame-size={size}", code=2).stderr


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


def test_a_graph_that_deviates_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.BUDGETS, "fp32", (1e-9, 1e-9))
    with pytest.raises(ParityError, match="no bundle was written"):
        export_bundle(load_checkpoint(), tmp_path / "b.fbclip", PROOF, Deployment("b"))
    assert list(tmp_path.iterdir()) == []


def test_weights_beside_a_graph_that_is_too_large(
    golden_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "EXTERNAL_DATA_FROM", 0)
    bundle, _ = export_bundle(golden.model(golden_files), tmp_path / "b.fbclip", PROOF, Deployment("b"))
    data = bundle.path / "model.onnx.data"
    assert data.stat().st_size > bundle.graph("fp32").stat().st_size
    check_same_numbers(bundle)
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="is damaged"):
        bundle.graph("fp32")


def test_a_bundle_without_a_graph_for_the_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "old.fbclip"
    shutil.copytree(EMBEDDED, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop(VARIANTS["cpu", "fp32"], None)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Bundle.load(folder).graph_for("cpu", "fp32") == folder / "model.onnx"
    (folder / VARIANTS["cpu", "fp32"]).write_bytes(b"x")
    manifest["files"][VARIANTS["cpu", "fp32"]] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.load(folder).graph_for("cpu", "fp32")
