"""A simulated GPU: its memory, its streams, its graphs. Work that is put on a stream is done when the stream is waited
for and not before, so that code which forgets to wait, or frees too early, gets wrong results.

What it is and how it misbehaves stands in environment variables, for children get those:

    FAKE_GPU            its name, ``Orin``; empty for no GPU
    FAKE_GPU_CAPABILITY compute capability, ``8.7``
    FAKE_GPU_BYTES      of its memory, 1 GiB
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

DEVICE, PINNED = "device", "pinned"


class CudaFailed(Exception):  # noqa: N818 -- carries a code, is never seen outside
    """``code`` is CUDA's error number."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Stream:
    """Work in order; while it is recorded, nothing is done."""

    handle: int
    queue: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def wait(self) -> None:
        if self.recording is not None:
            raise CudaFailed(900)  # cudaErrorStreamCaptureUnsupported
        queue, self.queue = self.queue, []
        for work in queue:
            work()


class Gpu:
    """One process's view of it."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[str, Any, int]] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._next = 1000

    @property
    def name(self) -> str:
        return os.environ.get("FAKE_GPU", "Orin")

    @property
    def capability(self) -> tuple[int, int]:
        major, _, minor = os.environ.get("FAKE_GPU_CAPABILITY", "8.7").partition(".")
        return int(major), int(minor)

    @property
    def total(self) -> int:
        return int(os.environ.get("FAKE_GPU_BYTES", str(1 << 30)))

    @property
    def free(self) -> int:
        return self.total - sum(size for kind, _, size in self.blocks.values() if kind == DEVICE)

    def number(self) -> int:
        self._next += 1
        return self._next

    def allocate(self, kind: str, size: int) -> int:
        if kind == DEVICE and size > self.free:
            raise CudaFailed(2)  # cudaErrorMemoryAllocation
        block = (ctypes.c_byte * size)(*([0x5A] * min(size, 64)))
        address = ctypes.addressof(block)
        self.blocks[address] = (kind, block, size)
        return address

    def release(self, kind: str, address: int) -> None:
        if self.blocks.get(address, ("",))[0] != kind:
            raise CudaFailed(1)  # cudaErrorInvalidValue
        del self.blocks[address]

    def check(self, kind: str, address: int, size: int) -> None:
        """That the bytes lie within one block of this kind."""
        for start, (found, _, length) in self.blocks.items():
            if found == kind and start <= address and address + size <= start + length:
                return
        raise CudaFailed(700)  # cudaErrorIllegalAddress

    def copy(self, target: tuple[str, int], source: tuple[str, int], size: int, stream: Stream) -> None:
        self.check(*target, size)
        self.check(*source, size)

        def work() -> None:
            self.check(*target, size)
            self.check(*source, size)
            ctypes.memmove(target[1], source[1], size)

        stream.put(work)


GPU = Gpu()
