"""CUDA graphs: the same numbers as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fbclip.bundle import Bundle
from fbclip.data.procedural import ProceduralDefects
from fbclip.errors import DeviceError
from fbclip.model.backend import TorchBackend, bundle_backend
from fbclip.model.capture import Captured
from fbclip.training import loop as training
from fbclip.training.batches import ReadableSamples, collate
from fbclip.training.step import Recipe, Trainer
from helpers import golden
from helpers.training import metrics, tiny_model

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_captured() -> None:
    with pytest.raises(DeviceError, match="torch-captured needs a GPU"):
        bundle_backend(Bundle.load(), "torch-captured", None, None, None)


def test_what_a_gpu_does_not_take_is_computed_plainly_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device here takes a graph, so that the refusal is CUDA's own."""
    if torch.cuda.is_available() or not torch.backends.cuda.is_built():
        pytest.skip("there is a GPU, or torch knows nothing of CUDA")
    data, recipe, execution = ProceduralDefects(32, 8), Recipe(1, 4, 1e-3), training.Execution(progress=False)
    training.train(tiny_model(), data, recipe, tmp_path / "plain", execution)
    assert "CUDA graph" not in capsys.readouterr().out
    begin = Trainer.__init__

    def captured(self: Trainer, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.passes = Captured(self._losses_and_gradient)

    monkeypatch.setattr(Trainer, "__init__", captured)
    training.train(tiny_model(), data, recipe, tmp_path / "refused", execution)
    told = [line for line in capsys.readouterr().out.splitlines() if "CUDA graph" in line]
    assert len(told) == 1 and told[0].startswith("training without a CUDA graph")
    plain, refused = ([row["total"] for row in metrics(tmp_path / name)] for name in ("plain", "refused"))
    assert plain == refused


def test_gradients_stay_where_a_graph_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph would do is done plainly here: over steps of two parts, the last with fewer images."""
    monkeypatch.setattr(Captured, "__call__", lambda self, *inputs: self.work(*inputs))
    rows = []
    for captured in (False, True):
        accelerator = training.accelerator_for("no")
        trainer = Trainer(tiny_model(), ProceduralDefects(32, 10), Recipe(1, 4, 1e-3), tmp_path, accelerator)
        if captured:
            trainer.passes = Captured(trainer._losses_and_gradient)
        readable = ReadableSamples(trainer.data)
        parts = [collate([readable[i] for i in indices]) for indices in trainer.parts_of_batches(0, 2)]
        addresses = []
        for number in (1, 2, 3):
            rows.append(trainer.step(number, parts[2 * number - 2 : 2 * number], False))
            addresses.append([p.grad.data_ptr() for p in trainer.parameters if p.grad is not None])
        if captured:
            assert addresses[0] == addresses[1] == addresses[2]
    assert rows[:3] == rows[3:]


@gpu
@torch.no_grad()
def test_a_captured_forward_pass(golden_files: Path) -> None:
    model = golden.model(golden_files)
    frames = np.random.default_rng(0).integers(0, 256, (5, golden.IMAGE_SIZE, golden.IMAGE_SIZE, 3), np.uint8)
    eager, captured = TorchBackend(model, "cuda"), TorchBackend(model, "cuda", Captured(model.visual))
    assert captured.launches == "CUDA graph"
    expected = eager.run(frames)
    for batch in (1, 1, 1, 2, 2, 2, 1):  # plainly, captured, replayed, and back
        kept = captured.run(frames[:batch])
        captured.run(frames[4 : 4 + 1])
        for found, right in zip(kept, expected, strict=True):
            np.testing.assert_allclose(found, right[:batch], atol=1e-6)


@gpu
def test_captured_training_takes_the_same_steps(tmp_path: Path) -> None:
    """Two parts a step, and a last step with fewer images."""
    rows = []
    for name in ("captured", "plain"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "plain":
                patch.setattr(Captured, "__call__", lambda self, *inputs: self.work(*inputs))
            execution = training.Execution(accumulate=2)
            training.train(tiny_model(), ProceduralDefects(32, 22), Recipe(2, 4, 1e-3), tmp_path / name, execution)
        rows.append([(row["total"], row["gradient_norm"]) for row in metrics(tmp_path / name)])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4)
