"""A candidate beside float: by its own race where float runs in the same runtime, and again where that says nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from kedge.evaluation import worker_messages
from kedge.evaluation.latency_race import Latency, RelativeLatency
from kedge.search import float_beside
from kedge.search.candidate import Candidate, StepChoice
from kedge.search.candidate_latency import CandidateLatency
from kedge.search.latency import LatencyLog
from kedge.search.results import Attempt, Outcome
from kedge_protocol.bundle.config import Verified
from kedge_targets import target
from kedge_targets.numerics import Plan, Precision

Races = dict[Precision, RelativeLatency]


class _Job:
    record = LatencyLog()

    def __getattr__(self, name: str) -> Any:
        return self

    def __fspath__(self) -> str:
        return ""


def paced(ratio: float, low: float, high: float) -> RelativeLatency:
    return RelativeLatency(ratio=ratio, low=low, high=high)


def raced(
    folder: Path, device: str, backend: int, races: Races, call_ms: float = 2.0
) -> tuple[CandidateLatency, dict[Precision, Outcome]]:
    """Candidates of one backend, each after a race of one alone."""
    found = target.find(device)
    outcomes = {}
    current: list[RelativeLatency] = []

    def call(task: str, request: object, kind: object, **more: object) -> object:
        return worker_messages.RaceAnswer(latencies=(Latency(p50=call_ms, p95=call_ms),), paces=tuple(current))

    watch = CandidateLatency(found, cast("Any", _Job()), cast("Any", call))
    for precision, pace in races.items():
        (folder / precision.value).write_bytes(precision.value.encode())
        program = worker_messages.Program(
            folder=str(folder), backend="b", entry=precision.value, options={}, inputs=(), outputs=()
        )
        lowered = worker_messages.LowerAnswer(
            files={}, entry=precision.value, inputs=(), outputs=(), runtimes=(), verified=Verified.EXECUTED, tools={},
            runtime_options={}, seconds={}, notes=(), calibration_samples=1,
        )  # fmt: skip
        candidate = Candidate(backend=found.backends[backend], plan=Plan(default=precision))
        attempt = Attempt(backend="b", precision=precision.value)
        outcomes[precision] = Outcome(
            candidate=candidate, attempt=attempt, plan=candidate.plan, folder=folder, lowered=lowered, program=program
        )
        current[:] = [pace]
        watch.first(outcomes[precision])
    return watch, outcomes


RACES = {Precision.INT8: paced(1.67, 1.17, 2.1), Precision.FLOAT32: paced(1.01, 0.96, 1.2)}


def test_two_races_with_the_same_float_model_are_not_less_sure_than_one(tmp_path: Path) -> None:
    watch, outcomes = raced(tmp_path, "generic-cpu", 0, RACES)
    assert watch.slower(outcomes[Precision.INT8])
    assert watch.remarks(outcomes[Precision.INT8]) == ("slower than float: 1.67× (1.17 to 2.1)",)
    assert watch.remarks(outcomes[Precision.FLOAT32]) == ()


def test_what_is_slower_than_float_is_not_unsure_beside_it(tmp_path: Path) -> None:
    watch, outcomes = raced(tmp_path, "generic-cpu", 0, RACES)
    one, other = outcomes[Precision.INT8], outcomes[Precision.FLOAT32]
    assert not watch.unranked(one, other)
    assert not watch.unranked(other, one)
    watch, outcomes = raced(tmp_path, "generic-cpu", 0, {**RACES, Precision.INT8: paced(1.1, 0.9, 1.5)})
    assert watch.unranked(outcomes[Precision.INT8], outcomes[Precision.FLOAT32])


@pytest.mark.parametrize(("precision", "loses"), [(Precision.INT8, False), (Precision.FLOAT16, True)])
def test_a_short_call_that_gains_only_bytes_loses_no_time(tmp_path: Path, precision: Precision, loses: bool) -> None:
    watch, outcomes = raced(tmp_path, "generic-cpu", 0, {precision: paced(1.4, 1.35, 1.5)}, call_ms=0.04)
    assert watch.slower(outcomes[precision]) is loses
    assert watch.remarks(outcomes[precision]) == ("slower than float: 1.4× (1.35 to 1.5)",)


def test_another_runtimes_float_is_the_one_that_counts(tmp_path: Path) -> None:
    watch, outcomes = raced(tmp_path, "intel-cpu", 0, RACES)
    assert not watch.slower(outcomes[Precision.INT8])
    (said,) = watch.remarks(outcomes[Precision.INT8])
    assert said.startswith("not surely faster than float: 1.65× (0.975")


def test_equal_names_of_two_backends_are_told_apart(tmp_path: Path) -> None:
    same = {Precision.INT8: paced(0.5, 0.4, 0.6), Precision.INT8_DYNAMIC: paced(0.5, 0.4, 0.6)}
    watch, outcomes = raced(tmp_path, "intel-cpu", 0, same)
    taken, other = outcomes[Precision.INT8], outcomes[Precision.INT8_DYNAMIC]
    end = "is faster is not sure; bytes and drop decided"
    assert watch.unsure_beside(taken, []) == ()
    assert watch.unsure_beside(taken, [other]) == (f"which of int8 and int8-dynamic {end}",)
    first, second = target.find("intel-cpu").backends[:2]
    other.candidate = replace(taken.candidate, backend=second)
    assert watch.unsure_beside(taken, [other]) == (f"which of int8 by {first.name} and int8 by {second.name} {end}",)


@pytest.mark.parametrize(("steps", "slower"), [((), False), ((StepChoice(use="prune-channels"),), True)])
def test_a_float_file_that_was_asked_for_int8_is_not_slower_than_itself(
    tmp_path: Path, steps: tuple[StepChoice, ...], slower: bool
) -> None:
    watch, outcomes = raced(tmp_path, "generic-cpu", 0, {Precision.INT8: paced(1.39, 1.3, 1.45)})
    trees = outcomes[Precision.INT8]
    trees.candidate, trees.evaluation = replace(trees.candidate, steps=steps), cast("Any", object())
    trees.attempt.precision = "float32"
    assert (watch.beside_float(trees) is None) is not slower
    assert watch.slower(trees) is slower
    assert watch.remarks(trees) == (("slower than float: 1.39× (1.3 to 1.45)",) if slower else ())


def test_a_float_file_is_the_float_of_its_runtime_whatever_was_asked_for(tmp_path: Path) -> None:
    races = {Precision.INT8: paced(2.0, 1.9, 2.1), Precision.INT8_DYNAMIC: paced(2.0, 1.9, 2.1)}
    watch, outcomes = raced(tmp_path, "intel-cpu", 0, races)
    assert watch.remarks(outcomes[Precision.INT8_DYNAMIC]) == ("slower than float: 2× (1.9 to 2.1)",)
    outcomes[Precision.INT8].attempt.precision, outcomes[Precision.INT8].evaluation = "float32", cast("Any", object())
    (said,) = watch.remarks(outcomes[Precision.INT8_DYNAMIC])
    assert said.startswith("not surely faster than float: 1×")


@pytest.mark.parametrize(
    ("pace", "unsure"),
    [((0.5, 0.4, 0.6), False), ((1.5, 1.3, 1.8), False), ((1.1, 0.9, 1.5), True), ((1.0, 0.99, 1.01), False)],
)
def test_what_may_be_slower_or_not_is_measured_again(
    tmp_path: Path, pace: tuple[float, float, float], unsure: bool
) -> None:
    watch, outcomes = raced(tmp_path, "generic-cpu", 0, {Precision.INT8: paced(*pace)})
    assert watch.unsure(outcomes[Precision.INT8]) is unsure


@pytest.mark.parametrize(
    ("estimated", "bytes_of_int8", "behind"),
    [(True, 300, [Precision.FLOAT32]), (True, 900, []), (False, 300, [])],
)
def test_an_estimate_puts_no_float_before_smaller_integers(
    tmp_path: Path, estimated: bool, bytes_of_int8: int, behind: list[Precision]
) -> None:
    _, outcomes = raced(tmp_path, "rpi4", 0, RACES)
    for precision, one in outcomes.items():
        assert one.attempt.target_latency is not None
        one.attempt.target_latency = replace(one.attempt.target_latency, estimated=estimated)
        one.evaluation = cast("Any", object())
        one.attempt.size_bytes = bytes_of_int8 if precision is Precision.INT8 else 800
    found = float_beside.ahead_by_guess(list(outcomes.values()))
    assert [one.candidate.plan.default for one in found] == behind


@pytest.mark.parametrize(("bytes_wanted", "behind"), [(False, [Precision.CODEBOOK4]), (True, [])])
def test_an_estimate_puts_no_weights_of_few_bits_before_integers_unless_bytes_are_wanted(
    tmp_path: Path, bytes_wanted: bool, behind: list[Precision]
) -> None:
    few = {Precision.INT8: paced(0.5, 0.4, 0.6), Precision.CODEBOOK4: paced(0.5, 0.4, 0.6)}
    _, outcomes = raced(tmp_path, "rpi4", 0, few)
    for precision, one in outcomes.items():
        one.evaluation = cast("Any", object())
        one.attempt.size_bytes = 300 if precision is Precision.INT8 else 160
    found = float_beside.ahead_by_guess(list(outcomes.values()), bytes_wanted=bytes_wanted)
    assert [one.candidate.plan.default for one in found] == behind


def test_another_processors_time_never_says_which_is_faster(tmp_path: Path) -> None:
    far = {Precision.INT8: paced(0.5, 0.49, 0.51), Precision.INT8_DYNAMIC: paced(2.0, 1.9, 2.1)}
    for device, unranked in (("rpi4", True), ("generic-cpu", False)):
        (folder := tmp_path / device).mkdir()
        watch, outcomes = raced(folder, device, 0, far)
        one, other = outcomes.values()
        assert one.point.guessed is unranked
        assert watch.unranked(one, other) is unranked
