"""The figure of what a search chose is measured on samples that the choice did not see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kedge.evaluation import resampling
from kedge.evaluation.metric import USER, Choice, Score
from kedge.evaluation.resampling import Rows
from kedge.report import statements
from kedge.search import held_back, pareto
from kedge.search.budget import Budget
from kedge.search.candidate import Candidate
from kedge.search.cross_fitting import CrossFittedFigure, MeasuredCandidate, cross_fit
from kedge.search.results import Attempt
from kedge.search.search import Search
from kedge_targets.numerics import Plan, Precision
from kedge_targets.target import BackendChoice

Array = npt.NDArray[Any]

MINE = Choice(kind=USER, name="mine.py:f", function="mine.py:f")
BUDGET = Budget(max_drop=0.0)


def score(rows: Array) -> Score:
    return Score(value=float(rows.mean()), samples=len(rows), rows=Rows.of(rows))


def measured(key: str, size: int, reference: Score, found: Score) -> MeasuredCandidate:
    drop = MINE.drop(reference.value, found.value)
    return MeasuredCandidate(point=pareto.Point(key=key, drop=drop, size=size, latency=None), score=found)


def chosen(candidates: list[MeasuredCandidate], reference: Score) -> tuple[MeasuredCandidate, CrossFittedFigure | None]:
    point = pareto.choose([one.point for one in candidates], BUDGET)
    assert point is not None
    taken = next(one for one in candidates if one.point is point)
    return taken, cross_fit(taken, candidates, reference=reference, choice=MINE, budget=BUDGET, confidence=0.95)


def test_one_candidate_is_no_choice() -> None:
    reference = score(np.ones(20))
    assert chosen([measured("a", 1, reference, reference)], reference)[1] is None


def test_a_choice_that_every_fold_makes_has_its_figure_on_all_samples() -> None:
    rng = np.random.default_rng(0)
    reference = score(rng.normal(1, 0.1, 100))
    good = measured("good", 1, reference, score(np.asarray(rng.normal(2, 0.1, 100))))
    bad = measured("bad", 1, reference, score(np.asarray(rng.normal(0, 0.1, 100))))
    taken, unseen = chosen([bad, good], reference)
    assert unseen is not None
    assert (taken.point.key, unseen.same, unseen.folds) == ("good", 5, 5)
    assert unseen.drop == pytest.approx(good.point.drop)


def test_luck_is_taken_out_of_the_figure() -> None:
    # Twenty candidates that are worth the same: the one that looks best owes that to its samples.
    rng = np.random.default_rng(1)
    looked, fair = [], []
    for _ in range(40):
        reference = score(np.zeros(60))
        candidates = [
            measured(str(number), 100 - number, reference, score(rng.normal(0.0, 1.0, 60))) for number in range(20)
        ]
        candidates = sorted(candidates, key=lambda one: one.point.drop)
        candidates = [
            MeasuredCandidate(
                point=pareto.Point(key=c.point.key, drop=c.point.drop, size=1, latency=None), score=c.score
            )
            for c in candidates
        ]
        taken, unseen = chosen(candidates, reference)
        assert unseen is not None
        looked.append(taken.point.drop)
        fair.append(unseen.drop)
    assert np.mean(looked) < -0.2
    assert abs(np.mean(fair)) < 0.06


def test_of_plenty_a_part_is_held_back_and_alone_gives_the_figure() -> None:
    rng = np.random.default_rng(0)
    reference = score(np.ones(held_back.PLENTY))
    part = held_back.part(reference)
    assert part is not None
    assert len(part) == held_back.PLENTY // 5
    assert held_back.part(score(np.ones(held_back.PLENTY - 1))) is None
    # As good as float on what the search sees, and bad on the rest.
    rows = np.ones(held_back.PLENTY)
    rows[part] = rng.normal(0.5, 0.01, len(part))
    found = score(rows)
    alone = [measured("a", 1, reference, found)]
    for candidates in (alone, [*alone, measured("b", 2, reference, found)]):
        unseen = cross_fit(alone[0], candidates, reference=reference, choice=MINE, budget=BUDGET, confidence=0.95)
        assert unseen is not None
        assert unseen.held == len(part)
        assert unseen.drop == pytest.approx(0.5, abs=0.01)
        assert unseen.interval is not None
        assert unseen.interval.samples == len(part)
        assert "400 samples held back" in statements.sample_statement(unseen, held_back.PLENTY)

    search = Search.__new__(Search)
    search._job = SimpleNamespace(  # type: ignore[assignment]
        reference=SimpleNamespace(result=lambda: SimpleNamespace(score=reference, choice=MINE)), budget=BUDGET
    )
    outcome = SimpleNamespace(evaluation=SimpleNamespace(score=found), attempt=Attempt(backend="any", precision="int8"))
    search._hold_back(outcome)  # type: ignore[arg-type]
    assert outcome.attempt.drop == 0.0
    assert outcome.attempt.value == 1.0
    assert unseen is not None
    assert search._over_unseen(unseen, alone[0].point).startswith("on samples that the choice did not see")


def test_values_of_folds_stand_in_for_rows() -> None:
    count, folds = 50, 5
    calls = resampling.CALLS
    reference = Score(value=1.0, samples=count, again=(1.0,) * (calls + 2 * folds))

    def candidate(key: str, outside: list[float], inside: list[float]) -> MeasuredCandidate:
        found = Score(value=1.0, samples=count, again=(*(1.0,) * calls, *outside, *inside))
        return MeasuredCandidate(
            point=pareto.Point(key=key, drop=0.0, size=1 if key == "a" else 2, latency=None), score=found
        )

    steady = candidate("b", [1.0] * folds, [1.0] * folds)
    lucky = candidate("a", [1.2, 1.2, 0.9, 0.9, 0.9], [0.2, 0.2, 1.4, 1.4, 1.4])
    taken, unseen = chosen([lucky, steady], reference)
    assert unseen is not None
    assert (taken.point.key, unseen.same) == ("a", 2)
    assert unseen.drop == pytest.approx(0.4 * 0.8)
    assert unseen.value == pytest.approx(1 - 0.32)


def test_a_metric_that_cannot_be_had_of_some_samples_is_told_as_it_is() -> None:
    reference = Score(value=1.0, samples=9)
    two = [measured(key, 1, reference, Score(value=1.0, samples=9)) for key in "ab"]
    assert chosen(two, reference)[1] is None


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.INT8])
def test_the_float_model_itself_is_not_refused_for_what_other_candidates_lose(precision: Precision) -> None:
    # In some folds the other candidate looks good enough, and is measured bad: no loss of the float model.
    reference = score(np.ones(100))
    lossy = np.where(np.arange(100) % 7 == 0, 0.9, 1.0)
    scores = {precision: reference, Precision.INT4: score(lossy)}
    outcomes = {
        pareto.Point(key=one.value, drop=reference.value - found.value, size=size, latency=None): SimpleNamespace(
            candidate=Candidate(backend=BackendChoice(name="any"), plan=Plan(default=one)),
            is_float=one is Precision.FLOAT32,
            evaluation=SimpleNamespace(score=found),
        )
        for size, (one, found) in enumerate(scores.items(), 1)
    }
    search = Search.__new__(Search)
    search._job = SimpleNamespace(  # type: ignore[assignment]
        reference=SimpleNamespace(result=lambda: SimpleNamespace(score=reference, choice=MINE)), budget=BUDGET
    )
    search._outcomes = list(outcomes.values())  # type: ignore[arg-type]
    taken = next(iter(outcomes.values()))
    unseen = search._unseen(taken, outcomes)  # type: ignore[arg-type]
    assert (unseen is None) == (precision is Precision.FLOAT32)
