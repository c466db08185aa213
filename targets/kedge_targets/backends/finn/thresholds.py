"""Computes MultiThreshold on integers: a sum of comparisons, as a line rounded down if that is equivalent.

QONNX's MultiThreshold counts, for each number, the thresholds of its channel that it reaches: ``out = scale * count +
bias``. Thresholds of a uniform quantizer are steps of a line, so ``count = clip(floor(slope * x + start), low, high)``
for some slope and start. That takes five passes over the numbers instead of one for each threshold. If no such line
exists, a table, a search or the comparisons themselves give the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ROUNDS = 60


@dataclass(frozen=True)
class Line:
    """``count = clip(floor(slope * x + start), low, high)``; each parameter one number per channel, in the carrier's
    dtype."""

    slope: Array
    start: Array
    low: Array
    high: Array

    @property
    def whole(self) -> bool:
        """Return whether ``slope * x + start`` is an integer for every integer, so that nothing is rounded."""
        return bool((self.slope == np.rint(self.slope)).all() and (self.start == np.rint(self.start)).all())

    def count(self, x: Array) -> Array:
        """Return the counts of ``x`` [channels, points], with the operations in the simulator's order."""
        found = x * self.slope[:, None]
        found += self.start[:, None]
        np.floor(found, out=found)
        np.maximum(found, self.low[:, None], out=found)
        np.minimum(found, self.high[:, None], out=found)
        return found


def line(thresholds: Array, low: int, high: int, dtype: Any, *, bias: int = 0) -> Line | None:
    """Return a line that gives ``count + bias`` for every integer in ``low`` .. ``high``, or None if there is none.

    Both sides are monotonic in ``x`` (rounding is), and the count is the same from one threshold to the integer before
    the next. So they are equal everywhere if they are equal at each threshold, at the integer before it, and at both
    ends. This is checked, with the dtype and the operations that are used later, before a line is returned.

    Args:
        thresholds: integers [channels, steps], ascending.
        low, high: known range of ``x``.
        dtype: float32 or float64.
        bias: number that is added to the count.
    """
    channels, steps = thresholds.shape
    inside = (thresholds > low) & (thresholds <= high)
    first = (thresholds <= low).sum(axis=1)
    last = (thresholds <= high).sum(axis=1)
    slope, start = _fitted(thresholds.astype(np.float64), inside, np.arange(1, steps + 1) + float(bias))
    never = ~inside.any(axis=1)
    slope[never], start[never] = 0.0, first[never] + bias
    found = Line(slope.astype(dtype), start.astype(dtype), (first + bias).astype(dtype), (last + bias).astype(dtype))
    points = np.concatenate(
        [thresholds, thresholds - 1, np.full((channels, 1), low), np.full((channels, 1), high)], axis=1
    )
    points = np.sort(points.clip(low, high), axis=1)
    wanted = count(points, thresholds) + bias
    return found if np.array_equal(found.count(points.astype(dtype)), wanted.astype(dtype)) else None


def count(points: Array, thresholds: Array) -> Array:
    """Return how many thresholds [channels, steps] (ascending) each point [channels, points] reaches."""
    rows = [np.searchsorted(row, point, side="right") for row, point in zip(thresholds, points, strict=True)]
    return np.stack(rows)


def table(thresholds: Array, low: int, high: int) -> Array:
    """Return the counts of every integer in ``low`` .. ``high``, int64 [channels, high - low + 1]."""
    points = np.arange(low, high + 1)
    return np.stack([np.searchsorted(row, points, side="right") for row in thresholds])


def _fitted(thresholds: Array, inside: Array, levels: Array) -> tuple[Array, Array]:
    """Return slope and start of each channel's line with the largest margin.

    A line steps to level ``k`` at threshold ``t`` if ``slope * t + start >= k`` and ``slope * (t - 1) + start < k``.
    For a given slope, the starts that satisfy this for all steps form an interval, whose length is concave in the
    slope: a ternary search finds the longest.
    """
    count = inside.sum(axis=1)
    any_inside = count > 0
    first = np.where(any_inside, inside.argmax(axis=1), 0)
    last = np.where(any_inside, inside.shape[1] - 1 - inside[:, ::-1].argmax(axis=1), 0)
    rows = np.arange(len(thresholds))
    run = np.maximum(thresholds[rows, last] - thresholds[rows, first], 1.0)
    rise = (last - first).astype(np.float64)
    lowest, highest = rise / run / 4, rise / run * 4 + 1.0

    def interval(slope: Array) -> tuple[Array, Array]:
        starts = levels - slope[:, None] * thresholds
        at_least = np.where(inside, starts, -np.inf).max(axis=1)
        below = np.where(inside, starts, np.inf).min(axis=1) + slope
        return at_least, below

    for _ in range(_ROUNDS):
        left = lowest + (highest - lowest) / 3
        right = highest - (highest - lowest) / 3
        lengths = [np.subtract(*interval(slope)[::-1]) for slope in (left, right)]
        better = lengths[0] < lengths[1]
        lowest, highest = np.where(better, left, lowest), np.where(better, highest, right)
    slope = (lowest + highest) / 2
    # One step alone: the slope is free, and 1 makes everything an integer.
    slope = np.where(count == 1, 1.0, slope)
    at_least, below = interval(slope)
    with np.errstate(invalid="ignore"):  # of channels that no step is in
        start = np.where(count == 1, at_least, (at_least + below) / 2)
    return slope, start
