"""Plots the FPGA resources of each layer: one row per layer, one bar per resource."""

from __future__ import annotations

from dataclasses import dataclass

from kedge_targets.contract import Estimate

_WIDTH = 380.0
_ROW = 14
_COLOURS = ("#2563eb", "#0d9488", "#d97706", "#7c3aed", "#be185d")


@dataclass(frozen=True)
class Bar:
    """One resource of one layer, in the SVG's own units."""

    y: float
    width: float
    colour: str
    text: str


@dataclass(frozen=True)
class Row:
    """One layer."""

    name: str
    y: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Plot:
    """One target: rows, the legend (resource, colour, sum in words), the height."""

    target: str
    title: str
    rows: tuple[Row, ...]
    legend: tuple[tuple[str, str, str], ...]
    height: int


def plot(target: str, estimate: Estimate) -> Plot:
    """Bars are shares of what the device has (of the sum, where that is not known)."""
    names = [name for name in _resources(estimate) if any(layer.resources.get(name) for layer in estimate.layers)]
    totals = {name: sum(layer.resources.get(name, 0.0) for layer in estimate.layers) for name in names}
    most = {name: estimate.capacity.get(name) or totals[name] or 1.0 for name in names}
    largest = max((layer.resources.get(n, 0.0) / most[n] for layer in estimate.layers for n in names), default=1.0)
    rows = []
    y = 0
    for layer in estimate.layers:
        bars = []
        for number, name in enumerate(names):
            count = layer.resources.get(name, 0.0)
            share = count / most[name]
            bars.append(
                Bar(
                    y + number * _ROW,
                    round(share / (largest or 1.0) * _WIDTH, 1),
                    _COLOURS[number % len(_COLOURS)],
                    f"{count:g} {name}" + ("" if layer.cycles is None or number else f", {layer.cycles} cycles"),
                )
            )
        rows.append(Row(layer.name, y, tuple(bars)))
        y += max(1, len(names)) * _ROW + 8
    legend = tuple(
        (name, _COLOURS[number % len(_COLOURS)], _sum(totals[name], estimate.capacity.get(name)))
        for number, name in enumerate(names)
    )
    title = f"{target}: {estimate.frames_per_second:.0f} samples a second, {estimate.latency_ms:.3g} ms"
    if estimate.clock_mhz is not None:
        title += f" at {estimate.clock_mhz:g} MHz"
    return Plot(target, f"{title}, says {estimate.source}", tuple(rows), legend, y)


def _resources(estimate: Estimate) -> list[str]:
    found: dict[str, None] = {}
    for layer in estimate.layers:
        found |= dict.fromkeys(layer.resources)
    return list(found)


def _sum(total: float, capacity: float | None) -> str:
    return f"{total:g}" if not capacity else f"{total:g} of {capacity:g} ({total / capacity:.0%})"
