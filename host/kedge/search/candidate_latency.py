"""Latencies of candidates: measured on this host in alternation with the float model, and converted to the target."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kedge.evaluation import worker_messages
from kedge.evaluation.latency_race import RelativeLatency
from kedge.search.latency import HOST, LatencyTable, Measurement
from kedge.search.results import Job, Outcome
from kedge.search.trial import Call
from kedge_protocol import digest
from kedge_protocol.errors import CompileError
from kedge_targets import registry
from kedge_targets.target import Target

ALONE_SECONDS = 1.0
FINAL_SECONDS = 3.0


class CandidateLatency:
    """Measures the candidates of one target.

    Args:
        call: runs a task in the worker that measures.
    """

    def __init__(self, target: Target, job: Job, call: Call) -> None:
        self._target = target
        self._job = job
        self._call = call
        self._table = LatencyTable(target, job.record.measurements)
        self._files: dict[int, str] = {}
        self._outcomes: list[Outcome] = []

    def first(self, outcome: Outcome) -> None:
        """Measure a completed candidate in alternation with the float model."""
        lowered, program = outcome.lowered, outcome.program
        if lowered is None or program is None:
            raise CompileError(f"{outcome.attempt.label} has no files", where=f"target {self._target.name}")
        answer = self._raced([program], ALONE_SECONDS)
        measured, pace = answer.latencies[0], answer.paces[0]
        files = self._files[id(outcome)] = digest.of_file(Path(program.folder) / program.entry)
        self._outcomes.append(outcome)
        self._table.seen(files, measured.p50)
        outcome.attempt.latency_ms = measured
        outcome.attempt.target_latency = self._table.of(
            files, measured.p50, lowered.verified, lowered.estimate, pace=pace
        )

    def again(self, outcomes: Sequence[Outcome]) -> None:
        """Measure candidates in alternation with each other and set their paces by this race. Values recorded in an
        earlier search or measured by a device stay."""
        if all(self._settled(one) for one in outcomes):
            return
        answer = self._raced([one.program for one in outcomes if one.program is not None], FINAL_SECONDS)
        for outcome, pace in zip(outcomes, answer.paces, strict=True):
            latency = outcome.attempt.target_latency
            if latency is not None and latency.pace is not None:
                outcome.attempt.target_latency = replace(latency, pace=pace)

    def _settled(self, outcome: Outcome) -> bool:
        latency = outcome.attempt.target_latency
        return latency is None or latency.pace is None or self._table.knows(self._files[id(outcome)])

    def _raced(self, programs: Sequence[worker_messages.Program], seconds: float) -> worker_messages.RaceAnswer:
        job = self._job
        reference = worker_messages.ReferenceLatencyRequest(
            model=job.model.reference, inputs=job.model.inputs, data=job.evaluation, preprocess=job.preprocess
        )
        return self._call(
            "kedge.evaluation.worker_tasks:race",
            worker_messages.RaceRequest(programs=tuple(programs), reference=reference, seconds=seconds),
            worker_messages.RaceAnswer,
            deadline=job.options.deadline,
        )

    @property
    def measurements(self) -> list[Measurement]:
        """Return the latencies measured on this host for this target, for the record."""
        found = []
        for outcome in self._outcomes:
            here, there = outcome.attempt.latency_ms, outcome.attempt.target_latency
            if here is None or there is None or there.estimated:
                continue
            found.append(
                Measurement(
                    device=HOST,
                    target=self._target.name,
                    files=self._files[id(outcome)],
                    p50_ms=there.p50,
                    p95_ms=here.p95 if there.p50 == here.p50 else there.p50,
                    pace=there.pace,
                )
            )
        return found

    def beside_float(self, outcome: Outcome) -> RelativeLatency | None:
        """Return a candidate's latency relative to float by the same backend if that was tried, else to the float model
        by ONNX Runtime; None if it is unknown, or if the files are the float model itself: what they take more than the
        reference is a bundle's own share of a call, as of texts, which is not in the reference's. For a target other
        than this machine it is the host's. If the backend is the one that runs the float model, its own race with it
        says more than two races do."""
        latency = outcome.attempt.target_latency
        if latency is None or latency.pace is None or outcome.is_float:
            return None
        if registry.compiler(outcome.candidate.backend.name).reference:
            return latency.pace
        for other in self._outcomes:
            known = other.attempt.target_latency
            same = other.candidate.backend == outcome.candidate.backend
            if same and other.is_float and known is not None and known.pace is not None:
                return latency.pace.beside(known.pace)
        return latency.pace

    def unsure(self, outcome: Outcome) -> bool:
        """Return whether a candidate may lose time beside float on the target itself, or may not."""
        latency, pace = outcome.attempt.target_latency, self.beside_float(outcome)
        if latency is None or latency.estimated or pace is None or pace.faster or outcome.loses(pace):
            return False
        return outcome.loses(replace(pace, low=pace.high))

    def slower(self, outcome: Outcome) -> bool:
        """Return whether a candidate certainly loses time beside float on the target itself."""
        latency, pace = outcome.attempt.target_latency, self.beside_float(outcome)
        if latency is None or latency.estimated or pace is None:
            return False
        return outcome.loses(pace)

    def unranked(self, one: Outcome, other: Outcome) -> bool:
        """Return whether both were measured and neither is certainly faster, which another processor's never is."""
        first, second = one.point, other.point
        if first.pace is None or second.pace is None:
            return False
        if first.guessed or second.guessed:
            return True
        if one.is_float != other.is_float:
            pace = self.beside_float(other if one.is_float else one)
            return pace is not None and not pace.slower and not pace.faster
        return first.pace.overlaps(second.pace)

    def unsure_beside(self, taken: Outcome, rivals: Sequence[Outcome]) -> tuple[str, ...]:
        """Return a remark that names the rivals that may be as fast, with their backends if these differ."""
        found = [one for one in rivals if self.unranked(taken, one)]
        if not found:
            return ()
        several = len({one.candidate.backend.name for one in (taken, *found)}) > 1
        first, *others = (
            f"{one.candidate.label} by {one.candidate.backend.name}" if several else one.candidate.label
            for one in (taken, *found)
        )
        return (f"which of {first} and {', '.join(others)} is faster is not sure; bytes and drop decided",)

    def remarks(self, outcome: Outcome) -> tuple[str, ...]:
        """Return the remarks for the report on a candidate's latency."""
        latency, pace = outcome.attempt.target_latency, self.beside_float(outcome)
        said = []
        if latency is not None and latency.estimated and latency.pace is not None:
            said.append(
                f"{latency.p50:.3g} ms is {latency.source.removeprefix('estimated: ')}; no {self._target.title} has "
                "measured these files"
            )
        if pace is not None and not pace.faster:
            where = "" if latency is not None and not latency.estimated else f" on this host ({platform.machine()})"
            said.append(f"{'slower' if pace.slower else 'not surely faster'} than float{where}: {pace.text}")
        return tuple(said)
