"""Confidence intervals of a share, and of a drop measured twice on the same samples.

Right and wrong answers are paired by sample: the interval is Tango's score interval ("Equivalence test and confidence
interval for the difference in proportions for the paired-sample design", 1998), wide also where hardly any sample
differs; the test beside it is McNemar's, exact. Everything else is bootstrapped in pairs: samples are drawn with
replacement, the same for both models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import resampling
from kedge.evaluation.metric import USER, Choice, Score
from kedge_protocol.errors import KedgeError

Array = npt.NDArray[Any]

CONFIDENCE = 0.95
_LEAST_CALLS = 50
_QUICK, _SLOW = 0.002, 0.1
"""Seconds of one aggregation."""
_MOST_NEEDED = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The confidence interval of a drop.

    Attributes:
        low, high: its ends; a drop is worse than float above 0.
        confidence: that the two ends have together.
        method: how they were found.
        samples: that they are of.
        lost, won: samples that only the float model, only the candidate is right on; None where nothing is right or
            wrong.
        p_value: of McNemar's exact test that both happen equally often.
    """

    low: float
    high: float
    confidence: float
    method: str
    samples: int
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None

    def needed(self, drop: float, allowed: float) -> int | None:
        """Estimate how many samples like these bring the upper end within the limit; None if no number does."""
        if drop >= allowed:
            return None
        if self.high <= allowed:
            return self.samples
        if self.lost is not None and self.won is not None:
            return _needed_pairs(self.lost, self.won, self.samples, allowed, self.confidence)
        count = self.samples * ((self.high - drop) / (allowed - drop)) ** 2
        return min(_MOST_NEEDED, round(count))


def of_drop(choice: Choice, reference: Score, score: Score, confidence: float = CONFIDENCE) -> Interval | None:
    """Return the interval of a drop; None if the metric has no rows and cannot be computed on resamples.

    Args:
        reference: the float model's score.
        score: the candidate's, on the same samples.
    """
    if reference.rows is None or score.rows is None:
        return _of_calls(choice, reference, score, confidence)
    wanted, got = reference.rows.array, score.rows.array
    if choice.of_answers and _binary(wanted) and _binary(got):
        if choice.outputs:
            worst = choice.worst(got)
            wanted, got = wanted[:, worst], got[:, worst]
        return of_answers(wanted > 0, got > 0, confidence)
    return _bootstrapped(choice, wanted, got, confidence)


def of_answers(reference: Array, right: Array, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of a drop of right answers.

    Args:
        reference, right: N times whether the float model, the candidate is right.
    """
    count = len(reference)
    lost, won = int((reference & ~right).sum()), int((right & ~reference).sum())
    low, high = tango(lost, won, count, confidence)
    return Interval(
        low=round(low, 9),
        high=round(high, 9),
        confidence=confidence,
        method="score interval of paired answers",
        samples=count,
        lost=lost,
        won=won,
        p_value=round(mcnemar(lost, won), 9),
    )


def share(right: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's score interval of a share.

    Args:
        right: how many of ``count``.
    """
    if count <= 0:
        return 0.0, 1.0
    z = _normal(confidence)
    mean, spread = right / count, z * z / count
    middle = (mean + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(max(0.0, mean * (1 - mean) / count + spread / (4 * count)))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: ``lost + won`` tosses of a fair coin."""
    thrown = lost + won
    if not thrown:
        return 1.0
    logs = [
        math.lgamma(thrown + 1) - math.lgamma(k + 1) - math.lgamma(thrown - k + 1) for k in range(min(lost, won) + 1)
    ]
    tail = sum(math.exp(log - thrown * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def tango(lost: float, won: float, count: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of ``(lost - won) / count``."""
    z, point = _normal(confidence), (lost - won) / count

    def away(drop: float) -> float:
        """Return the score statistic, which decreases with the drop."""
        a = 2 * count
        b = -lost - won + (2 * count - lost + won) * drop
        c = -won * drop * (1 - drop)
        rate = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        spread = count * (2 * rate + drop * (1 - drop))
        gap = lost - won - count * drop
        if spread <= 0:
            return 0.0 if abs(gap) < 1e-12 else math.copysign(math.inf, gap)
        return gap / math.sqrt(spread)

    return _root(away, z, -1.0, point), _root(away, -z, point, 1.0)


def _root(function: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Find where a decreasing function crosses a level."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) > level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _needed_pairs(lost: int, won: int, count: int, allowed: float, confidence: float) -> int | None:
    def ends_within(number: float) -> bool:
        return tango(lost * number / count, won * number / count, number, confidence)[1] <= allowed

    number = float(count)
    while not ends_within(number):
        number *= 2
        if number > _MOST_NEEDED:
            return None
    low, high = number / 2, number
    while high - low > max(1.0, 0.01 * high):
        middle = (low + high) / 2
        low, high = (low, middle) if ends_within(middle) else (middle, high)
    return math.ceil(high)


def _bootstrapped(choice: Choice, wanted: Array, got: Array, confidence: float) -> Interval | None:
    count = len(wanted)
    if choice.averages:
        apart = (wanted - got).reshape(count, -1).mean(axis=1)
        drops = choice.drop(1.0, 0.0) * resampling.drawn_means(apart, resampling.DRAWS)
    else:
        drops = _aggregated(choice, wanted, got)
    drops = drops[np.isfinite(drops)]
    if len(drops) < _LEAST_CALLS:
        return None
    low, high = _ends(drops, count, confidence)
    span = None if choice.kind == USER else choice.metric().span
    if span is not None and np.array_equal(wanted, got):
        # No sample differs, and yet one in so many may.
        unseen = span * tango(0, 0, count, confidence)[1]
        low, high = low - unseen, high + unseen
    return Interval(
        low=round(low, 9),
        high=round(high, 9),
        confidence=confidence,
        method=f"paired bootstrap of {len(drops)} draws",
        samples=count,
    )


def _aggregated(choice: Choice, wanted: Array, got: Array) -> Array:
    """Drops on drawn samples: fewer draws where one takes long, none where it takes very long; NaN where one cannot be
    had, as of a class that was not drawn."""
    took = math.inf
    for _ in range(3):  # the first is often slow
        began = time.monotonic()
        choice.aggregate(got)
        took = min(took, time.monotonic() - began)
    if took > _SLOW:
        return np.zeros(0)
    number = resampling.DRAWS if took < _QUICK else resampling.CALLS
    found = []
    with np.errstate(all="ignore"):
        for draw in resampling.draws(len(wanted), number):
            try:
                found.append(choice.drop(choice.aggregate(wanted[draw]), choice.aggregate(got[draw])))
            except (ArithmeticError, ValueError, KedgeError):
                found.append(math.nan)
    return np.array(found)


def _of_calls(choice: Choice, reference: Score, score: Score, confidence: float) -> Interval | None:
    calls = resampling.CALLS
    drops = [
        choice.drop(left, right)
        for left, right in zip(reference.again[:calls], score.again[:calls], strict=False)
        if left is not None and right is not None
    ]
    if len(drops) < _LEAST_CALLS:
        return None
    low, high = _ends(drops, score.samples, confidence)
    return Interval(
        low=round(low, 9),
        high=round(high, 9),
        confidence=confidence,
        method=f"paired bootstrap of {len(drops)} draws",
        samples=score.samples,
    )


def _ends(drops: Array | Sequence[float], count: int, confidence: float) -> tuple[float, float]:
    """Percentiles, spread a little where samples are few, as Student's t is (Hesterberg, "What teachers should know
    about the bootstrap", 2015)."""
    z = _normal(confidence)
    if count > 1:
        t = z + (z**3 + z) / (4 * (count - 1))
        z = math.sqrt(count / (count - 1)) * t
    tail = NormalDist().cdf(-z)
    low, high = np.quantile(np.asarray(drops), [tail, 1 - tail])
    return float(low), float(high)


def _binary(values: Array) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _normal(confidence: float) -> float:
    """The quantile of the normal distribution, two sides."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
