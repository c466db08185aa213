"""The budget of a compressed model, and how far a candidate exceeds it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kedge.evaluation import confidence_intervals
from kedge_protocol.errors import ConfigError

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>x|%|[kMG]i?B?|B)?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_PERCENT = 100
ACCURACY = frozenset({"drop", "agreement", "output"})
"""The parts of a budget that concern the outputs."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits on what a bundle may cost.

    Attributes:
        max_drop: largest allowed drop of the metric below the float model's.
        min_agreement: share of the samples that must get the float model's own answer, right or wrong.
        confidence: at which the limits of drop and agreement must be kept: the ends of their intervals decide; None
            if the figures themselves decide.
        max_size: largest size of the files that the device needs, in bytes.
        max_latency: longest time of one call with one sample (p50) on the target, in milliseconds.
    """

    max_drop: float
    max_size: int | None = None
    max_latency: float | None = None
    min_agreement: float | None = None
    confidence: float | None = None

    def excess(
        self,
        *,
        drop: float,
        size: int,
        latency: float | None,
        agreement: float | None = None,
        lost: Sequence[str] = (),
        upper: float | None = None,
        samples: int = 0,
    ) -> dict[str, float]:
        """Return what exceeds the budget: name → excess as a share of the limit (drop and agreement: in hundredths,
        since the limit may be 0). Empty if the budget is kept. An ``agreement`` of None, with no answers to compare,
        never exceeds it. Each lost output (:mod:`kedge.evaluation.floors`) counts as an excess of 100 hundredths.

        Args:
            upper: upper end of the drop's interval, which decides with ``confidence``; None if there is none.
            samples: number of samples of the agreement; with ``confidence`` the lower end of its interval decides.
        """
        if self.confidence is not None:
            drop = math.inf if upper is None else max(drop, upper)
        over: dict[str, float] = {}
        if lost:
            over["output"] = float(len(lost) * _PERCENT)
        if not drop <= self.max_drop:
            over["drop"] = (drop - self.max_drop) * _PERCENT if math.isfinite(drop) else math.inf
        sure = self._sure(agreement, samples)
        if self.min_agreement is not None and sure is not None and sure < self.min_agreement:
            over["agreement"] = (self.min_agreement - sure) * _PERCENT
        if self.max_size is not None and size > self.max_size:
            over["size"] = size / self.max_size - 1
        if self.max_latency is not None and latency is not None and latency > self.max_latency:
            over["latency"] = latency / self.max_latency - 1
        return over

    def said(
        self,
        *,
        drop: float,
        size: int,
        latency: float | None,
        agreement: float | None = None,
        lost: Sequence[str] = (),
        upper: float | None = None,
        samples: int = 0,
    ) -> str:
        """Describe what exceeds the budget; empty if nothing does."""
        over = self.excess(drop=drop, size=size, latency=latency, agreement=agreement, upper=upper, samples=samples)
        words = []
        if "drop" in over:
            words.append(self._dropped(drop, upper))
        if "agreement" in over:
            sure = self._sure(agreement, samples)
            shown = "" if sure == agreement else f", and {self.confidence:g} sure is only {sure:.4g}"
            words.append(f"agrees with the float model on {agreement:.4g}{shown}, wanted are {self.min_agreement:g}")
        words += lost
        if "size" in over:
            words.append(f"takes {size} bytes, allowed are {self.max_size}")
        if "latency" in over:
            words.append(f"takes {latency:.3g} ms, allowed are {self.max_latency:g}")
        return "; ".join(words)

    def _sure(self, agreement: float | None, samples: int) -> float | None:
        if agreement is None or self.confidence is None:
            return agreement
        return confidence_intervals.share(agreement * samples, samples, self.confidence)[0]

    def _dropped(self, drop: float, upper: float | None) -> str:
        if self.confidence is None or not drop <= self.max_drop:
            return f"dropped by {drop:.4g}, allowed are {self.max_drop:g}"
        if upper is None:
            return f"dropped by {drop:.4g}; the metric has no interval, which --confidence needs"
        return f"dropped by {drop:.4g}, and {self.confidence:g} sure is only {upper:.4g}, allowed are {self.max_drop:g}"


def size_bytes(text: str, *, of: int, where: str) -> int:
    """Read a size: ``200k``, ``1.5MB``, ``300KiB``, ``12345``; or a share of the float model's file: ``0.3x``, ``30%``.

    Args:
        of: size of the float model's file in bytes.

    Raises:
        ConfigError: the text is not a size, or the size is zero.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found["number"]) == 0:
        raise ConfigError(
            f"{text!r} is no size",
            where=where,
            remedy="Write bytes (200k, 1.5MB, 300KiB) or a share of the file (0.3x)",
        )
    number, unit = float(found["number"]), (found["unit"] or "").lower()
    if unit == "x":
        return int(number * of)
    if unit == "%":
        return int(number * of / _PERCENT)
    return int(number * _UNITS[unit.removesuffix("b") if unit != "b" else "b"])
