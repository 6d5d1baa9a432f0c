"""ONNX Runtime: buffers that stay, one thread for all, what `auto` takes, and what is said where CUDA doesn't start.

What a GPU alone can show is marked so; the rest of the same code runs here on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import RELEASES, Run, standins
from numpy.typing import NDArray
from rich.console import Console

from fbclip.backend import Results
from fbclip.bundle import Bundle
from fbclip.engines import EngineOptions
from fbclip.errors import DeviceError
from fbclip.export.engine import build_engine
from fbclip.runtime import backends
from fbclip.runtime.backends import ENGINES, candidates, make_backend, onnx
from fbclip.runtime.backends.onnx import CUDA_GRAPH, KERNEL_BY_KERNEL, MOST_SHAPES, OnnxRuntimeBackend
from fbclip.runtime.backends.providers import explain, provider_options, words
from helpers.memories import made_up
from helpers.tiny import tiny_bundle

IMAGES = np.random.default_rng(0).integers(0, 255, (8, 192, 192, 3), np.uint8)


def backend_of(bundle: Bundle, device: str = "cpu") -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle.graph("fp32"), bundle.text, device, bundle.manifest.memory_shape)


@pytest.fixture
def plain() -> Iterator[OnnxRuntimeBackend]:
    with backend_of(Bundle.load()) as made:
        yield made


def replays(bundle: Bundle) -> OnnxRuntimeBackend:
    """As on CUDA, on the CPU, whose provider passes over the numbers of graphs."""
    made = backend_of(bundle)
    made._captures = True
    made._thread = ThreadPoolExecutor(1)
    return made


@pytest.fixture
def replaying() -> Iterator[OnnxRuntimeBackend]:
    with replays(Bundle.load()) as made:
        yield made


def require_equal(found: tuple[NDArray[np.float32], ...], wanted: tuple[NDArray[np.float32], ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_buffers_that_stay_give_the_same_to_the_last_bit(
    plain: OnnxRuntimeBackend, replaying: OnnxRuntimeBackend
) -> None:
    kept: list[tuple[Results, Results]] = []
    for count in (1, 2, 1, 2):
        for first in (0, 8 - count):
            images = IMAGES[first : first + count]
            kept.append((replaying.run(images), plain.run(images)))
    for found, wanted in kept:  # none was overwritten by what came later
        require_equal(found, wanted)
    assert [buffers is not None for buffers in replaying._shapes.values()] == [True, True]
    numbers = {
        buffers.options.get_run_config_entry("gpu_graph_id") for buffers in replaying._shapes.values() if buffers
    }
    assert numbers == {"1", "2"}


def test_more_shapes_than_are_kept_run_all_the_same(tmp_path: Path) -> None:
    backend = backend_of(Bundle.load(tiny_bundle(tmp_path)))
    backend._captures = True
    for _ in range(3):
        for count in range(1, 8):
            scores, maps = backend.run(IMAGES[:count])
            np.testing.assert_allclose(maps, IMAGES[:count].mean(-1) / 255, atol=1e-6)
            np.testing.assert_allclose(scores, maps.mean((1, 2)), atol=1e-6)
    assert len(backend._shapes) == MOST_SHAPES


def test_a_memory_is_written_where_it_lies(plain: OnnxRuntimeBackend, replaying: OnnxRuntimeBackend) -> None:
    shape = Bundle.load().manifest.memory_shape
    assert shape
    images = IMAGES[:2]
    before = [replaying.run(images) for _ in range(3)][-1]
    places = {name: value.data_ptr() for name, value in replaying._held.items()}
    tensors = made_up(shape)
    for backend in (plain, replaying):
        backend.set_memory(tensors)
    changed = replaying.run(images)
    require_equal(changed, plain.run(images))
    assert not np.array_equal(changed[1], before[1])
    require_equal(replaying.describe(images), plain.describe(images))
    require_equal(replaying.run(images), changed)  # describing has moved nothing
    replaying.set_memory(None)
    require_equal(replaying.run(images), before)
    assert {name: value.data_ptr() for name, value in replaying._held.items()} == places


def test_one_thread_serves_many_and_is_ahead_of_an_iteration(tmp_path: Path) -> None:
    replaying = replays(Bundle.load(tiny_bundle(tmp_path)))
    expected = [replaying.run(image[None]) for image in IMAGES]

    def work(_: int) -> None:
        for found, wanted in zip(map(replaying.run, IMAGES[:, None]), expected, strict=True):
            require_equal(found, wanted)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()
    buffer = np.empty((1, 192, 192, 3), np.uint8)

    def overwritten() -> Iterator[NDArray[np.uint8]]:
        for image in IMAGES:
            buffer[0] = image
            yield buffer

    for found, wanted in zip(replaying.run_each(overwritten()), expected, strict=True):
        require_equal(found, wanted)
    replaying.close()
    replaying.close()
    for call in (replaying.run, lambda images: next(replaying.run_each([images]))):
        with pytest.raises(DeviceError, match="closed"):
            call(IMAGES[:1])


def test_what_cannot_be_replayed_runs_kernel_by_kernel(
    plain: OnnxRuntimeBackend, replaying: OnnxRuntimeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    replaying._place = "cuda"  # which this ONNX Runtime has no memory on, or no graph of this session's
    for _ in range(3):
        require_equal(replaying.run(IMAGES[:1]), plain.run(IMAGES[:1]))
    assert (replaying.launches or "").startswith(f"{KERNEL_BY_KERNEL} (")
    assert [record.message for record in caplog.records] == [
        f"runs are not replayed as CUDA graphs: {replaying.launches}"
    ]


def test_graphs_are_recorded_where_they_are_asked_for() -> None:
    ((_, recorded),) = provider_options("cuda", None, capture=True)
    ((_, launched),) = provider_options("cuda", None)
    assert recorded == {"use_tf32": "0", "enable_cuda_graph": "1"}
    assert launched == {"use_tf32": "0"}


NOT_FOUND = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("missing", "reason", "cure"),
    [
        (f"libcublasLt.so.13: {NOT_FOUND}", "CUDA's libraries are not found", "onnxruntime-gpu[cuda,cudnn]"),
        (f"libcuda.so.1: {NOT_FOUND}", "no NVIDIA driver here", "install it"),
        (f"libnvinfer.so.10: {NOT_FOUND}", "TensorRT's libraries are not found", "install TensorRT"),
    ],
)
def test_what_the_linker_misses_has_a_cure(missing: str, reason: str, cure: str) -> None:
    line = explain(missing)
    assert reason in line
    assert missing in line
    assert cure in line
    assert line.endswith("or run it on the cpu")


def test_the_words_of_onnxruntime_without_its_source() -> None:
    """As ONNX Runtime 1.31 put them, on a machine whose driver has no GPU and on one without TensorRT."""
    place = (
        "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, void> CudaCall(E) "
    )
    cuda = "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"
    assert words(RuntimeError(f"{place}{cuda} ; GPU=-1 ; hostname=vm ; expr=cudaSetDevice(0);")) == cuda
    assert words(RuntimeError(f"{place}Please install TensorRT libraries")) == "Please install TensorRT libraries"
    assert words(RuntimeError("another")) == "another"


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_auto_takes_what_works_and_tells_what_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CUDA provider that can't start, as here, where there is no driver: on the CPU with a word, or refused by name."""
    bundle = Bundle.load()
    for module in (backends, onnx):
        monkeypatch.setattr(module, "available", lambda: ["cuda", "cpu"])
    with caplog.at_level(logging.INFO, "fbclip"):
        backend, precision = make_backend(bundle)
    if backend.device == "cuda":
        pytest.skip("CUDA works here")
    assert (backend.device, precision) == ("cpu", "fp32")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("cuda is not used: ONNX Runtime could not start CUDAExecutionProvider: ")
    assert record.message.endswith("or run it on the cpu")
    with pytest.raises(DeviceError, match="could not start CUDAExecutionProvider"):
        make_backend(bundle, "cuda")


def test_auto_tries_engines_first_and_only_those_of_the_bundle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.load(tiny_bundle(tmp_path))
    without = candidates(bundle)
    assert without[-1] == "cpu"
    assert not set(without) & ENGINES.keys()
    bundle.engines.mkdir()
    (bundle.engines / "orin.plan").write_bytes(b"")
    assert candidates(bundle) == ["tensorrt", *without]
    with caplog.at_level(logging.INFO, "fbclip"):
        backend, _ = make_backend(bundle)
    assert backend.device == without[0]
    assert caplog.records[0].message.startswith("tensorrt is not used: ")


def test_auto_takes_an_engine_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(tiny_bundle(tmp_path))
    monkeypatch.setattr(backends, "driver_fault", lambda: None)  # the stand-ins are libraries without a driver
    with standins(RELEASES[-1], monkeypatch):
        build_engine(bundle, "fp32", EngineOptions((1, 1, 2)), Console(quiet=True))
        for batch, device in ((1, "tensorrt"), (2, "tensorrt"), (3, "cpu")):
            with make_backend(bundle, batch=batch)[0] as backend:
                assert backend.device == device


def test_the_command_says_where_it_ran(fbclip: Run) -> None:
    assert "the model is on cpu, fp32" in fbclip("infer", "--device", "cpu").stdout


@pytest.fixture
def cuda() -> Iterator[OnnxRuntimeBackend]:
    try:
        backend = backend_of(Bundle.load(), "cuda")
    except DeviceError as error:
        pytest.skip(str(error))
    with backend:
        yield backend


@pytest.mark.gpu
def test_on_a_gpu_shapes_that_come_again_are_replayed(plain: OnnxRuntimeBackend, cuda: OnnxRuntimeBackend) -> None:
    shape = Bundle.load().manifest.memory_shape
    assert shape
    assert cuda.launches == CUDA_GRAPH
    for tensors in (None, made_up(shape)):
        for backend in (plain, cuda):
            backend.set_memory(tensors)
        for _ in range(3):
            for count in (1, 3):
                images = IMAGES[:count]
                for found, wanted in zip(cuda.run(images), plain.run(images), strict=True):
                    np.testing.assert_allclose(found, wanted, atol=1e-4)
                for found, wanted in zip(cuda.describe(images), plain.describe(images), strict=True):
                    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert all(cuda._shapes.values())
    expected = [cuda.run(image[None]) for image in IMAGES]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(cuda.run, IMAGES[:, None]), expected, strict=True):
            require_equal(found, wanted)
    for found, wanted in zip(cuda.run_each(IMAGES[:, None]), expected, strict=True):
        require_equal(found, wanted)
    times = cuda.device_times(IMAGES[:1])
    assert times and all(value > 0 for value in times.values())
    assert cuda.launches == CUDA_GRAPH
