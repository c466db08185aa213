"""Says when float must be tried beside what keeps the budget, because it may be faster or smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kedge.evaluation.latency_race import NOTICED_MS
from kedge.search.budget import Budget
from kedge.search.results import Outcome
from kedge_targets.numerics import Family, Precision

_CLEARLY = 0.6
"""A latency relative to the float model by ONNX Runtime that other runtimes' float usually does not reach."""
_LONG_MS = 10 * NOTICED_MS
"""A call of which a tenth is noticed."""


@dataclass(frozen=True)
class FloatBeside:
    """What decides it on one backend.

    Attributes:
        available: whether the backend has float32.
        reference: whether the backend is the one that runs the float model.
        float_bytes: size of the float model's file.
    """

    available: bool
    reference: bool
    budget: Budget
    float_bytes: int

    def may_win(self, seen: Sequence[Outcome]) -> bool:
        """Return whether what holds may be slower than float, or is larger, and float was not tried."""
        holding = [one for one in seen if one.holds]
        if not holding or not self.available or has_float(seen) or self.budget.max_size is not None:
            return False
        fastest = quickest(seen)
        larger = min(one.attempt.size_bytes or 0 for one in holding) > self.float_bytes
        return larger or (fastest is not None and self.maybe_slower(fastest))

    def maybe_slower(self, one: Outcome) -> bool:
        """Return whether float may be as fast or faster. If the measured float is the backend's own, a candidate that
        is surely faster is not; otherwise one that is far ahead is not. Where a call takes next to nothing, float may
        be faster only if the difference is a loss."""
        if one.pace is None or not self.available:
            return False
        if not self.reference:
            return one.pace.high > _CLEARLY and (one.quiet > NOTICED_MS or not one.in_integers)
        return one.loses(one.pace) or (not one.pace.faster and one.quiet > _LONG_MS)


def ahead_by_guess(seen: Sequence[Outcome], *, bytes_wanted: bool = False) -> list[Outcome]:
    """Return the candidates that compute in float, are no smaller than one in integers that keeps the budget, and whose
    latency on the target is an estimate: another processor's time says nothing of what integers gain there. Weights of
    few bits are smaller, but gain nothing else, so they are among these unless bytes are what is wanted."""
    smallest = min(
        (one.attempt.size_bytes or 0 for one in seen if one.holds and one.in_integers and one.named_truly), default=None
    )
    return [
        one
        for one in seen
        if smallest is not None
        and not one.in_integers
        and ((one.attempt.size_bytes or 0) >= smallest or (_few_bits(one) and not bytes_wanted))
        and one.attempt.target_latency is not None
        and one.attempt.target_latency.estimated
    ]


def _few_bits(one: Outcome) -> bool:
    return one.candidate.plan.default.family is Family.WEIGHTS


def quickest(seen: Sequence[Outcome]) -> Outcome | None:
    """Return the fastest of those that hold and were measured on the target itself."""
    holding = [one for one in seen if one.holds and one.pace is not None]
    return min(holding, key=lambda one: one.pace.high if one.pace is not None else math.inf, default=None)


def has_float(seen: Sequence[Outcome]) -> bool:
    """Return whether float32 was tried."""
    return any(one.candidate.plan.default is Precision.FLOAT32 for one in seen)
