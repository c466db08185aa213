"""Talks to the toolchain's driver: one process, kept for all calls of this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kedge_targets.toolchain.client import ToolchainClient

NAME = "finn"

QONNX, FINN = "qonnx", "finn"
"""Dialects of :func:`execute`."""

_START_SECONDS = 300.0
_BUILD_SECONDS = 1800.0
_SECONDS_A_SAMPLE = 10.0


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """See the task ``build`` in ``toolchain/driver.py``."""

    graph: str
    folder: str
    board: str
    clock_mhz: float
    limits: dict[str, float]
    target_fps: float | None = None
    input_types: dict[str, str] = field(default_factory=dict)
    standalone_thresholds: bool = False


@dataclass(frozen=True, kw_only=True)
class Outside:
    """A node without a hardware layer.

    Attributes:
        place: ``before``, ``behind`` or ``between`` hardware layers.
        weights: number of its constant inputs.
    """

    name: str
    operator: str
    place: str
    weights: int


@dataclass(frozen=True, kw_only=True)
class HardwareLayer:
    """One layer in the fabric: cycles per sample, and resources (``LUT``, ``BRAM_18K``, ``URAM``, ``DSP``)."""

    name: str
    operator: str
    cycles: int
    resources: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost and speed of one folding; ``bottleneck`` names the slowest layer."""

    layers: tuple[HardwareLayer, ...]
    total: dict[str, float]
    max_cycles: int
    bottleneck: str
    latency_cycles: int
    frames_per_second: float
    latency_ms: float


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the driver made; only ``outside`` and ``seconds`` are set if there is no single partition.

    Attributes:
        streamlined, hardware, parent, child: ONNX files: the integer graph, the same as hardware layers, the graph
            around the partition, and the partition, folded.
        folding: FINN's folding configuration.
        reports: FINN's own estimates.
        fold: cost of the folding with the requested speed, or the fastest that fits, or the smallest.
        fits: whether this folding is within the limits.
        fastest: cost of the fastest folding that fits, as far as the search went.
        settings: settings of the board's driver.
        steps: steps of FINN's flow from the streamlined graph to a bitfile.
    """

    outside: tuple[Outside, ...]
    seconds: dict[str, float]
    streamlined: str = ""
    hardware: str = ""
    parent: str = ""
    child: str = ""
    folding: str = ""
    reports: tuple[str, ...] = ()
    fold: Cost | None = None
    fits: bool = False
    fastest: Cost | None = None
    tries: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    part: str = ""
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExecuteRequest:
    """See the task ``execute`` in ``toolchain/driver.py``."""

    model: str
    samples: str
    answers: str
    dialect: str = FINN


@dataclass(frozen=True, kw_only=True)
class Executed:
    """The number of samples, and the seconds that they took without loading the model."""

    samples: int
    seconds: float


_client = ToolchainClient(NAME, start_seconds=_START_SECONDS)


def build(request: BuildRequest) -> Built:
    """Map a graph to the fabric, fold it, and estimate its cost.

    Raises:
        ToolchainError: the toolchain is not installed.
        LoweringError: FINN fails; with its own message, and the node if it names one.
    """
    return _client.call("build", request, Built, deadline=_BUILD_SECONDS)


def execute(request: ExecuteRequest, samples: int) -> Executed:
    """Run a model with the tools' own executors: the reference for the simulator.

    Raises:
        ToolchainError: the toolchain is not installed.
        LoweringError: the executor fails; with its own message.
    """
    return _client.call("execute", request, Executed, deadline=_BUILD_SECONDS + _SECONDS_A_SAMPLE * samples)


def start() -> None:
    """Start loading the driver while the caller prepares the graph; :func:`build` waits for it and reports if it cannot
    be loaded."""
    _client.start()


def versions() -> dict[str, str]:
    """Return the packages that the driver works with, and their versions."""
    return _client.versions()
