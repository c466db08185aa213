"""The small part of depthai 3 that a camera's session uses: queues, messages, one camera.

The "firmware" is a function on FP16 arrays, given by a test. A test asks the real package whether it has every name of
this one (tests/integration/test_myriad_backend.py).
"""

# ruff: noqa: N802, N803, N818 -- the names are depthai's

from __future__ import annotations

import datetime
import enum
import json
import queue
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Firmware = Callable[[dict[str, Array]], "dict[str, Array] | None"]

__version__ = "3.0.0-fake"


class XLinkPlatform(enum.Enum):
    X_LINK_MYRIAD_X = 2480
    X_LINK_RVC4 = 4000


class TensorInfo:
    class DataType(enum.Enum):
        FP16 = 0
        U8F = 1
        INT = 2

    def __init__(self, name: str, dims: list[int], dataType: DataType) -> None:
        self.name, self.dims, self.dataType = name, dims, dataType


class NNData:
    """Tensors are kept as the bytes that travel."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[bytes, tuple[int, ...], npt.DTypeLike]] = {}

    def addTensor(self, name: str, tensor: Array, dataType: TensorInfo.DataType) -> None:
        if not 1 <= tensor.ndim <= 4:
            raise RuntimeError("Unsupported tensor shape. Only 1D, 2D, 3D and 4D tensors are supported")
        types_ = {"FP16": np.float16, "U8F": np.uint8, "INT": np.int32}
        dtype = types_[dataType.name]
        self._tensors[name] = (tensor.astype(dtype).tobytes(), tensor.shape, dtype)

    def getTensor(self, name: str) -> Array:
        raw, shape, dtype = self._tensors[name]
        made = np.frombuffer(raw, dtype).reshape(shape)
        return made.astype(np.float32 if made.dtype.kind == "f" else np.int32)

    def getAllLayerNames(self) -> list[str]:
        return list(self._tensors)


class OpenVINO:
    class Blob:
        """Of a file that :func:`blob` wrote."""

        def __init__(self, path: Path) -> None:
            try:
                made = json.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise RuntimeError(f"Cannot load blob: {error}") from error
            self.numShaves: int = made["shaves"]
            self.networkInputs = {
                name: TensorInfo(name, dims, TensorInfo.DataType[kind]) for name, (dims, kind) in made["inputs"].items()
            }
            self.networkOutputs = {
                name: TensorInfo(name, dims, TensorInfo.DataType[kind])
                for name, (dims, kind) in made["outputs"].items()
            }


def blob(path: Path, shaves: int, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Write what :class:`OpenVINO.Blob` reads: name → (dims, the fastest axis first; type)."""
    path.write_text(json.dumps({"shaves": shaves, "inputs": inputs, "outputs": outputs}), encoding="utf-8")


class MessageQueue:
    class QueueException(Exception):
        pass

    def __init__(self) -> None:
        self._messages: queue.Queue[NNData] = queue.Queue()
        self.closed = False

    def get(self, timeout: datetime.timedelta) -> NNData | None:
        if self.closed:
            raise MessageQueue.QueueException("MessageQueue was closed")
        try:
            # A test does not wait as long as a user would.
            return self._messages.get(timeout=min(timeout.total_seconds(), 0.05))
        except queue.Empty:
            return None


class InputQueue:
    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def send(self, msg: NNData) -> None:
        self._pipeline.run_firmware(msg)


class _Input:
    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def createInputQueue(self, maxSize: int = 16, blocking: bool = False) -> InputQueue:
        return InputQueue(self._pipeline)


class _Output:
    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def createOutputQueue(self, maxSize: int = 16, blocking: bool = False) -> MessageQueue:
        return self._pipeline.answers


class _NeuralNetwork:
    def __init__(self, pipeline: Pipeline) -> None:
        self.input, self.out = _Input(pipeline), _Output(pipeline)
        self.path: Path | None = None
        self.threads = 2

    def setBlobPath(self, path: Path) -> None:
        OpenVINO.Blob(path)
        self.path = path

    def setNumInferenceThreads(self, numThreads: int) -> None:
        self.threads = numThreads


node = types.SimpleNamespace(NeuralNetwork=_NeuralNetwork)


class Pipeline:
    def __init__(self, defaultDevice: Device) -> None:
        self.device = defaultDevice
        defaultDevice.pipeline = self
        self.answers = MessageQueue()
        self.network: _NeuralNetwork | None = None
        self.running = False

    def create(self, kind: type[_NeuralNetwork]) -> _NeuralNetwork:
        self.network = kind(self)
        return self.network

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False
        self.answers.closed = True

    def run_firmware(self, message: NNData) -> None:
        if not self.running or self.device.closed:
            raise RuntimeError("Communication exception - possible device error/misconfiguration")
        answer = self.device.firmware({name: message.getTensor(name) for name in message.getAllLayerNames()})
        if answer is None:
            return
        made = NNData()
        for name, array in answer.items():
            made.addTensor(name, array, TensorInfo.DataType.FP16)
        self.answers._messages.put(made)


class DeviceInfo:
    def __init__(self, platform: XLinkPlatform, *, busy: bool = False) -> None:
        self.platform, self.busy = platform, busy


class Device:
    connected: ClassVar[list[DeviceInfo]] = []
    firmware: Firmware = staticmethod(lambda inputs: inputs)
    opened: ClassVar[list[Device]] = []

    def __init__(self, deviceInfo: DeviceInfo) -> None:
        if deviceInfo.busy:
            raise RuntimeError("X_LINK_DEVICE_ALREADY_IN_USE")
        self.closed = False
        self.pipeline: Pipeline | None = None
        Device.opened.append(self)

    @staticmethod
    def getAllAvailableDevices() -> list[DeviceInfo]:
        return Device.connected

    def getDeviceName(self) -> str:
        return "OAK-D"

    def close(self) -> None:
        self.closed = True
