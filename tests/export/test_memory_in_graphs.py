"""A memory of good parts in the graphs: the formulas, every precision, swapping, and graphs that have none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, export_arguments
from numpy.typing import NDArray

from fbclip.backend import Backend
from fbclip.bundle import Bundle
from fbclip.errors import BundleError, DeviceError, UsageError
from fbclip.manifest import MOST_MEMORY, Manifest
from fbclip.memory import Tensors
from fbclip.model.backend import TorchBackend
from fbclip.model.memory import AdaptableVisual, MemoryTensors
from fbclip.resample import resize
from fbclip.runtime.backends import make_backend
from helpers import golden
from helpers.memories import formula, made_up
from helpers.tiny import tiny_bundle

PRECISIONS = ("fp32", "fp16", "int8")
SIZE = golden.IMAGE_SIZE
IMAGES = np.stack(
    [
        resize(golden.arrays()["raw_image"], (SIZE, SIZE)),
        resize(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8), (SIZE, SIZE)),
        np.full((SIZE, SIZE, 3), 128, np.uint8),
    ]
)


def backend_of(golden_bundle: Path, precision: str = "fp32") -> Backend:
    return make_backend(Bundle.load(golden_bundle), "cpu", precision)[0]


def same(a: tuple[NDArray[np.float32], ...], b: tuple[NDArray[np.float32], ...]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def test_the_memory_of_nothing_changes_no_bit(golden_files: Path) -> None:
    model = golden.model(golden_files)
    adaptable = AdaptableVisual(model.config, model.visual)
    image, text = torch.from_numpy(golden.arrays()["image"]), model.encode_text()
    neutral = MemoryTensors(*map(torch.from_numpy, Tensors.neutral(model.config.memory_shape).named().values()))
    for batched in (False, True):
        expected, found = model.visual(image, text, batched), adaptable(image, text, neutral, batched)
        assert torch.equal(found.score, expected.score)
        assert torch.equal(found.patch_map, expected.patch_map)
        assert torch.equal(found.logits[:, 0].sigmoid(), expected.score)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("reach", "bank"), [(0, False), (1, False), (2, False), (0, True)])
def test_every_graph_follows_the_formulas(golden_bundle: Path, precision: str, reach: int, bank: bool) -> None:
    """From the features on, all is float32 in all precisions."""
    bundle = Bundle.load(golden_bundle)
    shape = bundle.manifest.memory_shape
    assert shape
    with backend_of(golden_bundle, precision) as backend:
        features, logits = backend.describe(IMAGES)
        memory = made_up(shape, reach, bank)
        backend.set_memory(memory)
        scores, maps = backend.run(IMAGES)
        expected_scores, expected_maps = formula(shape, SIZE, memory, features, logits)
        assert 0.01 < expected_maps.mean() < 0.99
        assert np.abs(scores - expected_scores).max() <= 1e-5
        assert np.abs(maps - expected_maps).max() <= 1e-5
        described = backend.describe(IMAGES)  # as without a memory
        assert same(described, (features, logits))


def test_features_have_layers_of_length_1_and_logits_are_the_zero_shot_ones(golden_bundle: Path) -> None:
    layout = Bundle.load(golden_bundle).manifest.memory
    assert layout
    with backend_of(golden_bundle) as backend:
        features, logits = backend.describe(IMAGES)
        scores, _ = backend.run(IMAGES)
    assert features.shape == (3, 11**2, layout.groups * layout.width)
    lengths = np.linalg.norm(np.split(features, len(layout.layers), axis=-1), axis=-1)
    assert np.abs(lengths - 1).max() < 1e-5
    assert np.abs(1 / (1 + np.exp(-logits[:, 0])) - scores).max() < 1e-6


@pytest.mark.parametrize(("precision", "score_budget", "map_budget"), [("fp32", 1e-4, 1e-4), ("fp16", 2e-3, 5e-3)])
def test_torch_and_graphs_agree(
    golden_files: Path, golden_bundle: Path, precision: str, score_budget: float, map_budget: float
) -> None:
    trained = TorchBackend(golden.model(golden_files))
    zero_shot = trained.run(IMAGES)
    assert trained.memory_shape
    memory = made_up(trained.memory_shape, reach=1)
    with backend_of(golden_bundle, precision) as backend:
        for one in (trained, backend):
            one.set_memory(memory)
        (scores, maps), (expected, expected_maps) = backend.run(IMAGES), trained.run(IMAGES)
        assert np.abs(scores - expected).max() <= score_budget
        assert np.abs(maps - expected_maps).max() <= map_budget
        assert np.abs(backend.describe(IMAGES).features - trained.describe(IMAGES).features).max() <= score_budget
    trained.set_memory(None)
    assert same(trained.run(IMAGES), zero_shot)
    trained.close()
    with pytest.raises(DeviceError, match="closed"):
        trained.set_memory(memory)
    with pytest.raises(DeviceError, match="closed"):
        trained.describe(IMAGES)


def test_another_forward_pass_takes_no_memory(golden_files: Path) -> None:
    model = golden.model(golden_files)
    trained = TorchBackend(model, forward=lambda image, text: model.visual(image, text))
    trained.set_memory(None)
    with pytest.raises(UsageError, match="no inputs for a memory"):
        trained.set_memory(Tensors.neutral(model.config.memory_shape))
    with pytest.raises(UsageError, match="no inputs for a memory"):
        trained.describe(IMAGES)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_memory_needs_no_other_session(golden_bundle: Path, precision: str) -> None:
    with backend_of(golden_bundle, precision) as backend:
        shape, session = backend.memory_shape, backend.session  # type: ignore[attr-defined]
        assert shape
        zero_shot = backend.run(IMAGES)
        found = []
        for seed in (1, 2, 1):
            memory = made_up(shape, seed=seed)
            backend.set_memory(memory)
            memory.matrix[:] = np.nan  # the caller's again
            found.append(backend.run(IMAGES))
        assert same(found[0], found[2])
        assert not same(found[0], found[1])
        alone = backend.run(IMAGES[1:2])
        assert all(np.abs(a[0] - b[1]).max() < 1e-5 for a, b in zip(alone, found[2], strict=True))
        backend.set_memory(None)
        assert same(backend.run(IMAGES), zero_shot)
        assert backend.session is session  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="closed"):
        backend.set_memory(None)
    with pytest.raises(DeviceError, match="closed"):
        backend.describe(IMAGES)


def test_tensors_of_another_model(golden_bundle: Path) -> None:
    with backend_of(golden_bundle) as backend:
        shape = backend.memory_shape
        assert shape
        fits = made_up(shape)
        backend.set_memory(fits)
        before = backend.run(IMAGES)
        for wrong in (
            made_up(shape._replace(grid=10)),
            made_up(shape._replace(width=64)),
            replace(fits, bank=fits.bank.astype(np.float64)),
        ):
            with pytest.raises(UsageError, match="a memory for this model is float32"):
                backend.set_memory(wrong)
        assert same(backend.run(IMAGES), before)


def older_bundle(folder: Path, number: int) -> Bundle:
    """A bundle as fbclip wrote it before there were memories."""
    path = tiny_bundle(folder)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("memory", *(("int8",) if number < 3 else ()), *(("frame_size",) if number < 2 else ())):
        del manifest[name]
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": number}))
    return Bundle.load(path)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_older_bundles_run_and_say_how_to_become_adaptable(tmp_path: Path, number: int) -> None:
    bundle = older_bundle(tmp_path, number)
    assert bundle.manifest.memory is bundle.manifest.memory_shape is None
    grey = np.full((2, 192, 192, 3), 51, np.uint8)
    with make_backend(bundle)[0] as backend:
        backend.set_memory(None)
        assert np.allclose(backend.run(grey)[0], 0.2, atol=1e-4)
        for call in (lambda: backend.set_memory(made_up(adaptable)), lambda: backend.describe(grey)):
            with pytest.raises(UsageError, match=r"no inputs for a memory: export it again with fbclip export"):
                call()


adaptable = Bundle.load().manifest.memory_shape
assert adaptable


def test_a_graph_without_the_manifests_memory(tmp_path: Path) -> None:
    """And one with a memory that the manifest knows nothing of."""
    path = tiny_bundle(tmp_path)
    text = (path / "manifest.json").read_text()
    layout = {"layers": [4, 6], "groups": 1, "width": 256}
    (path / "manifest.json").write_text(json.dumps({**json.loads(text), "memory": layout}))
    with pytest.raises(BundleError, match=r"outputs for a memory of Shape.*export the bundle again"):
        make_backend(Bundle.load(path))
    embedded = Bundle.load()
    unaware = replace(embedded, manifest=replace(embedded.manifest, memory=None))
    with pytest.raises(BundleError, match="export the bundle again"):
        make_backend(unaware)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"layers": [6, 4], "groups": 1, "width": 256}, "layers of memory ascend"),
        ({"layers": [4, 6], "groups": 3, "width": 256}, "groups of memory share its layers"),
        ({"layers": [4, 6], "groups": 1, "width": 0}, "width is a number from 1 to 4096"),
        ({"layers": [], "groups": 1, "width": 8}, "layers"),
        ({"layers": list(range(1, 13)), "groups": 12, "width": 4096}, f"at most {MOST_MEMORY:,} numbers"),
        ({"layers": [4, 6], "groups": 1}, "lacks width"),
        ([], "memory"),
    ],
)
def test_layouts_that_make_no_sense(tmp_path: Path, memory: object, message: str) -> None:
    values = json.loads((Bundle.load().path / "manifest.json").read_text())
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps({**values, "memory": memory}), tmp_path)


def test_whole_frames_have_a_memory_too(fbclip: Run, golden_files: Path, tmp_path: Path) -> None:
    fbclip(*export_arguments(golden_files), "--frame-size", "123x201", "--out", "frames.fbclip")
    bundle = Bundle.load(tmp_path / "frames.fbclip")
    frames = np.random.default_rng(0).integers(0, 256, (2, 123, 201, 3), np.uint8)
    with make_backend(bundle)[0] as backend:
        assert backend.memory_shape
        features, _ = backend.describe(frames)
        assert features.shape == (2, 121, backend.memory_shape.features)
        before = backend.run(frames)
        backend.set_memory(made_up(backend.memory_shape))
        scores, maps = backend.run(frames)
        assert maps.shape == (2, 123, 201)
        assert np.abs(scores - before[0]).max() > 1e-3
