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
convex combination; a capped one falls on average (V. Vovk, R. Wang, "E-values: calibration, combination, and
applications", 2021).

A device may go bad by itself: under the null it is, with probability ``faulty``, one whose calls tell nothing of the
bundle. Then its capped ratio is at most ``exp(cap)``, else 1 on average, so their mixture is at most
``1 + faulty * (exp(cap) - 1)``; divided by this, each device's ratio again has a mean of at most 1, whatever a faulty
device measures (P. J. Huber, "A robust version of the probability ratio test", 1965, caps the ratio for the same
reason). So one alpha holds for chance and for faulty devices together, and no device is left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

OVERSHOOT = 0.5826
"""Mean overshoot of a random walk of small normal steps over a boundary, in standard deviations of one step (D.
Siegmund, "Sequential Analysis", 1985, ch. 10)."""
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


def boundaries(alpha: float, beta: float, *, step: float = 0.0) -> Boundaries:
    """Return Wald's boundaries.

    Args:
        alpha, beta: probabilities of deciding for the alternative under the null, and the reverse.
        step: standard deviation of the log-likelihood ratio's change between two looks. With it the boundaries are
            moved inwards by the mean overshoot, so that the error probabilities are met rather than undercut; with 0
            they are kept at most.
    """
    # The mean overshoot is that of small steps.
    moved = OVERSHOOT * min(step, 1.0)
    upper = math.log((1 - beta) / alpha) - moved
    lower = math.log(beta / (1 - alpha)) + moved
    return Boundaries(max(upper, 0.0), min(lower, 0.0))


def log_ratio(effect: Effect, null: float, alternative: float) -> float:
    """Return the log-likelihood ratio of ``alternative`` against ``null``."""
    return (alternative - null) * (effect.estimate - (alternative + null) / 2) / effect.variance


def pooled(effects: Sequence[Effect]) -> Effect:
    """Return the mean of independent effects, each weighted by its information."""
    information = sum(1 / effect.variance for effect in effects)
    return Effect(sum(effect.estimate / effect.variance for effect in effects) / information, 1 / information)


def combined(ratios: Sequence[float], *, faulty: float, bound: float, priced: bool = True) -> float:
    """Return the joint log evidence of devices.

    Args:
        ratios: of each device, as of :func:`log_ratio`.
        faulty: probability of a device to be faulty by itself, 0 to below 1.
        bound: what the evidence must reach to decide.
        priced: whether the error probability holds for faulty devices too; else for chance alone, and what one device
            says is bounded all the same.
    """
    # Bounds differ by the step of a look; caps that are alike are reckoned once.
    cap = cap_of_device(len(ratios), faulty, math.ceil(2 * bound) / 2)
    price = len(ratios) * _price(faulty, cap) if priced else 0.0
    return sum(min(_staked(ratio), cap) for ratio in ratios) - price


_CAPS = tuple(step / 4 for step in range(2, 41))
"""Log ratios that a device's evidence may be capped at."""


@functools.lru_cache(maxsize=4096)
def cap_of_device(devices: int, faulty: float, bound: float) -> float:
    """Return the most that one of so many devices counts: of :data:`_CAPS`, that with which a bundle as bad as the
    limit is found soonest. A higher one makes each device's evidence dearer, a lower one cuts more of it off.

    It falls with the number of devices, so evidence that grows by devices never gains by the change.
    """
    times = [(_information(devices, faulty, bound, cap), cap) for cap in _CAPS]
    return min(times)[1]


def _information(devices: int, faulty: float, bound: float, cap: float) -> float:
    """Return the mean log ratio that each device must have for the evidence to reach the bound; infinite where it
    never does."""
    price = _price(faulty, cap)
    low, high = 0.0, bound + 60.0
    if devices * (_capped(high, cap) - price) < bound:
        return math.inf
    for _ in range(20):
        middle = (low + high) / 2
        if devices * (_capped(middle, cap) - price) < bound:
            low = middle
        else:
            high = middle
    return high


def _capped(mean: float, cap: float) -> float:
    """Return the mean of the smaller of ``cap`` and a log ratio under its alternative: normal, with a variance of twice
    its mean."""
    deviation = math.sqrt(2 * mean)
    place = (cap - mean) / deviation
    below = (1 + math.erf(place / math.sqrt(2))) / 2
    density = math.exp(-place * place / 2) / math.sqrt(2 * math.pi)
    return mean * below - deviation * density + cap * (1 - below)


def _price(faulty: float, cap: float) -> float:
    """Return what is taken off a device's evidence, since it may be faulty by itself."""
    return math.log1p(faulty * math.expm1(cap))


def _staked(ratio: float) -> float:
    """Return ``log(1 - STAKE + STAKE * exp(ratio))``."""
    if ratio > 0:
        return ratio + math.log(STAKE + (1 - STAKE) * math.exp(-ratio))
    return math.log1p(STAKE * math.expm1(ratio))


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
