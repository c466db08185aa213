"""How long a search may take."""

from __future__ import annotations

import enum


class Effort(str, enum.Enum):
    """Bounds the time of a search."""

    QUICK = "quick"  # the usual precision, then larger ones: no training, no sensitivity
    NORMAL = "normal"  # the usual precision; where it does not keep the budget all that repairs it, cheapest first
    HIGH = "high"  # the whole front: small weights, pruning, fine-tuning, whether needed or not

    @property
    def seconds(self) -> float:
        """Return the default time limit of the search for all targets, after which no candidate is started."""
        return {Effort.QUICK: 600.0, Effort.NORMAL: 1800.0, Effort.HIGH: float("inf")}[self]

    @property
    def sensitivity_seconds(self) -> float:
        """Return how long measuring the sensitivity of layers may take."""
        return {Effort.QUICK: 0.0, Effort.NORMAL: 20.0, Effort.HIGH: 120.0}[self]

    @property
    def sensitivity_samples(self) -> int:
        """Return the number of calibration samples that measuring sensitivity may use."""
        return {Effort.QUICK: 0, Effort.NORMAL: 64, Effort.HIGH: 256}[self]
