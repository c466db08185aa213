"""Requests and answers of the tasks in :mod:`kedge.search.worker_tasks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kedge.evaluation import metric
from kedge.evaluation.changes import Change
from kedge.evaluation.dataset import Data
from kedge.evaluation.kinds import ClassifiedOutput
from kedge.evaluation.preview import Preview
from kedge.evaluation.worker_messages import Latency
from kedge_protocol.bundle.config import Preprocess
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.numerics import Plan, Precision, QuantizationScheme


@dataclass(frozen=True, kw_only=True)
class StepRequest:
    """A request to run one step over a graph; see :class:`kedge.step.Context`.

    Attributes:
        graph, made: paths of the input graph, and of the graph that is written.
        teacher: path of the original float model.
        memo: folder that runs of the step over the same graph with the same options share.
        seconds: how long the step may take.
    """

    use: str
    options: dict[str, Any]
    graph: str
    made: str
    teacher: str
    plan: Plan
    inputs: tuple[TensorInfo, ...]
    calibration: Data
    preprocess: dict[str, Preprocess]
    seed: int
    fixed_batch: bool
    workdir: str
    memo: str | None = None
    checkpoints: str | None = None
    loss: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepAnswer:
    """The notes and figures of a step."""

    notes: tuple[str, ...]
    figures: dict[str, float]
    ranges: dict[str, tuple[float, ...]]
    layers: dict[str, Precision]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """A request to run a float graph (or one with QONNX's nodes) by ONNX Runtime over the evaluation set."""

    graph: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    data: Data
    preprocess: dict[str, Preprocess]
    choice: metric.Choice
    reference: dict[str, str]
    batch: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class ScoreAnswer:
    """The score of a float graph."""

    value: float
    size_bytes: int
    latency_ms: Latency


@dataclass(frozen=True, kw_only=True)
class StepEntry:
    """One step of a candidate for the report: its cost in accuracy, and its savings in bytes and milliseconds.

    Attributes:
        use, options: as in the recipe.
        value: the metric of the graph after the step, in float by ONNX Runtime; ``drop`` against the float model.
        size_bytes: of the graph after the step; ``latency_ms`` on the host.
        figures, notes: given by the step itself.
    """

    use: str
    options: dict[str, Any]
    value: float
    drop: float
    size_bytes: int
    latency_ms: Latency
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChangesRequest:
    """A request for the evaluation samples that a bundle changed most; see :mod:`kedge.evaluation.changes`.

    Attributes:
        outputs: output name → ``.npy`` file of the bundle; ``reference`` of the float model.
        kinds: the kind of each output.
        precision: of the quantized layers, to find the layer that changes a sample; None if none is quantized.
        floating: layers left in float.
        seconds: approximate time for finding the layers.
    """

    graph: str
    inputs: tuple[TensorInfo, ...]
    calibration: Data
    evaluation: Data
    preprocess: dict[str, Preprocess]
    outputs: dict[str, str]
    reference: dict[str, str]
    kinds: tuple[ClassifiedOutput, ...]
    precision: Precision | None = None
    quantized: QuantizationScheme | None = None
    floating: tuple[str, ...] = ()
    seconds: float = 8.0


@dataclass(frozen=True, kw_only=True)
class ShownChange:
    """A sample that changed, with previews of it."""

    change: Change
    previews: tuple[Preview, ...]


@dataclass(frozen=True, kw_only=True)
class ChangesAnswer:
    """The samples, most changed first; ``note`` says why no layers are named, if none are."""

    changes: tuple[ShownChange, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SensitivityRequest:
    """A request to measure layer sensitivity; see :mod:`kedge.quantization.sensitivity`."""

    graph: str
    inputs: tuple[TensorInfo, ...]
    calibration: Data
    preprocess: dict[str, Preprocess]
    precisions: tuple[Precision, ...]
    quantized: QuantizationScheme | None = None
    samples: int
    seconds: float
    choice: metric.Choice | None = None
