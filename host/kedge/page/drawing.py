"""Shapes of the page's plots, as SVG paths. Colours come from the style sheet, by the name of a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CELL, STEP = 8, 10
"""Side of a cell and distance between two, in the SVG's units."""
ROWS = 5
MAX_CELLS = 400
"""Of one block; beyond it a cell stands for several devices."""
WIDTH, HEIGHT = 300.0, 64.0


@dataclass(frozen=True)
class Cells:
    """Devices as cells, column by column, those of one state beside each other.

    Attributes:
        paths: state → path of its cells.
        width, height: in the SVG's units.
        each: devices that a cell stands for.
    """

    paths: dict[str, str]
    width: int
    height: int
    each: int


@dataclass(frozen=True)
class Line:
    """A series over time. ``line`` is its path, ``low`` and ``high`` the ends of the scale, ``last`` its latest value,
    ``y`` that value's height."""

    line: str
    low: float
    high: float
    last: float
    y: float


def cells(counts: Mapping[str, int]) -> Cells:
    """Draw devices by state. A state with any device has at least one cell."""
    total = sum(counts.values())
    each = max(1, -(-total // MAX_CELLS))
    paths, place = {}, 0
    for state, count in counts.items():
        number = -(-count // each)
        spots = ((spot // ROWS * STEP, spot % ROWS * STEP) for spot in range(place, place + number))
        paths[state] = "".join(f"M{x} {y}h{CELL}v{CELL}h-{CELL}z" for x, y in spots)
        place += number
    columns = -(-place // ROWS)
    return Cells(paths, max(1, columns) * STEP - 2, min(ROWS, max(1, place)) * STEP - 2, each)


def line(values: Sequence[float | None]) -> Line | None:
    """Draw a series, evenly spaced; None where there are fewer than two values. A gap is left where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    low, high = min(0.0, *known), max(known)
    high = high if high > low else low + 1.0
    parts, pen = [], "M"
    y = HEIGHT
    for index, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        x = index * WIDTH / (len(values) - 1)
        y = HEIGHT - (value - low) / (high - low) * HEIGHT
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return Line("".join(parts), low, high, known[-1], round(y, 1))
