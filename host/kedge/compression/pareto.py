"""Choosing among what was measured: the front of (metric, bytes, latency), and one point of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kedge.compression.budget import Budget

_LATENCY_STEP = math.log(1.10)
"""Latencies are compared in steps of a tenth: less than that is the machine's mood, and would make choices that nobody
can repeat."""

_UNKNOWN = 50.0
"""Logarithm of a latency that nobody knows: beyond any that is known."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One candidate, measured.

    Attributes:
        key: of the candidate.
        drop: of the metric, against the float model.
        size: bytes of the files.
        latency: milliseconds (p50); None where it was not measured.
        agreement: with the float model's answers; None where there are none to compare.
        upper: end of the drop's interval; None where it has none.
        lost: the outputs below the floor, and why, in words.
    """

    key: str
    drop: float
    size: int
    latency: float | None
    agreement: float | None = None
    lost: tuple[str, ...] = ()
    upper: float | None = None


def excess(one: Point, budget: Budget) -> dict[str, float]:
    """See :meth:`kedge.compression.budget.Budget.excess`."""
    return budget.excess(
        drop=one.drop, size=one.size, latency=one.latency, agreement=one.agreement, lost=one.lost, upper=one.upper
    )


def _grade(latency: float | None) -> float:
    """A latency on the grid; unknown is worst."""
    if latency is None:
        return math.inf
    return round(math.log(max(latency, 1e-9)) / _LATENCY_STEP)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: at least as good in drop, size and latency, and better in one. Equal points are
    there once, the first of them. In the order given."""
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
    """The smallest and fastest that keeps the budget: least product of bytes and (graded) milliseconds; of equals the
    one with the smaller drop, then the smaller file, then the first. None where none keeps it."""
    holding = [one for one in points if not excess(one, budget)]
    if not holding:
        return None

    def cost(one: Point) -> tuple[float, float, int]:
        graded = _grade(one.latency)
        return (
            (math.log(max(one.size, 1)) + (graded * _LATENCY_STEP if math.isfinite(graded) else 50.0)),
            one.drop,
            one.size,
        )

    return min(holding, key=cost)


def nearest(points: Sequence[Point], budget: Budget) -> Point | None:
    """The one that is least over the budget: the smallest sum of what is over; None without points."""
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
