"""A forward pass, and a step of training, compute on the model's device alone: what comes from the host in between makes a
GPU wait, and can't be captured as a CUDA graph. Shown on the meta device, which takes no values to the host either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fbclip.memory import Tensors
from fbclip.model.memory import AdaptableVisual, MemoryTensors
from fbclip.model.network import FBCLIP
from fbclip.training.step import loss_of_tokens
from helpers import golden

BATCH = 2


MADE_OF_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}


class Mixed(TorchDispatchMode):
    """Finds the operations that take or give a tensor of another device."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and not t.is_meta for t in tree_leaves((args, kwargs, result))):
            self.found.append(str(func))
        return result


class OfValues(TorchFunctionMode):
    """Finds the tensors made of Python's values, which are made on the host first whatever device is named."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MADE_OF_VALUES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def from_host() -> Iterator[list[str]]:
    """What brings values from the host meanwhile."""
    found: list[str] = []
    with Mixed(found), OfValues(found):
        yield found


@pytest.fixture(scope="module")
def model(golden_files: Path) -> FBCLIP:
    """At another grid than it was trained at, so that positions are resized."""
    model = golden.model(golden_files)
    assert model.visual.tower.resizing is not None
    return model.to("meta")


@pytest.fixture
def image() -> torch.Tensor:
    return torch.empty(BATCH, 3, golden.IMAGE_SIZE, golden.IMAGE_SIZE, device="meta")


@torch.no_grad()
def test_a_forward_pass(model: FBCLIP, image: torch.Tensor) -> None:
    with from_host() as found:
        text = model.encode_text()
        for batched in (False, True):
            assert model.visual(image, text, batched).score.shape == (BATCH,)
    assert found == []


@torch.no_grad()
def test_a_forward_pass_with_a_memory(model: FBCLIP, image: torch.Tensor) -> None:
    adaptable = AdaptableVisual(model.config, model.visual).to("meta")
    neutral = Tensors.neutral(model.config.memory_shape).named().values()
    memory = MemoryTensors(*(torch.from_numpy(value).to("meta") for value in neutral))
    with from_host() as found:
        adaptable(image, model.encode_text(), memory)
    assert found == []


def test_a_step_of_training(model: FBCLIP, image: torch.Tensor) -> None:
    masks = torch.empty(BATCH, golden.IMAGE_SIZE, golden.IMAGE_SIZE, dtype=torch.uint8, device="meta")
    with from_host() as found:
        losses = loss_of_tokens(model, model.visual.tower(image), masks)
        losses.total.backward()
    assert found == []


@pytest.mark.parametrize(
    "bring",
    [
        lambda: torch.tensor([0, 1], device="meta"),
        lambda: torch.empty(2, device="meta").new_tensor([0, 1]),
        lambda: torch.from_numpy(golden.arrays()["image"]).to("meta"),
        lambda: torch.empty(2, device="meta") * torch.tensor(2.0),
    ],
)
def test_what_comes_from_the_host_is_found(bring: Callable[[], torch.Tensor]) -> None:
    with from_host() as found:
        bring()
    assert found


def test_a_trained_tower_learns_its_positions(golden_files: Path) -> None:
    model = golden.model(golden_files)
    tower = model.visual.tower.requires_grad_(True)
    tower.positions().square().sum().backward()
    assert tower.positional_embedding.grad is not None
    assert bool((tower.positional_embedding.grad != 0).all(dim=1).all())
    assert not any("resizing" in name or "before" in name for name in model.state_dict())
