"""One target: which backend, which precision. The host decides; backends only lower.

Backends in the target's order, precisions from small to large: the first whose packed files hold the budget wins.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from kedge.compiler import exchange, metric
from kedge.compiler.dataset import Data
from kedge.compiler.model import Model
from kedge.compiler.options import CompileOptions
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.errors import (
    CompileError,
    ConfigError,
    KedgeError,
    MissingDependencyError,
    StorageError,
    TargetError,
    UnsupportedOperatorError,
)
from kedge_targets import registry
from kedge_targets.contract import Compiler
from kedge_targets.numerics import Plan, Precision
from kedge_targets.target import BackendChoice, Target
from kedge_targets.worker import Worker

_FINAL = (UnsupportedOperatorError, TargetError, ConfigError, MissingDependencyError)
"""Another precision would meet the same."""
_FREE_BYTES = 1 << 20

Tell = Callable[[str, str, int, int], None]
"""``(who, what, done, total)``: who is a target's name, ``reference`` or ``data``."""


@dataclass(kw_only=True)
class Attempt:
    """One precision tried with one backend; what was not reached is None.

    Attributes:
        drop: reference minus value.
        seconds: by span.
        reason: why it was not taken, empty for the one that was.
    """

    backend: str
    precision: str
    value: float | None = None
    drop: float | None = None
    agreement: float | None = None
    size_bytes: int | None = None
    latency_ms: exchange.Latency | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all targets of one compilation share."""

    options: CompileOptions
    model: Model
    calibration: Data
    evaluation: Data
    preprocess: dict[str, Preprocess]
    reference: Future[exchange.ReferenceAnswer]
    scratch: Path
    tell: Tell


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A target's model that held the budget."""

    target: Target
    backend: BackendChoice
    precision: Precision
    lowered: exchange.LowerAnswer
    evaluation: exchange.EvaluateAnswer
    latency: exchange.Latency
    golden: exchange.GoldenAnswer
    golden_file: Path
    attempts: list[Attempt]

    @property
    def attempt(self) -> Attempt:
        """The one that was taken."""
        return self.attempts[-1]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A target for which nothing that was tried held.

    Attributes:
        error: the first backend's, or how far each precision was off.
    """

    target: Target
    error: KedgeError
    attempts: list[Attempt]


def compile_target(target: Target, job: Job, worker: Worker) -> Compiled | Failed:
    """Try backends and precisions in order.

    Raises:
        StorageError: the disk is full.
        KedgeError: what is not this target's: the float reference, or the user's metric, failed.
    """
    attempts: list[Attempt] = []
    errors: list[KedgeError] = []
    for choice in target.backends:
        compiler = registry.compiler(choice.name)
        missing = compiler.missing()
        if missing is not None:
            errors.append(MissingDependencyError(f"backend {choice.name} is not installed", remedy=missing))
            attempts.append(Attempt(backend=choice.name, precision="", reason=str(errors[-1])))
            continue
        for plan in plans(compiler, target):
            attempt = Attempt(backend=choice.name, precision=plan.default.value)
            attempts.append(attempt)
            try:
                taken = _try(target, choice, plan, job, worker, attempt)
            except KedgeError as error:
                _reraise_if_not_the_targets(error, job)
                attempt.reason = str(error)
                errors.append(error)
                if isinstance(error, _FINAL):
                    break
                continue
            if taken is not None:
                return replace(taken, attempts=attempts)
    return Failed(target=target, error=_verdict(target, job.options, attempts, errors), attempts=attempts)


def _reraise_if_not_the_targets(error: KedgeError, job: Job) -> None:
    from_reference = job.reference.done() and job.reference.exception() is error
    if from_reference or isinstance(error, StorageError) or error.where == metric.WHERE:
        raise error
    # A vendor's own words for a full disk are seldom clear.
    if shutil.disk_usage(job.scratch).free < _FREE_BYTES:
        raise StorageError(
            f"the disk is full: {error.what.rstrip('.')}",
            where=str(job.options.out),
            remedy="Free space or choose another folder",
        ) from error


def plans(compiler: Compiler, target: Target) -> list[Plan]:
    """The ladder: int8 in the way that is best and safe on this processor, then what is larger."""
    made = []
    for precision in Precision:
        if precision not in compiler.numerics.precisions:
            continue
        if precision is Precision.INT8:
            ways = compiler.quantized_for(target)
            if ways:
                made.append(Plan(default=precision, quantized=ways[0]))
        else:
            made.append(Plan(default=precision))
    return made


def _try(
    target: Target, choice: BackendChoice, plan: Plan, job: Job, worker: Worker, attempt: Attempt
) -> Compiled | None:
    """Lower, evaluate, judge; None where the drop is too large."""
    name, precision = target.name, plan.default.value
    workdir = job.scratch / name / choice.name / precision
    workdir.mkdir(parents=True)
    files = workdir / "files"
    files.mkdir()
    deadline = job.options.deadline

    def progress(what: str, done: int, total: int) -> None:
        job.tell(name, f"{precision} {what}", done, total)

    progress("lower", 0, 0)
    began = time.perf_counter()
    lowered = worker.call(
        "kedge.compiler.tasks:lower",
        exchange.LowerRequest(
            graph=job.model.graph,
            inputs=job.model.inputs,
            plan=plan,
            calibration=job.calibration,
            preprocess=job.preprocess,
            target=target,
            backend=choice.name,
            options=choice.options,
            workdir=str(files),
        ),
        exchange.LowerAnswer,
        deadline=deadline,
        on_progress=progress,
    )
    attempt.seconds = {"lower": time.perf_counter() - began, **lowered.seconds}
    attempt.notes = lowered.notes
    attempt.size_bytes = sum(Path(path).stat().st_size for path in lowered.files.values())
    program = _program(choice.name, lowered, workdir / "packed")
    reference = job.reference.result()
    evaluation = worker.call(
        "kedge.compiler.tasks:evaluate",
        exchange.EvaluateRequest(
            program=program,
            data=job.evaluation,
            choice=reference.choice,
            reference=reference.outputs,
            batch=job.model.batch,
            folder=str(workdir / "outputs"),
        ),
        exchange.EvaluateAnswer,
        deadline=deadline,
        on_progress=progress,
    )
    attempt.seconds["evaluate"] = evaluation.seconds
    attempt.value = evaluation.value
    attempt.agreement = evaluation.agreement
    attempt.drop = reference.value - evaluation.value
    latency = attempt.latency_ms = worker.call(
        "kedge.compiler.tasks:latency",
        exchange.LatencyRequest(program=program, data=job.evaluation),
        exchange.Latency,
        deadline=deadline,
    )
    if attempt.drop > job.options.max_drop:
        attempt.reason = f"dropped by {attempt.drop:.4g}, allowed are {job.options.max_drop:g}"
        return None
    began = time.perf_counter()
    golden_file = workdir / "golden.npz"
    golden = worker.call(
        "kedge.compiler.tasks:make_golden",
        exchange.GoldenRequest(
            program=program,
            eight_bits=Precision.INT8 in (plan.default, *plan.layers.values()),
            data=job.evaluation,
            batch=job.model.batch,
            file=str(golden_file),
        ),
        exchange.GoldenAnswer,
        deadline=deadline,
        on_progress=progress,
    )
    attempt.seconds["golden"] = time.perf_counter() - began
    return Compiled(
        target=target,
        backend=choice,
        precision=plan.default,
        lowered=lowered,
        evaluation=evaluation,
        latency=latency,
        golden=golden,
        golden_file=golden_file,
        attempts=[],
    )


def _program(backend: str, lowered: exchange.LowerAnswer, folder: Path) -> exchange.Program:
    """The files under the titles that the bundle will give them: what is evaluated is what is packed."""
    folder.mkdir()
    for title, path in lowered.files.items():
        try:
            (folder / title).hardlink_to(path)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, folder / title)
    return exchange.Program(
        folder=str(folder),
        backend=backend,
        entry=lowered.entry,
        options=lowered.runtime_options,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
    )


def _verdict(target: Target, options: CompileOptions, attempts: list[Attempt], errors: list[KedgeError]) -> KedgeError:
    dropped = [f"{a.backend} {a.precision} by {a.drop:.4g}" for a in attempts if a.drop is not None]
    if dropped:
        return CompileError(
            f"no precision holds a drop of {options.max_drop:g}: {', '.join(dropped)}",
            where=f"target {target.name}",
            remedy="Allow more with --max-drop, or give more calibration samples",
        )
    if errors:
        return errors[0]
    return CompileError("its backends offer no precision", where=f"target {target.name}")
