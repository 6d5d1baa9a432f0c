"""What bounds a model on a machine: the rates at which it multiplies matrices and copies memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

import numpy as np

from fbclip.runtime.host import allowed_cores, cores

SIDE = 1536  # of the square matrices whose product is timed: 7 billion operations, beyond the second cache
COPIED_BYTES = 1 << 27  # beyond the last cache of most machines
REPEATS = 3  # per turn, the best of which counts
# An ONNX model of one MatMul of float32 (n, n) matrices a and b to c, opset 18. ONNX Runtime's products are often the
# quickest of a machine, and its Python package has no other way to call them.
MATMUL = bytes.fromhex(
    "08083a5b0a110a01610a01621201632206" + b"MatMul".hex() + "1201675a150a016112100a0e0801120a0a0312016e0a0312016e"
    "5a150a016212100a0e0801120a0a0312016e0a0312016e62150a016312100a0e0801120a0a0312016e0a0312016e42040a001012"
)


class Rates:
    """The machine's rates, to be measured again in every round of a benchmark.

    Args:
        torch: the module whose `matrix_products` are timed too (see `fbclip.runtime.bench.run.Options`), or None.
    """

    def __init__(self, torch: str | None = None) -> None:
        import onnxruntime as ort

        a = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
        out = np.empty_like(a)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = allowed_cores()
        session = ort.InferenceSession(MATMUL, options, providers=["CPUExecutionProvider"])
        self.products: dict[str, Callable[[], object]] = {
            "cpu fp32 onnxruntime": lambda: session.run(None, {"a": a, "b": a}),
            "cpu fp32 numpy": lambda: np.matmul(a, a, out=out),
        }
        if torch is not None:
            self.products |= resolve_name(f"{torch}:matrix_products")(a)
        self.source = np.ones(COPIED_BYTES // 4, np.float32)
        self.target = np.zeros_like(self.source)
        threads = cores()
        self.pool = ThreadPoolExecutor(threads)
        bounds = np.linspace(0, len(self.source), threads + 1).astype(int)
        self.parts = [slice(start, end) for start, end in pairwise(bounds)]

    def ready(self) -> dict[str, Any]:
        return {}

    def run(self) -> dict[str, Any]:
        """The rates, and the core-seconds that measuring them took."""
        before = time.process_time()
        return {"rates": self.measure(), "cpu_s": time.process_time() - before}

    def measure(self) -> dict[str, float]:
        """Operations per second of each library's float32 product, and bytes per second read and written in a copy."""
        rates = {name: 2 * SIDE**3 / _best(product) for name, product in self.products.items()}
        return {**rates, "cpu copy": 2 * COPIED_BYTES / _best(self._copy)}

    def _copy(self) -> None:
        """In as many threads as there are cores: one alone seldom fills the memory's bus."""
        list(self.pool.map(lambda part: np.copyto(self.target[part], self.source[part]), self.parts))


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rate(rates: Mapping[str, float], device: str, precision: str) -> float | None:
    """The quickest library's operations per second on "cpu" or "cuda"; None where none was measured."""
    found = [rate for name, rate in rates.items() if name.startswith(f"{device} {precision} ")]
    return max(found, default=None)


def least_seconds(operations: float, rate: float, transferred: float, memory_rate: float | None) -> float:
    """The roofline (Williams, Waterman, Patterson 2009): no run can be quicker than its products at the machine's rate,
    nor than reading weights and frames and writing maps once."""
    return max(operations / rate, transferred / memory_rate if memory_rate else 0.0)
