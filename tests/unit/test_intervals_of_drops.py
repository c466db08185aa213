"""Error bars: they cover the truth as often as they say, few samples show little, and how many would is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.evaluation import confidence_intervals, resampling
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge.evaluation.metric import USER, Choice, Score
from kedge.evaluation.metrics import Direction, Metric
from kedge.evaluation.resampling import Rows
from kedge.report import statements
from kedge.search.budget import Budget

Array = npt.NDArray[Any]

TOP1 = Choice(
    kind="top1", name="top1", output="y", kinds=(ClassifiedOutput(name="y", kind=OutputKind.CLASSES, why=""),)
)
MINE = Choice(kind=USER, name="mine.py:f", function="mine.py:f")


def score(rows: Array) -> Score:
    return Score(value=float(rows.mean()), samples=len(rows), rows=Rows.of(rows))


def test_rows_travel_as_they_are() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 3))
    assert np.array_equal(Rows.of(rows).array, rows)


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1.0), (5, 5, 1.0), (8, 1, 0.0390625), (10, 0, 0.001953125)])
def test_mcnemar_is_exact(lost: int, won: int, p: float) -> None:
    assert confidence_intervals.mcnemar(lost, won) == pytest.approx(p)


def test_tangos_interval_is_open_where_nothing_differs() -> None:
    assert confidence_intervals.tango(0, 0, 50)[1] == pytest.approx(1.96**2 / (50 + 1.96**2), abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 400))
def test_tangos_interval_holds_the_point_and_turns_with_its_sides(lost: int, won: int, same: int) -> None:
    count = max(1, lost + won + same)
    low, high = confidence_intervals.tango(lost, won, count)
    assert -1 <= low <= (lost - won) / count + 1e-9
    assert (lost - won) / count - 1e-9 <= high <= 1
    assert confidence_intervals.tango(won, lost, count) == (
        pytest.approx(-high, abs=1e-6),
        pytest.approx(-low, abs=1e-6),
    )


def test_the_interval_of_answers_covers_the_truth() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        kind = rng.choice(3, 120, p=[0.04, 0.02, 0.94])
        found = confidence_intervals.of_answers(kind != 1, kind != 0)
        hits += found.low <= 0.02 <= found.high
    assert 0.92 <= hits / 400 <= 0.99


@pytest.mark.parametrize("count", [20, 100])
def test_the_bootstrap_covers_the_truth(count: int) -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        wanted = rng.gamma(2, 1, count)
        found = confidence_intervals.of_drop(MINE, score(wanted), score(wanted - rng.normal(0.1, 0.3, count)))
        assert found is not None
        hits += found.low <= 0.1 <= found.high
    assert hits / 300 >= 0.89


def test_no_difference_on_few_samples_shows_little() -> None:
    right = np.ones(32)
    found = confidence_intervals.of_drop(TOP1, score(right), score(right))
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(-0.107, abs=1e-3), pytest.approx(0.107, abs=1e-3))
    budget = Budget(max_drop=0.01)
    assert statements.is_shown(0.0, found, budget) is False
    assert statements.budget_statement(0.0, found, budget) == "kept on these samples; to show it takes about 380"
    many = np.ones(400)
    wide = confidence_intervals.of_drop(TOP1, score(many), score(many))
    assert statements.is_shown(0.0, wide, budget) is True
    assert statements.budget_statement(0.0, wide, budget).startswith("shown: 95% sure")


def test_how_many_samples_would_show_it_is_about_right() -> None:
    lost, won = np.arange(200) < 3, np.arange(200) >= 198
    found = confidence_intervals.of_answers(~won, ~lost)
    needed = found.needed(0.005, 0.01)
    assert needed is not None
    times = needed / 200
    high = confidence_intervals.tango(3 * times, 2 * times, needed)[1]
    assert high == pytest.approx(0.01, abs=2e-4)
    assert found.needed(0.01, 0.01) is None
    assert "no number of samples" in statements.budget_statement(0.01, found, Budget(max_drop=0.01))


def test_a_drop_is_worse_than_float_whichever_way_is_better() -> None:
    lower = Choice(kind=USER, name="e", function="e", direction=Direction.LOWER)
    error = np.linspace(1, 2, 50)
    found = confidence_intervals.of_drop(lower, score(error), score(error + 0.5))
    assert found is not None
    assert lower.drop(1.0, 1.5) == 0.5
    assert found.low == pytest.approx(0.5)


def test_what_could_not_be_computed_on_drawn_samples_has_no_interval() -> None:
    assert confidence_intervals.of_drop(MINE, Score(value=1.0, samples=9), Score(value=0.9, samples=9)) is None
    again = tuple(1.0 - 0.001 * number for number in range(resampling.CALLS))
    told = Score(value=1.0, samples=40, again=again)
    worse = Score(value=0.9, samples=40, again=tuple(one - 0.1 for one in again))
    found = confidence_intervals.of_drop(MINE, told, worse)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert "no interval" in statements.budget_statement(0.0, None, Budget(max_drop=0.01))


def test_a_metric_that_some_draws_do_not_have_is_bootstrapped_on_the_others() -> None:
    class Rare(Metric):
        name = "rare"

        def per_sample(self, outputs: Any, reference: Any, labels: Any) -> None:
            return None

        def aggregate(self, rows: Array) -> float:
            drawn = rows[rows[:, 1] > 0, 0]
            return float(drawn.mean()) if len(drawn) else float("nan")

    rows = np.stack([np.linspace(0, 1, 30), np.arange(30) < 1], axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kedge.evaluation.metric.find", lambda name, where: Rare)
        found = confidence_intervals.of_drop(
            Choice(kind="rare", name="rare"), score(rows), score(rows + np.array([0.5, 0.0]))
        )
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(-0.5), pytest.approx(-0.5))
    assert 50 <= int(found.method.split()[-2]) < 900


def test_with_a_confidence_the_end_of_the_interval_decides() -> None:
    sure = Budget(max_drop=0.01, confidence=0.95)
    assert sure.excess(drop=0.0, size=1, latency=None, upper=0.009) == {}
    assert sure.excess(drop=0.0, size=1, latency=None, upper=0.03) == pytest.approx({"drop": 2.0})
    assert sure.excess(drop=0.0, size=1, latency=None) == {"drop": float("inf")}
    assert Budget(max_drop=0.01).excess(drop=0.0, size=1, latency=None, upper=0.03) == {}
    assert "0.95 sure is only 0.03" in sure.said(drop=0.0, size=1, latency=None, upper=0.03)
