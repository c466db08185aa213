"""Finds the smallest of growing candidates that is good enough, without trying them all."""

from __future__ import annotations

from collections.abc import Callable, Generator

from kedge.search.candidate import Candidate
from kedge.search.results import Outcome

Bisection = Generator[list[Candidate], list[Outcome], tuple[dict[int, Outcome], int | None]]


def smallest(count: int, make: Callable[[int], Candidate], good: Callable[[Outcome], bool]) -> Bisection:
    """Try the first candidate, then halve what is left: whatever is larger than a good one is taken to be good.

    Args:
        count: number of candidates, from small to large.
        make: place → candidate.

    Returns:
        The outcomes by place, in the order in which they were tried; and the smallest place that is good, or None.
    """
    tried: dict[int, Outcome] = {}
    low, high, place = 0, count, 0
    while low < high:
        (tried[place],) = yield [make(place)]
        if good(tried[place]):
            high = place
        else:
            low = place + 1
        place = (low + high) // 2
    return tried, high if high in tried else None
