"""Plots layer sensitivity: one row per layer, one bar per precision, its length the signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kedge.quantization.sensitivity import LARGEST_DB, LayerSensitivity, Sensitivity
from kedge_targets.numerics import Precision

LEFT, RIGHT = 230.0, 560.0
"""Where bars begin, and the longest ends, in the SVG's own units."""
WIDTH = 760
_TOP = 22
_BAR, _GAP = 9, 9
_MOST_ROWS = 80
_FULL_DB = 60.0  # more is as good as no noise
_NAME = 34
_COLOURS = {
    Precision.W2A2: "#991b1b",
    Precision.W3A3: "#c2410c",
    Precision.W4A4: "#ea580c",
    Precision.W8A8: "#d97706",
    Precision.INT4: "#9333ea",
    Precision.CODEBOOK4: "#a855f7",
    Precision.LOG4: "#c026d3",
    Precision.CODEBOOK8: "#6366f1",
    Precision.LOG8: "#818cf8",
    Precision.INT8: "#2563eb",
    Precision.INT8_DYNAMIC: "#0891b2",
    Precision.FLOAT16: "#0d9488",
    Precision.FLOAT32: "#a16207",
}


@dataclass(frozen=True)
class Bar:
    """One precision of one layer.

    Attributes:
        width, y: in the SVG's units.
        text: the figure, ``31.2 dB``; ``title`` the whole of it.
        chosen: whether the plan has the layer so.
    """

    precision: str
    width: float
    y: int
    colour: str
    text: str
    title: str
    chosen: bool


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        label: the name, its beginning left out where it is long; ``title`` the whole, with operator and weights.
        choice: the precision that the plan has, ``colour`` its own.
    """

    label: str
    title: str
    y: int
    height: int
    bars: tuple[Bar, ...]
    choice: str
    colour: str


@dataclass(frozen=True)
class Plot:
    """All of it.

    Attributes:
        legend: precision and colour.
        ticks: place and text of the axis.
        notes: what is not in the picture, and why.
    """

    metric: str
    samples: int
    width: int
    height: int
    left: float
    bar: int
    rows: tuple[Row, ...]
    legend: tuple[tuple[str, str], ...]
    ticks: tuple[tuple[float, str], ...]
    notes: tuple[str, ...]


def plot(sensitivity: Sensitivity, choices: Mapping[str, str], *, why: Mapping[str, str] | None = None) -> Plot:
    """The plot.

    Args:
        choices: layer → precision that the plan has it in.
        why: layer → reason, shown with the layer.
    """
    shown, notes = _shown(sensitivity)
    largest = max((min(db, _FULL_DB) for layer in shown for db in layer.sqnr_db.values()), default=0.0)
    scale = (RIGHT - LEFT) / max(10.0, largest)
    rows, y = [], _TOP
    for layer in shown:
        row = _row(layer, choices.get(layer.name, ""), (why or {}).get(layer.name, ""), y, scale)
        rows.append(row)
        y += row.height + _GAP
    present = {name for layer in shown for name in layer.sqnr_db} | {row.choice for row in rows}
    return Plot(
        metric=sensitivity.metric,
        samples=sensitivity.samples,
        width=WIDTH,
        height=y,
        left=LEFT,
        bar=_BAR,
        rows=tuple(rows),
        legend=tuple((one.value, _COLOURS[one]) for one in Precision if one.value in present),
        ticks=tuple((LEFT + db * scale, f"{db} dB") for db in range(0, int(max(10.0, largest)) + 1, 10)),
        notes=notes,
    )


def _shown(sensitivity: Sensitivity) -> tuple[list[LayerSensitivity], tuple[str, ...]]:
    layers = [layer for layer in sensitivity.layers if layer.sqnr_db]
    notes = list(sensitivity.left_out)
    if len(layers) > _MOST_ROWS:
        worst = sorted(layers, key=lambda layer: min(layer.sqnr_db.values()))[:_MOST_ROWS]
        notes.append(
            f"the {len(layers) - _MOST_ROWS} least sensitive of {len(layers)} layers are not drawn; report.json has all"
        )
        kept = {layer.name for layer in worst}
        layers = [layer for layer in layers if layer.name in kept]
    return layers, tuple(notes)


def _row(layer: LayerSensitivity, choice: str, why: str, y: int, scale: float) -> Row:
    bars = []
    for index, precision in enumerate(one for one in Precision if one.value in layer.sqnr_db):
        db = layer.sqnr_db[precision.value]
        text = "no noise" if db >= LARGEST_DB else f"{db:.1f} dB"
        lost = layer.drop.get(precision.value)
        bars.append(
            Bar(
                precision=precision.value,
                width=round(max(0.0, min(db, _FULL_DB)) * scale, 1),
                y=y + index * _BAR,
                colour=_COLOURS[precision],
                text=text,
                title=f"{layer.name} in {precision.value}: {text}" + ("" if lost is None else f", drop {lost:.4g}"),
                chosen=precision.value == choice,
            )
        )
    label = layer.name if len(layer.name) <= _NAME else "…" + layer.name[1 - _NAME :]
    title = f"{layer.name}: {layer.operator}, {layer.weights:,} weights" + (f"; {why}" if why else "")
    colour = next((_COLOURS[one] for one in Precision if one.value == choice), "#6b7280")
    return Row(
        label=label, title=title, y=y, height=max(1, len(bars)) * _BAR, bars=tuple(bars), choice=choice, colour=colour
    )
