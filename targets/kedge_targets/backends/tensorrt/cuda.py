"""Provides device memory, pinned memory, streams and graphs through NVIDIA's ``cuda-python``.

The same functions are in ``cuda.bindings.runtime`` (12.6 and later, the only place from 13 on) and in ``cuda.cudart``
(up to 12.9). Each returns a tuple: the error, then the results.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import MissingDependencyError, VerificationError

_MODULES = ("cuda.bindings.runtime", "cuda.cudart")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: NVIDIA's name, e.g. ``Orin``.
        capability: compute capability, e.g. ``8.7``.
        free_bytes: its free memory now. A Jetson's GPU shares the device's memory.
    """

    name: str
    capability: str
    free_bytes: int


@functools.cache
def library() -> Any:
    """Return ``cuda-python``'s runtime module.

    Raises:
        MissingDependencyError: ``cuda-python`` is not installed.
    """
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise MissingDependencyError(
        f"cuda-python cannot be loaded: {'; '.join(reasons)}",
        remedy="Install the cuda-python of the device's CUDA version (JetPack 6: pip install 'cuda-python==12.*')",
    )


def call(name: str, *arguments: Any) -> Any:
    """Call a function of CUDA's runtime; return what it returns besides the error, as a tuple if that is more than one
    value.

    Raises:
        VerificationError: CUDA reports an error; with CUDA's own message.
    """
    cuda = library()
    error, *answer = getattr(cuda, name)(*arguments)
    if int(error) != 0:
        raise VerificationError(f"CUDA fails in {name}: {_words(cuda, error)}")
    return answer[0] if len(answer) == 1 else tuple(answer)


def gpu() -> Gpu:
    """Return the GPU that CUDA chooses by default.

    Raises:
        MissingDependencyError: there is no cuda-python, no driver, or no GPU.
    """
    attribute = library().cudaDeviceAttr
    try:
        if call("cudaGetDeviceCount") < 1:
            raise MissingDependencyError("CUDA finds no GPU")
        major = call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, 0)
        minor = call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, 0)
        name = call("cudaGetDeviceProperties", 0).name
        free, _ = call("cudaMemGetInfo")
    except VerificationError as error:
        raise MissingDependencyError(
            f"no GPU can be used: {error.what}", remedy="See that the driver is loaded and this user is in group video"
        ) from error
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return Gpu(name=text.rstrip("\0").strip(), capability=f"{major}.{minor}", free_bytes=int(free))


class Buffer:
    """One tensor's memory, pinned on the host and on the device.

    Args:
        shape: the largest shape that the tensor will have.
        dtype: the tensor's dtype.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.device = 0
        self.pinned = 0
        self._dtype = np.dtype(dtype)
        self.capacity = max(1, _elements(shape)) * self._dtype.itemsize
        try:
            self.pinned = int(call("cudaMallocHost", self.capacity))
            self.device = int(call("cudaMalloc", self.capacity))
        except VerificationError:
            self.close()
            raise
        self.host: Array = self._view(shape)
        """The pinned memory as an array. It must not be used after :meth:`close`."""

    def reshape(self, shape: tuple[int, ...]) -> None:
        """Change the shape, to one no larger than the first."""
        if shape != self.host.shape:
            self.host = self._view(shape)

    def to_device(self, stream: Any) -> None:
        """Enqueue a copy to the device on the stream."""
        kind = library().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", self.device, self.pinned, self.host.nbytes, kind, stream)

    def to_host(self, stream: Any) -> None:
        """Enqueue a copy to the host on the stream."""
        kind = library().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", self.pinned, self.device, self.host.nbytes, kind, stream)

    def close(self) -> None:
        """Free the memory on the host and on the device."""
        device, pinned = self.device, self.pinned
        self.device = self.pinned = 0
        if device:
            call("cudaFree", device)
        if pinned:
            call("cudaFreeHost", pinned)

    def _view(self, shape: tuple[int, ...]) -> Array:
        raw = memoryview((ctypes.c_byte * self.capacity).from_address(self.pinned))
        found: Array = np.frombuffer(raw, dtype=self._dtype, count=_elements(shape)).reshape(shape)
        return found


class Stream:
    """A stream, and the graph that was recorded from it, if any."""

    def __init__(self) -> None:
        self.handle = call("cudaStreamCreate")
        self._graph: Any = None
        self._program: Any = None

    def __int__(self) -> int:
        return int(self.handle)

    def wait(self) -> None:
        """Wait until all enqueued work is done."""
        call("cudaStreamSynchronize", self.handle)

    def begin(self) -> None:
        """Start recording; work enqueued from now on is recorded, not run."""
        # Of this thread only: another thread's CUDA calls go on meanwhile.
        mode = library().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.handle, mode)

    def end(self) -> None:
        """End the recording, which :meth:`launch` then runs."""
        self._graph = call("cudaStreamEndCapture", self.handle)
        self._program = call("cudaGraphInstantiate", self._graph, 0)

    def abandon(self) -> None:
        """End a failed recording; any error that CUDA reports about it is ignored."""
        library().cudaStreamEndCapture(self.handle)

    def launch(self) -> None:
        """Enqueue the recorded work on the stream."""
        call("cudaGraphLaunch", self._program, self.handle)

    def close(self) -> None:
        """Free the stream and its graph."""
        if self._program is not None:
            call("cudaGraphExecDestroy", self._program)
        if self._graph is not None:
            call("cudaGraphDestroy", self._graph)
        self._program = self._graph = None
        if self.handle is not None:
            call("cudaStreamDestroy", self.handle)
        self.handle = None


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _words(cuda: Any, error: Any) -> str:
    _, text = cuda.cudaGetErrorString(error)
    words = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return f"{words} ({int(error)})"
