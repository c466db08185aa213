"""Runs one candidate: its steps over the float graph, the lowering, and the evaluation of the files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kedge.evaluation import confidence_intervals, worker_messages
from kedge.search.candidate import Candidate, StepChoice
from kedge.search.results import Attempt, Job, Outcome
from kedge.search.worker_messages import ScoreAnswer, ScoreRequest, StepAnswer, StepEntry, StepRequest
from kedge_protocol import codec, files
from kedge_protocol.errors import KedgeError
from kedge_targets import registry
from kedge_targets.numerics import Plan, Precision
from kedge_targets.target import Target
from kedge_targets.true_precision import true_name
from kedge_targets.worker import OnProgress

A = TypeVar("A")


class Call(Protocol):
    """The signature of :meth:`kedge_targets.worker.Worker.call`."""

    def __call__(
        self, task: str, request: Any, answer_type: type[A], *, deadline: float, on_progress: OnProgress | None = None
    ) -> A:
        """Run one task."""


def run(candidate: Candidate, target: Target, job: Job, call: Call, folder: Path) -> Outcome:
    """Run a candidate as far as possible; the outcome holds the error that stopped it.

    Args:
        call: runs a task in the worker.
        folder: an empty folder for this trial.
    """
    attempt = Attempt(
        backend=candidate.backend.name,
        precision=candidate.plan.default.value,
        label=candidate.label,
        why=candidate.why,
    )
    outcome = Outcome(candidate=candidate, attempt=attempt, plan=candidate.plan, folder=folder)
    try:
        folder.mkdir(parents=True)
        _run(outcome, target, job, call)
    except KedgeError as error:
        outcome.error = error
        attempt.reason = str(error)
    return outcome


def _run(outcome: Outcome, target: Target, job: Job, call: Call) -> None:
    candidate, attempt, folder = outcome.candidate, outcome.attempt, outcome.folder

    def progress(what: str, done: int, total: int) -> None:
        job.on_progress(target.name, f"{candidate.plan.default.value} {what}", done, total)

    graph, outcome.plan, attempt.steps = _stepped(candidate, job, call, progress)
    lowered = _lower(outcome, graph, target, job, call, progress)
    _name(outcome, lowered)
    attempt.size_bytes = sum(Path(path).stat().st_size for path in lowered.files.values())
    outcome.program = program(candidate.backend.name, lowered, folder / "packed")
    reference = job.reference.result()
    evaluation = outcome.evaluation = call(
        "kedge.evaluation.worker_tasks:evaluate",
        worker_messages.EvaluateRequest(
            program=outcome.program,
            data=job.evaluation,
            choice=reference.choice,
            reference=reference.outputs,
            batch=job.model.batch,
            states=job.model.states,
            folder=str(folder / "outputs"),
        ),
        worker_messages.EvaluateAnswer,
        deadline=job.deadline,
        on_progress=progress,
    )
    attempt.seconds["evaluate"] = evaluation.seconds
    attempt.value, attempt.agreement = evaluation.value, evaluation.agreement
    attempt.outputs = evaluation.outputs
    attempt.drop = reference.choice.drop(reference.value, evaluation.value)
    attempt.interval = confidence_intervals.of_drop(
        reference.choice, reference.score, evaluation.score, job.budget.confidence or confidence_intervals.CONFIDENCE
    )


def _lower(
    outcome: Outcome, graph: str, target: Target, job: Job, call: Call, progress: OnProgress
) -> worker_messages.LowerAnswer:
    candidate, attempt = outcome.candidate, outcome.attempt
    progress("lower", 0, 0)
    files = outcome.folder / "files"
    files.mkdir()
    compiler = registry.compiler(candidate.backend.name)
    if not job.model.quantized or compiler.numerics.quantized_graphs or candidate.steps:
        lowered_from = graph
    else:
        lowered_from = job.model.reference
    began = time.perf_counter()
    lowered = outcome.lowered = call(
        "kedge.evaluation.worker_tasks:lower",
        worker_messages.LowerRequest(
            graph=lowered_from,
            inputs=job.model.inputs,
            outputs=job.model.outputs,
            plan=outcome.plan,
            calibration=job.calibration,
            preprocess=job.preprocess,
            target=target,
            backend=candidate.backend.name,
            options={**candidate.backend.options, **job.options.requirements(compiler)},
            workdir=str(files),
        ),
        worker_messages.LowerAnswer,
        deadline=job.deadline,
        on_progress=progress,
    )
    attempt.seconds = {"lower": time.perf_counter() - began, **lowered.seconds}
    attempt.notes = lowered.notes
    return lowered


def _name(outcome: Outcome, lowered: worker_messages.LowerAnswer) -> None:
    """Name the attempt after the true precision of its files."""
    candidate, attempt, numbers = outcome.candidate, outcome.attempt, lowered.numbers
    if numbers is not None:
        attempt.weights_in_integers, attempt.macs_in_integers = numbers.weights_in_integers, numbers.macs_in_integers
    if lowered.precision:  # the graph decided it, not the plan
        attempt.precision = lowered.precision
        attempt.label = " + ".join([*(step.said for step in candidate.steps), lowered.precision])
        return
    attempt.precision = true_name(outcome.asked, numbers)
    if attempt.precision != outcome.asked.value:
        attempt.label = f"{attempt.precision}, asked for {candidate.label}"


def _stepped(
    candidate: Candidate, job: Job, call: Call, progress: Callable[[str, int, int], None]
) -> tuple[str, Plan, tuple[StepEntry, ...]]:
    """Return the graph after all steps, the plan with the ranges that they decided, and the effect of each step. Steps
    that another candidate began with are not run again."""
    graph, plan = job.model.graph, candidate.plan
    entries: list[StepEntry] = []
    for number, choice in enumerate(candidate.steps):
        done = candidate.steps[: number + 1]
        folder = job.scratch / "steps" / _key(done, candidate.plan)
        kept = folder / "entry.json"
        with _alone(folder):
            if not kept.is_file():
                _step(choice, graph, plan, folder, job, call, progress)
        stored = codec.decode(kept.read_bytes(), _Stored, where=str(kept))
        entries.append(stored.entry)
        plan = dataclasses.replace(plan, ranges={**plan.ranges, **{n: (r[0], r[1]) for n, r in stored.ranges.items()}})
        if registry.compiler(candidate.backend.name).numerics.mixed:
            plan = dataclasses.replace(plan, layers={**stored.layers, **plan.layers})
        graph = str(folder / "graph.onnx")
    return graph, plan, tuple(entries)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on a step's folder: parallel candidates may begin with the same steps, and the second reuses the
    result of the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(folder.with_suffix(".lock")):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    entry: StepEntry
    ranges: dict[str, tuple[float, ...]]
    layers: dict[str, Precision]


def _key(steps: tuple[StepChoice, ...], plan: Plan) -> str:
    """Return the key of steps; it includes the plan because steps may read it."""
    return _digest(list(steps), plan)


def _digest(*content: object) -> str:
    return hashlib.sha256(codec.encode(list(content))).hexdigest()[:24]


def _step(
    choice: StepChoice,
    graph: str,
    plan: Plan,
    folder: Path,
    job: Job,
    call: Call,
    progress: Callable[[str, int, int], None],
) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of one that was interrupted
    (folder / "work").mkdir(parents=True)
    memo = folder.parent / f"memo-{_digest(choice, graph)}"
    memo.mkdir(exist_ok=True)
    made = folder / "graph.onnx"
    checkpoints = job.options.checkpoints
    if checkpoints is not None:
        checkpoints.mkdir(parents=True, exist_ok=True)
    progress(choice.use, 0, 0)
    answer = call(
        "kedge.search.worker_tasks:apply_step",
        StepRequest(
            use=choice.use,
            options=choice.options,
            graph=graph,
            made=str(made),
            teacher=job.model.reference,
            plan=plan,
            inputs=job.model.inputs,
            calibration=job.calibration,
            preprocess=job.preprocess,
            seed=job.seed,
            fixed_batch=job.model.fixed_batch,
            workdir=str(folder / "work"),
            memo=str(memo),
            checkpoints=None if checkpoints is None else str(checkpoints.absolute()),
            loss=job.options.loss_function,
            seconds=job.deadline,
        ),
        StepAnswer,
        deadline=job.deadline,
        on_progress=lambda what, done, total: progress(f"{choice.use} {what}", done, total),
    )
    reference = job.reference.result()
    scored = _score(made, folder / "score", job, call)
    entry = StepEntry(
        use=choice.use,
        options=choice.options,
        value=scored.value,
        drop=reference.choice.drop(reference.value, scored.value),
        size_bytes=scored.size_bytes,
        latency_ms=scored.latency_ms,
        seconds=answer.seconds,
        figures=answer.figures,
        notes=answer.notes,
    )
    (folder / "entry.json").write_bytes(codec.encode(_Stored(entry=entry, ranges=answer.ranges, layers=answer.layers)))


def _score(graph: Path, folder: Path, job: Job, call: Call) -> ScoreAnswer:
    """Score the float graph after a step."""
    reference = job.reference.result()
    return call(
        "kedge.search.worker_tasks:score",
        ScoreRequest(
            graph=str(graph),
            inputs=job.model.inputs,
            outputs=job.model.outputs,
            data=job.evaluation,
            preprocess=job.preprocess,
            choice=reference.choice,
            reference=reference.outputs,
            batch=1 if job.model.fixed_batch else job.model.batch,
            folder=str(folder),
        ),
        ScoreAnswer,
        deadline=job.deadline,
    )


def program(backend: str, lowered: worker_messages.LowerAnswer, folder: Path) -> worker_messages.Program:
    """Return the files under the titles that they get in the bundle: exactly what is evaluated is packed."""
    folder.mkdir()
    for title, path in lowered.files.items():
        try:
            (folder / title).hardlink_to(path)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, folder / title)
    return worker_messages.Program(
        folder=str(folder),
        backend=backend,
        entry=lowered.entry,
        options=lowered.runtime_options,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
    )
