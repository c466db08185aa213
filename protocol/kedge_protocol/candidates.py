"""Chooses among the bundles that a release holds for one target: the same rule on a device, which has measured two of
them, and in the controller, which has the figures of several devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kedge_protocol.bundle.config import BundleConfig

_ROUNDING = 1e-9
"""The controller takes logarithms of the figures that a device compares as they are."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One bundle, and what is known of it.

    Attributes:
        size: bytes that a device pulls (:attr:`~kedge_protocol.bundle.layout.Bundle.transfer_bytes`).
        p50_ms, p95_ms: milliseconds of one call on the device (of several devices the medians); None if not measured.
        failed: whether it did not pass its proof.
        max_ms: latency that the release's budget allows; None for any.
    """

    size: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    failed: bool = False
    max_ms: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it is known to exceed the latency budget."""
        return self.max_ms is not None and self.p50_ms is not None and self.p50_ms > self.max_ms


def allowed_ms(config: BundleConfig) -> float | None:
    """Return the latency in milliseconds that a bundle's budget allows; None for any."""
    allowed = config.provenance.options.get("max_latency")
    return float(allowed) if isinstance(allowed, (int, float)) else None


def choose(candidates: Sequence[Candidate]) -> int | None:
    """Return the index of the better candidate; None if none passed its proof.

    Those within the budget come first. Of these the fastest counts, by its median; those whose spread (median to 95th
    percentile) overlaps with the fastest one's are as fast. Of them the smallest is taken, of equals the earliest. One
    that was not measured is taken only if none was.
    """
    left = [index for index, one in enumerate(candidates) if not one.failed]
    within = [index for index in left if not candidates[index].is_over]
    left = within or left
    measured = {index: one.p50_ms for index in left if (one := candidates[index]).p50_ms is not None}
    if measured:
        fastest = min(measured, key=lambda index: measured[index])
        end = candidates[fastest].p95_ms or measured[fastest]
        left = [index for index in measured if measured[index] <= end * (1 + _ROUNDING)]
    return min(left, key=lambda index: (candidates[index].size, index), default=None)
