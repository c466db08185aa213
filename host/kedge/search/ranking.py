"""Orders what a search has measured: outcomes by their drop, layers by their sensitivity."""

from __future__ import annotations

from collections.abc import Sequence

from kedge.quantization.sensitivity import Sensitivity
from kedge.search.results import Outcome
from kedge_targets.numerics import Precision


def least_drop(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome with the smallest drop; the first one if none could be measured."""
    measured = [one for one in outcomes if one.measured and one.attempt.drop is not None]
    return min(measured, key=lambda one: ("output" in one.over, one.attempt.drop or 0.0), default=outcomes[0])


def by_sensitivity(sensitivity: Sensitivity | None, precision: Precision) -> dict[str, str]:
    """Return layer → reason for its rank, the most sensitive layers first."""
    if sensitivity is None:
        return {}
    name = precision.value
    known = [layer for layer in sensitivity.layers if name in layer.sqnr_db]
    known.sort(key=lambda layer: (-max(0.0, layer.drop.get(name, 0.0)), layer.sqnr_db[name]))
    return {
        layer.name: f"alone in {name} it leaves {layer.sqnr_db[name]:.1f} dB"
        + (f" and drops {layer.drop[name]:.4g}" if name in layer.drop else "")
        for layer in known
    }
