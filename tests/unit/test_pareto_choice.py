"""The front and the choice: nobody beats what is on it, and the choice keeps the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.evaluation.latency_race import RelativeLatency
from kedge.search.budget import Budget
from kedge.search.pareto import Point, choose, finalists, front, nearest

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


def paced(key: str, size: int, ratio: float, spread: float = 0.02, drop: float = 0.0) -> Point:
    pace = RelativeLatency(ratio=ratio, low=ratio * (1 - spread), high=ratio * (1 + spread))
    return Point(key=key, drop=drop, size=size, latency=ratio, pace=pace)


def test_of_those_whose_spreads_overlap_the_smaller_is_taken_then_the_earlier() -> None:
    budget = Budget(max_drop=0.1)
    large, small = paced("large", 1000, 0.50, 0.2), paced("small", 700, 0.60, 0.2)
    assert choose([large, small], budget) is choose([small, large], budget) is small
    first, second = paced("first", 700, 0.52), paced("second", 700, 0.5)
    assert choose([first, second], budget) is first
    assert choose([second, first], budget) is second
    assert choose([paced("large", 1000, 0.3), small], budget).key == "large"  # type: ignore[union-attr]


def test_of_the_same_size_and_pace_the_one_that_lost_less_is_taken() -> None:
    worse, better = paced("worse", 700, 0.5, drop=0.009), paced("better", 705, 0.51, drop=0.001)
    assert choose([worse, better], Budget(max_drop=0.01)) is better
    assert choose([worse, paced("larger", 800, 0.5)], Budget(max_drop=0.01)) is worse


def test_what_keeps_the_budget_barely_gives_way_to_what_keeps_it_well_for_hardly_more_bytes() -> None:
    budget = Budget(max_drop=0.1)
    barely, well = paced("barely", 1000, 0.5, drop=0.06), paced("well", 1080, 0.51, drop=0.04)
    assert choose([barely, well], budget) is choose([well, barely], budget) is well
    assert choose([barely, paced("large", 1200, 0.5, drop=0.0)], budget) is barely
    assert choose([barely, paced("slow", 1080, 0.8, drop=0.0)], budget) is barely
    assert choose([paced("enough", 1000, 0.5, drop=0.05), paced("better", 1080, 0.5)], budget).key == "enough"  # type: ignore[union-attr]
    assert choose([barely, well, paced("larger", 1090, 0.5)], budget) is well


# NudeNet's cuts for rpi4 as a search on this host found them, and what one race said of each: the first was "surely"
# half as fast as the other two, which differ from it by 18 and 32 layers in float.
CUTS = (
    Point(key="98 layers", drop=0.005131, size=3288400, latency=34.4, guessed=True),
    Point(key="130 layers", drop=0.004714, size=3473784, latency=35.7, guessed=True),
    Point(key="116 layers", drop=0.004964, size=3329152, latency=31.8, guessed=True),
)
RACES = ((1.3956, 1.1423, 1.6242), (0.7022, 0.5375, 0.8344), (0.6701, 0.5428, 0.7853))
some_paces = st.tuples(st.floats(0.2, 3.0), st.floats(0.7, 1.0), st.floats(1.0, 1.4)).map(
    lambda drawn: (drawn[0], drawn[0] * drawn[1], drawn[0] * drawn[2])
)


def raced(points: tuple[Point, ...], races: tuple[tuple[float, float, float], ...], *, busy: bool) -> list[Point]:
    made = [RelativeLatency(ratio=ratio, low=low, high=high, busy=busy) for ratio, low, high in races]
    return [replace(one, pace=pace, latency=30 * pace.ratio) for one, pace in zip(points, made, strict=True)]


@given(st.just(RACES) | st.tuples(some_paces, some_paces, some_paces), st.booleans())
def test_another_processors_time_ranks_nothing_whatever_it_says(
    races: tuple[tuple[float, float, float], ...], busy: bool
) -> None:
    found = raced(CUTS, races, busy=busy)
    assert [choose(order, Budget(max_drop=0.01)).key for order in (found, found[::-1])] == ["116 layers"] * 2  # type: ignore[union-attr]
    assert finalists(found, Budget(max_drop=0.01)) == []


def test_what_keeps_the_budget_barely_gives_way_only_to_what_surely_loses_less() -> None:
    # Three cuts of a detector for the Pi: 130 layers in float have the smaller cosine loss by chance, and fewer boxes.
    found = [
        Point(key="98 layers", drop=0.005401, upper=0.006209, size=3288400, latency=34.4, guessed=True),
        Point(key="116 layers", drop=0.005176, upper=0.006003, size=3329152, latency=31.8, guessed=True),
        Point(key="130 layers", drop=0.004763, upper=0.005420, size=3473784, latency=35.7, guessed=True),
    ]
    assert choose(found, Budget(max_drop=0.01)).key == "116 layers"  # type: ignore[union-attr]
    surely = [*found[:2], replace(found[2], upper=0.005100)]
    assert choose(surely, Budget(max_drop=0.01)).key == "130 layers"  # type: ignore[union-attr]


def test_what_the_target_itself_measured_ranks_beside_guesses() -> None:
    budget = Budget(max_drop=0.1)
    slow, quick = paced("slow", 300, 1.0), paced("quick", 310, 0.5)
    assert choose([slow, quick, replace(paced("larger", 400, 0.1), guessed=True)], budget) is quick
    guess = replace(paced("smaller", 200, 9.0), guessed=True)
    assert choose([slow, quick, guess], budget) is guess


@pytest.mark.parametrize("busy", [True, False])
def test_on_a_busy_machine_no_single_race_excludes_a_candidate(busy: bool) -> None:
    found = raced(tuple(replace(one, guessed=False) for one in CUTS), RACES, busy=busy)
    last = {one.key for one in finalists(found, Budget(max_drop=0.01))}
    assert last == ({"98 layers", "116 layers", "130 layers"} if busy else {"116 layers", "130 layers"})


@pytest.mark.parametrize(("ratio", "chosen"), [(0.53, "130 layers"), (0.62, "130 layers"), (0.66, "98 layers")])
def test_what_keeps_the_budget_barely_gives_way_for_hardly_more_time(ratio: float, chosen: str) -> None:
    barely, well, _ = (replace(one, guessed=False) for one in CUTS)
    found = raced((barely, well), ((0.5, 0.495, 0.505), (ratio, ratio * 0.99, ratio * 1.01)), busy=False)
    assert choose(found, Budget(max_drop=0.01)).key == chosen  # type: ignore[union-attr]


def test_only_what_is_not_sure_is_measured_again() -> None:
    budget = Budget(max_drop=0.1)
    sure = [paced("small", 300, 0.5), paced("float", 1000, 1.0)]
    assert finalists(sure, budget) == [sure[0]]
    unsure = [*sure, paced("other", 310, 0.5)]
    assert {one.key for one in finalists(unsure, budget)} == {"small", "other"}
    assert finalists([*unsure, point("unknown", 0.0, 300)], budget) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.3, 3.0), st.floats(0.0, 0.3)), min_size=1, max_size=8))
def test_nothing_that_is_as_small_is_surely_faster_than_the_choice(drawn: list[tuple[int, float, float]]) -> None:
    given_points = [paced(str(i), 100 * size, ratio, spread) for i, (size, ratio, spread) in enumerate(drawn)]
    chosen = choose(given_points, Budget(max_drop=0.1))
    assert chosen is not None
    assert chosen.pace is not None
    for one in given_points:
        assert one.pace is not None
        assert not (one.size <= chosen.size and one.pace.beside(chosen.pace).faster)


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
