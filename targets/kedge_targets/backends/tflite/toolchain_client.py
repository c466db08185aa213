"""Talking to the toolchain's driver: one process, kept for all conversions of this process."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kedge_protocol.errors import KedgeError, LoweringError, WorkerError
from kedge_targets import toolchain
from kedge_targets.toolchain.installation import Versions
from kedge_targets.worker import Worker

T = TypeVar("T")

NAME = "tflite"

_START_SECONDS = 300.0
_CONVERT_SECONDS = 1800.0
_SECONDS_A_SAMPLE = 5.0
_MEMORY_SHARE = 0.8  # of the machine's


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """See the task ``convert`` in ``toolchain/driver.py``."""

    graph: str
    keep: list[str]
    precision: str
    file: str
    calibration: list[str] = field(default_factory=list)
    samples: int = 0
    group: int = 1
    orders: list[list[int]] = field(default_factory=list)
    floating: list[str] = field(default_factory=list)
    guard: bool = False
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class ConvertedTensor:
    """A tensor as the file really has it; see :class:`kedge_protocol.bundle.config.FileTensor`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What the driver made.

    Attributes:
        inputs, outputs: in the file's order.
        input_order: for each input of the graph its position in the file.
        samples: of the calibration, really used.
        operators: how many there are, without those that only quantize.
        float_operators: names of those that compute in float, where the file is quantized.
        minimum_runtime: the oldest runtime that has all the operators' versions, as TensorFlow says; empty where it
            does not.
        seconds: spans: ``graph`` (ONNX to TensorFlow), ``convert`` (TensorFlow to the file).
        floating: of int8, nodes of the graph that stay in float though nobody asked for it.
        decibels: of int8, each output's signal-to-noise ratio against the float file on calibration samples, in the
            file's order; None of integers.
    """

    inputs: tuple[ConvertedTensor, ...]
    outputs: tuple[ConvertedTensor, ...]
    input_order: tuple[int, ...]
    samples: int
    operators: int
    float_operators: tuple[str, ...]
    minimum_runtime: str
    seconds: dict[str, float]
    floating: tuple[str, ...] = ()
    decibels: tuple[float | None, ...] = ()


_lock = threading.Lock()
_kept: dict[Path, tuple[Worker, Versions]] = {}


def convert(request: ConvertRequest) -> Converted:
    """Make one file.

    Raises:
        ToolchainError: it is not installed.
        UnsupportedOperatorError: names the operator and its node.
        LoweringError: all else, with the vendor's own words.
    """
    return ask("convert", request, Converted, deadline=_CONVERT_SECONDS + _SECONDS_A_SAMPLE * request.samples)


def ask(task: str, request: Any, answer_type: type[T], *, deadline: float = _CONVERT_SECONDS) -> T:
    """Run one of the driver's tasks; raises as :func:`convert`."""
    worker, _ = _driver()
    try:
        return worker.call(task, request, answer_type, deadline=deadline)
    except WorkerError as error:
        raise LoweringError(error.what, where=error.where, remedy=error.remedy) from error


def start() -> None:
    """Begin to load the driver while the caller prepares the graph; :func:`convert` waits for it, and says so if it
    cannot be loaded."""

    def load() -> None:
        with contextlib.suppress(KedgeError):
            _driver()

    threading.Thread(target=load, name="kedge-driver-start", daemon=True).start()


def versions() -> dict[str, str]:
    """The packages that the driver works with, and their versions."""
    return dict(_driver()[1].packages)


def _driver() -> tuple[Worker, Versions]:
    """The running driver: loading TensorFlow takes longer than converting a small model."""
    installed = toolchain.find(NAME)
    with _lock:
        if installed.folder not in _kept:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            worker = installed.worker(memory_limit=int(memory * _MEMORY_SHARE))
            atexit.register(worker.close)
            try:
                found = worker.call("version", {}, Versions, deadline=_START_SECONDS)
            except WorkerError as error:
                raise LoweringError(error.what, where=error.where, remedy=error.remedy) from error
            _kept[installed.folder] = (worker, found)
        return _kept[installed.folder]
