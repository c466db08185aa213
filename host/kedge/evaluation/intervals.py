"""Error bars: of a share, and of a drop that is measured on the same samples twice."""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95


def share(right: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        right: how many of ``count``.
    """
    if count <= 0:
        return 0.0, 1.0
    z = quantile(confidence)
    mean, spread = right / count, z * z / count
    middle = (mean + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(mean * (1 - mean) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def quantile(confidence: float) -> float:
    """Of the normal distribution, two sides."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
