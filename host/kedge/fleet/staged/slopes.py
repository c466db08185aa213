"""The slope of a device's memory."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

WARM_UP_SECONDS = 120.0
"""After a switch memory grows by caches; it is left out."""
MIN_SECONDS = 240.0
"""Between the first and the last value of a slope that counts."""


def slope(points: Sequence[tuple[float, float]]) -> tuple[float | None, float]:
    """Return the median slope of all pairs of points (H. Theil, 1950; P. K. Sen, 1968) and its variance.

    The variance is that of a least-squares line, inflated by the first autocorrelation of the residuals, since memory
    wanders (H. von Storch, F. W. Zwiers, "Statistical Analysis in Climate Research", 1999, ch. 6.6).

    Args:
        points: (seconds, bytes), oldest first.

    Returns:
        Bytes a minute, None for fewer than three points; and their variance.
    """
    if len(points) < 3 or points[0][0] == points[-1][0]:
        return None, 0.0
    times = [seconds / 60 for seconds, _ in points]
    values = [value for _, value in points]
    found = statistics.median(_pairs(times, values))
    center = statistics.fmean(times)
    level = statistics.median(value - found * time for time, value in zip(times, values, strict=True))
    residuals = [value - level - found * time for time, value in zip(times, values, strict=True)]
    squares = math.fsum(residual * residual for residual in residuals)
    spread = math.fsum((time - center) ** 2 for time in times)
    if not squares:
        return found, 0.0
    lagged = math.fsum(a * b for a, b in itertools.pairwise(residuals)) / squares
    alike = min(0.9, max(0.0, lagged))
    return found, squares / (len(points) - 2) / spread * (1 + alike) / (1 - alike)


def _pairs(times: Sequence[float], values: Sequence[float]) -> Iterable[float]:
    for later in range(1, len(times)):
        for earlier in range(later):
            if times[later] > times[earlier]:
                yield (values[later] - values[earlier]) / (times[later] - times[earlier])
