"""The data that a compilation shares, and its attempts and results."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from kedge.evaluation import worker_messages
from kedge.evaluation.cascade import CascadeFigures
from kedge.evaluation.confidence_intervals import Interval
from kedge.evaluation.cost import Cost
from kedge.evaluation.dataset import Data
from kedge.evaluation.latency_race import RelativeLatency
from kedge.evaluation.model import Model
from kedge.evaluation.outputs import OutputFigures
from kedge.search import pareto
from kedge.search.budget import ACCURACY, Budget
from kedge.search.candidate import Candidate
from kedge.search.clock import Clock
from kedge.search.cross_fitting import CrossFittedFigure
from kedge.search.latency import LatencyLog, TargetLatency
from kedge.search.options import CompileOptions
from kedge.search.worker_messages import ChangesAnswer, StepEntry
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.bundle.pipeline import Cascade, Pipeline
from kedge_protocol.errors import KedgeError
from kedge_targets.numerics import Plan, Precision
from kedge_targets.target import Target

ProgressCallback = Callable[[str, str, int, int], None]
"""``(who, what, done, total)``; ``who`` is a target's name, ``reference`` or ``data``."""


KEPT = "keeps the budget; another is smaller or faster"
"""The reason given for an attempt that keeps the budget but was not taken."""
SLOWER = "keeps the budget, but is slower than float; --max-size takes it for its bytes"


@dataclass(kw_only=True)
class Attempt:
    """A candidate tried with one backend. Values of stages that were not reached are None.

    Attributes:
        precision: the true precision name of the files (:func:`kedge_targets.true_precision.true_name`).
        label: the whole candidate in words, including its steps.
        why: why it was tried.
        outputs: figures of every output.
        interval: of the drop.
        drop: reference minus value.
        weights_in_integers, macs_in_integers: shares of the weight bytes and of the multiply-accumulates, counted in
            the files.
        steps: the steps over the float graph, each measured.
        seconds: time by stage.
        latency_ms: on the host; ``target_latency`` on the target.
        front: whether it lies on the Pareto front of metric, bytes and latency.
        remarks: on its latency: where it was measured, whether it is slower than float.
        reason: why it was not taken; empty for the one that was.
    """

    backend: str
    precision: str
    label: str = ""
    why: str = ""
    value: float | None = None
    drop: float | None = None
    agreement: float | None = None
    outputs: tuple[OutputFigures, ...] = ()
    interval: Interval | None = None
    size_bytes: int | None = None
    weights_in_integers: float | None = None
    macs_in_integers: float | None = None
    latency_ms: worker_messages.Latency | None = None
    target_latency: TargetLatency | None = None
    steps: tuple[StepEntry, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    front: bool = False
    remarks: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The data shared by all targets of one compilation."""

    options: CompileOptions
    budget: Budget
    model: Model
    calibration: Data
    evaluation: Data
    preprocess: dict[str, Preprocess]
    reference: Future[worker_messages.ReferenceAnswer]
    record: LatencyLog
    seed: int
    scratch: Path
    on_progress: ProgressCallback
    clock: Clock = field(default_factory=Clock)

    @property
    def deadline(self) -> float:
        """Return the time limit, in seconds, of one step of a trial."""
        return self.options.deadline if self.clock.lenient else max(1.0, min(self.options.deadline, self.clock.share))


@dataclass(kw_only=True)
class Outcome:
    """The outcome of one candidate, up to the stage that it reached.

    Attributes:
        plan: the candidate's plan, with the ranges that its steps decided.
        lowered, program, evaluation: None if that stage was not reached.
        error: the error that stopped it.
    """

    candidate: Candidate
    attempt: Attempt
    plan: Plan
    folder: Path
    lowered: worker_messages.LowerAnswer | None = None
    program: worker_messages.Program | None = None
    evaluation: worker_messages.EvaluateAnswer | None = None
    error: KedgeError | None = None
    over: dict[str, float] = field(default_factory=dict)

    @property
    def point(self) -> pareto.Point:
        """Return the figures by which candidates are compared."""
        attempt = self.attempt
        latency = attempt.target_latency
        return pareto.Point(
            key=self.candidate.key,
            drop=attempt.drop if attempt.drop is not None else float("inf"),
            size=attempt.size_bytes or 0,
            latency=None if latency is None else latency.p50,
            agreement=attempt.agreement,
            upper=None if attempt.interval is None else attempt.interval.high,
            lost=tuple(f"output {one.name!r} is lost: {one.lost}" for one in attempt.outputs if one.lost),
            pace=None if latency is None else latency.pace,
            guessed=latency is not None and latency.guessed,
            samples=0 if self.evaluation is None else self.evaluation.score.samples,
        )

    @property
    def measured(self) -> bool:
        """Return whether there are files and figures for them."""
        return self.error is None and self.evaluation is not None

    @property
    def named_truly(self) -> bool:
        """Return whether the files have the requested precision, or one that the graph itself determined."""
        decided = "" if self.lowered is None else self.lowered.precision
        return not self.measured or self.attempt.precision in (self.asked.value, decided)

    @property
    def suffices(self) -> bool:
        """Return whether a search for accuracy may end with it: it keeps the accuracy, and is in integers as asked. A
        file that is float but in name keeps any accuracy and gains nothing."""
        return self.holds_accuracy and (self.named_truly or bool(self.candidate.plan.layers))

    @property
    def asked(self) -> Precision:
        """Return the smallest precision of the plan."""
        return next(one for one in Precision if one in self.candidate.plan.precisions)

    @property
    def pace(self) -> RelativeLatency | None:
        """Return the latency relative to the float model by ONNX Runtime; None if it was not measured on the target
        itself."""
        latency = self.attempt.target_latency
        return None if latency is None or latency.estimated else latency.pace

    @property
    def quiet(self) -> float:
        """Return the milliseconds of a call on this host when it is otherwise idle; 0 if unknown."""
        latency = self.attempt.latency_ms
        return 0.0 if latency is None else latency.least or latency.p50

    @property
    def is_float(self) -> bool:
        """Return whether its files are the float model: asked for as such, or without a step and found to hold nothing
        of a lower precision, as trees asked for int8 do."""
        found_float = not self.candidate.steps and self.attempt.precision == Precision.FLOAT32.value
        return self.candidate.is_float or (self.measured and found_float)

    @property
    def in_integers(self) -> bool:
        """Return whether it multiplies in integers: as counted in the file, else as planned."""
        counted = self.attempt.macs_in_integers
        if counted is not None:
            return counted > 0
        return any(one.activation_bits is not None for one in self.plan.precisions)

    def loses(self, pace: RelativeLatency) -> bool:
        """Return whether this latency relative to float is a loss: if it is noticed, or, for what computes in float and
        so gains nothing but bytes, if it is certain."""
        return pace.noticed(self.quiet) if self.in_integers else pace.slower

    @property
    def holds(self) -> bool:
        """Return whether the candidate keeps the budget."""
        return self.measured and not self.over

    @property
    def holds_accuracy(self) -> bool:
        """Return whether the candidate keeps the accuracy, regardless of size and latency."""
        return self.measured and not self.over.keys() & ACCURACY


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The candidate taken for a target.

    Attributes:
        attempts: all attempts; the one that was taken is last.
        over: what exceeds the budget, in words; empty for a candidate that goes into OUT.
        changes: the evaluation samples that it changed most.
        unseen: its figure on samples that the choice did not use; None if there was no choice.
        examples: file of raw items and their outputs (:mod:`kedge_targets.pipeline.examples`).
        alternatives: the best candidate of each other backend in the target's order, if they were asked for.
        cost: of one call on this host.
        larger: the pipeline's larger model, with the confidence for this target; ``cascade`` is what that gains.
    """

    target: Target
    candidate: Candidate
    plan: Plan
    lowered: worker_messages.LowerAnswer
    evaluation: worker_messages.EvaluateAnswer
    golden: worker_messages.GoldenAnswer
    golden_file: Path
    attempts: list[Attempt]
    over: str = ""
    changes: ChangesAnswer = field(default_factory=ChangesAnswer)
    unseen: CrossFittedFigure | None = None
    examples: Path | None = None
    alternatives: tuple[Compiled, ...] = ()
    cost: Cost | None = None
    larger: Cascade | None = None
    cascade: CascadeFigures | None = None

    @property
    def precision(self) -> str:
        """Return the true precision name of the files."""
        return self.attempt.precision

    @property
    def attempt(self) -> Attempt:
        """Return the attempt that was taken."""
        return self.attempts[-1]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A target for which no candidate keeps the budget.

    Attributes:
        error: that of the first backend, or how near the best candidate came.
        nearest: the best candidate, if any could be measured.
    """

    target: Target
    error: KedgeError
    attempts: list[Attempt]
    nearest: Compiled | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseSource:
    """The common origin of all bundles of a release.

    Attributes:
        pipeline: the final one; ``pipeline_files`` holds the files that it names, by title.
    """

    options: CompileOptions
    budget: Budget
    seed: int
    model: Model
    labels: tuple[str, ...]
    calibration_digest: str
    evaluation_digest: str
    evaluation_samples: int
    reference: worker_messages.ReferenceAnswer
    tools: dict[str, str] = field(default_factory=dict)
    pipeline: Pipeline | None = None
    pipeline_files: dict[str, Path] = field(default_factory=dict)
