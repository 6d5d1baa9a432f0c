"""The stand-ins of TensorRT, PyCUDA and cuda-bindings are stricter than the real packages, or they prove nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.engines import EngineOptions
from fbclip.export.engine import build_engine
from fbclip.memory import Tensors
from helpers import golden

IMAGE = np.random.default_rng(0).integers(0, 255, (1, 192, 192, 3), np.uint8)


@pytest.fixture
def rig(standin: str, tmp_path: Path) -> Any:
    """An execution context with everything bound, by hand, on two streams."""
    bundle = Bundle.load(shutil.copytree(EMBEDDED, tmp_path / "b.fbclip"))
    plan = build_engine(bundle, "fp32", EngineOptions((1, 1, 2)), Console(quiet=True)).read_bytes()
    import gpu_model
    import pycuda.driver as cuda
    import tensorrt as trt

    cuda_context = cuda.Device(0).make_context()
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan)
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    rig = SimpleNamespace(cuda=cuda, trt=trt, engine=engine, context=context, memory={}, text=bundle.text)
    rig.streams = [cuda.Stream(), cuda.Stream()]
    sizes = {"image": IMAGE.nbytes, "text": bundle.text.nbytes, "score": 4, "anomaly_map": 192 * 192 * 4}
    shape = bundle.manifest.memory_shape
    memory = Tensors.neutral(shape).named()
    sizes |= {name: value.nbytes for name, value in memory.items()} | {
        "features": 24**2 * shape.features * 4,
        "logits": 577 * 4,
    }
    rig.scratch = cuda.mem_alloc(4096)
    context.set_device_memory(int(rig.scratch), 4096)
    assert context.set_input_shape("image", IMAGE.shape)
    for name, size in sizes.items():
        rig.memory[name] = cuda.mem_alloc(size)
        assert context.set_tensor_address(name, int(rig.memory[name]))
    cuda.memcpy_htod(rig.memory["image"], IMAGE)
    for name, value in {"text": bundle.text, **memory}.items():
        cuda.memcpy_htod(rig.memory[name], value)
    rig.score = cuda.pagelocked_empty((1,), np.float32)
    yield rig
    cuda_context.pop()
    gpu_model.living.clear()


def run(rig: Any) -> bool:
    return bool(rig.context.execute_async_v3(rig.streams[0].handle))


def test_a_score_can_be_read_after_synchronising_only(rig: Any) -> None:
    assert run(rig)
    rig.cuda.memcpy_dtoh_async(rig.score, rig.memory["score"], rig.streams[0])
    assert np.isnan(rig.score).all()
    rig.streams[0].synchronize()
    assert 0 < rig.score[0] < 1


def test_an_upload_sees_what_was_written_after_it(rig: Any) -> None:
    pinned = rig.cuda.pagelocked_empty(IMAGE.shape, np.uint8)
    pinned[:] = 1
    rig.cuda.memcpy_htod_async(rig.memory["image"], pinned, rig.streams[0])
    pinned[:] = 2
    rig.streams[0].synchronize()
    import gpu_model

    assert (gpu_model.at(gpu_model.current(), rig.memory["image"], IMAGE.nbytes) == 2).all()


def test_an_unset_address_or_shape_or_memory(rig: Any) -> None:
    engine, strategy = rig.engine, rig.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    rig.context = engine.create_execution_context(strategy)
    assert not run(rig)
    rig.context.set_device_memory(int(rig.scratch), 4096)
    assert not run(rig)
    assert rig.context.set_input_shape("image", IMAGE.shape)
    assert not run(rig)
    for name in rig.memory:
        assert not run(rig)
        rig.context.set_tensor_address(name, int(rig.memory[name]))
    assert run(rig)


@pytest.mark.parametrize("name", ["image", "text", "memory_places", "score", "features"])
def test_memory_that_is_too_small(rig: Any, name: str) -> None:
    rig.context.set_tensor_address(name, int(rig.cuda.mem_alloc(3)))
    assert run(rig)
    with pytest.raises(rig.cuda.LaunchError, match="illegal memory access"):
        rig.streams[0].synchronize()
    with pytest.raises(rig.cuda.LaunchError, match="illegal memory access"):  # the context does not recover
        rig.cuda.Stream()


def test_freed_memory(rig: Any) -> None:
    assert run(rig)
    rig.memory["image"].free()
    with pytest.raises(rig.cuda.LaunchError, match="illegal memory access"):
        rig.streams[0].synchronize()


def test_shapes_outside_the_profile(rig: Any) -> None:
    assert not rig.context.set_input_shape("image", (3, 192, 192, 3))
    assert not rig.context.set_input_shape("image", (1, 191, 192, 3))
    assert not rig.context.set_input_shape("image", (192, 192, 3))
    assert rig.context.set_input_shape("image", (2, 192, 192, 3))
    assert tuple(rig.context.get_tensor_shape("anomaly_map")) == (2, 192, 192)


def test_two_streams_without_an_event_between_them(rig: Any) -> None:
    assert run(rig)
    other = rig.streams[1].handle
    with pytest.raises(AssertionError, match="two streams"):
        rig.context.execute_async_v3(other)
    event = rig.cuda.Event()
    event.record(rig.streams[0])
    rig.streams[1].wait_for_event(event)
    assert rig.context.execute_async_v3(other)


def test_copies_beside_work_need_pinned_memory(rig: Any) -> None:
    with pytest.raises(AssertionError, match="pinned"):
        rig.cuda.memcpy_htod_async(rig.memory["image"], IMAGE, rig.streams[0])


def test_a_copy_under_work_that_reads_the_memory(rig: Any) -> None:
    values = np.zeros(8, np.float32)
    assert run(rig)
    with pytest.raises(AssertionError, match="under work"):
        rig.cuda.memcpy_htod(rig.memory["memory_weights"], values)
    rig.cuda.Context.synchronize()
    rig.cuda.memcpy_htod(rig.memory["memory_weights"], values)


def test_a_capture_needs_the_shape_to_have_run(rig: Any) -> None:
    from cuda.bindings import driver

    stream = driver.CUstream(rig.streams[0].handle)
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert driver.cuStreamBeginCapture(stream, mode)[0] == driver.CUresult.CUDA_SUCCESS
    assert not run(rig)
    assert driver.cuStreamEndCapture(stream)[0] == driver.CUresult.CUDA_SUCCESS
    assert run(rig)
    driver.cuStreamBeginCapture(stream, mode)
    assert run(rig)
    with pytest.raises(rig.cuda.LogicError, match="uncaptured"):
        event = rig.cuda.Event()
        event.record(rig.streams[1])
        rig.streams[0].wait_for_event(event)
    graph = driver.cuStreamEndCapture(stream)[1]
    executable = driver.cuGraphInstantiate(graph, 0)[1]
    driver.cuGraphDestroy(graph)
    driver.cuGraphLaunch(executable, stream)
    rig.cuda.memcpy_dtoh_async(rig.score, rig.memory["score"], rig.streams[0])
    rig.streams[0].synchronize()
    assert 0 < rig.score[0] < 1
    assert driver.cuGraphExecDestroy(executable)[0] == driver.CUresult.CUDA_SUCCESS
    assert driver.cuGraphLaunch(executable, stream)[0] != driver.CUresult.CUDA_SUCCESS


def test_a_context_outlives_what_was_made_in_it(rig: Any) -> None:
    import gpu_model

    with pytest.raises(AssertionError, match=r"'allocations': 11, 'streams': 2, 'pinned arrays': 1"):
        gpu_model.current().detach()


def test_no_context_is_current(standin: str) -> None:
    import pycuda.driver as cuda

    with pytest.raises(cuda.LogicError, match="no currently active context"):
        cuda.mem_alloc(1)
    with pytest.raises(cuda.LogicError, match="cannot pop"):
        cuda.Context.pop()


def test_leaving_with_a_context_is_fatal(standin: str) -> None:
    program = "import pycuda.driver as cuda; cuda.init(); context = cuda.Device(0).make_context()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 134
    assert "PyCUDA ERROR" in done.stderr


def test_the_interface_is_the_recorded_one(standin: str) -> None:
    import tensorrt as trt

    record = json.loads((golden.DATA / "tensorrt" / f"api-{standin}.json").read_text())
    for name, members in record["classes"].items():
        shown = {member for member in vars(getattr(trt, name)) if not member.startswith("_")}
        assert shown == {member for member in members if member != "__init__"}, name
    for name, members in record["enums"].items():
        assert {member.name for member in getattr(trt, name)} == set(members)
    assert hasattr(trt.BuilderFlag, "FP16") == (standin != "11.4.0")


def test_what_the_record_lacks_raises(standin: str) -> None:
    import pycuda.driver as cuda
    import tensorrt as trt

    context = cuda.Device(0).make_context()
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1  # of TensorRT 8
    with pytest.raises(AttributeError):
        builder.build_engine(None, config)
    with pytest.raises(TypeError, match="incompatible"):
        builder.create_network(1, 2)
    with pytest.raises(TypeError, match="incompatible"):
        config.set_flag("TF32")
    with pytest.raises(TypeError, match="incompatible"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, bytes=1)
    with pytest.raises(TypeError, match="No constructor"):
        trt.IBuilderConfig()
    with pytest.raises(NotImplementedError):
        config.get_tactic_sources()

    class Careless(trt.ILogger):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called"):
        Careless()
    assert not hasattr(cuda, "StreamCapture")
    context.pop()
    import gpu_model

    gpu_model.living.clear()
