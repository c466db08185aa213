"""Sketches of what a model sees and answers: histograms of bounded size that add up over processes, time and devices.

A bundle's configuration holds the baseline: for each stream the edges of its bins and the counts of the calibration or
evaluation samples. A device counts its live samples in the same bins; the controller adds these counts and compares
them with the baseline by the population stability index. Inputs that repeat exactly are told by a sketch too
(:func:`repeat_effect`) and count less; near copies, such as frames of a camera that stands still, count as different.

This module does not use numpy; :mod:`kedge_targets.drift` computes the values that are counted.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kedge_protocol.errors import BundleError

MAX_STREAMS = 32
MAX_BINS = 32
ALARM = 0.25
"""The index from which on a stream counts as drifted; 0.1 to 0.25 is a small shift (N. Siddiqi, Credit Risk Scorecards,
2006, ch. 8)."""
REPEATS = "repeats"
"""The name, among the streams of a message, of the counts that tell how often samples repeat."""
REPEAT_BITS = MAX_BINS - 1
_CHANCE = 4.0
"""Standard deviations above what chance makes of samples without a shift."""


class Kind(str, enum.Enum):
    """What a stream is of."""

    INPUT = "input"
    OUTPUT = "output"
    CONFIDENCE = "confidence"


class Statistic(str, enum.Enum):
    """The number that is counted of each sample."""

    MEAN = "mean"
    SPREAD = "spread"  # the standard deviation within the sample
    CLASS = "class"  # the index of the largest value
    TOP = "top"  # the largest value, of an output that holds probabilities
    SOFTMAX = "softmax"  # the largest value of the output's softmax


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One histogram of a model.

    Attributes:
        tensor: name of the input or output.
        edges: between the bins, ascending; a value on an edge belongs above it.
        counts: of the baseline; one more than ``edges``.
    """

    kind: Kind
    tensor: str
    statistic: Statistic
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        """The stream's name in messages: ``input/x/mean``."""
        return f"{self.kind.value}/{self.tensor}/{self.statistic.value}"

    def bin_of(self, value: float) -> int | None:
        """Return the number of a value's bin; None if the value is not finite."""
        return bisect.bisect_right(self.edges, value) if math.isfinite(value) else None


def check(streams: Sequence[Stream], *, where: str) -> None:
    """Check a baseline.

    Raises:
        BundleError: there are too many streams or bins, or the parts of a stream do not fit together.
    """
    if len(streams) > MAX_STREAMS or len({stream.name for stream in streams}) != len(streams):
        raise BundleError(f"the drift baseline has more than {MAX_STREAMS} streams, or one twice", where=where)
    for stream in streams:
        ordered = all(low < high for low, high in zip(stream.edges, stream.edges[1:], strict=False))
        bins = len(stream.counts)
        if not 2 <= bins <= MAX_BINS or bins != len(stream.edges) + 1 or not ordered or min(stream.counts) < 0:
            raise BundleError(f"the drift baseline of {stream.name!r} is broken", where=where)


def psi(expected: Sequence[int], actual: Sequence[int]) -> float:
    """Return the population stability index, ``sum((a - e) ln(a / e))`` over the bins' shares: the symmetrized
    Kullback-Leibler divergence (Siddiqi 2006; B. Yurdakul, Statistical Properties of Population Stability Index, 2018).

    Half a sample is added to each bin, so that an empty one does not make it infinite.

    Args:
        expected, actual: counts of the same bins.
    """
    wanted, came = sum(expected) + 0.5 * len(expected), sum(actual) + 0.5 * len(actual)
    total = 0.0
    for one, other in zip(expected, actual, strict=True):
        e, a = (one + 0.5) / wanted, (other + 0.5) / came
        total += (a - e) * math.log(a / e)
    return total


def by_chance(expected: Sequence[int], actual: Sequence[int], *, effect: float = 1.0) -> float:
    """Return an index that samples without a shift hardly ever exceed: it is then distributed as ``(1/N + 1/M)`` times
    chi-square with as many degrees of freedom as there are bins, less one (Yurdakul 2018, theorem 3.1). This is its
    mean and four standard deviations.

    Args:
        effect: of samples that repeat, see :func:`repeat_effect`: so many times fewer samples count.
    """
    freedom = len(expected) - 1
    scale = 1 / max(1, sum(expected)) + effect / max(1, sum(actual))
    return scale * (freedom + _CHANCE * math.sqrt(2 * freedom))


def repeat_bits(digest: bytes) -> list[int]:
    """Return the places, of :data:`REPEAT_BITS`, at which a sample is counted, by 4 bytes or more of its hash."""
    bits = int.from_bytes(digest[:4], "little")
    return [place for place in range(REPEAT_BITS) if bits >> place & 1]


def repeat_effect(counts: Sequence[int] | None) -> float:
    """Return the number of samples divided by the number that counts, at least 1: where inputs repeat, the shares of
    the bins vary as those of fewer samples do.

    Of samples of which the i-th distinct one comes ``c_i`` times, ``(sum c)² / sum c²`` count (L. Kish, Survey
    Sampling, 1965, ch. 11.7). ``sum c²`` is estimated in bounded bytes: each sample adds 1 or -1 to each of several
    sums, by the bits of its hash, and the mean square of these sums is its unbiased estimate, with a relative deviation
    of a quarter here (N. Alon, Y. Matias, M. Szegedy, "The Space Complexity of Approximating the Frequency Moments",
    1996). The sums add up over processes, time and devices.

    Args:
        counts: the number of samples, then how many of them had each bit; None from an older agent.
    """
    if counts is None or len(counts) != REPEAT_BITS + 1 or counts[0] <= 0:
        return 1.0
    samples = counts[0]
    squares = sum((2 * with_bit - samples) ** 2 for with_bit in counts[1:]) / REPEAT_BITS
    return max(1.0, squares / samples)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far a stream is from its baseline.

    Attributes:
        stream: its name.
        psi: the index.
        samples: live samples behind it.
        chance: what chance alone may make of so few samples, of which those that repeat count less.
        effective: how many samples count.
    """

    stream: str
    psi: float
    samples: int
    chance: float
    effective: int

    @property
    def alarms(self) -> bool:
        """Whether it has drifted, and not by chance."""
        return self.psi > max(ALARM, self.chance)


def shifts(baseline: Iterable[Stream], counts: Mapping[str, Sequence[int]]) -> tuple[Shift, ...]:
    """Compare counts with a baseline.

    Args:
        counts: stream's name → counts of its bins. Unknown streams, and those of another number of bins, are left out.
    """
    found = []
    effect = repeat_effect(counts.get(REPEATS))
    for stream in baseline:
        actual = counts.get(stream.name)
        if actual is not None and len(actual) == len(stream.counts) and sum(actual) > 0:
            samples = sum(actual)
            found.append(
                Shift(
                    stream=stream.name,
                    psi=psi(stream.counts, actual),
                    samples=samples,
                    chance=by_chance(stream.counts, actual, effect=effect),
                    effective=max(1, round(samples / effect)),
                )
            )
    return tuple(found)


def effective_samples(counts: Mapping[str, Sequence[int]]) -> int:
    """Return how many samples of a sketch count: those that repeat count less."""
    most = max((sum(one) for name, one in counts.items() if name != REPEATS), default=0)
    return round(most / repeat_effect(counts.get(REPEATS)))


def added(one: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Add sketches; where their bins do not fit, the other one is left out, and so are more streams than there can be:
    a message need not name all of them, and the sum of many is bounded as one is."""
    total = {name: list(counts) for name, counts in one.items()}
    for name, counts in other.items():
        known = total.get(name)
        if known is None:
            if len(total) <= MAX_STREAMS:  # and :data:`REPEATS`
                total[name] = list(counts)
        elif len(known) == len(counts):
            total[name] = [a + b for a, b in zip(known, counts, strict=True)]
    return total
