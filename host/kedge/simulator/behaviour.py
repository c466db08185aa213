"""What a simulated runtime does: calls, errors, latencies, memory, by the scenario's description of its bundle."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kedge.simulator.scenario import Defect, Runtime
from kedge_protocol.latency_buckets import BUCKETS, bounds, sparse

TAIL_SHARE = 0.02
"""Share of the calls that a defect's ``tail`` makes slower."""
_MOST_DRAWN = 5000
"""Latencies that are drawn for one message."""
_GAUSS_FROM = 30.0
_UPPER_ENDS = np.array([bounds(bucket)[1] for bucket in range(BUCKETS - 1)])
"""Of the buckets of latencies but the last, in nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was counted in one interval; ``inferences`` are the calls that were answered."""

    inferences: int
    errors: int
    latencies_ms: npt.NDArray[np.float64]
    memory_bytes: int
    temperature_c: float

    def latency_ms(self) -> dict[str, float]:
        """Return the quantiles and the mean; empty without calls."""
        count = len(self.latencies_ms)
        if not count:
            return {}
        ordered = np.sort(self.latencies_ms)
        found = {f"p{share}": float(ordered[min(count - 1, count * share // 100)]) for share in (50, 95, 99)}
        return {**found, "mean": float(ordered.mean())}

    def latency_buckets(self) -> dict[str, int]:
        """Return the histogram as it is sent, see :mod:`kedge_protocol.latency_buckets`."""
        # The same numbers as bucket_of gives, for all calls at once.
        buckets = np.searchsorted(_UPPER_ENDS, self.latencies_ms * 1e6, side="right")
        return sparse(np.bincount(buckets, minlength=1).tolist())


class SimulatedRuntime:
    """The runtime of one device.

    Args:
        runtime: the scenario's.
        chance: draws; of this device alone.
        noise: draws many numbers at once; shared.
        slow: factor of each call's time.
    """

    def __init__(self, runtime: Runtime, chance: random.Random, noise: np.random.Generator, *, slow: float) -> None:
        self._runtime = runtime
        self._chance = chance
        self._noise = noise
        self._median_ms = runtime.latency_ms * slow * math.exp(chance.gauss(0.0, runtime.between_devices))
        self.median_ms = self._median_ms
        """Milliseconds of a call, of the old release on this device."""
        self._busy = math.exp(chance.gauss(0.0, 0.2))
        self._leaked = 0.0

    def restarted(self) -> None:
        """Note that the serving process is a new one: what had leaked is given back."""
        self._leaked = 0.0

    def measure(self, seconds: float, defect: Defect) -> Figures:
        """Return the figures of an interval in which a bundle with this defect served."""
        runtime, chance = self._runtime, self._chance
        calls = poisson(chance, runtime.calls_per_minute * self._busy * seconds / 60.0)
        errors = binomial(chance, calls, min(1.0, runtime.errors + defect.errors))
        self._leaked += defect.leak_mb_per_minute * seconds / 60.0
        memory_mb = runtime.memory_mb + self._leaked + chance.gauss(0.0, runtime.memory_noise_mb)
        return Figures(
            inferences=calls - errors,
            errors=errors,
            latencies_ms=self._latencies(min(calls - errors, _MOST_DRAWN), defect),
            memory_bytes=max(1, int(memory_mb * (1 << 20))),
            temperature_c=runtime.temperature_c + chance.gauss(0.0, 1.0),
        )

    def shadowed(self, inferences: int, share: float, defect: Defect) -> dict[str, tuple[int, ...]]:
        """Return what a shadow with this defect answered: class of the old answer → (compared, agreed).

        Args:
            inferences: calls of the interval.
            share: of them that the shadow sees.
        """
        runtime, chance = self._runtime, self._chance
        found: dict[str, tuple[int, ...]] = {}
        for number in range(runtime.classes):
            compared = poisson(chance, inferences * share / runtime.classes)
            agreement = 0.0 if number == defect.wrong_class else runtime.agreement
            found[str(number)] = (compared, binomial(chance, compared, agreement))
        return {name: counts for name, counts in found.items() if counts[0]}

    def _latencies(self, count: int, defect: Defect) -> npt.NDArray[np.float64]:
        drawn: npt.NDArray[np.float64] = self._noise.standard_normal(max(count, 0))
        drawn = self._median_ms * defect.latency * np.exp(self._runtime.spread * drawn)
        if defect.tail != 1.0 and count:
            slow = self._noise.random(count) < TAIL_SHARE
            drawn[slow] *= defect.tail
        return drawn


def poisson(chance: random.Random, mean: float) -> int:
    """Draw a Poisson number; above a mean of 30 from the normal distribution."""
    if mean > _GAUSS_FROM:
        return max(0, round(chance.gauss(mean, math.sqrt(mean))))
    return _counted(chance, math.exp(-mean), lambda number: mean / number)


def binomial(chance: random.Random, trials: int, share: float) -> int:
    """Draw how many of ``trials`` hit; with many hits from the normal distribution."""
    mean = trials * share
    if share <= 0 or trials <= 0:
        return 0
    if share >= 1:
        return trials
    if mean > _GAUSS_FROM and trials - mean > _GAUSS_FROM:
        return min(trials, max(0, round(chance.gauss(mean, math.sqrt(mean * (1 - share))))))
    odds = share / (1 - share)
    first = math.exp(trials * math.log1p(-share))
    if first <= 0.0:
        return sum(chance.random() < share for _ in range(trials))
    return min(trials, _counted(chance, first, lambda number: (trials - number + 1) / number * odds))


def _counted(chance: random.Random, first: float, ratio: Callable[[int], float]) -> int:
    """Invert a distribution function: ``first`` is the probability of 0, ``ratio`` of a number to the one before."""
    left, number, weight = chance.random() - first, 0, first
    while left > 0 and number < 10_000:
        number += 1
        weight *= ratio(number)
        left -= weight
    return number
