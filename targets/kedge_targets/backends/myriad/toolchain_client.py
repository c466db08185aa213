"""Talks to the toolchain's driver, which knows what its compiler takes and makes the blobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kedge_targets import toolchain
from kedge_targets.toolchain.client import lowering_errors
from kedge_targets.toolchain.installation import Versions
from kedge_targets.worker import Worker

NAME = "myriad"

_START_SECONDS = 120.0
_QUERY_SECONDS = 300.0
_COMPILE_SECONDS = 1200.0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the graph: its name, and its type in OpenVINO."""

    name: str
    type: str


@dataclass(frozen=True, kw_only=True)
class Queried:
    """The layers that the compiler does not take, in the graph's order."""

    unsupported: tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class BlobTensor:
    """An input or output of a blob as depthai reads it.

    Attributes:
        shape: shape, slowest axis first.
        dtype: depthai's name: ``FP16``, ``U8F``, ``INT``.
        order: depthai's name for the axes' order, ``NCHW``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    order: str


@dataclass(frozen=True, kw_only=True)
class Blob:
    """One compiled blob, as depthai reads it."""

    shaves: int
    file: str
    inputs: tuple[BlobTensor, ...]
    outputs: tuple[BlobTensor, ...]
    stages: int


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The answer to ``compile``."""

    blobs: tuple[Blob, ...]


class Driver:
    """The running toolchain."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def versions(self) -> dict[str, str]:
        """Return the packages that it works with, and their versions."""
        return dict(self._worker.call("version", {}, Versions, deadline=_START_SECONDS).packages)

    def unsupported(self, model: Path) -> tuple[Layer, ...]:
        """Return the layers of an ``.xml`` that the compiler does not take, according to its own query.

        Raises:
            LoweringError: the old release cannot read the graph; with its own message.
        """
        request = {"model": str(model)}
        return self._worker.call("query", request, Queried, deadline=_QUERY_SECONDS).unsupported

    def compile(self, model: Path, shaves: tuple[int, ...], folder: Path) -> tuple[Blob, ...]:
        """Compile one ``model-SHAVES.blob`` in ``folder`` for each number of SHAVEs.

        Raises:
            LoweringError: the compiler fails, with its own message; or depthai does not parse the result.
        """
        request = {"model": str(model), "shaves": list(shaves), "folder": str(folder)}
        return self._worker.call("compile", request, Compiled, deadline=_COMPILE_SECONDS).blobs


@contextlib.contextmanager
def driver() -> Iterator[Driver]:
    """Provide the driver for the duration of the block.

    Raises:
        ToolchainError: the toolchain is not installed, or libusb is not.
        LoweringError: the driver crashed or exceeded its time limit.
    """
    with toolchain.find(NAME).worker() as worker, lowering_errors():
        yield Driver(worker)
