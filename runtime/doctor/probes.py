"""What `fbclip doctor` tries in processes of their own: a library that crashes, hangs or exits takes only its probe along.

A probe takes text arguments and returns plain values. Imports are inside the probes, because they are what is being
tried.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fbclip.errors import reason
from fbclip.runtime.host import opencv, peak_memory

if TYPE_CHECKING:
    from fbclip.engines import Platform, RtxPlatform

Values = dict[str, Any]


def package(name: str) -> Values:
    """Import a module: its version, or that of the package around it, and its place."""
    module = import_module(name)
    around = import_module(name.rpartition(".")[0] or name)
    version = getattr(module, "__version__", getattr(around, "__version__", ""))
    return {"version": str(version), "place": str(Path(str(module.__file__)).parent)}


def onnxruntime() -> Values:
    """ONNX Runtime's version, and the providers it was built with."""
    ort = import_module("onnxruntime")
    return {"version": ort.__version__, "providers": ort.get_available_providers()}


def provider(name: str) -> Values:
    """Create a session of the embedded graph on a provider: what the session really got, and why, if that is another."""
    ort = import_module("onnxruntime")
    from fbclip.bundle import Bundle
    from fbclip.runtime.backends.providers import load_cuda, quiet, why_not

    options = ort.SessionOptions()
    options.log_severity_level = 3
    load_cuda()
    with quiet():
        session = ort.InferenceSession(Bundle.load().graph("fp32"), options, providers=[name])
    got = session.get_providers()[0]
    return {"got": got, "why": None if got == name else why_not(name)}


def cuda_libraries() -> Values:
    """The folders in which CUDA's libraries for this ONNX Runtime are found, and those of them that are not."""
    from fbclip.runtime.backends.providers import find_libraries

    places, missing = find_libraries()
    return {"places": places, "missing": missing}


def tensorrt() -> Values:
    """TensorRT's version, and whether its builder starts, which needs a working GPU."""
    trt = import_module("tensorrt")
    found: Values = {"version": trt.__version__, "builder": "starts"}
    try:
        if not trt.Builder(trt.Logger(trt.Logger.ERROR)):
            found["builder"] = "does not start"
    except Exception as error:
        found["builder"] = f"does not start: {reason(error)}"
    return found


def tensorrt_rtx() -> Values:
    """TensorRT-RTX's version, whether its builder starts, for which it needs no GPU, and the GPUs that it builds for."""
    from fbclip.runtime.backends.cuda import Library

    rtx = import_module("tensorrt_rtx")
    return {
        "version": rtx.__version__,
        "builder": "starts" if rtx.Builder(rtx.Logger(rtx.Logger.ERROR)) else "does not start",
        "compute_capabilities": list(Library(rtx=True).capabilities),
    }


def pycuda() -> Values:
    """PyCUDA's version, and the devices it sees."""
    version = getattr(import_module("pycuda"), "VERSION_TEXT", "version unknown")
    cuda = import_module("pycuda.driver")
    cuda.init()
    devices = [cuda.Device(i) for i in range(cuda.Device.count())]
    return {
        "version": version,
        "cuda": ".".join(map(str, cuda.get_version())),
        "devices": [
            {
                "name": device.name(),
                "compute_capability": ".".join(map(str, device.compute_capability())),
                "memory_mb": device.total_memory() >> 20,
            }
            for device in devices
        ],
    }


def bundle(path: str) -> Values:
    """Load a bundle ("" is the embedded one) and check the hash of every file."""
    from fbclip.bundle import GRAPHS, Bundle
    from fbclip.runtime.backends import DEVICES

    loaded = Bundle.load(path or None)
    manifest = loaded.manifest
    loaded.verify()
    for precision in manifest.precisions:
        for device in DEVICES:
            loaded.graph_for(device, precision)
    parts = [loaded.path / name for name in manifest.files]
    return {
        "path": str(loaded.path),
        "name": loaded.name,
        "image_size": manifest.image_size,
        "opset": manifest.opset,
        "precisions": {
            p: sum(f.stat().st_size for f in parts if f.name.startswith(GRAPHS[p])) for p in manifest.precisions
        },
    }


def memory(path: str) -> Values:
    """Whether a bundle takes a memory of good parts, and what it has: None, or a line on it."""
    from fbclip.bundle import Bundle

    loaded = Bundle.load(path or None)
    learned = loaded.memory()
    if learned is None:
        return {"adaptable": loaded.manifest.memory is not None, "memory": None}
    about = learned.about
    where = f", for the region {about.roi}" if about.roi else ""
    return {
        "adaptable": True,
        "memory": f"{learned.explain()}, learned in {about.precision} on {about.device}{where}",
    }


def plans(path: str) -> Values:
    """Plans of a bundle by name: the device that runs them, what each was built for, why it does not run here, if so, and
    whether its library and the GPU can be used to say so."""
    from fbclip.bundle import Bundle
    from fbclip.engines import Engine, RtxEngine
    from fbclip.errors import FBClipError
    from fbclip.runtime.backends import ENGINES

    loaded = Bundle.load(path or None)
    found: Values = {}
    for device, kind in (("tensorrt", Engine), ("tensorrt-rtx", RtxEngine)):
        files = sorted(loaded.engines.glob(ENGINES[device]))
        here = _platform(device) if files else None
        for plan in files:
            values = found[plan.name] = {"device": device, "here": here is not None, "precision": "auto"}
            try:
                engine = kind.load(plan.with_suffix(".json"))
                refusal = here and engine.mismatch(here, loaded.graph_sha256(engine.precision))
                values |= {"built_for": str(engine.platform), "precision": engine.precision, "refusal": refusal}
            except FBClipError as error:
                values["refusal"] = str(error)
    return {"plans": found}


def _platform(device: str) -> Platform | RtxPlatform | None:
    """What plans for a device are bound to here; None where its library or the GPU can't be used."""
    from fbclip.errors import FBClipError
    from fbclip.runtime.backends.cuda import Gpu

    try:
        return Gpu(rtx=device == "tensorrt-rtx").platform
    except FBClipError:
        return None


def inference(path: str, device: str = "auto", precision: str = "auto") -> Values:
    """Score a sample image at the size that the bundle takes, and measure the memory that it took; `told` is what "auto"
    has to say of devices that it did not take."""
    import logging

    from fbclip.folders import list_images
    from fbclip.images import read_image
    from fbclip.resample import resize
    from fbclip.runtime.predictor import Predictor

    told: list[str] = []

    def take(record: logging.LogRecord) -> bool:
        told.append(record.getMessage())
        return False

    log = logging.getLogger("fbclip")
    level = log.level
    log.setLevel(logging.INFO)
    log.addFilter(take)
    try:
        predictor = Predictor(path or None, device=device, precision=precision)
    finally:
        log.removeFilter(take)
        log.setLevel(level)
    frame = resize(read_image(list_images([])[0]), predictor.bundle.manifest.input_size)
    prediction = predictor(frame)
    if predictor.launches:  # replay is tried when a shape comes again, on TensorRT in each of two slots
        predictor(frame)
        prediction = predictor(frame)
    peak = peak_memory()
    return {
        "told": told,
        "launches": predictor.launches,
        "device": predictor.backend.device,
        "precision": predictor.precision,
        "score": prediction.score,
        "model_ms": prediction.timings_ms["model"],
        "peak_mb": None if peak is None else peak >> 20,
    }


PROBES: dict[str, Callable[..., Values]] = {
    probe.__name__: probe
    for probe in (
        package,
        onnxruntime,
        provider,
        cuda_libraries,
        tensorrt,
        tensorrt_rtx,
        pycuda,
        opencv,
        bundle,
        memory,
        plans,
        inference,
    )
}


class Probe:
    """A probe as a worker's object (`fbclip.runtime.workers`): it is done once it is made.

    Args:
        name: of `PROBES`.
        arguments: of that probe.
    """

    def __init__(self, name: str, *arguments: str) -> None:
        self.found = PROBES[name](*arguments)

    def ready(self) -> Values:
        return self.found
