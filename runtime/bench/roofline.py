"""What bounds a model on a machine: the rates at which it multiplies matrices and copies memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

import numpy as np

from fbclip.errors import DeviceError
from fbclip.runtime.backends.providers import FATAL, PROVIDERS, available, load_cuda, provider_options, quiet
from fbclip.runtime.host import allowed_cores, cores
from fbclip.untrusted import one_line

SIDE = 1536  # of the square matrices whose product is timed: 7 billion operations, beyond the second cache
COPIED_BYTES = 1 << 27  # beyond the last cache of most machines
REPEATS = 3  # per turn, the best of which counts
FLOAT32, FLOAT16 = 1, 10  # as ONNX numbers types
GPU_SIDE, MOST_GPU_SIDE = 2048, 8192  # of products on a GPU: larger ones until a product takes so long
LONG_S = 2e-3  # beside which starting it is nothing
COPIED_SIDE = 6144  # of matrices of 151 MB, beyond the last cache of any GPU


def one_node(operator: str, kind: int = FLOAT32) -> bytes:
    """An ONNX model of one operator, "MatMul" or "Add", of (n, n) matrices a and b to c, opset 18.

    ONNX Runtime's products are often the quickest of a machine, and its Python package has no other way to call them.
    """
    node = b"\x0a\x01a\x0a\x01b\x12\x01c\x22" + bytes([len(operator)]) + operator.encode()

    def matrix(field: int, name: bytes) -> bytes:
        tensor = b"\x0a\x0e\x08" + bytes([kind]) + b"\x12\x0a" + 2 * b"\x0a\x03\x12\x01n"
        return bytes([field, 21]) + b"\x0a\x01" + name + b"\x12\x10" + tensor

    graph = (
        b"\x0a"
        + bytes([len(node)])
        + node
        + b"\x12\x01g"
        + matrix(0x5A, b"a")
        + matrix(0x5A, b"b")
        + matrix(0x62, b"c")
    )
    return b"\x08\x08\x3a" + bytes([len(graph)]) + graph + b"\x42\x04\x0a\x00\x10\x12"


class Rates:
    """The machine's rates, to be measured again in every round of a benchmark.

    Args:
        torch: the module whose `matrix_products` are timed too (see `fbclip.runtime.bench.run.Options`), or None.
        on_gpu: whether a GPU is timed, too, where ONNX Runtime can use it.
    """

    def __init__(self, torch: str | None = None, on_gpu: bool = False) -> None:
        import onnxruntime as ort

        a = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
        out = np.empty_like(a)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = allowed_cores()
        session = ort.InferenceSession(one_node("MatMul"), options, providers=["CPUExecutionProvider"])
        self.products: dict[str, Callable[[], object]] = {
            "cpu fp32 onnxruntime": lambda: session.run(None, {"a": a, "b": a}),
            "cpu fp32 numpy": lambda: np.matmul(a, a, out=out),
        }
        if torch is not None:
            self.products |= resolve_name(f"{torch}:matrix_products")(a)
        self.gpu = device_rates("cuda") if on_gpu else {}
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
        """Operations per second of each library's products, and bytes per second read and written in a copy."""
        rates = {name: 2 * SIDE**3 / _best(product) for name, product in self.products.items()}
        gpu = {name: measure() for name, measure in self.gpu.items()}
        return {**rates, **gpu, "cpu copy": 2 * COPIED_BYTES / _best(self._copy)}

    def _copy(self) -> None:
        """In as many threads as there are cores: one alone seldom fills the memory's bus."""
        list(self.pool.map(lambda part: np.copyto(self.target[part], self.source[part]), self.parts))


class DeviceOperator:
    """An operator of two matrices in ONNX Runtime, which stay on the device; calling it runs it once.

    Args:
        operator: "MatMul" or "Add".
        dtype: of the matrices.
        side: of the matrices at first.
        device: "cuda", or "cpu".

    Raises:
        DeviceError: ONNX Runtime can't run it there.
    """

    def __init__(self, operator: str, dtype: type[np.floating[Any]], side: int, device: str = "cuda") -> None:
        import onnxruntime as ort

        self.dtype, self.device = dtype, device
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        load_cuda()
        try:
            with quiet():
                model = one_node(operator, FLOAT16 if dtype is np.float16 else FLOAT32)
                self.session = ort.InferenceSession(model, options, providers=provider_options(device, None))
            if self.session.get_providers()[0] != PROVIDERS[device]:
                raise DeviceError(f"ONNX Runtime could not start {PROVIDERS[device]}")
            self.resize(side)
        except Exception as error:  # ONNX Runtime's have no other base
            raise DeviceError(f"{operator} does not run on {device}: {one_line(error)}") from error

    def resize(self, side: int) -> None:
        """Take other matrices (side, side), and run once, which is slower than later."""
        import onnxruntime as ort

        # of random numbers: a GPU multiplies ones with less power, and so more quickly
        a = np.random.default_rng(0).random((side, side), np.float32).astype(self.dtype)
        self.side, self.binding = side, self.session.io_binding()
        held = ort.OrtValue.ortvalue_from_numpy(a, self.device, 0)
        for name in ("a", "b"):
            self.binding.bind_ortvalue_input(name, held)
        result = ort.OrtValue.ortvalue_from_shape_and_type(a.shape, self.dtype, self.device, 0)
        self.binding.bind_ortvalue_output("c", result)
        self()

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)


def device_rates(device: str) -> dict[str, Callable[[], float]]:
    """What measures a device's rates in ONNX Runtime, by their names; nothing where ONNX Runtime can't use it."""
    if device not in available():
        return {}
    found: dict[str, Callable[[], float]] = {}
    try:
        for precision, dtype in (("fp32", np.float32), ("fp16", np.float16)):
            product = DeviceOperator("MatMul", dtype, GPU_SIDE, device)
            while _best(product) < LONG_S and product.side < MOST_GPU_SIDE:
                product.resize(2 * product.side)
            found[f"{device} {precision} onnxruntime"] = partial(_rate, 2 * product.side**3, product)
        addition = DeviceOperator("Add", np.float32, COPIED_SIDE, device)  # reads two, writes one
        return {**found, f"{device} copy": partial(_rate, 3 * addition.side**2 * 4, addition)}
    except DeviceError:
        return {}


def _rate(amount: int, work: Callable[[], object]) -> float:
    return amount / _best(work)


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
