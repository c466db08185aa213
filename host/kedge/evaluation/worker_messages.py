"""Requests and answers of the tasks in :mod:`kedge.evaluation.worker_tasks`.

Arrays travel as paths of ``.npy`` files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.evaluation import metric
from kedge.evaluation.dataset import Data
from kedge.evaluation.latency_race import Latency as Latency
from kedge.evaluation.latency_race import RelativeLatency
from kedge.evaluation.outputs import OutputFigures
from kedge_protocol.bundle.config import Preprocess, RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.drift import Stream
from kedge_targets.contract import Estimate
from kedge_targets.executor import Executor
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.numerics import Plan
from kedge_targets.target import Target
from kedge_targets.true_precision import Numbers


@dataclass(frozen=True, kw_only=True)
class WarmRequest:
    """Load what a backend's compiler and runtime will need, while the parent still reads data.

    Attributes:
        metric: as :attr:`ReferenceRequest.metric`.
    """

    backend: str
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """An answer that says no more."""


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest:
    """Run the float model over the evaluation set.

    Attributes:
        metric: the ``--metric`` option, a file with its whole path.
        min_agreement: whether the user asked for answers to agree.
    """

    model: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    data: Data
    preprocess: dict[str, Preprocess]
    batch: int
    folder: str
    metric: str | None = None
    min_agreement: bool = False


@dataclass(frozen=True, kw_only=True)
class ReferenceAnswer:
    """What the float model gave: outputs as ``.npy`` files by name; ``score`` is its own."""

    choice: metric.Choice
    score: metric.Score
    outputs: dict[str, str]
    tools: dict[str, str]
    seconds: float

    @property
    def value(self) -> float:
        """The metric's."""
        return self.score.value


@dataclass(frozen=True, kw_only=True)
class LowerRequest:
    """Turn the graph into one backend's files."""

    graph: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    plan: Plan
    calibration: Data
    preprocess: dict[str, Preprocess]
    target: Target
    backend: str
    options: dict[str, Any]
    workdir: str


@dataclass(frozen=True, kw_only=True)
class LowerAnswer:
    """A :class:`kedge_targets.contract.Lowered` on the wire, with the caller's names, layouts and preprocessing."""

    files: dict[str, str]
    entry: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    runtimes: tuple[RuntimeRequirement, ...]
    verified: Verified
    tools: dict[str, str]
    runtime_options: dict[str, Any]
    seconds: dict[str, float]
    notes: tuple[str, ...]
    calibration_samples: int
    estimate: Estimate | None = None
    precision: str = ""
    floating: tuple[str, ...] = ()
    numbers: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """A lowered model, as an executor opens it; ``folder`` holds its files by title."""

    folder: str
    backend: str
    entry: str
    options: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def open(self, kernel_set: str | None = None) -> Executor:
        """Load it with one kernel set; None for the runtime's own choice."""
        return Executor(
            Path(self.folder),
            backend=self.backend,
            entry=self.entry,
            options=self.options,
            inputs=self.inputs,
            outputs=self.outputs,
            kernel_set=kernel_set,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Run a lowered model over the evaluation set and compare it with the float model.

    Attributes:
        states: carried from sample to sample where the data set has :attr:`~kedge.evaluation.dataset.Data.steps`.
    """

    program: Program
    data: Data
    choice: metric.Choice
    reference: dict[str, str]
    batch: int
    folder: str
    states: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluateAnswer:
    """What was measured on the very files; memory is the process's growth on load and first call (bytes).

    Attributes:
        agreement: share of the samples whose answers are the float model's; None where no output has answers.
        files: output name → ``.npy`` file of its answers, where the worker ran.
    """

    score: metric.Score
    memory_bytes: int
    seconds: float
    runtime: str
    agreement: float | None = None
    outputs: tuple[OutputFigures, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The metric's."""
        return self.score.value


@dataclass(frozen=True, kw_only=True)
class GoldenRequest:
    """Choose golden vectors, measure their tolerance over every kernel set, write them.

    Attributes:
        budget: bytes that their file may have.
    """

    program: Program
    eight_bits: bool
    data: Data
    batch: int
    file: str
    budget: int


@dataclass(frozen=True, kw_only=True)
class GoldenAnswer:
    """What the golden vectors are; ``form`` says how they were made small, where they were. ``drift`` is the
    distribution of the evaluation samples, of which the first kernel set gave the answers."""

    samples: int
    kernel_sets: tuple[str, ...]
    tolerances: dict[str, list[float]] = field(default_factory=dict)
    form: str = ""
    drift: tuple[Stream, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReferenceLatencyRequest:
    """Measure the latency of the float model on one sample."""

    model: str
    inputs: tuple[TensorInfo, ...]
    data: Data
    preprocess: dict[str, Preprocess]


@dataclass(frozen=True, kw_only=True)
class RaceRequest:
    """Measure lowered models on one sample, in turns with the float model.

    Attributes:
        seconds: that the race may take, about.
    """

    programs: tuple[Program, ...]
    reference: ReferenceLatencyRequest
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RaceAnswer:
    """Of each program its latency, and its pace beside the float model."""

    latencies: tuple[Latency, ...]
    paces: tuple[RelativeLatency, ...]
