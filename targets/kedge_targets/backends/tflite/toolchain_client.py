"""Talks to the toolchain's driver: one process, kept for all conversions of this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from kedge_targets.toolchain.client import ToolchainClient

T = TypeVar("T")

NAME = "tflite"

_START_SECONDS = 300.0
_CONVERT_SECONDS = 1800.0
_SECONDS_A_SAMPLE = 5.0


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
    wide: list[str] = field(default_factory=list)
    guard: bool = False
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class ConvertedTensor:
    """A tensor as stored in the file; see :class:`kedge_protocol.bundle.config.FileTensor`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The driver's answer to ``convert``.

    Attributes:
        inputs, outputs: tensors in the file's order.
        input_order: position in the file of each input of the graph.
        samples: number of calibration samples actually used.
        operators: number of operators, without those that only quantize.
        float_operators: names of those that compute in float, if the file is quantized.
        minimum_runtime: the oldest runtime that has all the operators' versions, according to TensorFlow; empty if it
            does not say.
        seconds: spans: ``graph`` (ONNX to TensorFlow), ``convert`` (TensorFlow to the file).
        floating: for int8, nodes of the graph that stay in float although this was not requested.
        decibels: for int8, each output's signal-to-noise ratio against the float file on calibration samples, in the
            file's order; None for integer outputs.
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


_client = ToolchainClient(NAME, start_seconds=_START_SECONDS)


def convert(request: ConvertRequest) -> Converted:
    """Convert a graph to one file.

    Raises:
        ToolchainError: the toolchain is not installed.
        UnsupportedOperatorError: an operator is not supported; names it and its node.
        LoweringError: anything else, with the vendor's own message.
    """
    return ask("convert", request, Converted, deadline=_CONVERT_SECONDS + _SECONDS_A_SAMPLE * request.samples)


def ask(task: str, request: Any, answer_type: type[T], *, deadline: float = _CONVERT_SECONDS) -> T:
    """Run one of the driver's tasks; raises the same errors as :func:`convert`."""
    return _client.call(task, request, answer_type, deadline=deadline)


def start() -> None:
    """Start loading the driver while the caller prepares the graph; :func:`convert` waits for it and reports if it
    cannot be loaded."""
    _client.start()


def versions() -> dict[str, str]:
    """Return the packages that the driver works with, and their versions."""
    return _client.versions()
