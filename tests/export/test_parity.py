"""The parity gate's figures, and the search for what must stay float32."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fbclip.assets import EMBEDDED
from fbclip.errors import ParityError, UsageError
from fbclip.export.graph import DeployedModel, write_onnx
from fbclip.export.parity import Deviation, Differences, Parity, Proof, auroc_budget, find_proof
from fbclip.export.precision.float32_islands import BLOCK_GROUPS, parts_by_stage, widen
from fbclip.export.precision.half import Halver
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend
from helpers import golden

probabilities = arrays(np.float32, st.integers(1, 300), elements=st.floats(0, 1, width=32, allow_subnormal=False))


@settings(deadline=None)
@given(st.lists(probabilities, min_size=1, max_size=4))
def test_quantiles_of_a_stream(parts: list[np.ndarray]) -> None:
    differences = Differences()
    for part in parts:
        differences.add(part, np.zeros_like(part))
    values = np.concatenate(parts)
    assert differences.max == values.max()
    for q in (0.5, 0.99, 0.999):
        exact = np.quantile(values, q, method="inverted_cdf")
        assert exact <= differences.quantile(q) <= exact * 1.0006 + 1e-30


def test_what_is_no_number_is_the_largest_difference() -> None:
    differences = Differences()
    differences.add(np.array([0.5, np.nan], np.float32), np.array([0.5, 0.5], np.float32))
    assert differences.deviation().max == 1.0


def test_budgets() -> None:
    def overrun(precision: str, score: float, map_max: float, map_p999: float) -> float:
        deviations = (Deviation(score, 0, 0, score), Deviation(map_max, 0, 0, map_p999))
        return Parity(precision, 1, *deviations, 0, 0, (), None, "a", (0,)).overrun

    assert overrun("fp32", 0, 2e-4, 0) == pytest.approx(2)
    assert overrun("fp16", 1e-3, 0.5, 1e-3) == pytest.approx(0.5)
    assert overrun("fp16", 4e-3, 0, 0) == pytest.approx(2)
    assert overrun("int8", 1e-2, 1, 1e-2) == pytest.approx(0.5)


@pytest.mark.parametrize(("labels", "budget"), [([0] * 30 + [1] * 30, 5e-3), ([0, 0, 1], 0.5), ([0, 1], 1)])
def test_an_auroc_may_change_by_one_pair(labels: list[int], budget: float) -> None:
    assert auroc_budget(labels) == budget
    deviations = (Deviation(0, 0, 0, 0), Deviation(0, 0, 0, 0))
    changed = Parity("int8", 1, *deviations, 0, 0, (), (0.9, 0.9 - 2 * budget), "a", (0,), budget)
    assert changed.overrun == pytest.approx(2)


def test_a_proof_from_a_labelled_set(tmp_path: Path) -> None:
    for kind, number in (("good", 100), ("defective", 50)):
        (tmp_path / kind).mkdir()
        for index in range(number):
            (tmp_path / kind / f"{index:03}.png").touch()
    paths, labels = find_proof([str(tmp_path)])
    assert labels is not None
    assert len(paths) == len(set(paths)) == 64
    assert 18 <= sum(labels) <= 24  # a third, as in the set
    assert find_proof([str(tmp_path / "good")])[1] is None
    with pytest.raises(UsageError, match="got none: pass others"):
        Proof([], ())


@pytest.mark.parametrize("blocks", [1, 3, 4, 6, 24])
def test_parts_are_in_the_order_of_the_model(blocks: int) -> None:
    stages = parts_by_stage(blocks)
    assert list(stages)[:blocks] == [f"block {number}" for number in range(1, blocks + 1)]
    parts = list(dict.fromkeys(stages.values()))
    assert len(parts) <= BLOCK_GROUPS + 2
    numbers = [int(n) for part in parts[:-2] for n in part.split()[1].split("-")]
    assert numbers == sorted(numbers)
    assert stages["foreground mask"] == stages["views"] == stages[f"block {blocks}"] == parts[-3]


@torch.no_grad()
def test_a_part_that_overflows_stays_float32(golden_files: Path, tmp_path: Path) -> None:
    model = golden.model(golden_files)
    text = model.encode_text()
    for branch in (model.visual.separation.foreground, model.visual.separation.background):
        branch.to_v.weight *= 1e6  # past 65504 in between, the same in the end
        branch.to_out.weight *= 1e-6
    portable, half = tmp_path / "model.onnx", tmp_path / "half.onnx"
    write_onnx(DeployedModel(model), text, portable)
    halver = Halver(portable)
    image = np.random.default_rng(0).integers(0, 256, (1, 154, 154, 3), np.uint8)

    def score(graph: Path) -> float:
        with OnnxRuntimeBackend(graph, text.numpy(), memory=model.config.memory_shape) as backend:
            return float(backend.run(image)[0][0])

    expected, said = score(portable), list[str]()

    def overrun(islands: Collection[str]) -> float:
        halver.write(half, islands)
        return float(np.nan_to_num(abs(score(half) - expected), nan=1.0)) / 2e-3

    assert overrun(()) > 100
    islands = widen("fp16", halver.parts, overrun, "separation", said.append)
    assert islands == ("separation",)
    assert overrun(islands) <= 1
    products = [node for node in onnx.load(half).graph.node if node.op_type == "MatMul"]
    types = {weight.name: weight.data_type for weight in onnx.load(half).graph.initializer}
    for stage, kind in (("separation/", onnx.TensorProto.FLOAT), ("block 1/", onnx.TensorProto.FLOAT16)):
        assert {types.get(n.input[1], kind) for n in products if n.name.startswith(stage)} == {kind}
    assert len(said) == 1


def test_a_model_that_no_island_saves() -> None:
    weights = Halver(EMBEDDED / "model.onnx")
    said: list[str] = []
    with pytest.raises(ParityError, match="diverges first in block 3"):
        widen("fp16", weights.parts, lambda islands: 2.0, "block 3", said.append)
    assert said
    assert not any("separation" in line for line in said)  # it comes later, and mends nothing
