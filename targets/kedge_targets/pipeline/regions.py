"""Finds regions of text in a map of probabilities, with numpy alone.

Source: the decoding of Differentiable Binarization (Liao et al., 2020, arXiv:1911.08947). Of each set of connected
pixels above the threshold the smallest enclosing rectangle is taken (one of its sides lies on a side of the convex
hull; Freeman and Shapira, 1975), and grown by the area over the perimeter, by which the training had shrunk it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Regions
from kedge_protocol.errors import InputError
from kedge_targets.pipeline.answers import Region
from kedge_targets.pipeline.pictures import Placement

Array = npt.NDArray[Any]

_SMALLEST_SIDE = 3
"""Pixels of the picture; a smaller rectangle holds no text."""


def decode(scores: Array, how: Regions, placement: Placement) -> list[Region]:
    """Return the regions of one picture in reading order, with corners in whole pixels of the picture.

    Args:
        scores: probabilities, height x width or 1 x height x width.

    Raises:
        InputError: the output is not such a map.
    """
    shown = scores[0] if scores.ndim == 3 and scores.shape[0] == 1 else scores
    if shown.ndim != 2:
        raise InputError(
            f"an output {'x'.join(map(str, scores.shape))} is no map of probabilities",
            remedy="[regions] takes an output Nx1xHxW or NxHxW",
        )
    shown = shown.astype(np.float64)
    marked = shown > how.threshold
    if how.dilate:
        grown = marked.copy()
        grown[1:] |= marked[:-1]
        grown[:, 1:] |= marked[:, :-1]
        grown[1:, 1:] |= marked[:-1, :-1]
        marked = grown
    ratio = np.asarray(placement.input_size) / shown.shape[::-1]
    found = []
    for points in outlines(marked, how.least_side, how.most):
        centre, axes, halves = smallest_rectangle(hull(points))
        if 2 * halves.min() < how.least_side:
            continue
        score = _mean_inside(shown, _corners(centre, axes, halves))
        if not score >= how.score_floor:
            continue
        area, perimeter = 4 * halves[0] * halves[1], 4 * (halves[0] + halves[1])
        grown_halves = halves + how.grow * area / perimeter
        if 2 * grown_halves.min() < how.least_side + 2:
            continue
        corners = _corners(centre, axes, grown_halves) * ratio
        corners = np.rint((corners - placement.offset) / placement.scale)
        corners = _clockwise(np.clip(corners, 0, np.asarray(placement.size) - 1))
        if min(np.linalg.norm(corners[0] - corners[1]), np.linalg.norm(corners[0] - corners[3])) > _SMALLEST_SIDE:
            found.append((corners, float(score)))
    return [
        Region(score, tuple((float(x), float(y)) for x, y in corners)) for corners, score in _in_reading_order(found)
    ]


def outlines(marked: Array, least: float, most: int) -> Iterator[Array]:
    """Yield the outermost pixels of each set of connected pixels (also diagonally), ``[P, 2]`` as x and y.

    Args:
        marked: bool, height x width.
        least: sets that are neither as high nor as wide as this are left out.
        most: the maximum number of sets; those with the longest runs of pixels come first.
    """
    width = marked.shape[1] + 2
    edges = np.diff(np.pad(marked, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    if not len(rows):
        return
    owner = _connected(rows, starts, ends, width)
    order = np.argsort(owner, kind="stable")
    firsts = np.flatnonzero(np.diff(owner[order], prepend=-1))
    pixels = np.add.reduceat((ends - starts)[order], firsts)
    wide = np.maximum.reduceat(ends[order], firsts) - np.minimum.reduceat(starts[order], firsts)
    high = np.maximum.reduceat(rows[order], firsts) - np.minimum.reduceat(rows[order], firsts) + 1
    kept = np.flatnonzero(np.maximum(wide, high) >= least)
    kept = np.sort(kept[np.argsort(-pixels[kept], kind="stable")[:most]])
    parts = np.split(order, firsts[1:])
    for number in kept:
        part = parts[number]
        left = np.stack([starts[part], rows[part]], axis=1)
        right = np.stack([ends[part] - 1, rows[part]], axis=1)
        yield np.concatenate([left, right])


def _connected(rows: Array, starts: Array, ends: Array, width: int) -> Array:
    """Return for each run of pixels the number of its set: the lowest number of a run that it is connected with."""
    above = (rows - 1) * width
    low = np.searchsorted(rows * width + ends, above + starts, "left")
    high = np.searchsorted(rows * width + starts, above + ends, "right")
    counts = np.maximum(high - low, 0)
    one = np.repeat(np.arange(len(rows)), counts)
    other = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    owner = np.arange(len(rows))
    while True:
        first, second = owner[one], owner[other]
        if np.array_equal(first, second):
            return owner
        np.minimum.at(owner, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(owner, shorter := owner[owner]):
            owner = shorter


def hull(points: Array) -> Array:
    """Return the corners of the convex hull (Andrew's monotone chain), ``[H, 2]``."""
    ordered = np.unique(points, axis=0).tolist()
    if len(ordered) < 3:
        return np.asarray(ordered, np.float64)
    chains = []
    for direction in (ordered, ordered[::-1]):
        chain: list[list[int]] = []
        for x, y in direction:
            while len(chain) > 1 and (chain[-1][0] - chain[-2][0]) * (y - chain[-2][1]) <= (
                chain[-1][1] - chain[-2][1]
            ) * (x - chain[-2][0]):
                chain.pop()
            chain.append([x, y])
        chains += chain[:-1]
    return np.asarray(chains, np.float64)


def smallest_rectangle(corners: Array) -> tuple[Array, Array, Array]:
    """Return the smallest rectangle around a convex hull: its centre ``[2]``, the directions of its sides ``[2, 2]``
    and half their lengths ``[2]``."""
    sides = np.roll(corners, -1, axis=0) - corners
    lengths = np.linalg.norm(sides, axis=1)
    along = sides[lengths > 0] / lengths[lengths > 0, None] if lengths.any() else np.asarray([[1.0, 0.0]])
    axes = np.stack([along, np.stack([-along[:, 1], along[:, 0]], axis=1)], axis=1)
    places = axes @ corners.T
    least, most = places.min(axis=2), places.max(axis=2)
    best = int(np.argmin(np.prod(most - least, axis=1).round(6)))
    middle = (least[best] + most[best]) / 2
    return middle @ axes[best], axes[best], (most[best] - least[best]) / 2


def _corners(centre: Array, axes: Array, halves: Array) -> Array:
    one, other = axes * halves[:, None]
    return np.asarray([centre - one - other, centre + one - other, centre + one + other, centre - one + other])


def _mean_inside(shown: Array, corners: Array) -> float:
    """Return the mean of the pixels within a rectangle, those on its sides included."""
    height, width = shown.shape
    x1, y1 = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, (width - 1, height - 1))
    x2, y2 = np.clip(np.ceil(corners.max(axis=0)).astype(int), 0, (width - 1, height - 1))
    part = shown[y1 : y2 + 1, x1 : x2 + 1]
    across, down = np.meshgrid(np.arange(x1, x2 + 1), np.arange(y1, y2 + 1))
    inside = np.ones(part.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        reach = 0.5 * float(np.hypot(bx - ax, by - ay))
        inside &= (bx - ax) * (down - ay) - (by - ay) * (across - ax) >= -reach
    return float(part[inside].mean()) if inside.any() else 0.0


def _clockwise(corners: Array) -> Array:
    """Return the corners from the top left on, clockwise in the picture."""
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
    right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
    return np.asarray([left[0], right[0], right[1], left[1]])


def _in_reading_order(found: list[tuple[Array, float]]) -> list[tuple[Array, float]]:
    """Sort regions row by row, from left to right within a row. A region belongs to the row of the one before (by
    height) if it begins less than half of the lower one's height below it."""
    rows: list[list[tuple[Array, float]]] = []
    last: Array | None = None
    for one in sorted(found, key=lambda each: (each[0][0, 1], each[0][0, 0])):
        corners = one[0]
        if last is None or corners[0, 1] - last[0, 1] >= 0.5 * min(_height(corners), _height(last)):
            rows.append([])
        rows[-1].append(one)
        last = corners
    return [one for row in rows for one in sorted(row, key=lambda each: each[0][0, 0])]


def _height(corners: Array) -> float:
    return float(np.linalg.norm(corners[3] - corners[0]))
