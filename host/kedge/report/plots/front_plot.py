"""Plots the Pareto front of a search: one dot per candidate, size from left to right, drop from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kedge.search.results import Attempt

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 620, 20, 250
_LEAST = 3
"""Fewer dots make no plot."""
_SMALLEST, _LARGEST = 4.0, 12.0  # radii, by latency


@dataclass(frozen=True)
class Dot:
    """One candidate; all in the SVG's own units.

    Attributes:
        front: whether it is on the front; ``taken`` whether it was taken.
    """

    x: float
    y: float
    radius: float
    text: str
    front: bool
    taken: bool


@dataclass(frozen=True)
class Plot:
    """One target's dots, and the ends of the axes in words.

    Attributes:
        beyond: candidates that drop more than the axis shows; they lie on its end.
    """

    target: str
    dots: tuple[Dot, ...]
    least_size: str
    most_size: str
    least_drop: str
    most_drop: str
    beyond: int = 0


def plot(target: str, attempts: Sequence[Attempt]) -> Plot | None:
    """The plot; None where too little was measured to make one.

    Drops beyond ten times the median are drawn at the lower edge: one collapsed candidate would squeeze the others.
    """
    measured = [(a, a.drop, a.size_bytes) for a in attempts if a.drop is not None and a.size_bytes]
    if len(measured) < _LEAST:
        return None
    sizes = [math.log(size) for _, _, size in measured]
    drops = sorted(drop for _, drop, _ in measured)
    low = min(0.0, drops[0])
    high = max(min(drops[-1], 10 * max(drops[len(drops) // 2], 0.01)), low + 1e-6)
    speeds = [a.target_latency.p50 for a, _, _ in measured if a.target_latency is not None]
    slowest = max(speeds, default=1.0)
    dots = []
    for attempt, drop, size in measured:
        x = _LEFT + _share(math.log(size), min(sizes), max(sizes)) * (_RIGHT - _LEFT)
        y = _TOP + min(1.0, _share(drop, low, high)) * (_BOTTOM - _TOP)
        latency = None if attempt.target_latency is None else attempt.target_latency.p50
        radius = _SMALLEST + (_LARGEST - _SMALLEST) * math.sqrt((latency or 0.0) / slowest)
        text = f"{attempt.label or attempt.precision}: drop {drop:.4g}, {size} bytes"
        if latency is not None:
            text += f", {latency:.3g} ms"
        dots.append(Dot(round(x, 1), round(y, 1), round(radius, 1), text, attempt.front, not attempt.reason))
    return Plot(
        target,
        tuple(dots),
        f"{min(s for _, _, s in measured)} B",
        f"{max(s for _, _, s in measured)} B",
        f"{low:.3g}",
        f"{high:.3g}",
        sum(drop > high for _, drop, _ in measured),
    )


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high - low < 1e-12 else (value - low) / (high - low)
