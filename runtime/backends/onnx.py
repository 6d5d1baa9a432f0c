"""ONNX Runtime as a backend, on a CPU, CUDA or its TensorRT provider."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fbclip.backend import Backend, Described, Results
from fbclip.bundle import ANOMALY_MAP, IMAGE, SCORE, TEXT
from fbclip.errors import BundleError, DeviceError
from fbclip.memory import FEATURES, LOGITS, Shape, Tensors
from fbclip.runtime.host import allowed_cores
from fbclip.untrusted import one_line

# What ONNX Runtime runs; "tensorrt" is a plan in TensorRT itself.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}
# Of ONNX Runtime's optimisations: on a CPU this one's kernel takes twice the time of the additions and norm it replaces.
UNWANTED_FUSIONS = ["SkipLayerNormFusion"]
SPIN_US = 20  # a thread without work waits as long in a loop before it sleeps: waking one takes as long as a small node
SPIN_SINCE = (1, 26)  # the release of ONNX Runtime that takes it; older ones spin for milliseconds or not at all


class OnnxRuntimeBackend(Backend):
    """A graph in ONNX Runtime. The precision is the graph's; providers are given none of their own.

    Args:
        graph: the ONNX file.
        text: text features float32 (2, E).
        device: "cpu", "cuda" or "ort-tensorrt" (ONNX Runtime's providers of those names).
        memory: of the graph's tensors of a memory; None where it has none.
        cache: folder where the TensorRT provider keeps what it builds; for this graph only, since the names that it
            gives its files say nothing of the weights.

    Attributes:
        device: where the session really runs.
        graph: what it runs.
        unwanted: optimisations of ONNX Runtime that are off.
        input_size: height and width of the images that the graph takes.

    Raises:
        DeviceError: the device is not there, or ONNX Runtime fell back to another.
        BundleError: it can't load the graph, or the graph is no bundle's.
    """

    def __init__(
        self,
        graph: Path,
        text: NDArray[np.float32],
        device: str = "cpu",
        memory: Shape | None = None,
        cache: Path | None = None,
    ) -> None:
        provider = PROVIDERS[device]
        if device not in available():
            raise DeviceError(
                f"{device} needs ONNX Runtime's {provider}; this one has {', '.join(available()) or 'none'}: "
                f"pip install 'fbclip[gpu]' on a machine with an NVIDIA GPU",
                option="device",
            )
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; warnings about nodes left on the CPU are checked below
        # threads that wait for each other in a loop for long take the cores from what prepares the next frame meanwhile
        spins = tuple(map(int, ort.__version__.split(".")[:2])) >= SPIN_SINCE
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        options.intra_op_num_threads = allowed_cores()
        self.unwanted = UNWANTED_FUSIONS if device == "cpu" else []
        try:
            self.session: Any = ort.InferenceSession(
                graph,
                options,
                providers=provider_options(device, cache),
                disabled_optimizers=self.unwanted,
                enable_fallback=0,  # to another provider, told on standard output, when this one fails
            )
        except Exception as error:  # its classes are those of C++, and their only base is this one
            raise BundleError(f"ONNX Runtime can't load {graph} on {device}: {one_line(error)}") from error
        self.input_size = require_signature(self.session, graph, text, memory)
        if self.session.get_providers()[0] != provider:
            raise DeviceError(
                f"ONNX Runtime could not start {provider} and fell back to {self.session.get_providers()[0]}; "
                f"check the driver and CUDA's libraries, or run it on the cpu",
                option="device",
            )
        self.device, self.graph = device, graph
        # Threads take turns: side by side they are hardly faster, as each run has all cores, and each would hold a run's
        # memory of its own.
        self._turn = Lock()
        self._binding = self.session.io_binding()
        place = "cpu" if device == "cpu" else "cuda"
        self.memory_shape = memory
        inputs = {TEXT: text, **(Tensors.neutral(memory).named() if memory else {})}
        # uploaded once; a memory's are written anew where they lie
        self._held = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), place, 0)
            for name, value in inputs.items()
        }
        for name, value in self._held.items():
            self._binding.bind_ortvalue_input(name, value)

    def run(self, images: NDArray[np.uint8]) -> Results:
        """Images uint8 (B, H, W, 3) -> scores float32 (B,), maps float32 (B, H', W'), both 0..1.

        Raises:
            DeviceError: it is closed.
        """
        with self._turn:
            scores, maps = self._run(images, (SCORE, ANOMALY_MAP))
        return scores, maps

    def describe(self, images: NDArray[np.uint8]) -> Described:
        if self.memory_shape is None:
            raise self._no_memory()
        with self._turn:
            return Described(*self._run(images, (FEATURES, LOGITS)))

    def run_described(self, images: NDArray[np.uint8]) -> tuple[Results, Described]:
        """What `run` and `describe` give, of one run."""
        with self._turn:
            scores, maps, *described = self._run(images, (SCORE, ANOMALY_MAP, FEATURES, LOGITS))
        return (scores, maps), Described(*described)

    def _run(self, images: NDArray[np.uint8], names: Sequence[str]) -> list[NDArray[np.float32]]:
        self._require_open()
        self._binding.bind_cpu_input(IMAGE, np.ascontiguousarray(images))
        self._binding.clear_binding_outputs()
        for name in names:  # anew, as their shapes follow the batch
            self._binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(self._binding)
        outputs: list[NDArray[np.float32]] = self._binding.copy_outputs_to_cpu()
        return outputs

    def _write_memory(self, tensors: Tensors) -> None:
        with self._turn:
            self._require_open()
            for name, value in tensors.named().items():
                self._held[name].update_inplace(np.ascontiguousarray(value))

    def _require_open(self) -> None:
        if self.session is None:
            raise DeviceError("this Predictor is closed: make a new one")

    def close(self) -> None:
        """Free the session and what it holds on the device, once a call under way is done; safe to call again."""
        with self._turn:
            self.session = self._binding = None
            self._held.clear()


def require_signature(
    session: Any, graph: Path, text: NDArray[np.float32], memory: Shape | None = None
) -> tuple[int, int]:
    """Height and width of the images that a graph takes.

    Raises:
        BundleError: its inputs and outputs are not those of `fbclip export`, or not for these text features and this shape
            of a memory.
    """
    inputs = [each.name for each in session.get_inputs()]
    found = {each.name: (each.type, list(each.shape)) for each in (*session.get_inputs(), *session.get_outputs())}
    _, shape = found.get(IMAGE, ("", []))
    batch, height, width, _ = shape if len(shape) == 4 else (None, 0, 0, 0)
    expected = {
        IMAGE: ("tensor(uint8)", [batch, height, width, 3]),
        TEXT: ("tensor(float)", list(text.shape)),
        SCORE: ("tensor(float)", [batch]),
        ANOMALY_MAP: ("tensor(float)", [batch, height, width]),
    }
    more = ""
    if memory:
        expected |= {name: ("tensor(float)", list(shape)) for name, shape in memory.shapes().items()}
        patches = memory.grid**2
        expected[FEATURES] = ("tensor(float)", [batch, patches, memory.features])
        expected[LOGITS] = ("tensor(float)", [batch, 1 + patches])
        more = f", and has inputs and outputs for a memory of {memory}"

    def fits(name: str) -> bool:
        (kind, there), (wanted_kind, wanted) = found[name], expected[name]
        open_ended = name not in inputs  # tools that rewrite graphs may forget the sizes of outputs
        return (kind, len(there)) == (wanted_kind, len(wanted)) and all(
            here == side or type(side) is not int or (open_ended and type(here) is not int)
            for here, side in zip(there, wanted, strict=True)
        )

    names = dict.fromkeys((*expected, *found))
    wrong = {name: found.get(name) for name in names if not (name in found and name in expected and fits(name))}
    if wrong or type(height) is not int or type(width) is not int:
        raise BundleError(
            f"a bundle's graph takes {IMAGE} uint8 (N, H, W, 3) and {TEXT} float32 {text.shape} as text.npy has it, and "
            f"gives {SCORE} float32 (N,) and {ANOMALY_MAP} float32 (N, H, W){more}; {graph} has {one_line(wrong or found)}: "
            f"export the bundle again"
        )
    return height, width


def provider_options(device: str, cache: Path | None) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's providers for a device, the wanted one first, with their options.

    Options: https://onnxruntime.ai/docs/execution-providers
    """
    cuda = (PROVIDERS["cuda"], {"use_tf32": "0"})  # its 10 bits are what the float32 islands are there to avoid
    if device == "cuda":
        return [cuda]
    if device == "cpu":
        return [(PROVIDERS["cpu"], {})]
    caching = {}
    if cache is not None:
        caching = {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(cache),
        }
    return [(PROVIDERS["ort-tensorrt"], caching), cuda]


def available() -> list[str]:
    """Devices that the ONNX Runtime here was built for."""
    if find_spec("onnxruntime") is None:
        return []
    import onnxruntime as ort

    providers: list[Any] = ort.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in providers]
