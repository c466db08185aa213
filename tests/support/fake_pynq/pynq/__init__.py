"""A stand-in for PYNQ with a board behind it: an ``Overlay`` whose DMA registers move data through a simulated fabric.

FINN's own driver runs on it unmodified. A "bitfile" is what :func:`tests.support.fabric.synthesized` writes. As on a
real board there is one fabric: whatever was downloaded last, by whichever process, computes. Buffers have memory of the
host and memory of the device; only ``flush`` and ``invalidate`` move data between them.

``FAKE_PYNQ_STATE`` names the file that holds what is in the fabric; ``FAKE_PYNQ_LOG`` one that tells what was done.
``FAKE_PYNQ_DEVICES=0`` is a machine with PYNQ and no board.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pynq import fabric

_BUFFERS: dict[int, PynqBuffer] = {}


class PynqBuffer(np.ndarray):
    """A buffer that DMA can reach."""

    device_address: int
    device_memory: bytearray

    def flush(self) -> None:
        self.device_memory[:] = self.tobytes()

    def invalidate(self) -> None:
        self[...] = np.frombuffer(bytes(self.device_memory), dtype=self.dtype).reshape(self.shape)


def allocate(shape: Any, dtype: Any = "u4", target: Any = None, cacheable: bool = True) -> PynqBuffer:
    buffer = np.zeros(shape, dtype=dtype).view(PynqBuffer)
    buffer.device_memory = bytearray(os.urandom(buffer.nbytes))
    buffer.device_address = 0x1_1000_0000 + 0x100_0000 * len(_BUFFERS)
    _BUFFERS[buffer.device_address] = buffer
    return buffer


class Bitstream:
    """Other overlays of the driver import the name; nothing here needs one."""


class _Dma:
    """Registers of one DMA: 0x00 control, 0x10 and 0x14 the address, 0x1c samples."""

    def __init__(self, started: Any) -> None:
        self.registers = {0x00: 0x4, 0x10: 0, 0x14: 0, 0x1C: 0}
        self._started = started

    def read(self, offset: int = 0) -> int:
        value = self.registers[offset]
        if offset == 0x00:
            self.registers[0x00] &= ~0x2  # done is cleared by reading
        return value

    def write(self, offset: int, value: int) -> None:
        self.registers[offset] = value
        if offset == 0x00 and value & 1:
            self.registers[0x00] = 0x1
            self._started()

    def done(self) -> None:
        self.registers[0x00] = 0x4 | 0x2

    @property
    def memory(self) -> bytearray:
        return _BUFFERS[self.registers[0x10] | self.registers[0x14] << 32].device_memory


class _Devices(type):
    @property
    def devices(cls) -> list[str]:
        return [] if os.environ.get("FAKE_PYNQ_DEVICES") == "0" else ["fake"]


class Device(metaclass=_Devices):
    """The boards that there are."""


class Overlay:
    """A bitstream with one DMA in and one out."""

    def __init__(self, bitfile_name: str, download: bool = True, device: Any = None, **_: Any) -> None:
        if not Device.devices:
            raise RuntimeError("No Devices Found")
        if not Path(bitfile_name).with_suffix(".hwh").exists():
            raise RuntimeError(f"Unable to find metadata for {bitfile_name}")
        self.bitfile_name = bitfile_name
        self.device = device
        self.ip_dict = {"idma0": {}, "odma0": {}}
        self.idma0, self.odma0 = _Dma(self._feed), _Dma(lambda: None)
        if download:
            self.download()

    def download(self, *_: Any) -> None:
        fabric.configure(Path(self.bitfile_name))
        _tell(f"download {Path(self.bitfile_name).name}")

    def _feed(self) -> None:
        assert self.odma0.registers[0x00] & 0x1, "data came and nobody waits for the answer"
        count = self.idma0.registers[0x1C]
        assert count == self.odma0.registers[0x1C]
        answer = fabric.stream(bytes(self.idma0.memory), count)
        self.odma0.memory[: len(answer)] = answer
        self.idma0.done()
        self.odma0.done()
        _tell(f"run {count}")


def _tell(line: str) -> None:
    if path := os.environ.get("FAKE_PYNQ_LOG"):
        with Path(path).open("a") as log:
            log.write(line + "\n")
