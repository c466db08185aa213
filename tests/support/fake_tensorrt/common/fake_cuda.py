"""The functions of cuda-python's runtime module that Kedge uses, over the simulated GPU."""

# ruff: noqa: N801, N802, N803, N815 -- the names are NVIDIA's

from __future__ import annotations

import enum
from typing import Any

from fake_gpu import DEVICE, GPU, PINNED, CudaFailed, Stream


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceProp:
    def __init__(self, name: str) -> None:
        self.name = name.encode().ljust(256, b"\0")


class cudaStream_t:
    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __int__(self) -> int:
        return self._handle


def _answer(function: Any, *arguments: Any) -> Any:
    try:
        found = function(*arguments)
    except CudaFailed as failed:
        return cudaError_t(failed.code), None
    return cudaError_t.cudaSuccess, found


def _stream(stream: cudaStream_t) -> Stream:
    try:
        return GPU.streams[int(stream)]
    except KeyError:
        raise CudaFailed(1) from None


def cudaGetErrorString(error: cudaError_t) -> Any:
    return cudaError_t.cudaSuccess, error.name.encode()


def cudaGetDeviceCount() -> Any:
    return (cudaError_t.cudaSuccess, 1) if GPU.name else (cudaError_t.cudaErrorNoDevice, None)


def cudaGetDeviceProperties(device: int) -> Any:
    return cudaError_t.cudaSuccess, cudaDeviceProp(GPU.name)


def cudaDeviceGetAttribute(attr: cudaDeviceAttr, device: int) -> Any:
    return cudaError_t.cudaSuccess, GPU.capability[attr - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]


def cudaMemGetInfo() -> Any:
    return cudaError_t.cudaSuccess, GPU.free, GPU.total


def cudaMalloc(size: int) -> Any:
    return _answer(GPU.allocate, DEVICE, size)


def cudaFree(devPtr: int) -> Any:
    return (_answer(GPU.release, DEVICE, devPtr)[0],)


def cudaMallocHost(size: int) -> Any:
    return _answer(GPU.allocate, PINNED, size)


def cudaFreeHost(ptr: int) -> Any:
    return (_answer(GPU.release, PINNED, ptr)[0],)


def cudaMemcpyAsync(dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: cudaStream_t) -> Any:
    ends = (DEVICE, PINNED) if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else (PINNED, DEVICE)

    def copy() -> None:
        GPU.copy((ends[0], dst), (ends[1], src), count, _stream(stream))

    return (_answer(copy)[0],)


def cudaStreamCreate() -> Any:
    handle = GPU.number()
    GPU.streams[handle] = Stream(handle)
    return cudaError_t.cudaSuccess, cudaStream_t(handle)


def cudaStreamSynchronize(stream: cudaStream_t) -> Any:
    return (_answer(lambda: _stream(stream).wait())[0],)


def cudaStreamDestroy(stream: cudaStream_t) -> Any:
    return (_answer(lambda: GPU.streams.pop(_stream(stream).handle))[0],)


def cudaStreamBeginCapture(stream: cudaStream_t, mode: cudaStreamCaptureMode) -> Any:
    def begin() -> None:
        _stream(stream).recording = []

    return (_answer(begin)[0],)


def cudaStreamEndCapture(stream: cudaStream_t) -> Any:
    def end() -> int:
        found = _stream(stream)
        if found.recording is None:
            raise CudaFailed(1)
        graph = GPU.number()
        GPU.graphs[graph] = found.recording
        found.recording = None
        return graph

    return _answer(end)


def cudaGraphInstantiate(graph: int, flags: int) -> Any:
    def instantiate() -> int:
        program = GPU.number()
        GPU.graphs[program] = list(GPU.graphs[graph])
        return program

    return _answer(instantiate)


def cudaGraphLaunch(graphExec: int, stream: cudaStream_t) -> Any:
    def launch() -> None:
        for work in GPU.graphs[graphExec]:
            _stream(stream).put(work)

    return (_answer(launch)[0],)


def cudaGraphDestroy(graph: int) -> Any:
    return (_answer(lambda: GPU.graphs.pop(graph))[0],)


def cudaGraphExecDestroy(graphExec: int) -> Any:
    return (_answer(lambda: GPU.graphs.pop(graphExec))[0],)
