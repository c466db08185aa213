"""What each device's figures say of the new bundle: one effect a device, with its variance.

Variances are of what was really seen: between blocks of time (minutes) of the same device and bundle, pooled over the
cohort, and never below what a device changes from one hour to another by itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kedge.fleet.staged.cohorts import (
    CallFigures,
    CohortEvidence,
    DeviceCalls,
    DriftFigures,
    ShadowFigures,
    Share,
    Spread,
)
from kedge.fleet.staged.sequential import Effect

KNOWN_CALLS = 200
"""A device's own rate with the old bundle counts as much as its target's once it is of so many calls."""
LEAST_RATE = 1e-4
"""No rate is taken to be lower."""
LATENCY_DRIFT = 0.08
"""Standard deviation of the change of a device's log latency between two hours with the same bundle."""
LATENCY_BLOCK = 0.05
"""Smallest standard deviation of a log latency between minutes."""
ERROR_DRIFT = 0.1
"""Standard deviation of the change of a device's error rate by itself, as a share of the limit."""
MEMORY_DRIFT = 100_000.0
"""Standard deviation, bytes a minute, of a device's memory slope by itself."""
MEMORY_UNKNOWN = 500_000.0
"""Standard deviation, bytes a minute, of a memory slope of whose scatter nothing is known yet."""
MEMORY_PRIOR = 2
"""Values that :data:`MEMORY_UNKNOWN` counts as much as."""
MIN_POINTS = 3
"""Values of memory before a slope counts."""
HOTTER = 5.0
"""°C that a device must be hotter than before, beside being too hot."""
OFTEN = 20
"""Inputs of a class before its agreement is told."""
DRIFT_DEVIATION = 0.05
"""Standard deviation of a device's population stability index by itself."""


@dataclass(frozen=True)
class Measured:
    """Effects of the devices that measured.

    Attributes:
        samples: calls, blocks or values that they are of.
        detail: in words.
        nothing: in words, why there are no effects.
        shown: from an effect to the figure that is shown.
        ratios: log-likelihood ratio of each device, where it is not that of its effect as a normal estimate.
        step: standard deviation of a ratio's change when a device sends one message; 0 where that is not known.
        pending: whether there are no effects yet, and there will be.
    """

    effects: Sequence[Effect]
    samples: int
    detail: str
    nothing: str
    shown: Callable[[float], float] = float
    ratios: Sequence[float] | None = None
    step: float = 0.0
    pending: bool = False


def error_rates(cohort: CohortEvidence, limit: float) -> Measured:
    """How much larger the share of failed calls is than with the old bundle on the same device, or, where that is not
    known, on its target; against 0 where nothing is known."""
    tested = proportions(cohort.new, cohort.old, limit)
    phi = min((one.phi for one in tested), default=1.0)
    new_rate, old_rate = cohort.new.error_rate, cohort.old.error_rate
    return Measured(
        [one.effect for one in tested],
        cohort.new.inferences,
        f"{new_rate:.2%} of {cohort.new.inferences} calls failed, {old_rate:.2%} of {cohort.old.inferences} before,"
        f" dispersion {phi:.1f}",
        "no calls of users came",
        ratios=[one.ratio for one in tested],
        step=min((one.step for one in tested), default=0.0),
    )


def proportions(new: CallFigures, old: CallFigures, rise: float) -> list[Proportion]:
    """Return each device's failed calls with the new bundle, to be tested for ``rise`` above those with the old one."""
    before = {device.device: device.calls for device in old.devices}
    own_phi, phi = dispersions([(device.device, device.calls) for device in (*new.devices, *old.devices)])
    common = _rate(before.values(), phi)
    found = []
    for device in new.devices:
        if not device.calls.total:
            continue
        own = before.get(device.device, Share())
        known = own.total + KNOWN_CALLS
        base = (own.bad + KNOWN_CALLS * common) / known if before else 0.0
        worse = own_phi.get(device.device, phi)
        found.append(Proportion(device.calls, base, rise, worse, 1 / known if before else 0.0))
    return found


@dataclass(frozen=True)
class Proportion:
    """A share of one device against a base.

    Attributes:
        share: what was counted.
        base: the share under the null.
        rise: how much larger it is under the alternative.
        phi: dispersion of the counts.
        unknown: variance of ``base``, in units of the variance of one count.
    """

    share: Share
    base: float
    rise: float
    phi: float
    unknown: float

    @cached_property
    def information(self) -> float:
        """The number of independent counts against a base that is known exactly, that tell as much."""
        middle = sum(self._ends) / 2
        drift = (ERROR_DRIFT * self.rise) ** 2 / (middle * (1 - middle))
        return 1 / (self.phi * (1 / self.share.total + self.unknown) + drift)

    @property
    def effect(self) -> Effect:
        """The rise, with its variance."""
        middle = sum(self._ends) / 2
        return Effect(self.share.rate - self.base, middle * (1 - middle) / self.information)

    @property
    def ratio(self) -> float:
        """The log-likelihood ratio of ``base + rise`` against ``base`` by binomial counts, as much of it as is
        information (quasi-likelihood)."""
        low, high = self._ends
        rate = self.share.rate
        return self.information * (rate * math.log(high / low) + (1 - rate) * math.log((1 - high) / (1 - low)))

    @property
    def deviation(self) -> float:
        """The standard deviation of the ratio of one independent count."""
        low, high = self._ends
        middle = (low + high) / 2
        return math.sqrt(middle * (1 - middle)) * math.log(high * (1 - low) / low / (1 - high))

    @property
    def step(self) -> float:
        """The standard deviation of the ratio's change by one block of time."""
        return self.deviation * math.sqrt(self.information / max(1, self.share.blocks))

    @cached_property
    def _ends(self) -> tuple[float, float]:
        low = min(max(self.base, LEAST_RATE), 1 - self.rise - LEAST_RATE)
        return low, low + self.rise


def _rate(shares: Iterable[Share], phi: float) -> float:
    """Return the joint rate, which is never quite 0: half an error in a hundred calls more, as many calls as are
    worth so many that are independent. No device counts more than the median one, whatever number of calls it tells."""
    known = [share for share in shares if share.total]
    if not known:
        return 0.0
    most = statistics.median(share.total for share in known)
    weights = [min(1.0, most / share.total) for share in known]
    total = sum(weight * share.total for weight, share in zip(weights, known, strict=True))
    bad = sum(weight * share.bad for weight, share in zip(weights, known, strict=True))
    return (bad + 0.5 * phi) / (total + 100 * phi)


def dispersions(shares: Iterable[tuple[str, Share]]) -> tuple[dict[str, float], float]:
    """Return by how much the variance between blocks exceeds that of independent calls, at least 1: of the device that
    exceeds it most, by name, and of all others together, so that no single one drowns what they say.

    It is the squares that were seen by those to be expected, both summed over devices. A device without errors tells
    nothing of how they come, and so counts nothing; in a mean of Pearson's quotients it would count as much as one with
    bursts.

    Args:
        shares: of devices, by name; some of them twice.
    """
    squares: dict[str, tuple[float, float]] = {}
    for name, share in shares:
        if share.blocks < 2:
            continue
        # With a rate of 0 there is no deviation; half an error keeps the quotient finite.
        rate = (share.bad + 0.5) / (share.total + 1)
        seen = max(0.0, share.squares - 2 * rate * share.bad + rate * rate * share.total)
        before = squares.get(name, (0.0, 0.0))
        squares[name] = (before[0] + seen, before[1] + (share.blocks - 1) * rate * (1 - rate))
    whole = _quotient(squares.values())
    if len(squares) < 3:
        return {}, whole
    worst = max(squares, key=lambda name: squares[name][0] - squares[name][1])
    others = _quotient(pair for name, pair in squares.items() if name != worst)
    return {worst: max(others, _quotient([squares[worst]]))}, others


def _quotient(pairs: Iterable[tuple[float, float]]) -> float:
    known = list(pairs)
    expected = sum(pair[1] for pair in known)
    return max(1.0, sum(pair[0] for pair in known) / expected) if expected else 1.0


def latencies(cohort: CohortEvidence, quantile: str) -> Measured:
    """Log ratio of a latency quantile to the old bundle's on the same device, or its target's."""
    new = _spreads(cohort.new.devices, quantile)
    old = _spreads(cohort.old.devices, quantile)
    own_within, within = _variances_within((*new.items(), *old.items()), LATENCY_BLOCK**2)
    means = [spread.mean for spread in old.values()]
    common = statistics.fmean(means) if means else 0.0
    between = _variance_of(means, common) if len(means) > 1 else 1.0
    effects = []
    for name, spread in new.items():
        own = old.get(name)
        if own is None and not means:
            continue
        of_block = own_within.get(name, within)
        base, known = (common, between) if own is None else (own.mean, of_block / own.count)
        effects.append(Effect(spread.mean - base, of_block / spread.count + known + LATENCY_DRIFT**2))
    now, before = cohort.new.latency_ms(quantile), cohort.old.latency_ms(quantile)
    return Measured(
        effects,
        sum(spread.count for spread in new.values()),
        f"{_WORDS.get(quantile, quantile)} {now or 0:.3g} ms, {before or 0:.3g} ms before, on {len(effects)} devices",
        "no latency of the new bundle and of the old one",
        math.exp,
    )


def _variance_of(values: Sequence[float], mean: float) -> float:
    """Return the variance of a sample. That of the standard library reckons in fractions, which takes longer than all
    else of a gate."""
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


_WORDS = {"first": "first token, p95,"}


def _spreads(devices: Iterable[DeviceCalls], quantile: str) -> dict[str, Spread]:
    found: Mapping[str, Spread] = {device.device: getattr(device, quantile) for device in devices}
    return {name: spread for name, spread in found.items() if spread.count}


def _variances_within(spreads: Iterable[tuple[str, Spread]], least: float) -> tuple[dict[str, float], float]:
    """Return the variance between blocks: of the device with the largest, by name, and of all others together."""
    squares: dict[str, tuple[float, int]] = {}
    for name, spread in spreads:
        before = squares.get(name, (0.0, 0))
        squares[name] = (before[0] + spread.squares, before[1] + spread.count - 1)
    whole = _variance(squares.values(), least)
    if len(squares) < 3:
        return {}, whole
    worst = max(squares, key=lambda name: squares[name][0])
    others = _variance((pair for name, pair in squares.items() if name != worst), least)
    return {worst: max(others, _variance([squares[worst]], least))}, others


def _variance(pairs: Iterable[tuple[float, int]], least: float) -> float:
    known = list(pairs)
    # Blocks that follow each other resemble each other: with few of them the estimate is not trusted.
    return max(least, (sum(pair[0] for pair in known) + 4 * 0.04) / (sum(pair[1] for pair in known) + 4))


def memory(cohort: CohortEvidence) -> Measured:
    """Growth of memory with the new bundle, less the median growth with the old one."""
    known = [device for device in cohort.memory_slope if device.new is not None and device.points >= MIN_POINTS]
    before = [device.old for device in cohort.memory_slope if device.old is not None]
    base = max(0.0, statistics.median(before)) if before else 0.0
    # A device's own variance is of a few points: it counts only where it is above the cohort's. That one is never of a
    # few points alone either, since three points lie on one line by chance often enough.
    spare = [device.points - 2 for device in known]
    scatter = math.fsum(device.variance * free for device, free in zip(known, spare, strict=True))
    common = (scatter + MEMORY_PRIOR * MEMORY_UNKNOWN**2) / (sum(spare) + MEMORY_PRIOR)
    effects = [
        Effect(device.new - base, max(device.variance, common) + MEMORY_DRIFT**2)
        for device in known
        if device.new is not None
    ]
    return Measured(
        effects,
        sum(device.points for device in known),
        f"growth on {len(known)} devices, {base:.0f} bytes a minute before",
        "no device has measured its memory for long enough",
        pending=any(device.new is None and device.old is None for device in cohort.memory_slope),
    )


def hot_devices(cohort: CohortEvidence, limit: float) -> tuple[int, int, float | None]:
    """Return how many devices became too hot, of how many, and the highest temperature with the new bundle."""
    pairs = [(device.new, device.old) for device in cohort.temperature_c if device.new is not None]
    hot = [new for new, old in pairs if new >= limit and (old is None or new - old >= HOTTER)]
    return len(hot), len(pairs), max((new for new, _ in pairs), default=None)


def disagreement(shadow: ShadowFigures, limit: float) -> Measured:
    """Share of inputs that the shadow answers otherwise, above half of the limit, which a good release may have."""
    known = [device for device in shadow.devices if device.compared.total]
    own_phi, phi = dispersions([(device.device, device.compared) for device in known])
    tested = [
        Proportion(device.compared, limit / 2, limit / 2, own_phi.get(device.device, phi), 0.0) for device in known
    ]
    agreement = shadow.agreement
    return Measured(
        [one.effect for one in tested],
        shadow.compared,
        f"{agreement or 0:.2%} of {shadow.compared} inputs on {len(known)} devices answered alike{_worst(shadow)}",
        "no shadow has compared anything yet",
        lambda rise: 1 - limit / 2 - rise,
        [one.ratio for one in tested],
        step=min((one.step for one in tested), default=0.0),
    )


def _worst(shadow: ShadowFigures) -> str:
    """Name the class that agrees least, if any was compared often enough to tell."""
    sums: dict[str, tuple[int, int]] = {}
    for device in shadow.devices:
        for name, (compared, agreed) in device.classes.items():
            before = sums.get(name, (0, 0))
            sums[name] = (before[0] + compared, before[1] + agreed)
    often = {name: agreed / compared for name, (compared, agreed) in sums.items() if compared >= OFTEN}
    if not often:
        return ""
    worst = min(often, key=lambda name: often[name])
    return f", least class {worst} ({often[worst]:.0%})"


def drifts(drift: DriftFigures, limit: float) -> Measured:
    """The larger shift of outputs and of confidence, above that of the inputs, which no release changes."""
    found = []
    for device in drift.devices:
        shifts = [shift for shift in (device.outputs, device.confidence) if shift is not None]
        if shifts:
            found.append(Effect(max(shifts) - (device.inputs or 0.0), DRIFT_DEVIATION**2 + limit**2 / device.samples))
    shown = {"inputs": drift.inputs, "outputs": drift.outputs, "confidence": drift.confidence}
    words = ", ".join(f"{name} {value:.2f}" for name, value in shown.items() if value is not None)
    return Measured(
        found, sum(device.samples for device in drift.devices), f"shift of {words or 'nothing'}", "no sketch came yet"
    )
