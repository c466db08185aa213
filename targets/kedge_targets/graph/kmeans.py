"""k-means of scalars: computes the table of a weight's codebook."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BINS = 1 << 16
_RESTARTS = 3
_ROUNDS = 200


def clusters(values: Array, entries: int, *, seed: int = 0) -> Array:
    """Return the ``entries`` cluster centres for ``values``: float32, ascending, padded with the last if there are
    fewer distinct values.

    On a line the clusters are intervals, so one round of Lloyd's algorithm is a look-up in prefix sums. It starts from
    where the density's cube root says (Panter and Dite, 1951: best for many entries) and from k-means++ (Arthur and
    Vassilvitskii, 2007) some times, and the least square error wins.
    """
    points, counts = _histogram(values)
    if len(points) <= entries:
        table = np.full(entries, points[-1], np.float32)
        table[: len(points)] = points
        return table
    rng = np.random.default_rng(seed)
    starts = [_by_density(points, counts, entries)]
    starts += [_plus_plus(points, counts, entries, rng) for _ in range(_RESTARTS)]
    found = [_lloyd(points, counts, start) for start in starts]
    return min(found, key=lambda one: one[1])[0].astype(np.float32)


def _histogram(values: Array) -> tuple[Array, Array]:
    """Return points in ascending order with their counts: all distinct values, or the means of many bins."""
    exact = values.astype(np.float64)
    if values.size <= _BINS:
        points, counts = np.unique(exact, return_counts=True)
        return points, counts.astype(np.float64)
    low, high = float(exact.min()), float(exact.max())
    if low == high:
        return np.array([low]), np.array([float(values.size)])
    bins = np.minimum(((exact - low) * (_BINS / (high - low))).astype(np.int64), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    sums = np.bincount(bins, weights=exact, minlength=_BINS)
    filled = counts > 0
    return sums[filled] / counts[filled], counts[filled].astype(np.float64)


def _by_density(points: Array, counts: Array, entries: int) -> Array:
    coarse, edges = np.histogram(points, bins=4 * entries, weights=counts)
    share = np.concatenate(([0.0], np.cumsum(np.cbrt(coarse))))
    start: Array = np.interp((np.arange(entries) + 0.5) / entries, share / share[-1], edges)
    return start


def _plus_plus(points: Array, counts: Array, entries: int, rng: np.random.Generator) -> Array:
    centres = [points[rng.choice(len(points), p=counts / counts.sum())]]
    distance = np.square(points - centres[0])
    while len(centres) < entries:
        weights = np.cumsum(counts * distance)
        index = int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
        centres.append(points[min(index, len(points) - 1)])
        np.minimum(distance, np.square(points - centres[-1]), out=distance)
    return np.sort(np.array(centres))


def _lloyd(points: Array, counts: Array, centres: Array) -> tuple[Array, float]:
    """Return converged centres and their square error."""
    number = np.concatenate(([0.0], np.cumsum(counts)))
    total = np.concatenate(([0.0], np.cumsum(counts * points)))
    ends = None
    for _ in range(_ROUNDS):
        now = np.concatenate(([0], np.searchsorted(points, (centres[1:] + centres[:-1]) / 2), [len(points)]))
        if ends is not None and np.array_equal(now, ends):
            break
        ends = now
        members = np.diff(number[ends])
        # A cluster without members stays where it is.
        centres = np.where(members > 0, np.diff(total[ends]) / np.maximum(members, 1e-300), centres)
        centres = np.sort(centres)
    nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, points)]
    return centres, float((counts * np.square(points - nearest)).sum())
