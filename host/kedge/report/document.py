"""The report of a compilation: ``report.json`` for programs, ``report.html`` for people. Both lie in OUT beside the
layout and are part of no digest."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field

from kedge.evaluation import worker_messages
from kedge.evaluation.cascade import CascadeFigures
from kedge.evaluation.confidence_intervals import Interval
from kedge.evaluation.cost import Cost
from kedge.evaluation.outputs import OutputFigures
from kedge.quantization.sensitivity import Sensitivity
from kedge.report import statements
from kedge.search.candidate import Candidate
from kedge.search.clock import Clock
from kedge.search.latency import TargetLatency
from kedge.search.results import Attempt, Compiled, Failed, ReleaseSource
from kedge.search.worker_messages import ChangesAnswer, StepEntry
from kedge_protocol import __version__
from kedge_targets.contract import Estimate
from kedge_targets.numerics import Precision


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """The user's model; ``file`` without its folder."""

    file: str
    digest: str
    size_bytes: int
    name: str
    version: str


@dataclass(frozen=True, kw_only=True)
class ReferenceEntry:
    """The float model run by ONNX Runtime; ``teacher`` is its file where the model was distilled from another."""

    value: float
    size_bytes: int
    samples: int
    latency_ms: worker_messages.Latency
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetEntry:
    """The budget; see :class:`kedge.search.budget.Budget`."""

    max_drop: float
    max_size: int | None = None
    max_latency: float | None = None
    min_agreement: float | None = None
    confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """The precision chosen for one layer, and the reason."""

    name: str
    precision: str
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class BundleEntry:
    """One bundle. Its figures are measured on exactly the files that the device gets.

    Attributes:
        place: 0 for the bundle that the target's devices get without measurements of their own; those of the target's
            other backends follow.
        precision: the name that is true of the files: ``mixed`` where an integer name is not.
        weights_in_integers, macs_in_integers: shares of the weight bytes and of the multiply-accumulates, counted in
            the files; None where there are none, or the backend cannot count them.
        value, drop: of the metric, and how much worse than the float model's that is; where the search chose, on
            samples that the choice did not see (``measured_on_samples``).
        interval: of the drop; ``shown`` whether the budget holds all of it, ``promise`` that in words.
        agreement: share of samples whose answers are the float model's; None where no output has answers, and why not
            (``no_agreement``).
        outputs: every output's figures, on all samples.
        size_bytes: of the files that the device needs (golden vectors not counted).
        size_ratio: of that to the model's file.
        pulled_bytes: of all that a device pulls, golden vectors and descriptions too; ``pulled_ratio`` of that to the
            model's file.
        memory_bytes: the process's growth on load and first call, as measured here.
        latency_ms: on the host; ``target_latency`` on the target, and who says so.
        label: the whole way in words, steps and all; ``why`` it was tried.
        steps: over the float graph, with what each cost in accuracy and won in bytes and milliseconds.
        layers: those that do not have the precision of the rest.
        over: what of the budget it does not keep; empty in a release.
        changes: the evaluation samples that it moved most, beside the float model's answers.
        remarks: what must be known of its latency: whose it is, whether it is slower than float, whether the ranking is
            sure.
        cost: of one call on this host: processor time, and energy where a sensor tells it.
        cascade: what the pipeline's larger model gains.
        attempts: all that was tried; the last one was taken.
    """

    target: str
    backend: str
    precision: str
    value: float
    drop: float
    size_bytes: int
    size_ratio: float
    latency_ms: worker_messages.Latency
    verified: str
    digest: str
    calibration_samples: int
    evaluation_samples: int
    measured_on: str
    memory_bytes: int
    golden: worker_messages.GoldenAnswer
    agreement: float | None = None
    no_agreement: str = ""
    interval: Interval | None = None
    shown: bool | None = None
    promise: str = ""
    measured_on_samples: str = ""
    outputs: tuple[OutputFigures, ...] = ()
    pulled_bytes: int = 0
    pulled_ratio: float = 0.0
    weights_in_integers: float | None = None
    macs_in_integers: float | None = None
    target_latency: TargetLatency | None = None
    label: str = ""
    why: str = ""
    steps: tuple[StepEntry, ...] = ()
    layers: tuple[LayerEntry, ...] = ()
    estimate: Estimate | None = None
    over: str = ""
    remarks: tuple[str, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    changes: ChangesAnswer = field(default_factory=ChangesAnswer)
    cost: Cost | None = None
    cascade: CascadeFigures | None = None
    attempts: list[Attempt] = field(default_factory=list)
    place: int = 0

    @property
    def name(self) -> str:
        """Return the target; with the backend where it is not the target's first bundle."""
        return self.target if not self.place else f"{self.target} by {self.backend}"


@dataclass(frozen=True, kw_only=True)
class FailureEntry:
    """A target without a bundle, and the reason."""

    target: str
    kind: str
    error: str
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The complete report of a compilation.

    Attributes:
        metric: a known one (:mod:`kedge.evaluation.metrics`), with its output where the user named one; or the user's
            ``file.py:function``. ``direction`` is the better one, ``unit`` of its values.
        notes: on how the model was imported.
        sensitivity: what each layer suffers alone, measured on calibration samples.
        seconds: wall-clock spans of the whole command.
        time_limit: seconds after which the search began no other candidate; None without one.
    """

    model: ModelEntry
    metric: str
    max_drop: float
    reference: ReferenceEntry
    bundles: list[BundleEntry]
    failures: list[FailureEntry]
    warnings: list[str]
    tools: dict[str, str]
    seconds: dict[str, float]
    direction: str = ""
    unit: str = ""
    effort: str = ""
    time_limit: float | None = None
    budget: BudgetEntry | None = None
    notes: tuple[str, ...] = ()
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Facts about a compilation beside its bundles.

    Attributes:
        file: the model's file name.
        latency: of the float model.
        warnings: so far; fallbacks are added.
        seconds: spans so far; ``began`` on the clock of ``time.perf_counter``.
    """

    file: str
    latency: worker_messages.Latency
    warnings: list[str]
    seconds: dict[str, float]
    began: float
    sensitivity: Sensitivity | None = None
    notes: tuple[str, ...] = ()


def of(
    info: RunInfo, source: ReleaseSource, compiled: list[Compiled], digests: list[str], failed: list[Failed]
) -> Report:
    """Build the report.

    Args:
        compiled: of each target, with its alternatives.
        digests: of the bundles, each target's own first and then its alternatives'.
    """
    made = [(place, each) for one in compiled for place, each in enumerate((one, *one.alternatives))]
    reference, options = source.reference, source.options
    return Report(
        model=ModelEntry(
            file=info.file,
            digest=source.model.digest,
            size_bytes=source.model.size_bytes,
            name=options.name,
            version=options.version,
        ),
        metric=reference.choice.name,
        max_drop=options.max_drop,
        reference=ReferenceEntry(
            value=reference.value,
            size_bytes=source.model.float_bytes,
            teacher=None if source.model.teacher is None else source.model.teacher.file,
            samples=source.evaluation_samples,
            latency_ms=info.latency,
        ),
        bundles=[_bundle(one, digest, source, place) for (place, one), digest in zip(made, digests, strict=True)],
        failures=[
            FailureEntry(
                target=one.target.name, kind=type(one.error).__name__, error=str(one.error), attempts=one.attempts
            )
            for one in failed
        ],
        warnings=info.warnings + [text for one in compiled for text in _concerns(one)],
        tools={**source.tools, **reference.tools, "kedge": __version__, "python": platform.python_version()},
        seconds=info.seconds,
        direction=reference.choice.direction.value,
        unit=reference.choice.unit,
        effort=options.effort.value,
        time_limit=limit if math.isfinite(limit := Clock.of(options.effort, options.time_limit).limit) else None,
        budget=BudgetEntry(
            max_drop=source.budget.max_drop,
            max_size=source.budget.max_size,
            max_latency=source.budget.max_latency,
            min_agreement=source.budget.min_agreement,
            confidence=source.budget.confidence,
        ),
        notes=info.notes,
        sensitivity=info.sensitivity,
    )


def _bundle(compiled: Compiled, digest: str, source: ReleaseSource, place: int) -> BundleEntry:
    attempt, evaluation, unseen = compiled.attempt, compiled.evaluation, compiled.unseen
    choice = source.reference.choice
    value = evaluation.value if unseen is None else unseen.value
    drop = choice.drop(source.reference.value, value) if unseen is None else unseen.drop
    interval = attempt.interval if unseen is None or unseen.interval is None else unseen.interval
    size = attempt.size_bytes or 0
    pulled = size + compiled.golden_file.stat().st_size
    return BundleEntry(
        target=compiled.target.name,
        backend=compiled.candidate.backend.name,
        precision=compiled.precision,
        value=value,
        drop=drop,
        interval=interval,
        shown=statements.is_shown(drop, interval, source.budget),
        promise=statements.budget_statement(drop, interval, source.budget),
        measured_on_samples=statements.sample_statement(unseen, source.evaluation_samples),
        outputs=evaluation.outputs,
        agreement=evaluation.agreement,
        no_agreement="" if evaluation.agreement is not None else statements.agreement_statement(choice.kinds),
        weights_in_integers=attempt.weights_in_integers,
        macs_in_integers=attempt.macs_in_integers,
        size_bytes=size,
        size_ratio=size / max(1, source.model.float_bytes),
        pulled_bytes=pulled,
        pulled_ratio=pulled / max(1, source.model.float_bytes),
        latency_ms=attempt.latency_ms or worker_messages.Latency(p50=0.0, p95=0.0),
        target_latency=attempt.target_latency,
        label=attempt.label,
        why=attempt.why,
        steps=attempt.steps,
        layers=(
            *(
                LayerEntry(name=name, precision=precision.value, why=_why(compiled.candidate, name))
                for name, precision in compiled.plan.layers.items()
            ),
            *(
                LayerEntry(name=name, precision=Precision.FLOAT32.value, why="the backend keeps it in float: see notes")
                for name in compiled.lowered.floating
            ),
        ),
        estimate=compiled.lowered.estimate,
        over=compiled.over,
        remarks=attempt.remarks,
        verified=compiled.lowered.verified.value,
        digest=digest,
        calibration_samples=compiled.lowered.calibration_samples,
        evaluation_samples=source.evaluation_samples,
        measured_on=evaluation.runtime,
        memory_bytes=evaluation.memory_bytes,
        golden=compiled.golden,
        tools=compiled.lowered.tools,
        notes=compiled.lowered.notes,
        changes=compiled.changes,
        cost=compiled.cost,
        cascade=compiled.cascade,
        attempts=compiled.attempts if not place else [attempt],
        place=place,
    )


def _why(candidate: Candidate, layer: str) -> str:
    """Return why a layer has a different precision from the rest."""
    if layer in candidate.plan.layers:
        return candidate.reasons.get(layer, "")
    return "made so by the steps " + ", ".join(step.use for step in candidate.steps)


def _concerns(compiled: Compiled) -> list[str]:
    """Return the warnings. A candidate that a search tries and discards is no warning; a backend that could not try
    anything is."""
    attempt = compiled.attempt
    taken = f"{attempt.backend} {attempt.label or attempt.precision} was taken"
    found = [
        f"{compiled.target.name}: {a.reason.splitlines()[0]}; {taken}"
        for a in compiled.attempts[:-1]
        if a.backend != attempt.backend and not a.label
    ]
    if compiled.over:
        found.append(f"{compiled.target.name}: the budget is not kept: {compiled.over}")
    return found
