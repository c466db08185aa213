"""Clips ranges from a histogram: by percentile, by divergence, by square error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import rounding
from kedge_targets.numerics import RangeMethod

Counts = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

_COARSE, _FINE = 64, 8
"""Number of positions tried for an end: evenly over the histogram, then on each side of the best."""
_EPSILON = 1e-9


def clip_range(
    low: float,
    high: float,
    counts: Counts,
    zeros: int,
    *,
    method: RangeMethod,
    percentile: float,
    bits: int,
    symmetric: bool,
) -> tuple[float, float]:
    """Return the range that a method chooses.

    Args:
        low, high: least and greatest value, low ≤ 0 ≤ high.
        counts: of values other than 0, in bins of equal width from low to high; not read for ``MIN_MAX``.
        zeros: how many values were exactly 0, beside those counted.
        percentile: for ``PERCENTILE``, in percent.
        bits: for ``ENTROPY`` and ``MSE``.
        symmetric: the range is (-m, m).

    Returns:
        (low, high) within the range given, but for symmetric ones; low ≤ 0 ≤ high.
    """
    largest = max(-low, high)
    whole = (-largest, largest) if symmetric else (low, high)
    if method is RangeMethod.MIN_MAX or largest == 0.0 or not counts.any():
        return whole
    edges = np.linspace(low, high, len(counts) + 1)
    if symmetric:
        edges, counts = _folded(edges, counts)
    if method is RangeMethod.PERCENTILE:
        found = _percentile(edges, counts, zeros, percentile, one_sided=symmetric)
    elif method is RangeMethod.ENTROPY:
        # The sign of a symmetric number takes one bit.
        levels = 2 ** (bits - 1) if symmetric else 2**bits
        found = _searched(edges, lambda start, stop: _divergence(counts, start, stop, max(2, levels)))
    else:
        middles = (edges[:-1] + edges[1:]) / 2
        occupied = counts > 0
        points, weights = middles[occupied], counts[occupied].astype(np.float64)

        def error(start: int, stop: int) -> float:
            return _square_error(points, weights, float(edges[start]), float(edges[stop]), bits, symmetric)

        found = _searched(edges, error)
    return (-found[1], found[1]) if symmetric else found


def _folded(edges: Array, counts: Counts) -> tuple[Array, Counts]:
    """Return the histogram of the magnitudes with the same number of bins."""
    middles = np.abs(edges[:-1] + edges[1:]) / 2
    bins = len(counts)
    largest = max(-float(edges[0]), float(edges[-1]))
    places = np.minimum((middles * (bins / largest)).astype(np.int64), bins - 1)
    folded = np.bincount(places, weights=counts, minlength=bins).astype(np.int64)
    return np.linspace(0.0, largest, bins + 1), folded


def _percentile(edges: Array, counts: Counts, zeros: int, percentile: float, *, one_sided: bool) -> tuple[float, float]:
    filled = counts.copy()
    filled[min(int(np.searchsorted(edges, 0.0, side="right")) - 1, len(counts) - 1)] += zeros
    below = np.concatenate([[0], np.cumsum(filled)]).astype(np.float64)
    total = below[-1]
    cut = max(0.0, 1.0 - percentile / 100.0) * total
    if one_sided:
        return 0.0, float(np.interp(total - cut, below, edges))
    # An end at 0 has nothing to cut off; the other one has it all.
    sides = int(edges[0] < 0.0) + int(edges[-1] > 0.0)
    low = float(np.interp(cut / sides, below, edges)) if edges[0] < 0.0 else 0.0
    high = float(np.interp(total - cut / sides, below, edges)) if edges[-1] > 0.0 else 0.0
    return min(low, 0.0), max(high, 0.0)


def _searched(edges: Array, cost: Callable[[int, int], float]) -> tuple[float, float]:
    """Return the ends of least cost: search the upper end, then the lower one, then the upper one again."""
    bins = len(edges) - 1
    # Both ends stay on their side of 0: the bin with 0 is never cut.
    zero = int(np.searchsorted(edges, 0.0))
    lowest = max(0, zero - 1) if edges[0] < 0.0 else 0
    highest = min(zero + 1, bins) if edges[-1] > 0.0 else bins
    start, stop = 0, bins
    for _ in range(2 if lowest > 0 else 1):
        stop = _least(highest, bins, lambda end: cost(start, end), stop)  # noqa: B023 -- called at once
        start = _least(0, lowest, lambda end: cost(end, stop), start)  # noqa: B023
    return min(0.0, float(edges[start])), max(0.0, float(edges[stop]))


def _least(first: int, last: int, cost: Callable[[int], float], otherwise: int) -> int:
    """The place of least cost: of some evenly between first and last, then of those about the best. Of places that cost
    the same ``otherwise`` stands, which is the widest: what is not cut off cannot be missed."""
    if first >= last:
        return otherwise
    step = max(1, -(-(last - first) // _COARSE))
    best = _best(range(first, last + 1, step), cost, otherwise, cost(otherwise))
    fine = range(max(first, best[0] - step), min(last, best[0] + step) + 1, max(1, -(-step // _FINE)))
    return _best(fine, cost, *best)[0]


def _best(places: range, cost: Callable[[int], float], best: int, least: float) -> tuple[int, float]:
    for place in places:
        value = cost(place)
        if value < least:
            best, least = place, value
    return best, least


def _divergence(counts: Counts, start: int, stop: int, levels: int) -> float:
    """Kullback-Leibler divergence of the values from what ``levels`` levels leave of them, once all beyond the ends is
    moved to the ends (S. Migacz, "8-bit Inference with TensorRT", GTC 2017)."""
    inner = counts[start:stop]
    # With no more bins than levels nothing would be lost, whatever is cut off.
    if stop - start < levels or not inner.any():
        return float("inf")
    reference = inner.astype(np.float64)
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    # Level of each bin; the mass of a level is spread evenly over its bins that hold anything.
    level = np.arange(len(inner)) * levels // len(inner)
    occupied = reference > 0
    mass = np.bincount(level, weights=inner, minlength=levels)
    share = np.bincount(level, weights=occupied, minlength=levels)
    spread = np.divide(mass, share, out=np.zeros_like(mass), where=share > 0)[level] * occupied
    p = reference / reference.sum()
    q = spread / spread.sum()
    held = p > 0
    return float(np.sum(p[held] * np.log(p[held] / np.maximum(q[held], _EPSILON))))


def _square_error(points: Array, weights: Array, low: float, high: float, bits: int, symmetric: bool) -> float:
    """Return the square error of the values (at their bin centres) after rounding as the runtimes do."""
    scale, zero = rounding.scale_and_zero_point(low, high, bits=bits, signed=symmetric, symmetric=symmetric)
    least, most = rounding.bounds(bits, signed=symmetric, narrow=symmetric)
    made = (np.clip(np.rint(points / scale) + zero, least, most) - zero) * scale
    return float(weights @ np.square(made - points))
