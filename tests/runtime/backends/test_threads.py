"""One backend, one predictor, many threads: each gets its own image's result, to the last bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

import fbclip
from fbclip.assets import SAMPLES
from fbclip.bundle import Bundle
from fbclip.engines import EngineOptions
from fbclip.errors import DeviceError
from fbclip.export.engine import build_engine
from fbclip.runtime.backends import Backend, make_backend
from fbclip.runtime.backends.tensorrt import TensorRTBackend
from helpers.tiny import tiny_bundle
from helpers.waiting import PATIENCE_S

THREADS, CALLS = 8, 1000
IMAGES = np.random.default_rng(0).integers(0, 255, (16, 1, 192, 192, 3), np.uint8)


def require_same(call: Callable[[Any], Any], inputs: list[Any], expected: list[Any], calls: int) -> None:
    """Threads that begin together each call with all inputs in turn, each from another one on."""
    together = threading.Barrier(THREADS)

    def work(first: int) -> None:
        together.wait(PATIENCE_S)
        for number in range(first, first + calls // THREADS):
            found, wanted = call(inputs[number % len(inputs)]), expected[number % len(inputs)]
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)), f"call {number}"

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, 2 * thread) for thread in range(THREADS)]:
            done.result()


def require_thread_safe(backend: Backend) -> None:
    images = list(IMAGES)
    expected = [backend.run(image) for image in images]
    require_same(backend.run, images, expected, CALLS)


def test_a_thousand_calls_of_eight_threads(tmp_path: Path) -> None:
    backend, _ = make_backend(Bundle.load(tiny_bundle(tmp_path)), "cpu")
    require_thread_safe(backend)


def test_the_embedded_model_and_its_predictor() -> None:
    predict = fbclip.Predictor()
    images = [np.asarray(fbclip.images.read_image(path)) for path in sorted(SAMPLES.iterdir())]

    def call(image: NDArray[np.uint8]) -> tuple[object, ...]:
        found = predict(image)
        return found.score, found.anomaly_map, [region.box for region in found.regions]

    require_same(call, images, [call(image) for image in images], 6 * THREADS)


@pytest.fixture
def engine(tensorrt: str, tmp_path: Path) -> Iterator[TensorRTBackend]:
    bundle = Bundle.load(tiny_bundle(tmp_path))
    build_engine(bundle, "fp32", EngineOptions((1, 1, 2)), Console(quiet=True))
    with TensorRTBackend(bundle, "fp32") as made:
        yield made


def test_a_thousand_calls_of_an_engine(engine: TensorRTBackend) -> None:
    require_thread_safe(engine)
    assert engine.launches == "CUDA graph"


def test_iterations_and_calls_of_eight_threads(engine: TensorRTBackend) -> None:
    """One iteration is ahead of its results, and all get their own."""
    expected = [engine.run(image) for image in IMAGES]
    together = threading.Barrier(THREADS)

    def work(number: int) -> None:
        together.wait(PATIENCE_S)
        for _ in range(5):
            each = engine.run_each(IMAGES) if number % 2 else map(engine.run, IMAGES)
            for found, wanted in zip(each, expected, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, number) for number in range(THREADS)]:
            done.result()


def test_closing_waits_for_a_call_under_way(engine: TensorRTBackend) -> None:
    """Threads that still want results are refused in words once it is closed."""
    running = threading.Barrier(THREADS + 1)

    def work() -> None:
        running.wait(PATIENCE_S)
        with pytest.raises(DeviceError, match="closed"):
            while True:
                engine.run(IMAGES[0])

    with ThreadPoolExecutor(THREADS) as pool:
        workers = [pool.submit(work) for _ in range(THREADS)]
        running.wait(PATIENCE_S)
        engine.close()
        for worker in workers:
            worker.result()


def test_the_threshold_is_set_while_others_ask(tmp_path: Path) -> None:
    """A prediction's verdict is by the threshold that it names."""
    predict = fbclip.Predictor(tiny_bundle(tmp_path), threshold=0.0)
    image = np.dstack([np.tile(np.arange(192, dtype=np.uint8), (192, 1))] * 3)
    done = threading.Event()

    def ask() -> set[tuple[float, bool]]:
        seen = set()
        while not done.is_set():
            found = predict(image)
            seen.add((found.threshold, found.is_anomalous))
        return seen

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            for number in range(100):
                predict.set_threshold(float(number % 2))
                predict(image)
        finally:
            done.set()
        seen = set.union(*(each.result() for each in asking))
    assert seen <= {(0.0, True), (1.0, False)}
