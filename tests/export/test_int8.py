"""Both 8-bit forms of one graph: what is quantised and how, what is not, and what the gate makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Run
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from rich.console import Console

from fbclip.assets import EMBEDDED
from fbclip.bundle import DYNAMIC, IMAGE, STATIC, TEXT, Bundle, save
from fbclip.engines import EngineOptions
from fbclip.errors import DeviceError, GraphError, ParityError, UsageError
from fbclip.export import parity
from fbclip.export.bundle import Deployment, GraphWriter
from fbclip.export.engine import build_engine
from fbclip.export.parity import Proof, find_calibration, run_reference
from fbclip.export.precision.float32_islands import LARGEST_ISLANDS
from fbclip.export.precision.int8 import Quantization, Quantizer
from fbclip.export.report import Steps
from fbclip.export.tensorrt_rules import check_graph
from fbclip.folders import list_images
from fbclip.images import read_image
from fbclip.memory import Shape, Tensors
from fbclip.model.backend import TorchBackend
from fbclip.resample import resize
from fbclip.runtime.backends import make_backend
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend
from helpers import golden

NANO = Bundle.load()
SHAPE = Shape(24, 1, 256)
FRAMES = [resize(read_image(path), NANO.manifest.image_size) for path in list_images([])]
BLOCKS = max(NANO.manifest.feature_layers)
FLOAT = onnx.load(NANO.graph("fp32")).graph
PRODUCTS = [f"block {block}/MatMul {number}" for block in range(1, BLOCKS + 1) for number in (1, 2, 3, 7, 8, 9)] + [
    *(f"separation/MatMul {number}" for number in (1, 3, 4, 5, 8, 9, 10, 11, 14)),
    *("scores/MatMul 2", "scores/MatMul 3"),
]  # not 4 and 5 of a block, nor 6, 7, 12 and 13 of the separation, which are attention's; nor the gate's one output


@pytest.fixture(scope="module", params=[DYNAMIC, STATIC])
def quantizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantizer:
    constants = {TEXT: NANO.text, **Tensors.neutral(SHAPE).named()}
    feed = [{IMAGE: frame[None], **constants} for frame in FRAMES[:2]]
    return Quantizer(NANO.graph("fp32"), request.param, feed, tmp_path_factory.mktemp("quantizer"))


@pytest.fixture(scope="module")
def graph(quantizer: Quantizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.int8.onnx"
    quantizer.write(path)
    return path


def is_static(graph: onnx.GraphProto) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in graph.node)


def stored_weights(graph: onnx.GraphProto) -> Iterator[tuple[str, NDArray[np.int8], NDArray[np.float32]]]:
    """Quantised products with their weights int8 (K, N) and scales float32 (N), read off the nodes."""
    constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    writer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "MatMulInteger":  # a, b, zero points; their scales' product is scaled by the Mul behind
            (scales,) = (n for n in graph.node if n.name == f"{node.name}_scales_mul")
            assert not constants[node.input[3]].any()
            yield node.name.removesuffix("_quant"), constants[node.input[1]], constants[scales.input[1]]
        source = writer.get(node.input[1]) if node.op_type == "MatMul" else None
        if source and source.op_type == "DequantizeLinear":
            assert [a.i for a in source.attribute if a.name == "axis"] == [1]
            yield node.name, constants[source.input[0]], constants[source.input[1]]


def test_weights_are_the_nearest_of_their_channel(graph: Path) -> None:
    found = onnx.load(graph).graph
    limit = 127 if is_static(found) else 64  # 7 bits: 255·(64 + 64) fits into 16
    floats = {c.name: numpy_helper.to_array(c) for c in FLOAT.initializer}
    inputs = {node.name: node.input[1] for node in FLOAT.node if node.op_type == "MatMul"}
    stored = list(stored_weights(found))
    assert sorted(name for name, _, _ in stored) == sorted(PRODUCTS)
    for name, integers, scales in stored:
        expected = floats[inputs[name]]
        assert integers.dtype == np.int8
        assert np.abs(integers.astype(int)).max() <= limit
        largest = np.abs(expected).max(axis=0)
        assert np.allclose(scales, largest / limit, rtol=0.02)
        assert (np.abs(integers * scales - expected) <= 0.501 * scales + 1e-7).all()


def test_nothing_else_is_touched(graph: Path) -> None:
    found = onnx.load(graph).graph
    names = [node.name for node in found.node]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == {node.name.split("/")[0] for node in FLOAT.node}
    assert not onnx.load(graph).metadata_props
    rounded = {node.output[0] for node in found.node if node.op_type == "DequantizeLinear"}
    assert {n.name for n in found.node if rounded & set(n.input)} == (set(PRODUCTS) if is_static(found) else set())
    here = {node.name: node for node in found.node}
    for node in FLOAT.node:
        if node.name not in PRODUCTS:
            assert here[node.name] == node
    outputs = {name for node in found.node for name in node.output}
    assert {name for node in FLOAT.node for name in node.output} <= outputs  # so that stages can be compared


def test_only_fixed_ranges_are_for_tensorrt(graph: Path) -> None:
    if is_static(onnx.load(graph).graph):
        assert check_graph(graph) > len(FLOAT.node)
    else:
        with pytest.raises(GraphError, match="only operators that TensorRT's parser takes"):
            check_graph(graph)
        assert check_graph(graph, for_tensorrt=False) > len(FLOAT.node)


def test_parts_stay_float32(quantizer: Quantizer, tmp_path: Path) -> None:
    kept, within = ("blocks 3-4", "separation"), ("block 3", "block 4", "separation")
    quantizer.write(tmp_path / "g.onnx", kept)
    stored = [name for name, _, _ in stored_weights(onnx.load(tmp_path / "g.onnx").graph)]
    assert sorted(stored) == sorted(name for name in PRODUCTS if not name.startswith(within))
    block, separation = 128 * (384 + 128 + 2 * 384), 128 * (64 + 2 * 4 * 512)
    everything = BLOCKS * block + separation + 2 * 128 * 128  # the projection takes part in two products
    assert quantizer.parts.share(kept) == pytest.approx((2 * block + separation) / everything)


def test_scores_and_maps_stay_close(graph: Path) -> None:
    """With nothing left float32, before the gate's search: within twice its budget."""
    exact, rounded = (OnnxRuntimeBackend(path, NANO.text, "cpu", SHAPE) for path in (NANO.graph("fp32"), graph))
    score_budget, map_budget = (2 * budget for budget in parity.BUDGETS["int8"])
    for frame in FRAMES:
        (scores, maps), (expected, expected_maps) = rounded.run(frame[None]), exact.run(frame[None])
        assert 0 < np.quantile(np.abs(maps - expected_maps), 0.999) <= map_budget
        assert np.abs(scores - expected).max() <= score_budget


def dynamic_bundle(folder: Path) -> Bundle:
    def write(into: Path):  # type: ignore[no-untyped-def]
        shutil.copy(NANO.graph("fp32"), into)
        (folder / "working").mkdir()
        Quantizer(NANO.graph("fp32"), DYNAMIC, [], folder / "working").write(into / "model.int8.onnx")
        return replace(NANO.manifest, precisions=("fp32", "int8"), int8=DYNAMIC)

    return save(folder / "dynamic.fbclip", NANO.text, write)


def test_the_form_for_cpus_runs_there_alone(fbclip: Run, tmp_path: Path) -> None:
    bundle = dynamic_bundle(tmp_path)
    done = fbclip("infer", "--bundle", bundle.path, "--precision", "int8", "--no-save", "--json", "-")
    assert len(done.stdout.splitlines()) == 4
    assert make_backend(bundle, "cpu", "auto")[1] == "fp32"  # 8 bit is never chosen for the user
    for device in ("tensorrt", "ort-tensorrt", "cuda"):
        with pytest.raises(DeviceError, match=f"{device} takes 8 bit with fixed ranges.*--int8-static"):
            make_backend(bundle, device, "int8")
    with pytest.raises(DeviceError, match="--int8-static"):
        build_engine(bundle, "int8", EngineOptions(), Console(quiet=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--int8", "--int8-static"], "a bundle holds one 8-bit graph"),
        (["export", "--int8", "--calibration-images", "x.png"], "--calibration-images is for --int8-static"),
        (["export", "--int8", "--bundle", EMBEDDED, "--engine"], "--bundle goes with"),
        (["infer", "--precision", "int8"], "export it with fbclip export --int8"),
    ],
)
def test_wrong_usage_is_one_line(fbclip: Run, arguments: list[object], message: str) -> None:
    error = fbclip(*arguments, code=2).stderr
    assert message in error
    assert error.count("\n") == 1


def test_a_data_set_calibrates_with_its_good_images_for_training(tmp_path: Path) -> None:
    for kind in ("train/good", "test/good", "test/scratch", "ground_truth/scratch"):
        (tmp_path / "bottle" / kind).mkdir(parents=True)
        Image.new("L", (8, 8), 255).save(tmp_path / "bottle" / kind / f"{kind.replace('/', '-')}.png")
    assert [path.name for path in find_calibration([str(tmp_path)])] == ["train-good.png"]
    assert len(find_calibration([])) == 4
    with pytest.raises(UsageError, match="got none: pass others"):
        parity.read_calibration([Path(__file__)], (8, 8), lambda line: None)


@pytest.fixture
def gate(golden_files: Path, golden_bundle: Path, tmp_path: Path) -> GraphWriter:
    """Over the recorded configuration with its float32 graph already written to `tmp_path`."""
    shutil.copy(golden_bundle / "model.onnx", tmp_path)
    model = golden.model(golden_files)
    trained = TorchBackend(model)
    rng = np.random.default_rng(0)
    frames = [resize(rng.integers(0, 256, (9, 9, 3), np.uint8), golden.IMAGE_SIZE) for _ in range(2)]
    proof = Proof(frames, ("a", "b"))
    reference, taught = run_reference(trained, proof, golden.IMAGE_SIZE)
    said: list[str] = []
    gate = GraphWriter(model, trained.text.numpy(), proof, reference, taught, Deployment("b"), Steps(said.append))
    gate.said = said  # type: ignore[attr-defined]
    return gate


def test_what_hurts_most_stays_float32(gate: GraphWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization = Quantization(STATIC, gate.proof.frames)
    gate.write_quantized(tmp_path, quantization)
    (free,) = gate.parities
    assert free.overrun <= 1
    assert free.islands == ()
    monkeypatch.setitem(parity.BUDGETS, "int8", (2 * free.score.max, 0.9 * free.map.p999))
    gate.write_quantized(tmp_path, quantization)
    widened = gate.parities[-1]
    assert widened.overrun <= 1
    assert widened.islands
    assert widened.size_bytes > free.size_bytes
    said = gate.said  # type: ignore[attr-defined]
    assert any(line.startswith("  float32 ") for line in said)
    report = json.dumps(widened.to_dict())
    assert all(part in report for part in widened.islands)
    monkeypatch.setitem(parity.BUDGETS, "int8", (1e-6, 1e-6))
    with pytest.raises(ParityError, match=f"at most {LARGEST_ISLANDS:.0%} of the weights in float32"):
        gate.write_quantized(tmp_path, quantization)
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]  # no working files
