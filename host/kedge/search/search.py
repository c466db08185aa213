"""Searches for one target: tries candidates until one keeps the budget or none are left, then chooses one.

Backends are tried in the target's order; with quick effort only until one has a candidate within the budget.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from kedge.evaluation import confidence_intervals, golden_size, user, worker_messages
from kedge.evaluation.confidence_intervals import CONFIDENCE
from kedge.quantization.sensitivity import Sensitivity
from kedge.search import cross_fitting, fitting, float_beside, held_back, pareto, recipe, remedies
from kedge.search.candidate import Candidate
from kedge.search.candidate_latency import CandidateLatency
from kedge.search.effort import Effort
from kedge.search.latency import Measurement
from kedge.search.local_trials import LocalTrials, Trials
from kedge.search.results import KEPT, SLOWER, Attempt, Compiled, Failed, Job, Outcome
from kedge.search.strategy import AtTheEnd, Batches, Strategy
from kedge.search.worker_messages import ChangesAnswer, ChangesRequest
from kedge_protocol.errors import (
    BudgetError,
    CompileError,
    ConfigError,
    KedgeError,
    MissingDependencyError,
    StorageError,
    TargetError,
    UnsupportedOperatorError,
)
from kedge_targets import registry
from kedge_targets.numerics import Precision
from kedge_targets.target import BackendChoice, Target

_FINAL = (UnsupportedOperatorError, TargetError, ConfigError, MissingDependencyError)
"""Errors that any other candidate of the same backend would meet too."""
_FREE_BYTES = 1 << 20
_UNSEEN = {"drop": 0.0}
"""What exceeds the budget where it is kept only on the samples that a choice saw."""


class Search:
    """The search for one target.

    Args:
        local_trials: this machine's workers; ``trials`` runs candidates (these workers, or a cluster).
        sensitivity: measures the layers' sensitivity when first called.
    """

    def __init__(
        self,
        target: Target,
        job: Job,
        local_trials: LocalTrials,
        sensitivity: Callable[[], Sensitivity | None],
        *,
        section: recipe.Section | None = None,
        trials: Trials | None = None,
    ) -> None:
        self._target = target
        self._job = job
        self._local_trials = local_trials
        self._trials: Trials = trials or local_trials
        self._sensitivity = sensitivity
        self._section = section
        self._stopwatch = CandidateLatency(target, job, local_trials.first.call)
        self._attempts: list[Attempt] = []
        self._errors: list[KedgeError] = []
        self._outcomes: list[Outcome] = []
        self._strategies: list[tuple[BackendChoice, Strategy]] = []
        self._folders = 0
        self._ended = ""

    @property
    def measurements(self) -> list[Measurement]:
        """Return the latencies measured on the host, for the record."""
        return self._stopwatch.measurements

    def run(self) -> Compiled | Failed:
        """Run the search.

        Raises:
            StorageError: the disk is full.
            KedgeError: the failure is not this target's: the float reference or the user's metric failed.
        """
        try:
            if self._section is not None:
                self._job.clock.begin_turn(0)
                asked = recipe.candidate(self._section, self._target)
                self._backend(asked.backend, _only(asked))
            else:
                every = self._job.options.every_backend
                turns = [one for one in self._target.backends if one.usual or every]
                for place, choice in enumerate(turns, start=1):
                    self._job.clock.begin_turn(len(turns) - place)
                    strategy = self._strategy(choice)
                    self._strategies.append((choice, strategy))
                    self._backend(choice, strategy.run(), functools.partial(self._at_the_end, strategy))
                    quick = self._job.options.effort is Effort.QUICK and not every
                    if quick and any(one.holds for one in self._outcomes):
                        break
            return self._decided()
        except (ConfigError, TargetError) as error:
            _reraise_if_not_the_targets(error, self._job)
            return Failed(target=self._target, error=error, attempts=self._attempts)

    def _strategy(self, choice: BackendChoice) -> Strategy:
        job = self._job
        return Strategy(
            choice,
            registry.compiler(choice.name),
            self._target,
            job.model,
            job.options.effort,
            self._sensitivity,
            budget=job.budget,
        )

    def _backend(self, choice: BackendChoice, batches: Batches, at_the_end: AtTheEnd = lambda seen: []) -> None:
        unable = fitting.unable(choice, self._job.model, self._target)
        if unable is not None:
            self._errors.append(unable)
            self._attempts.append(Attempt(backend=choice.name, precision="", reason=str(unable)))
            return
        done: dict[str, Outcome] = {}
        self._job.clock.lenient = not self._attempts
        try:
            asked = next(batches)
            while True:
                fresh = {one.key: one for one in asked if one.key not in done}
                if fresh and self._late():
                    self._job.clock.lenient = True
                    self._tried(at_the_end(list(done.values())))
                    self._job.clock.lenient = False
                    return
                if fresh:
                    outcomes = self._tried(list(fresh.values()))
                    done |= dict(zip(fresh, outcomes, strict=True))
                    self._job.clock.lenient = False
                    if any(isinstance(one.error, _FINAL) for one in outcomes):
                        return
                asked = batches.send([done[one.key] for one in asked])
        except StopIteration:
            return

    def _at_the_end(self, strategy: Strategy, seen: Sequence[Outcome]) -> list[Candidate]:
        """Return what is still tried on a backend when the time is up: on one that had no time at all float32, which
        may be faster there, unless another's integers keep the budget."""
        if seen:
            return strategy.when_time_is_up(seen)
        kept = any(one.holds and one.in_integers for one in self._outcomes)
        return [one for one in strategy.in_float(seen) if one.plan.default is Precision.FLOAT32 and not kept]

    def _tried(self, candidates: Sequence[Candidate]) -> list[Outcome]:
        if not candidates:
            return []
        outcomes = self._trials.run(list(candidates), [self._folder() for _ in candidates])
        for outcome in outcomes:
            self._judge(outcome)
        return outcomes

    def _late(self) -> bool:
        """Return whether the time limit, or the backend's part of it, is reached; the first candidate is tried
        regardless."""
        ended = self._job.clock.ended if self._attempts else ""
        if ended and not self._ended.startswith(ended):
            self._ended = f"{ended}: {len(self._attempts)} were tried by then"
        return bool(ended)

    def _folder(self) -> Path:
        self._folders += 1
        return self._job.scratch / self._target.name / f"{self._folders:03d}"

    def _judge(self, outcome: Outcome) -> None:
        """Measure the latency of an outcome and compare it with the budget."""
        attempt = outcome.attempt
        self._attempts.append(attempt)
        if outcome.error is not None:
            _reraise_if_not_the_targets(outcome.error, self._job)
            self._errors.append(outcome.error)
            return
        lowered, program = outcome.lowered, outcome.program
        if lowered is None or program is None or attempt.drop is None or attempt.size_bytes is None:
            raise CompileError(f"a trial ended without figures: {attempt.label}", where=f"target {self._target.name}")
        if self._section is None:
            self._hold_back(outcome)
        self._outcomes.append(outcome)
        self._stopwatch.first(outcome)
        point = outcome.point
        outcome.over = pareto.excess(point, self._job.budget)
        attempt.reason = self._job.budget.said(
            drop=point.drop,
            size=point.size,
            latency=point.latency,
            agreement=point.agreement,
            lost=point.lost,
            upper=point.upper,
            samples=point.samples,
        )

    def _hold_back(self, outcome: Outcome) -> None:
        """Let a candidate's figures be those on the samples that the search may see."""
        if outcome.evaluation is None:
            return
        reference, attempt = self._job.reference.result(), outcome.attempt
        pair = reference.score, outcome.evaluation.score
        part = held_back.part(*pair)
        if part is not None:
            wanted, found = (held_back.outside(reference.choice, one, part) for one in pair)
            confidence = self._job.budget.confidence or CONFIDENCE
            attempt.value, attempt.drop = found.value, reference.choice.drop(wanted.value, found.value)
            attempt.interval = confidence_intervals.of_drop(reference.choice, wanted, found, confidence)

    def _decided(self) -> Compiled | Failed:
        budget = self._job.budget
        close = {point.key for point in pareto.finalists([one.point for one in self._outcomes], budget)}
        again = [one for one in self._outcomes if one.candidate.key in close]
        if len(again) > 1 or any(self._stopwatch.unsure(one) for one in again):
            self._stopwatch.again(again)
        points = [one.point for one in self._outcomes]
        on_front = {id(point) for point in pareto.front(points)}
        for point, outcome in zip(points, self._outcomes, strict=True):
            outcome.attempt.front = id(point) in on_front
            outcome.attempt.remarks = self._stopwatch.remarks(outcome)
        bytes_wanted = budget.max_size is not None
        slow = {id(one) for one in self._outcomes if not bytes_wanted and self._stopwatch.slower(one)}
        behind = slow | {id(one) for one in float_beside.ahead_by_guess(self._outcomes, bytes_wanted=bytes_wanted)}
        left = dict(zip(points, self._outcomes, strict=True))
        while (chosen := self._best(left, behind)) is not None:
            taken = left[chosen]
            rivals = {point: one for point, one in left.items() if (id(one) in behind) == (id(taken) in behind)}
            unseen = self._unseen(taken, rivals) if self._section is None else None
            over = self._over_all(taken, chosen) if unseen is None else self._over_unseen(unseen, chosen)
            if not over:
                for one in self._outcomes:
                    if one is not taken and not one.attempt.reason:
                        one.attempt.reason = SLOWER if id(one) in slow else KEPT
                taken.attempt.remarks += self._unsure(taken, behind)
                alternatives = self._alternatives(taken, left, behind)
                return dataclasses.replace(self._compiled(taken, unseen=unseen), alternatives=alternatives)
            taken.attempt.reason = over
            taken.over = dict(_UNSEEN)
            del left[chosen]
        return self._decided() if self._tried_in_float() else self._failed(points)

    def _tried_in_float(self) -> bool:
        """Try float on each backend where some candidate kept the budget, though not on samples that its choice did not
        see; return whether there was anything to try. The time limit does not count: without it there is no model."""
        asked = [
            candidate
            for choice, strategy in self._strategies
            if any(one.measured and one.over == _UNSEEN for one in self._of(choice))
            for candidate in strategy.in_float(self._of(choice))
        ]
        self._job.clock.lenient = True
        return bool(self._tried(asked))

    def _of(self, choice: BackendChoice) -> list[Outcome]:
        return [one for one in self._outcomes if one.candidate.backend == choice]

    def _best(self, left: Mapping[pareto.Point, Outcome], behind: Collection[int]) -> pareto.Point | None:
        """Choose among these; take a candidate of ``behind`` only if no other keeps the budget."""
        budget = self._job.budget
        quick = [point for point, one in left.items() if id(one) not in behind]
        return pareto.choose(quick, budget) or pareto.choose(list(left), budget)

    def _alternatives(
        self, taken: Outcome, left: Mapping[pareto.Point, Outcome], behind: Collection[int]
    ) -> tuple[Compiled, ...]:
        """Return the best candidate of each backend but the chosen one's, if the user wants them."""
        if not self._job.options.every_backend:
            return ()
        others = [choice for choice in self._target.backends if choice != taken.candidate.backend]
        found = (
            self._alternative({point: one for point, one in left.items() if one.candidate.backend == choice}, behind)
            for choice in others
        )
        return tuple(one for one in found if one is not None)

    def _alternative(self, mine: dict[pareto.Point, Outcome], behind: Collection[int]) -> Compiled | None:
        """Return the best of these that keeps the budget on samples that its choice did not see, too."""
        while (best := self._best(mine, behind)) is not None:
            unseen = self._unseen(mine[best], mine)
            over = self._over_all(mine[best], best) if unseen is None else self._over_unseen(unseen, best)
            if not over:
                return self._compiled(mine[best], unseen=unseen)
            mine.pop(best).attempt.reason = over
        return None

    def _unsure(self, taken: Outcome, behind: Collection[int]) -> tuple[str, ...]:
        """Return remarks on an uncertain ranking and on a search that the time limit ended."""
        rivals = [one for one in self._outcomes if one is not taken and one.holds and id(one) not in behind]
        return (*self._stopwatch.unsure_beside(taken, rivals), *((self._ended,) if self._ended else ()))

    def _unseen(self, taken: Outcome, left: Mapping[pareto.Point, Outcome]) -> cross_fitting.CrossFittedFigure | None:
        """Return the figure of the choice on samples that it did not use; None if nothing else was tried, or if the
        float model itself was taken, which no choice of samples favors."""
        if taken.is_float or len(self._outcomes) < 2:
            return None
        reference = self._job.reference.result()
        measured = {
            id(one): cross_fitting.MeasuredCandidate(point=point, score=one.evaluation.score)
            for point, one in left.items()
            if one.evaluation is not None
        }
        return cross_fitting.cross_fit(
            measured[id(taken)],
            list(measured.values()),
            reference=reference.score,
            choice=reference.choice,
            budget=self._job.budget,
            confidence=self._job.budget.confidence or CONFIDENCE,
        )

    def _over_all(self, taken: Outcome, chosen: pareto.Point) -> str:
        """Describe what exceeds the budget on all samples, those that are held back among them."""
        reference = self._job.reference.result()
        if taken.evaluation is None or held_back.part(reference.score, taken.evaluation.score) is None:
            return ""
        drop = reference.choice.drop(reference.score.value, taken.evaluation.score.value)
        said = self._job.budget.said(
            drop=drop, size=chosen.size, latency=chosen.latency, agreement=chosen.agreement, upper=chosen.upper
        )
        return said and f"on all samples, {said}"

    def _over_unseen(self, unseen: cross_fitting.CrossFittedFigure, chosen: pareto.Point) -> str:
        """Describe what exceeds the budget on samples that the choice did not use."""
        said = self._job.budget.said(
            drop=unseen.drop,
            size=chosen.size,
            latency=chosen.latency,
            agreement=chosen.agreement,
            upper=chosen.upper if unseen.interval is None else unseen.interval.high,
            samples=chosen.samples,
        )
        return said and f"on samples that the choice did not see, {said}"

    def _compiled(
        self, taken: Outcome, over: str = "", unseen: cross_fitting.CrossFittedFigure | None = None
    ) -> Compiled:
        lowered, program, evaluation = taken.lowered, taken.program, taken.evaluation
        if lowered is None or program is None or evaluation is None:
            raise CompileError("a candidate without files was chosen", where=f"target {self._target.name}")
        began = time.perf_counter()
        golden_file = taken.folder / "golden.npz"
        golden = self._local_trials.first.call(
            "kedge.evaluation.golden_task:make_golden",
            worker_messages.GoldenRequest(
                program=program,
                eight_bits=lowered.precision != "" or taken.plan.quantizes,
                data=self._job.evaluation,
                batch=self._job.model.batch,
                file=str(golden_file),
                budget=golden_size.budget(taken.attempt.size_bytes or 0),
            ),
            worker_messages.GoldenAnswer,
            deadline=self._job.options.deadline,
            on_progress=lambda what, done, total: self._job.on_progress(self._target.name, what, done, total),
        )
        taken.attempt.seconds["golden"] = time.perf_counter() - began
        others = [one for one in self._attempts if one is not taken.attempt]
        return Compiled(
            target=self._target,
            candidate=taken.candidate,
            plan=taken.plan,
            lowered=lowered,
            evaluation=evaluation,
            golden=golden,
            golden_file=golden_file,
            attempts=[*others, taken.attempt],
            over=over,
            unseen=unseen,
            changes=self._changes(taken, lowered, evaluation),
        )

    def _changes(
        self, taken: Outcome, lowered: worker_messages.LowerAnswer, evaluation: worker_messages.EvaluateAnswer
    ) -> ChangesAnswer:
        """Find the samples that changed most, for the report only."""
        job = self._job
        reference = job.reference.result()
        if not all(Path(file).is_file() for file in evaluation.files.values()):
            return ChangesAnswer(note="its answers lie on another machine")
        schemes = registry.compiler(taken.candidate.backend.name).quantized_for(self._target)
        floating = (name for name, precision in taken.plan.layers.items() if not precision.quantized)
        return self._local_trials.first.call(
            "kedge.search.worker_tasks:changes",
            ChangesRequest(
                graph=job.model.graph,
                inputs=job.model.inputs,
                calibration=job.calibration,
                evaluation=job.evaluation,
                preprocess=job.preprocess,
                outputs=evaluation.files,
                reference=reference.outputs,
                kinds=reference.choice.kinds,
                precision=taken.plan.default if taken.plan.default.quantized and not job.model.quantized else None,
                quantized=schemes[0] if schemes else None,
                floating=(*floating, *lowered.floating),
            ),
            ChangesAnswer,
            deadline=job.options.deadline,
        )

    def _failed(self, points: Sequence[pareto.Point]) -> Failed:
        budget = self._job.budget
        near = pareto.nearest(points, budget)
        where = f"target {self._target.name}"
        if near is not None:
            best = next(one for point, one in zip(points, self._outcomes, strict=True) if point is near)
            said = best.attempt.reason
            error: KedgeError = BudgetError(
                f"none of {len(points)} candidates keeps the budget; the nearest, {best.candidate.label}, {said}",
                where=where,
                remedy=remedies.of(
                    best, self._job, time_is_up=bool(self._ended), from_recipe=self._section is not None
                ),
            )
            attempts = list(self._attempts)
            return Failed(target=self._target, error=error, attempts=attempts, nearest=self._compiled(best, said))
        if self._errors:
            return Failed(target=self._target, error=self._errors[0], attempts=self._attempts)
        error = CompileError("its backends offer no precision", where=where)
        return Failed(target=self._target, error=error, attempts=self._attempts)


def _only(candidate: Candidate) -> Batches:
    """Try only what a recipe asks for."""
    yield [candidate]


def _reraise_if_not_the_targets(error: KedgeError, job: Job) -> None:
    from_reference = job.reference.done() and job.reference.exception() is error
    if from_reference or isinstance(error, StorageError) or error.where == user.WHERE:
        raise error
    # A vendor's own words for a full disk are seldom clear.
    if shutil.disk_usage(job.scratch).free < _FREE_BYTES:
        raise StorageError(
            f"the disk is full: {error.what.rstrip('.')}",
            where=str(job.options.out),
            remedy="Free space or choose another folder",
        ) from error
