"""Estimates how far values reach that calibration did not see.

The largest of a few hundred numbers is a poor guess of the largest of the next few hundred. How much it still grows
shows in the numbers themselves: with x1 ≥ x2 ≥ … the largest values of the samples, those of an exponential tail lie
above x(k+1) by the tail's scale on average, and the largest grows by ln 2 of that scale when the samples double (A.
Rényi, "On the theory of order statistics", 1953). What is bounded (a sigmoid, a clip) hardly grows and gets little.

A tensor with many values in each sample gets nothing either: one value of many that is clipped does no harm, while
one of ten is a tenth of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FEW = 256
"""Values of one sample, up to which a single one counts."""
_DOUBLINGS = 4.0
"""The ends are those expected of sixteen times as many samples."""
_FEWEST, _DEPTH = 3, 10
"""Of the largest values, a tenth of all, that show the tail. The two largest alone would show chance."""


class Ends:
    """The largest and the smallest value of each sample."""

    def __init__(self) -> None:
        self._high: list[Array] = []
        self._low: list[Array] = []

    def add(self, values: Array, samples: int) -> None:
        """Add a batch; what has another first axis, or many values in each sample, is passed over."""
        if values.ndim and len(values) == samples and 0 < values.size <= FEW * samples:
            rows = values.reshape(samples, -1)
            self._high.append(rows.max(axis=1))
            self._low.append(rows.min(axis=1))

    def beyond(self, low: float, high: float) -> tuple[float, float]:
        """Return a range with its ends further out. An end at 0 stays, and so does one that no sample has."""
        if not self._high:
            return low, high
        highs, lows = np.concatenate(self._high), np.concatenate(self._low)
        if highs.max() == high > 0:
            high += _DOUBLINGS * growth(highs)
        if lows.min() == low < 0:
            low -= _DOUBLINGS * growth(-lows)
        return low, high


def growth(largest: Sequence[float] | Array) -> float:
    """Return by how much the largest of these numbers would grow with twice as many of them."""
    ordered = np.sort(np.asarray(largest, np.float64))[::-1]
    depth = min(max(len(ordered) // 10, _FEWEST), _DEPTH, len(ordered) - 1)
    # What a Relu made of lower ones says nothing of the tail.
    above = ordered[:depth][ordered[:depth] > ordered[depth]]
    return float(np.log(2) * (above.mean() - ordered[depth])) if above.size else 0.0
