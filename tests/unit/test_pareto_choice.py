"""The front and the choice: nobody beats what is on it, and the choice keeps the budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kedge.compression.budget import Budget
from kedge.compression.pareto import Point, choose, front, nearest

points = st.lists(
    st.builds(
        Point,
        key=st.text("abcdef", min_size=1, max_size=4),
        drop=st.floats(-0.1, 1.0),
        size=st.integers(1, 10**8),
        latency=st.none() | st.floats(0.01, 1000.0),
    ),
    max_size=12,
)
budgets = st.builds(
    Budget,
    max_drop=st.floats(0, 1),
    max_size=st.none() | st.integers(1, 10**8),
    max_latency=st.none() | st.floats(0.01, 1000.0),
)


def point(key: str, drop: float, size: int, latency: float | None = 1.0) -> Point:
    return Point(key=key, drop=drop, size=size, latency=latency)


def test_the_smallest_and_fastest_that_holds_is_chosen() -> None:
    given_points = [point("float", 0.0, 1000, 4.0), point("int8", 0.005, 300, 1.5), point("int4", 0.2, 150, 4.0)]
    chosen = choose(given_points, Budget(max_drop=0.01))
    assert chosen is given_points[1]
    assert choose(given_points, Budget(max_drop=0.0)) is given_points[0]
    assert choose(given_points, Budget(max_drop=0.5, max_size=200)) is given_points[2]


def test_latencies_within_a_tenth_do_not_decide() -> None:
    slow, quick = point("first", 0.0, 100, 1.02), point("second", 0.0, 100, 0.99)
    assert choose([slow, quick], Budget(max_drop=0.1)) is slow
    assert choose([quick, slow], Budget(max_drop=0.1)) is quick


def test_equal_points_are_on_the_front_once() -> None:
    first, second = point("a", 0.0, 100), point("b", 0.0, 100)
    assert front([first, second]) == [first]


def test_the_nearest_is_the_one_least_over() -> None:
    budget = Budget(max_drop=0.01, max_size=100)
    far, near = point("far", 0.5, 90), point("near", 0.012, 90)
    assert nearest([far, near], budget) is near
    assert nearest([], budget) is None


@given(points)
def test_no_point_beats_one_of_the_front(given_points: list[Point]) -> None:
    kept = front(given_points)
    assert all(any(one is other for other in given_points) for one in kept)
    assert bool(kept) == bool(given_points)
    for one in kept:
        for other in given_points:
            known = one.latency is not None and other.latency is not None
            better = known and other.drop < one.drop and other.size < one.size and other.latency < one.latency * 0.8  # type: ignore[operator]
            assert not better


@given(points, budgets)
def test_the_choice_keeps_the_budget_and_is_on_no_worse_footing_than_the_front(
    given_points: list[Point], budget: Budget
) -> None:
    chosen = choose(given_points, budget)
    holding = [p for p in given_points if not budget.excess(drop=p.drop, size=p.size, latency=p.latency)]
    assert (chosen is None) == (not holding)
    if chosen is not None:
        assert chosen in holding
        assert not any(
            p.size < chosen.size
            and p.latency is not None
            and chosen.latency is not None
            and p.latency < chosen.latency * 0.9
            for p in holding
        )


@given(points, budgets)
def test_the_choice_depends_on_nothing_but_the_points(given_points: list[Point], budget: Budget) -> None:
    assert choose(given_points, budget) is choose(list(given_points), budget)
