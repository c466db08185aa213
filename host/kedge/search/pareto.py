"""Chooses among measured candidates: the Pareto front of drop, size and latency, and one point of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kedge.evaluation.latency_race import RelativeLatency
from kedge.search.budget import Budget

_LATENCY_STEP = math.log(1.10)
"""Latencies are compared in steps of a tenth: smaller differences are noise, and would make choices unrepeatable."""

_SAME_SIZE = 0.02
"""Files whose sizes differ by a smaller share count as equally large."""

_BARELY, _LARGER, _LONGER = 0.5, 0.10, 0.25
"""A candidate that uses a larger share of the allowed drop gives way to one that uses less, for so many more bytes and
so much more time: the layers that accuracy keeps in float take more of it than of bytes."""

_CLOSE = math.log(1.3)
_MOST_FINALISTS = 6
_UNKNOWN = 50.0
"""Logarithm assumed for an unknown latency: larger than any known one."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The measurements of one candidate.

    Attributes:
        key: of the candidate.
        drop: of the metric, against the float model.
        size: bytes of the files.
        latency: milliseconds (p50); None if not measured.
        pace: relative to the float model, if measured in alternation with it.
        guessed: whether the latency is another processor's, which ranks nothing.
        agreement: with the float model's answers; None if there are none to compare.
        upper: upper end of the drop's interval; None if there is none.
        lost: the outputs below the floor, each with the reason in words.
        samples: number of samples behind drop and agreement.
    """

    key: str
    drop: float
    size: int
    latency: float | None
    agreement: float | None = None
    lost: tuple[str, ...] = ()
    upper: float | None = None
    samples: int = 0
    pace: RelativeLatency | None = None
    guessed: bool = False


def excess(one: Point, budget: Budget) -> dict[str, float]:
    """Return what exceeds the budget; see :meth:`kedge.search.budget.Budget.excess`."""
    return budget.excess(
        drop=one.drop,
        size=one.size,
        latency=one.latency,
        agreement=one.agreement,
        lost=one.lost,
        upper=one.upper,
        samples=one.samples,
    )


def _grade(latency: float | None) -> float:
    """Round a latency to the grid; an unknown one counts as the worst."""
    if latency is None:
        return math.inf
    return round(math.log(max(latency, 1e-9)) / _LATENCY_STEP)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point dominates in drop, size and latency, in the given order. Of equal points
    the first one stays."""
    kept: list[Point] = []
    for number, one in enumerate(points):
        mine = (one.drop, one.size, _grade(one.latency))
        beaten = False
        for place, other in enumerate(points):
            theirs = (other.drop, other.size, _grade(other.latency))
            if place != number and all(t <= m for t, m in zip(theirs, mine, strict=True)):
                beaten = theirs != mine or place < number
                if beaten:
                    break
        if not beaten:
            kept.append(one)
    return kept


def choose(points: Sequence[Point], budget: Budget) -> Point | None:
    """Return the smallest and fastest candidate that keeps the budget; None if none does.

    The product of bytes and milliseconds is minimized. Among candidates that may be equally fast, the smaller one is
    taken; among nearly equal sizes the one with the smaller drop, then the earlier one. If it uses more than half of
    the allowed drop, the smallest of those that use less is taken instead, if it surely loses less, is hardly larger
    and not surely much slower. So a repeated measurement only changes the choice among candidates whose spreads
    overlap. Where latencies are guessed, it changes nothing: bytes and drops decide.
    """
    holding = [one for one in points if not excess(one, budget)]
    if not holding:
        return None
    known = [one for one in holding if not one.guessed]
    paced = all(one.pace is not None for one in known)
    best = min(known or holding, key=lambda one: _cost(one, paced))
    rivals = [one for one in holding if _alike(one, best, paced)]
    smallest = min(one.size for one in rivals)
    same = [one for one in rivals if one.size <= smallest * (1 + _SAME_SIZE)]
    # Two of them may both be as fast as the best one, and yet one surely faster than the other.
    undefeated = [one for one in same if not any(_faster(other, one) for other in same)]
    chosen = min(undefeated or same, key=lambda one: one.drop)
    if chosen.drop <= _BARELY * budget.max_drop:
        return chosen
    well = [one for one in holding if one.drop <= _BARELY * budget.max_drop and one.size <= smallest * (1 + _LARGER)]
    well = [one for one in well if _loses_less(one, chosen) and (one in rivals or not _longer(one, chosen))]
    return min(well, key=lambda one: (one.size, one.drop), default=chosen)


def finalists(points: Sequence[Point], budget: Budget) -> list[Point]:
    """Return the candidates between which the choice is uncertain, the most likely first: possibly as fast as the best
    one, nearly as good, or measured on a busy machine, where two races of one file may differ by a factor of two. A
    single one if the choice is certain; none where another race would tell nothing."""
    holding = [one for one in points if not excess(one, budget)]
    if not holding or any(one.pace is None or one.guessed for one in holding):
        return []
    best = min(holding, key=lambda one: _cost(one, True))
    near = _cost(best, True) + _CLOSE
    close = [one for one in holding if _alike(one, best, True) or _cost(one, True) < near or _busy(one) or _busy(best)]
    return sorted(close, key=lambda one: _cost(one, True))[:_MOST_FINALISTS]


def _busy(one: Point) -> bool:
    return one.pace is not None and one.pace.busy


def _cost(one: Point, paced: bool) -> float:
    """Return the logarithm of bytes times milliseconds; of bytes alone where these are guessed."""
    if one.guessed:
        return math.log(max(one.size, 1))
    if paced and one.pace is not None:
        return math.log(max(one.size, 1)) + math.log(max(one.pace.ratio, 1e-9))
    graded = _grade(one.latency)
    return math.log(max(one.size, 1)) + (graded * _LATENCY_STEP if math.isfinite(graded) else _UNKNOWN)


def _faster(one: Point, other: Point) -> bool:
    if one.pace is None or other.pace is None or one.guessed or other.guessed:
        return False
    return one.pace.beside(other.pace).faster


def _loses_less(one: Point, other: Point) -> bool:
    """Return whether the whole interval of a drop lies below another drop, so that no luck of samples decides."""
    return one.upper is None or one.upper < other.drop


def _longer(one: Point, other: Point) -> bool:
    """Return whether a call surely takes more time than another by more than is given for accuracy."""
    return one.pace is None or other.pace is None or one.pace.beside(other.pace).low > 1 + _LONGER


def _alike(one: Point, other: Point, paced: bool) -> bool:
    """Return whether the spreads of two latencies overlap, or one of them is guessed."""
    if one.guessed or other.guessed:
        return True
    if paced and one.pace is not None and other.pace is not None:
        return one.pace.overlaps(other.pace)
    return _grade(one.latency) == _grade(other.latency)


def nearest(points: Sequence[Point], budget: Budget) -> Point | None:
    """Return the point that exceeds the budget least, by the sum of all excesses; None without points."""
    if not points:
        return None
    return min(
        points,
        key=lambda one: (
            sum(excess(one, budget).values()),
            one.drop,
            one.size,
        ),
    )
