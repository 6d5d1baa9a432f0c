from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import RELEASES, Run
from numpy.typing import NDArray
from rich.console import Console

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.engines import EngineOptions
from fbclip.errors import BundleError, DeviceError, UsageError
from fbclip.export.engine import build_engine
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend, provider_options
from fbclip.runtime.backends.tensorrt import TensorRTBackend
from helpers.memories import made_up
from helpers.tiny import tiny_bundle

IMAGES = np.random.default_rng(0).integers(0, 255, (8, 192, 192, 3), np.uint8)


@pytest.fixture(scope="module")
def expected() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    bundle = Bundle.load()
    return OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text, "cpu", bundle.manifest.memory_shape).run(IMAGES)


def with_engine(folder: Path) -> Bundle:
    bundle = Bundle.load(shutil.copytree(EMBEDDED, folder / "b.fbclip"))
    build_engine(bundle, "fp32", EngineOptions((1, 1, 3)), Console(quiet=True))
    return bundle


@pytest.fixture
def bundle(tensorrt: str, tmp_path: Path) -> Bundle:
    return with_engine(tmp_path)


@pytest.fixture
def backend(bundle: Bundle) -> Iterator[TensorRTBackend]:
    with TensorRTBackend(bundle, "fp32") as made:
        yield made


def agree(
    results: tuple[NDArray[np.float32], NDArray[np.float32]],
    expected: tuple[NDArray[np.float32], NDArray[np.float32]],
    rows: slice,
    tensorrt: str,
) -> None:
    within = 1e-6 if tensorrt in RELEASES else 1e-4
    for found, wanted in zip(results, expected, strict=True):
        assert found.shape == wanted[rows].shape
        assert np.abs(found - wanted[rows]).max() <= within


def test_any_batch_in_any_order(
    tensorrt: str, backend: TensorRTBackend, expected: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    """Repeated shapes are replayed, new ones enqueued; both slots see all of it."""
    for start, count in ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2), (4, 2), (7, 1), (5, 3)):
        agree(backend.run(IMAGES[start : start + count]), expected, slice(start, start + count), tensorrt)
    assert backend.launches == "CUDA graph"


def test_two_batches_in_flight(
    tensorrt: str, backend: TensorRTBackend, expected: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    """The next is taken before the results of the one before are given, and other calls go on meanwhile."""
    frame = np.empty_like(IMAGES[:1])
    taken = 0

    def frames() -> Iterator[NDArray[np.uint8]]:
        nonlocal taken
        for image in IMAGES:
            frame[:] = image  # as a camera that reuses its buffer
            taken += 1
            yield frame

    for number, results in enumerate(backend.run_each(frames())):
        assert taken == min(number + 2, len(IMAGES))
        agree(results, expected, slice(number, number + 1), tensorrt)
        agree(backend.run(IMAGES[:1]), expected, slice(0, 1), tensorrt)
        if number == 2:
            (beside,) = backend.run_each([IMAGES[3:5]])
            agree(beside, expected, slice(3, 5), tensorrt)
    assert number == len(IMAGES) - 1
    assert backend.launches == "CUDA graph"


@pytest.mark.parametrize("ends", ["left", "source", "images"])
def test_an_iteration_that_ends_early_leaves_nothing_in_flight(
    tensorrt: str, backend: TensorRTBackend, expected: tuple[NDArray[np.float32], NDArray[np.float32]], ends: str
) -> None:
    def frames() -> Iterator[NDArray[np.uint8]]:
        yield from (IMAGES[:1], IMAGES[1:2])
        if ends == "source":
            raise OSError("unplugged")
        yield IMAGES[:9] if ends == "images" else IMAGES[:1]

    for _ in range(3):
        results = backend.run_each(frames())
        next(results)
        if ends == "left":
            results.close()
        else:
            with pytest.raises(OSError if ends == "source" else UsageError):
                next(results)
    for start, found in enumerate(backend.run_each(IMAGES[n : n + 1] for n in range(3))):
        agree(found, expected, slice(start, start + 1), tensorrt)


def test_an_iteration_of_a_closed_one(backend: TensorRTBackend) -> None:
    results = backend.run_each(IMAGES[n : n + 1] for n in range(3))
    next(results)
    backend.close()
    with pytest.raises(DeviceError, match="closed"):
        next(results)


def test_results_are_the_callers(backend: TensorRTBackend) -> None:
    scores, maps = backend.run(IMAGES[:1])
    kept = scores.copy(), maps.copy()
    backend.run(IMAGES[1:2])
    backend.run(IMAGES[2:3])
    backend.close()
    assert (scores == kept[0]).all()
    assert (maps == kept[1]).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:4], "takes 1 to 3 images at once, not 4"),
        (IMAGES[:0], "takes 1 to 3 images at once, not 0"),
        (IMAGES[:1, 1:], r"uint8 \(B, 192, 192, 3\)"),
        (IMAGES[:1].astype(np.float32), "got float32"),
    ],
)
def test_images_that_do_not_fit(backend: TensorRTBackend, images: NDArray[np.uint8], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        backend.run(images)
    assert backend.run(IMAGES[:1])[0].shape == (1,)  # it is as it was


def test_a_memory_is_swapped_under_the_graphs_that_were_captured(tensorrt: str, backend: TensorRTBackend) -> None:
    """Both slots replay what they captured, and read the new numbers."""
    bundle = Bundle.load()
    shape = backend.memory_shape
    assert shape
    with OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text, "cpu", shape) as cpu:
        for seed in (None, 1, 2, None):
            memory = None if seed is None else made_up(shape, reach=1, seed=seed)
            for one in (cpu, backend):
                one.set_memory(memory)
            expected = cpu.run(IMAGES)
            for number, results in enumerate(backend.run_each(IMAGES[n : n + 1] for n in range(5))):
                agree(results, expected, slice(number, number + 1), tensorrt)
    assert backend.launches == "CUDA graph"


def test_a_batch_in_flight_has_the_memory_that_it_began_with(tensorrt: str, backend: TensorRTBackend) -> None:
    bundle = Bundle.load()
    shape = backend.memory_shape
    assert shape
    with OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text, "cpu", shape) as cpu:
        before = cpu.run(IMAGES)
        cpu.set_memory(made_up(shape))
        after = cpu.run(IMAGES)
    results = backend.run_each(IMAGES[n : n + 1] for n in range(3))
    agree(next(results), before, slice(0, 1), tensorrt)  # and the second is in flight
    backend.set_memory(made_up(shape))
    agree(next(results), before, slice(1, 2), tensorrt)
    agree(next(results), after, slice(2, 3), tensorrt)


def test_images_are_described_beside_others_in_flight(tensorrt: str, backend: TensorRTBackend) -> None:
    bundle = Bundle.load()
    with OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text, "cpu", backend.memory_shape) as cpu:
        expected, scored = cpu.describe(IMAGES), cpu.run(IMAGES)
    results = backend.run_each(IMAGES[n : n + 1] for n in range(3))
    next(results)
    for start, count in ((0, 1), (1, 3), (4, 2), (6, 1)):
        found = backend.describe(IMAGES[start : start + count])
        for values, wanted in zip(found, expected, strict=True):
            assert np.abs(values - wanted[start : start + count]).max() <= (1e-5 if tensorrt in RELEASES else 1e-3)
    agree(next(results), scored, slice(1, 2), tensorrt)
    with pytest.raises(UsageError, match="not 4"):
        backend.describe(IMAGES[:4])
    backend.close()
    with pytest.raises(DeviceError, match="closed"):
        backend.describe(IMAGES[:1])
    with pytest.raises(DeviceError, match="closed"):
        backend.set_memory(None)


def test_a_plan_of_a_graph_without_a_memory(standin: str, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_bundle(tmp_path))
    build_engine(bundle, "fp32", EngineOptions((1, 1, 3)), Console(quiet=True))
    grey = np.full((1, 192, 192, 3), 51, np.uint8)
    with TensorRTBackend(bundle, "fp32") as backend:
        backend.set_memory(None)
        assert np.allclose(backend.run(grey)[0], 0.2, atol=1e-4)
        with pytest.raises(UsageError, match="tensorrt has no inputs for a memory: export it again"):
            backend.describe(grey)
    layout = Bundle.load().manifest.memory
    claims = replace(bundle, manifest=replace(bundle.manifest, memory=layout))
    with pytest.raises(BundleError, match="a plan has the tensors of its graph"):
        TensorRTBackend(claims, "fp32")


def test_a_worker_thread_uses_it(
    tensorrt: str, bundle: Bundle, expected: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    backend = TensorRTBackend(bundle, "fp32")
    found = []

    def work() -> None:
        found.extend(backend.run(IMAGES[n : n + 1]) for n in range(3))
        backend.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for number, results in enumerate(found):
        agree(results, expected, slice(number, number + 1), tensorrt)
    assert len(found) == 3


def test_closed_is_closed(backend: TensorRTBackend, bundle: Bundle) -> None:
    backend.close()
    backend.close()
    with pytest.raises(DeviceError, match="closed"):
        backend.run(IMAGES[:1])
    with TensorRTBackend(bundle, "fp32") as another:
        assert another.run(IMAGES[:1])[0].shape == (1,)


def test_without_cuda_bindings(
    standin: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> None:
    monkeypatch.setenv("STANDIN_NO_CUDA_BINDINGS", "1")
    with TensorRTBackend(with_engine(tmp_path), "fp32") as backend:
        assert backend.launches == "enqueue (cuda-bindings is not installed)"
        for number in range(4):
            agree(backend.run(IMAGES[number : number + 1]), expected, slice(number, number + 1), standin)


def test_where_capturing_fails_it_enqueues_and_says_so(
    standin: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> None:
    monkeypatch.setenv("STANDIN_NO_CAPTURE", "1")
    with TensorRTBackend(with_engine(tmp_path), "fp32") as backend:
        for number in range(4):
            agree(backend.run(IMAGES[number : number + 1]), expected, slice(number, number + 1), standin)
        assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in backend.launches
    assert "not replayed as CUDA graphs" in caplog.text


@pytest.mark.parametrize("in_flight", [False, True])
def test_an_error_of_the_device_closes_it_and_a_new_one_works(standin: str, tmp_path: Path, in_flight: bool) -> None:
    import gpu_model

    bundle = with_engine(tmp_path)
    backend = TensorRTBackend(bundle, "fp32")
    for _ in range(4):
        backend.run(IMAGES[:1])
    results = backend.run_each([IMAGES[:1]] * 3)
    if in_flight:
        next(results)
    (context,) = gpu_model.living
    with pytest.raises(gpu_model.LaunchError):
        gpu_model.fail(context, "cuStreamSynchronize failed: an illegal memory access was encountered")
    with pytest.raises(DeviceError, match=r"illegal memory access.*make a new one"):
        next(results) if in_flight else backend.run(IMAGES[:1])
    assert not gpu_model.living
    with TensorRTBackend(bundle, "fp32") as another:
        assert another.run(IMAGES[:1])[0].shape == (1,)


@pytest.mark.parametrize("free_mib", [0, 0.003, 0.2, 0.5])
def test_too_little_memory_leaves_nothing(
    standin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_mib: float
) -> None:
    """Wherever the memory ends: scratch, text, the first or the second slot."""
    import gpu_model

    bundle = with_engine(tmp_path)
    monkeypatch.setenv("STANDIN_FREE_MIB", str(free_mib))
    with pytest.raises(DeviceError, match="out of memory"):
        TensorRTBackend(bundle, "fp32")
    assert not gpu_model.living


def test_a_plan_that_tensorrt_refuses(standin: str, tmp_path: Path) -> None:
    import gpu_model

    bundle = with_engine(tmp_path)
    (plan,) = bundle.engines.glob("*.plan")
    content = plan.read_bytes().replace(standin.encode(), b"9.9.9", 1)
    plan.write_bytes(content)
    from hashlib import sha256

    sidecar = plan.with_suffix(".json")
    values = {**json.loads(sidecar.read_text()), "plan_sha256": sha256(content).hexdigest()}
    sidecar.write_text(json.dumps(values))
    with pytest.raises(DeviceError, match=r"can't read .*Version tag does not match"):
        TensorRTBackend(bundle, "fp32")
    assert not gpu_model.living


def test_evaluation_on_an_engine(standin: str, fbclip: Run, tmp_path: Path) -> None:
    bundle = with_engine(tmp_path)
    for name in ("train/good", "test/good", "test/scratch"):
        (tmp_path / "data" / "part" / name).mkdir(parents=True)
    samples = EMBEDDED.parent / "samples"
    for source, place in (("good", "train/good"), ("good", "test/good"), ("scratch", "test/scratch")):
        shutil.copy(samples / f"brushed-steel-{source}.jpg", tmp_path / "data" / "part" / place / "0.jpg")
    fbclip("eval", "data", "--bundle", bundle.path, "--device", "tensorrt", "--batch-size", "2", "--name", "gpu")
    (report,) = (tmp_path / "runs").rglob("*.json")
    stamp = json.loads(report.read_text())
    assert f'"tensorrt": "{standin}"' in json.dumps(stamp)
    refused = fbclip("eval", "data", "--bundle", bundle.path, "--device", "tensorrt", "--batch-size", "4", code=2)
    assert "takes 1 to 3 images at once, not 4" in refused.stderr


def test_the_providers_of_onnx_runtime(tmp_path: Path) -> None:
    (first, caching), (second, _) = provider_options("ort-tensorrt", tmp_path)
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert caching["trt_engine_cache_path"] == caching["trt_timing_cache_path"] == str(tmp_path)
    assert not [name for name in caching if "fp16" in name or "int8" in name or "bf16" in name]
    assert provider_options("cuda", None) == [("CUDAExecutionProvider", {"use_tf32": "0"})]
