"""Sequential tests: they may look at the evidence at any time and decide as early as it allows.

One device's evidence is a normal estimate of an effect with its variance. At successive looks such estimates have the
joint distribution of a Brownian motion with drift, watched at the times ``1 / variance`` (C. Jennison, B. W. Turnbull,
"Group Sequential Methods with Applications to Clinical Trials", 2000, ch. 3 and 11). The log-likelihood ratio of the
alternative against the null is therefore that of A. Wald's sequential probability ratio test ("Sequential Tests of
Statistical Hypotheses", 1945), and its exponential is a martingale under the null: the probability that it ever
exceeds ``1 / alpha`` is at most ``alpha`` (J. Ville, 1939), whatever the number of looks.

Calls of one device are not independent: their variance is inflated by the dispersion that was measured
(P. McCullagh, J. A. Nelder, "Generalized Linear Models", 1989, ch. 4.5), devices count separately, and
:func:`combined` joins them so that no single one can decide. A product of independent martingales is one, and so is a
convex combination or a capped one (V. Vovk, R. Wang, "E-values: calibration, combination, and applications", 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

OVERSHOOT = 0.5826
"""Mean overshoot of a random walk of normal steps over a boundary, in standard deviations of one step (D. Siegmund,
"Sequential Analysis", 1985, ch. 10). With skewed steps it is larger on one side by a sixth of the skewness and smaller
on the other, since the two differ by a third of it (T. L. Lai, "Asymptotic moments of random walks", 1976)."""
STAKE = 0.8
"""Share of what is left that is staked on each device; the rest is kept, so that one contrary device costs log 5 at
most."""


@dataclass(frozen=True)
class Effect:
    """An estimate with its variance."""

    estimate: float
    variance: float


@dataclass(frozen=True)
class Boundaries:
    """Where a log-likelihood ratio decides: for the alternative at ``upper``, for the null at ``lower``."""

    upper: float
    lower: float


def boundaries(alpha: float, beta: float, *, step: float = 0.0, skewness: float = 0.0) -> Boundaries:
    """Return Wald's boundaries.

    Args:
        alpha, beta: probabilities of deciding for the alternative under the null, and the reverse.
        step, skewness: standard deviation and skewness of the log-likelihood ratio's change between two looks. With
            them the boundaries are moved inwards by the mean overshoot, so that the error probabilities are met rather
            than undercut; with 0 they are kept at most.
    """
    upper = math.log((1 - beta) / alpha) - max(0.0, OVERSHOOT + skewness / 6) * step
    lower = math.log(beta / (1 - alpha)) + max(0.0, OVERSHOOT - skewness / 6) * step
    return Boundaries(max(upper, 0.0), min(lower, 0.0))


def log_ratio(effect: Effect, null: float, alternative: float) -> float:
    """Return the log-likelihood ratio of ``alternative`` against ``null``."""
    return (alternative - null) * (effect.estimate - (alternative + null) / 2) / effect.variance


def pooled(effects: Sequence[Effect]) -> Effect:
    """Return the mean of independent effects, each weighted by its information."""
    information = sum(1 / effect.variance for effect in effects)
    return Effect(sum(effect.estimate / effect.variance for effect in effects) / information, 1 / information)


def combined(ratios: Sequence[float], *, spared: int, cap: float) -> float:
    """Return the joint log evidence of devices.

    Args:
        ratios: of each device, as of :func:`log_ratio`.
        spared: so many of the strongest are left out: devices that may be faulty by themselves.
        cap: the most that one device counts.
    """
    staked = sorted(min(_staked(ratio), cap) for ratio in ratios)
    return sum(staked[: max(0, len(staked) - spared)])


def _staked(ratio: float) -> float:
    """Return ``log(1 - STAKE + STAKE * exp(ratio))``."""
    if ratio > 0:
        return ratio + math.log(STAKE + (1 - STAKE) * math.exp(-ratio))
    return math.log1p(STAKE * math.expm1(ratio))


def tail(count: int, total: int, share: float) -> float:
    """Return the probability that more than ``count`` of ``total`` happen, each with probability ``share``."""
    return max(0.0, 1.0 - _at_most(count, total, share))


def spare(devices: int, share: float, alpha: float) -> int:
    """Return the smallest number that is exceeded with probability at most ``alpha`` by the devices, of ``devices``,
    that are faulty by themselves, each with probability ``share``."""
    count = 0
    while count < devices and tail(count, devices, share) > alpha:
        count += 1
    return count


def count_evidence(count: int, total: int, share: float) -> float:
    """Return the log evidence that something happens to more than ``share`` of the devices: the likelihood ratio with
    the unknown share uniform on ``share..1`` (H. Robbins, "Statistical Methods Related to the Law of the Iterated
    Logarithm", 1970). Devices may be counted one after the other.

    Args:
        count, total: it happened to ``count`` of ``total``.
        share: 0..1, neither of them.
    """
    beta = math.lgamma(count + 1) + math.lgamma(total - count + 1) - math.lgamma(total + 2)
    above = math.log(max(_at_most(count, total + 1, share), 1e-300)) - math.log1p(-share)
    return beta + above - count * math.log(share) - (total - count) * math.log1p(-share)


def _at_most(count: int, total: int, share: float) -> float:
    """Return the binomial distribution function."""
    if count >= total:
        return 1.0
    term = total * math.log1p(-share)
    odds = math.log(share) - math.log1p(-share)
    terms = [term]
    for number in range(1, count + 1):
        term += math.log((total - number + 1) / number) + odds
        terms.append(term)
    highest = max(terms)
    return min(1.0, math.exp(highest) * math.fsum(math.exp(term - highest) for term in terms))
