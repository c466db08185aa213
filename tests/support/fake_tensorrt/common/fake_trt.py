"""What the three fake TensorRT packages share. An engine is the ONNX file with what it was built for, and ONNX Runtime
computes it, so that the numbers are real. Whatever the real one refuses, and Kedge relies on, is refused too.

How it misbehaves stands in environment variables; ``KIND`` is ``int8`` (the graph has QuantizeLinear) or ``fp16``:

    FAKE_TENSORRT_BUILD  ``KIND:how``: ``hang``, ``eat`` (memory), ``crash``, ``refuse``, ``no_memory`` of the GPU
    FAKE_TENSORRT_SLOW   ``KIND``: its engines take 20 ms more
    FAKE_TENSORRT_WRONG  ``KIND``: its engines answer wrongly
    FAKE_TENSORRT_LOG    a file: one line is added for each build and each engine that is deserialized
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import signal
import time
import zlib
from typing import Any

import numpy as np
from fake_gpu import DEVICE, GPU

MAGIC = b"FAKEENGINE"


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5


_NUMPY = {
    DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT8: np.int8, DataType.INT32: np.int32,
    DataType.BOOL: np.bool_, DataType.UINT8: np.uint8,
}  # fmt: skip


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


def nptype(trt_type: DataType) -> Any:
    return _NUMPY[trt_type]


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        # pybind11 refuses to use an object whose base was not initialized.
        self._initialized = True


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return logger._initialized


class IHostMemory:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data

    @property
    def nbytes(self) -> int:
        return len(self._data)


class IOptimizationProfile:
    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002 -- NVIDIA's names
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError("Inconsistent shapes")
        self._shapes[input] = [list(min), list(opt), list(max)]


class Parsed:
    """An ONNX file as the fake sees it."""

    def __init__(self, raw: bytes) -> None:
        import onnx
        from onnx import numpy_helper

        self.raw = raw
        self.model = onnx.load_model_from_string(raw)
        graph = self.model.graph
        self.constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        self.inputs = {item.name: item for item in graph.input if item.name not in self.constants}
        self.outputs = {item.name: item for item in graph.output}
        self.quantized = any(node.op_type == "QuantizeLinear" for node in graph.node)
        self.half = any(item.data_type == onnx.TensorProto.FLOAT16 for item in graph.initializer)

    @property
    def kind(self) -> str:
        return "int8" if self.quantized else "fp16"

    def refused(self, *, int8_weights: bool) -> tuple[int, str, str] | None:
        """``(number, name, reason)`` of the first node that NVIDIA's parser refuses (seen with tensorrt-rtx 1.7)."""
        for number, node in enumerate(self.model.graph.node):
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            if node.op_type == "DequantizeLinear" and self._dtype(node.input[0]) == np.int32:
                return number, node.name, "DequantizeLinear: input has type Int32"
            if node.op_type == "DequantizeLinear" and self._dtype(node.input[0]) == np.int8 and not int8_weights:
                return number, node.name, "TensorRT does not support int8 constants"
            if len(node.input) > 2 and (self._dtype(node.input[2]) != np.int8 or self.constants[node.input[2]].any()):
                return number, node.name, "only int8 with zero-point 0 is supported"
        return None

    def _dtype(self, name: str) -> Any:
        return self.constants[name].dtype if name in self.constants else None


def shape_of(item: Any) -> list[int]:
    return [axis.dim_value or -1 for axis in item.type.tensor_type.shape.dim]


class ITensor:
    __slots__ = ("name", "shape")

    def __init__(self, name: str, shape: list[int]) -> None:
        self.name = name
        self.shape = shape


class INetworkDefinition:
    __slots__ = ("_flags", "_parsed")

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._parsed: Parsed | None = None

    def _tensors(self, which: str) -> list[ITensor]:
        return [ITensor(name, shape_of(item)) for name, item in getattr(self._parsed, which).items()]

    @property
    def num_inputs(self) -> int:
        return len(self._tensors("inputs"))

    @property
    def num_outputs(self) -> int:
        return len(self._tensors("outputs"))

    def get_input(self, index: int) -> ITensor:
        return self._tensors("inputs")[index]

    def get_output(self, index: int) -> ITensor:
        return self._tensors("outputs")[index]


class ParserError:
    """10 and later know the node's name, 8.6 its number."""

    def __init__(self, number: int, name: str, text: str) -> None:
        self._number, self._name, self._text = number, name, text

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return self._number


class OnnxParser:
    ERROR: type[ParserError] = ParserError
    EXPLICIT_BATCH = 0  # bits of a network that 8.6's parser insists on
    INT8_WEIGHTS = True

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    def parse(self, model: bytes, path: str | None = None) -> bool:
        if self._network._flags & self.EXPLICIT_BATCH != self.EXPLICIT_BATCH:
            self._errors = [self.ERROR(-1, "", "only networks with an explicit batch dimension are supported")]
            return False
        parsed = Parsed(model)
        if refused := parsed.refused(int8_weights=self.INT8_WEIGHTS):
            self._errors = [self.ERROR(*refused)]
            return False
        self._network._parsed = parsed
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IBuilderConfig:
    __slots__ = ("_flags", "_pool", "_profiles")

    def __init__(self) -> None:
        self._flags: set[str] = set()
        self._pool: dict[Any, int] = {}
        self._profiles: list[IOptimizationProfile] = []

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        if pool_size <= 0:
            raise ValueError("no workspace")
        self._pool[pool] = pool_size

    def set_flag(self, flag: enum.IntEnum) -> None:
        self._flags.add(flag.name)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


def logged(what: str, kind: str) -> None:
    if path := os.environ.get("FAKE_TENSORRT_LOG"):
        with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123 -- a fake of a compiled package
            file.write(f"{what} {kind}\n")


class Builder:
    """Subclasses say of which version they are and make their own kinds of networks and settings."""

    VERSION = ""
    STRONGLY_TYPED = 0
    """Bit of the network's flag; 0 where there is none. -1: every network is."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        parsed = network._parsed
        if parsed is None:
            return self._fail("the network has no layers")
        logged("build", parsed.kind)
        self._misbehave(parsed.kind)
        if os.environ.get("FAKE_TENSORRT_BUILD") in (f"{parsed.kind}:refuse", f"{parsed.kind}:no_memory"):
            text = (
                "Could not find any implementation for node"
                if "refuse" in os.environ["FAKE_TENSORRT_BUILD"]
                else ("Requested amount of GPU memory could not be allocated (out of memory)")
            )
            return self._fail(text)
        if reason := self._typed_wrongly(network, config, parsed):
            return self._fail(reason)
        profile = config._profiles[0]._shapes if config._profiles else {}
        for name, item in parsed.inputs.items():
            if -1 in shape_of(item) and name not in profile:
                return self._fail(f"Network has dynamic input {name} but no optimization profile has been defined")
        self._steps(config)
        head = {"version": self.VERSION, "capability": GPU.capability, "kind": parsed.kind, "profile": profile}
        body = json.dumps(head).encode() + b"\n" + parsed.raw
        return IHostMemory(MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)

    def _typed_wrongly(self, network: INetworkDefinition, config: IBuilderConfig, parsed: Parsed) -> str | None:
        strongly = self.STRONGLY_TYPED == -1 or bool(network._flags & self.STRONGLY_TYPED)
        if strongly:
            return "precision flags in a strongly typed network" if {"FP16", "INT8"} & config._flags else None
        if parsed.quantized and "INT8" not in config._flags:
            return "Q/DQ layers without BuilderFlag.INT8"
        if parsed.half and "FP16" not in config._flags:
            return "half-precision layers without BuilderFlag.FP16"
        return None

    def _steps(self, config: IBuilderConfig) -> None:
        """10 and later tell the progress monitor."""

    def _fail(self, text: str) -> None:
        self._logger.log(Severity.ERROR, text)

    def _misbehave(self, kind: str) -> None:
        how = os.environ.get("FAKE_TENSORRT_BUILD", "")
        if how == f"{kind}:hang":
            time.sleep(600)
        if how == f"{kind}:crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == f"{kind}:eat":
            held = []
            while True:
                held.append(np.ones(4 << 20, dtype=np.uint8))
                time.sleep(0.01)


class Runtime:
    VERSION = ""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        data = bytes(serialized_engine)
        body = data[len(MAGIC) + 4 :]
        checksum = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "little")
        if not data.startswith(MAGIC) or zlib.crc32(body) != checksum:
            # The real one runs what it reads: nothing that was tampered with may come here.
            logged("foreign", "engine")
            os.abort()
        head, _, graph = body.partition(b"\n")
        told = json.loads(head)
        if told["version"] != self.VERSION or tuple(told["capability"]) != GPU.capability:
            self._logger.log(Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        logged("deserialize", told["kind"])
        return ICudaEngine(Parsed(graph), told["profile"], self._logger)


class ICudaEngine:
    def __init__(self, parsed: Parsed, profile: dict[str, Any], logger: Any) -> None:
        self._parsed = parsed
        self._profile = profile
        self._logger = logger

    def _item(self, name: str) -> Any:
        return (self._parsed.inputs | self._parsed.outputs)[name]

    def get_tensor_shape(self, name: str) -> list[int]:
        return shape_of(self._item(name))

    def get_tensor_dtype(self, name: str) -> DataType:
        import onnx

        element = self._item(name).type.tensor_type.elem_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        return next(kind for kind, numpy in _NUMPY.items() if numpy == dtype)

    def create_execution_context(self) -> IExecutionContext | None:
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        import onnxruntime

        self._engine = engine
        self._parsed = engine._parsed
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._parsed.raw, settings, providers=["CPUExecutionProvider"])
        self._addresses: dict[str, int] = {}
        self._shapes = {name: shape_of(item) for name, item in self._parsed.inputs.items()}
        self._ran = False

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine._profile.get(name, [self._shapes[name]] * 3)
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return self._fail(f"shape of {name} is out of the profile's bounds")
        self._shapes[name] = list(shape)
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        if name in self._shapes:
            return self._shapes[name]
        shape = shape_of(self._parsed.outputs[name])
        if -1 in shape and not any(-1 in found for found in self._shapes.values()):
            # The fake knows free batches only.
            return [next(iter(self._shapes.values()))[0], *shape[1:]]
        return shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._parsed.inputs and name not in self._parsed.outputs:
            return self._fail(f"there is no tensor {name}")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = GPU.streams[stream_handle]
        missing = [n for n in (*self._parsed.inputs, *self._parsed.outputs) if n not in self._addresses]
        if missing or any(-1 in shape for shape in self._shapes.values()):
            return self._fail(f"address or shape of {missing} is not set")
        if stream.recording is not None and not self._ran:
            return self._fail("the first call cannot be captured")
        self._ran = True
        names = list(self._parsed.outputs)
        shapes = {name: tuple(self.get_tensor_shape(name)) for name in (*self._parsed.inputs, *names)}
        addresses = dict(self._addresses)

        def work() -> None:
            views = {name: self._view(addresses[name], name, shapes[name]) for name in shapes}
            found = self._session.run(names, {name: views[name] for name in self._parsed.inputs})
            if os.environ.get("FAKE_TENSORRT_SLOW") == self._parsed.kind:
                time.sleep(0.02)
            for name, array in zip(names, found, strict=True):
                wrong = os.environ.get("FAKE_TENSORRT_WRONG") == self._parsed.kind
                views[name][...] = array + 1 if wrong else array

        stream.put(work)
        return True

    def _view(self, address: int, name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_NUMPY[self._engine.get_tensor_dtype(name)])
        size = int(np.prod(shape)) * dtype.itemsize
        GPU.check(DEVICE, address, size)
        return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype).reshape(shape)

    def _fail(self, text: str) -> bool:
        self._engine._logger.log(Severity.ERROR, text)
        return False
