"""Finds few things that suffice, where each trial costs time. Standard library only: drivers share it with Kedge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Made = TypeVar("Made")

_HALVINGS = 2


def fewest(
    order: Sequence[T],
    tried: Callable[[Sequence[T]], tuple[Made, bool]],
    *,
    along: Sequence[T] = (),
    returns: int = 0,
) -> tuple[Made, tuple[T, ...]]:
    """Return what is made with few of these, and which: their number is doubled until they suffice, and halved back as
    far as they still do. Then parts of them are left out, smaller and smaller ones, as delta debugging does (A. Zeller,
    R. Hildebrandt, "Simplifying and isolating failure-inducing input", 2002).

    Args:
        order: the most promising first; not empty.
        tried: some of them → what is made with them, and whether they suffice.
        along: all of them, neighbours side by side: parts that are left out are in one place.
        returns: trials to leave parts out.
    """
    low, high = 0, 1
    made, holds = tried(order[:1])
    while not holds and high < len(order):
        low, high = high, min(2 * high, len(order))
        made, holds = tried(order[:high])
    if not holds:
        return made, tuple(order)
    for _ in range(_HALVINGS):
        middle = (low + high) // 2
        if middle == low:
            break
        other, holds = tried(order[:middle])
        if holds:
            made, high = other, middle
        else:
            low = middle
    kept = set(order[:high])
    arranged = [one for one in along if one in kept]
    size = len(arranged) // 2
    while size and returns:
        for part in [arranged[at : at + size] for at in range(0, len(arranged), size)]:
            rest = [one for one in arranged if one not in part]
            if not returns or not rest:
                break
            returns -= 1
            other, holds = tried(rest)
            if holds:
                made, arranged = other, rest
                kept.difference_update(part)
        size = min(size, len(arranged)) // 2
    return made, tuple(one for one in order if one in kept)
