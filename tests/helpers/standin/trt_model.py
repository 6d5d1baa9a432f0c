"""What the members of TensorRT that fbclip uses do: the plan is the ONNX file, executions run it in ONNX Runtime.

The classes are not used as they are: `tensorrt/__init__.py` puts their functions behind the recorded interface.
"""

import json
import os
import signal
import threading
import weakref
from pathlib import Path

import gpu_model
import numpy as np
import onnx
import onnxruntime

trt = None  # the module made from the record
deserialised = []  # the header of every plan that was read
compiled = []  # the shapes that TensorRT-RTX compiled kernels for
OPERATORS = json.loads((Path(__file__).parents[3] / "export" / "onnx_operators.json").read_text())
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")  # TensorRT's order; the record's is another
BASES = {"IHostMemory": bytes, "Logger": "ILogger"}  # what the record does not say
TYPES = {
    onnx.TensorProto.FLOAT: ("FLOAT", np.float32),
    onnx.TensorProto.FLOAT16: ("HALF", np.float16),
    onnx.TensorProto.UINT8: ("UINT8", np.uint8),
    onnx.TensorProto.INT32: ("INT32", np.int32),
    onnx.TensorProto.INT64: ("INT64", np.int64),
}


def _make(name, *values, **attributes):
    """An object that Python can't construct itself."""
    kind = getattr(trt, name)
    made = kind.__new__(kind, *values)
    for key, value in attributes.items():
        object.__setattr__(made, key, value)
    return made


def _is_rtx():
    return hasattr(trt, "ComputeCapability")


def _of_context(made):
    """Something that must be gone before the CUDA context is; TensorRT-RTX builds without one."""
    if _is_rtx() and gpu_model.stack_is_empty():
        return made
    gpu_model.current()._users.append(weakref.ref(made))
    return made


def _error(logger, message):
    logger.log(trt.ILogger.Severity.ERROR, message)


class IHostMemory:
    def __len__(self):
        raise TypeError("object of type 'tensorrt.IHostMemory' has no len()")

    nbytes = property(lambda self: memoryview(self).nbytes)


class Dims:
    def __len__(self):
        return len(self._values)

    def __getitem__(self, index):
        return self._values[index]


def _dims(values):
    return _make("Dims", _values=tuple(values))


class ILogger:
    pass


class Logger:
    def __init__(self, min_severity=None):
        pass

    def log(self, severity, msg):
        print(f"[TRT] {msg}")


class IProgressMonitor:
    pass


class Builder:
    def __init__(self, logger):
        self._logger = logger
        _of_context(self)

    def create_network(self, flags=0):
        assert flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED), "precision lives in the graph"
        return _of_context(_make("INetworkDefinition", _inputs=[], _onnx=None))

    def create_builder_config(self):
        flags = {trt.BuilderFlag.TF32}
        config = _make("IBuilderConfig", _flags=flags, _profiles=[], _limits={}, _cache=None, _logger=self._logger)
        config.__dict__.update(
            progress_monitor=None,
            builder_optimization_level=3,
            hardware_compatibility_level=trt.HardwareCompatibilityLevel.NONE,
        )
        if _is_rtx():
            config.__dict__.update(_capabilities={}, num_compute_capabilities=0)
        return _of_context(config)

    def create_optimization_profile(self):
        return _make("IOptimizationProfile", _shapes={})

    def build_serialized_network(self, network, config):
        if layer := os.environ.get("STANDIN_UNBUILDABLE"):
            _error(
                self._logger, f"Error Code 10: Internal Error (Could not find any\nimplementation for node {layer}.)"
            )
            _error(self._logger, "Error Code 2: Internal Error (Assertion failed)")
            return None
        if not self._check(network, config) or not self._steps(config.progress_monitor):
            return None
        if _is_rtx():
            assert config._cache is None and "REQUIRE_USER_ALLOCATION" in {flag.name for flag in config._flags}
            assert len(config._capabilities) == config.num_compute_capabilities
            bound = {"capabilities": list(config._capabilities.values())}
            timings = 0
        else:
            timings = len(config._cache._data)
            config._cache._data = b"%s tactics" % _fingerprint()
            bound = {"gpu": gpu_model.Device(0).name()}
        plan = {
            "tensorrt": trt.__version__,
            **bound,
            "profile": config._profiles[0]._shapes,
            "flags": sorted(flag.name for flag in config._flags),
            "hardware": config.hardware_compatibility_level.name,
            "level": config.builder_optimization_level,
            "limits": config._limits,
            "timings": timings,
        }
        return _make("IHostMemory", json.dumps(plan).encode() + b"\n" + network._onnx)

    def _check(self, network, config):
        for tensor in network._inputs:
            if -1 in tensor.shape:
                shapes = config._profiles[0]._shapes.get(tensor.name) if config._profiles else None
                if shapes is None or not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
                    _error(self._logger, "Network has dynamic or shape inputs, but no optimization profile")
                    return False
        return True

    def _steps(self, monitor):
        """Two phases, one inside the other, from a thread of TensorRT's own; False if the monitor stops them."""
        if monitor is None:
            return True
        interrupt = os.environ.get("STANDIN_INTERRUPT")
        outcome = []

        def work():
            monitor.phase_start("Building engine", None, 2)
            go_on = monitor.step_complete("Building engine", 0)
            monitor.phase_start("Timing graph nodes", "Building engine", 1000)
            if interrupt:
                os.kill(os.getpid(), signal.SIGINT)
            for step in range(1000 if interrupt else 3):
                go_on = go_on and monitor.step_complete("Timing graph nodes", step)
                if not go_on:
                    break
                if interrupt:
                    threading.Event().wait(0.06)
            if interrupt and go_on:
                os._exit(99)  # nothing stopped the build
            monitor.phase_finish("Timing graph nodes")
            monitor.phase_finish("Building engine")
            outcome.append(go_on)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return outcome[0]


def _fingerprint():
    return f"timings of {trt.__version__} on {gpu_model.Device(0).name()}:".encode()


class IBuilderConfig:
    def set_compute_capability(self, compute_capability, index):
        self._capabilities[index] = compute_capability.name
        return index < self.num_compute_capabilities

    def set_flag(self, flag):
        self._flags.add(flag)

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool, pool_size):
        self._limits[pool.name] = pool_size

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return _make("ITimingCache", _data=bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache._data and not cache._data.startswith(_fingerprint()) and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class ITimingCache:
    def serialize(self):
        return _make("IHostMemory", self._data)


class IOptimizationProfile:
    def set_shape(self, input, min, opt, max):
        self._shapes[input] = [list(min), list(opt), list(max)]


class INetworkDefinition:
    num_inputs = property(lambda self: len(self._inputs))

    def get_input(self, index):
        return self._inputs[index]


def _tensor(value):
    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return _make("ITensor", _name=value.name, _shape=shape, _type=TYPES[kind.elem_type])


class ITensor:
    name = property(lambda self: self._name)
    shape = property(lambda self: _dims(self._shape))
    dtype = property(lambda self: trt.DataType[self._type[0]])


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self._logger, self._errors = network, logger, []
        _of_context(self)

    def parse_from_file(self, model):
        graph = onnx.load(model)
        for number, node in enumerate(graph.graph.node):
            if not OPERATORS.get(node.op_type, {}).get("supported"):
                said = f"No importer registered for op: {node.op_type}"
                self._errors.append(_make("ParserError", _node=node, _number=number, _desc=said))
                _error(self._logger, f"In node {number}: {said}")
        self._network._inputs = [_tensor(value) for value in graph.graph.input]
        self._network._onnx = graph.SerializeToString()
        return not self._errors

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index):
        return self._errors[index]


class ParserError:
    def desc(self):
        return self._desc

    def node_name(self):
        return self._node.name

    def node_operator(self):
        return self._node.op_type


class Runtime:
    def __init__(self, logger):
        self._logger = logger
        self.__dict__["engine_host_code_allowed"] = False
        _of_context(self)

    def deserialize_cuda_engine(self, serialized_engine):
        head, _, graph = bytes(serialized_engine).partition(b"\n")
        plan = json.loads(head)
        deserialised.append(plan)
        is_portable = "VERSION_COMPATIBLE" in plan["flags"] and self.engine_host_code_allowed
        if plan["tensorrt"] != trt.__version__ and not is_portable:
            _error(self._logger, "Error Code 1: Serialization (Version tag does not match)")
            return None
        here = gpu_model.Device(0)
        if _is_rtx():
            if "SM{}{}".format(*here.compute_capability()) not in plan["capabilities"]:
                _error(self._logger, "Error Code 9: compute capability is not supported")
                return None
        elif plan["gpu"] != here.name() and plan["hardware"] == "NONE":
            _error(self._logger, "Error Code 6: the engine was built for another GPU")
            return None
        model = onnx.load_from_string(graph)
        tensors = {value.name: _tensor(value) for value in (*model.graph.input, *model.graph.output)}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        engine = _make(
            "ICudaEngine",
            _logger=self._logger,
            _profile=plan["profile"],
            _inputs={value.name for value in model.graph.input},
            _tensors=tensors,
            _session=onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]),
        )
        return _of_context(engine)


class ICudaEngine:
    num_io_tensors = property(lambda self: len(self._tensors))
    device_memory_size_v2 = property(lambda self: 4096)

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_shape(self, name):
        return self._tensors[name].shape

    def create_runtime_config(self):
        config = _make("IRuntimeConfig", _cache=None)
        config.__dict__["dynamic_shapes_kernel_specialization_strategy"] = None
        return _of_context(config)

    def create_execution_context(self, strategy):
        cache = None
        if _is_rtx():
            specialized = strategy.dynamic_shapes_kernel_specialization_strategy
            assert specialized is trt.DynamicShapesKernelSpecializationStrategy.EAGER
            strategy, cache = strategy._strategy, strategy._cache
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = _make("IExecutionContext", _engine=self, _logger=self._logger, _scratch=None, _enqueued=None)
        context.__dict__["_cache"] = cache
        fixed = {
            name: tuple(t.shape) for name, t in self._tensors.items() if name in self._inputs and -1 not in t.shape
        }
        context.__dict__.update(_shapes=fixed, _addresses={})
        return _of_context(context)


class IRuntimeConfig:
    def set_execution_context_allocation_strategy(self, strategy=None):
        self.__dict__["_strategy"] = strategy

    def create_runtime_cache(self):
        return _of_context(_make("IRuntimeCache", _data=_fingerprint()))

    def set_runtime_cache(self, cache=None):
        self.__dict__["_cache"] = cache
        return True


class IRuntimeCache:
    def deserialize(self, blob):
        if not bytes(blob).startswith(_fingerprint()):
            return False
        self.__dict__["_data"] = bytes(blob)
        return True

    def serialize(self):
        return _make("IHostMemory", self._data)

    def _compile(self, shape):
        kernels = f" kernels of {shape};".encode()
        if kernels not in self._data:
            self.__dict__["_data"] += kernels
            compiled.append(shape)


class IExecutionContext:
    def set_device_memory(self, memory, size):
        assert size >= self._engine.device_memory_size_v2
        self._scratch = memory, size

    def set_input_shape(self, name, shape):
        low, _, high = self._engine._profile.get(name) or [tuple(self._engine._tensors[name].shape)] * 3
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            _error(self._logger, f"Static dimension mismatch while setting input shape for {name}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        if name in self._engine._inputs:
            return _dims(self._shapes.get(name, self._engine.get_tensor_shape(name)))
        batch = next((self._shapes[n][0] for n in self._engine._profile if n in self._shapes), -1)
        return _dims(batch if d == -1 else d for d in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name, memory):
        if name not in self._engine._tensors:
            _error(self._logger, f"Given invalid tensor name: {name}")
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        engine, device = self._engine, gpu_model.current()
        stream = device._streams.get(stream_handle)
        for fault, message in (
            (stream is None, "invalid stream"),
            (self._scratch is None, "no device memory was set"),
            (engine._inputs - self._shapes.keys(), "an input's shape is not set"),
            (engine._tensors.keys() - self._addresses.keys(), "a tensor's address is not set"),
        ):
            if fault:
                _error(self._logger, f"IExecutionContext::enqueueV3: Error Code 3: API Usage Error ({message})")
                return False
        if stream._capture is not None and self._enqueued != self._shapes:
            _error(self._logger, "the shape changed: enqueue once before capturing")
            return False
        self._enqueued = dict(self._shapes)
        if self._cache is not None:
            self._cache._compile(self._shapes["image"])
        shapes = {name: tuple(self.get_tensor_shape(name)) for name in engine._tensors}
        addresses, scratch = dict(self._addresses), self._scratch

        def at(name):
            dtype = np.dtype(engine._tensors[name]._type[1])
            size = int(np.prod(shapes[name])) * dtype.itemsize
            return gpu_model.at(device, addresses[name], size).view(dtype).reshape(shapes[name])

        def run():
            gpu_model.at(device, *scratch)[:] = 1
            outputs = [name for name in shapes if name not in engine._inputs]
            results = engine._session.run(outputs, {name: at(name) for name in engine._inputs})
            for name, result in zip(outputs, results, strict=True):
                at(name)[...] = result

        stream._put(run, scratch[0], ("execution context", id(self)), *(addresses[n] for n in shapes if n != "text"))
        return True
