"""Measures the latency of several models in turns, so that other load on the machine affects all of them alike.

A turn is a few calls of one contender after the other. What is compared is the least disturbed call of each turn:
another process can only lengthen a call. A contender's pace is its time as a multiple of the first contender's in the
same round; the median over the rounds stands with its distribution-free interval (order statistics; Conover,
"Practical Nonparametric Statistics", 3rd edition, 3.2).

Where other work holds the cores, calls with several threads wait for each other for many times their own length, and
the intervals of wall-clock time become wide. Processor time does not count the waiting: there it is compared instead.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

MOOD = 0.05
"""Of a pace: less than that is the machine's mood, however often it is measured."""

NOTICED_MS = 0.05
"""What a call must lose before a slower pace matters to anyone: below it Python's own share is larger."""

_WARM_CALLS = 3
_TURN_SECONDS = 0.004
_LEAST_CALLS = 5
_MOST_CALLS = 50
_LONG_SECONDS = 0.02
_LEAST_ROUNDS = 7
"""From six rounds on the extremes hold the median with 95 %."""
_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 120
_SURE = 0.03
_TIGHT = 1.3


@dataclass(frozen=True, kw_only=True)
class RelativeLatency:
    """The latency of a call relative to another.

    Attributes:
        ratio: median of the rounds; above 1 is slower.
        low, high: the interval that holds it with 95 %, or all that was seen where rounds are few.
        busy: whether it is of processor time, because the machine was at other work.
    """

    ratio: float
    low: float
    high: float
    busy: bool = False

    @property
    def slower(self) -> bool:
        """Return whether it is certainly slower, by more than the measurement noise."""
        return self.low > 1 + MOOD

    @property
    def faster(self) -> bool:
        """Return whether it is certainly faster, by more than the measurement noise."""
        return self.high < 1 - MOOD

    def noticed(self, milliseconds: float) -> bool:
        """Return whether it is certainly slower by a noticeable amount.

        Args:
            milliseconds: of the slower one's call.
        """
        return self.slower and milliseconds * (1 - 1 / self.low) > NOTICED_MS

    def overlaps(self, other: RelativeLatency) -> bool:
        """Return whether the intervals overlap, so that neither is certainly faster."""
        return self.low * (1 - MOOD) <= other.high and other.low * (1 - MOOD) <= self.high

    def beside(self, other: RelativeLatency) -> RelativeLatency:
        """Return the latency relative to another contender of the same race."""
        busy = self.busy or other.busy
        return RelativeLatency(
            ratio=self.ratio / other.ratio, low=self.low / other.high, high=self.high / other.low, busy=busy
        )

    @property
    def text(self) -> str:
        """``1.52× (1.45 to 1.6)``."""
        of = " of processor time, on a busy machine" if self.busy else ""
        return f"{self.ratio:.3g}× ({self.low:.3g} to {self.high:.3g}){of}"


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The latency of one call with one sample, in milliseconds.

    Attributes:
        low, high: where the median lies, from turn to turn.
        least: about what a quiet machine would take: of each turn's least disturbed call, the median.
    """

    p50: float
    p95: float
    low: float | None = None
    high: float | None = None
    least: float | None = None

    @property
    def spread(self) -> str:
        """``0.26 (0.25 to 0.3)``, without the interval where it is not known."""
        if self.low is None or self.high is None:
            return f"{self.p50:.3g}"
        return f"{self.p50:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True, kw_only=True)
class InterleavedCalls:
    """One contender's calls, in milliseconds: all of them, and of each round the middle and the least disturbed one;
    ``processor`` is of the least processor time."""

    calls: tuple[float, ...]
    middles: tuple[float, ...]
    rounds: tuple[float, ...]
    processor: tuple[float, ...]

    @property
    def latency(self) -> Latency:
        """Return the latency of one call."""
        p50, p95 = np.percentile(self.calls, [50, 95])
        low, high = interval(self.middles)
        least = min(np.median(self.rounds), np.median(self.processor))
        figures = {"p50": p50, "p95": p95, "low": min(low, p50), "high": max(high, p50), "least": least}
        return Latency(**{name: round(float(value), 4) for name, value in figures.items()})

    def pace(self, beside: InterleavedCalls) -> RelativeLatency:
        """Return the latency relative to a contender of the same race."""
        found, busy = _pace(self.rounds, beside.rounds), _pace(self.processor, beside.processor)
        if len(self.rounds) < _FEWEST_ROUNDS:  # no spread of their own: what either clock says is in the interval
            return replace(found, low=min(found.low, busy.low), high=max(found.high, busy.high))
        if found.high <= _TIGHT * found.low:
            return found
        # A busy machine may disturb every call of a turn, and longer calls more often: the least of all is a witness.
        least = min(self.processor) / max(min(beside.processor), 1e-6)
        return replace(busy, low=min(busy.low, least), high=max(busy.high, least), busy=True)


def _pace(mine: Sequence[float], theirs: Sequence[float]) -> RelativeLatency:
    ratios = [one / max(other, 1e-6) for one, other in zip(mine, theirs, strict=True)]
    low, high = interval(ratios)
    return RelativeLatency(ratio=float(np.median(ratios)), low=low, high=high)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The order statistics that hold the median of independent values with this confidence; the extremes where there
    are too few for it."""
    ordered = sorted(values)
    count = len(ordered)
    inside, rank = 1.0, 0
    for below in range(count // 2):
        inside -= 2 * math.comb(count, below) * 0.5**count
        if inside < confidence:
            break
        rank = below
    return ordered[rank], ordered[count - 1 - rank]


def race(calls: Sequence[Callable[[], object]], *, seconds: float) -> list[InterleavedCalls]:
    """Measure in turns until the ranking is sure (of each two one is surely faster, or they are as good as equal), or
    the time is up; where calls are long that may be after fewer than :data:`_LEAST_ROUNDS` rounds.

    Args:
        calls: one call of each contender.
        seconds: about.
    """
    began = time.perf_counter()
    until = began + seconds
    lengths = [_length(call) for call in calls]
    turns: list[list[list[tuple[float, float]]]] = [[] for _ in calls]
    made: list[InterleavedCalls] = []
    while len(turns[0]) < _MOST_ROUNDS:
        for number, call in enumerate(calls):
            turns[number].append(_turn(call, lengths[number]))
        made = [_turns(one) for one in turns]
        over = time.perf_counter() - until
        if over > 0 and (len(turns[0]) >= _FEWEST_ROUNDS or over > 2 * seconds):
            break
        pairs = itertools.combinations(made, 2)
        if len(turns[0]) >= _LEAST_ROUNDS and all(_sure(two.pace(one)) for one, two in pairs):
            break
    return made


def _turns(turns: Sequence[Sequence[tuple[float, float]]]) -> InterleavedCalls:
    walls = [[wall for wall, _ in turn] for turn in turns]
    return InterleavedCalls(
        calls=tuple(wall for turn in walls for wall in turn),
        middles=tuple(float(np.median(turn)) for turn in walls),
        rounds=tuple(min(turn) for turn in walls),
        processor=tuple(min(processor for _, processor in turn) for turn in turns),
    )


def _length(call: Callable[[], object]) -> int:
    """Return how many calls make a turn."""
    taken = []
    for _ in range(_WARM_CALLS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    least = _LEAST_CALLS if min(taken) < _LONG_SECONDS else 1
    return max(least, min(_MOST_CALLS, int(_TURN_SECONDS / max(min(taken), 1e-6))))


def _turn(call: Callable[[], object], length: int) -> list[tuple[float, float]]:
    """Return the wall-clock and processor time of each call, in milliseconds."""
    if length > 1:
        call()  # the contender before may have left its threads spinning, and the caches its own
    taken = []
    for _ in range(length):
        spent, began = time.process_time(), time.perf_counter()
        call()
        wall = time.perf_counter() - began
        taken.append((wall * 1000.0, (time.process_time() - spent) * 1000.0))
    return taken


def _sure(pace: RelativeLatency) -> bool:
    return pace.slower or pace.faster or pace.high - pace.low < _SURE * pace.ratio
