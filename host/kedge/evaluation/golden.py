"""Chooses golden vectors and measures their tolerances.

A device's runtime may compute the same file with other kernels (on ic_resnet8 int8, XNNPACK and TFLite's built-in
kernels differ on half of the rows). So each candidate sample is run by every kernel set; the vectors are those on
which the sets agree best, and which still tell a damaged file from a whole one: rows whose scores are not saturated,
of varied classes. The tolerance is the largest deviation seen on them, with a margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.golden import Tolerance, deviation

Array = npt.NDArray[Any]

WANTED = 16
LEAST = 8
CANDIDATES = 128
"""Samples of the evaluation set that are run by every kernel set (a set of reference kernels may be slow)."""
MARGIN = 1.5
"""Allowed over measured deviation: a device may have kernels that no host has (other vector lengths)."""
_FLOAT_FLOOR = 1e-5
"""Smallest allowance of a float output, of the largest expected magnitude: float32 sums in another order."""
_GRID_LEVELS = 256
_SAME_LEVEL = 1e-3
"""Of the largest magnitude: half a step of 256 levels is twice that."""
_SMALL_PROBABILITY = 1e-3
_LONE = 0.01
"""Share of elements that may round the other way."""
_SATURATED = 0.05
_LAST_TIER = 1000


def candidates(samples: int, wanted: int = CANDIDATES) -> list[int]:
    """Return the indices of the candidates: all, or ``wanted`` of them, evenly spread."""
    if samples <= wanted:
        return list(range(samples))
    return [int(i) for i in np.linspace(0, samples - 1, wanted).round()]


def quantum(output: Array, spec: TensorSpec) -> float:
    """Return how far an output moves if one 8-bit value before it rounds the other way; 0 if unknown.

    That is the scale of a quantized output. A file may also give float numbers that come from 8 bits inside: scores
    that lie on a grid, or probabilities whose logarithms do (softmax of such scores; a step ``s`` of one score moves
    a probability by at most ``s / 4``, its slope ``p (1 - p)`` being a quarter at most).
    """
    if spec.file.scale is not None:
        return float(spec.file.scale)
    if output.dtype.kind != "f":
        return 1.0
    rows = _rows(output)
    if probabilities(rows):
        logs = np.log(np.clip(rows, 1e-6, 1.0))
        seen = rows > _SMALL_PROBABILITY  # float32 holds the others' logarithms too coarsely
        return grid_step((logs - logs.max(axis=1, keepdims=True))[seen]) / 4
    return grid_step(rows)


def grid_step(values: Array) -> float:
    """Return the step of the grid on which the values lie; 0 if there is no grid of at most 256 levels."""
    levels = np.unique(values)
    gaps = np.diff(levels)
    gaps = gaps[gaps > _SAME_LEVEL * _magnitude(values)]
    if not 1 < len(gaps) < _GRID_LEVELS or values.size < 2 * len(gaps):
        return 0.0
    counts = np.round(gaps / gaps.min())
    on_grid = np.allclose(gaps / gaps.min(), counts, atol=0.05)
    return float(gaps.sum() / counts.sum()) if on_grid else 0.0


def probabilities(rows: Array) -> bool:
    """Return whether rows are probabilities: between 0 and 1, with a sum of 1 within 8-bit precision."""
    return bool(rows.shape[1] > 1 and rows.min() >= -1e-3 and np.allclose(rows.sum(axis=1), 1.0, atol=0.1))


def choose(
    runs: Sequence[Mapping[str, Array]], specs: Sequence[TensorSpec], *, eight_bits: bool, wanted: int = WANTED
) -> list[int]:
    """Pick vectors among the candidates, deterministically: those with the least disagreement for their sensitivity,
    one per class in turn.

    Args:
        runs: for each kernel set, output name → candidates' outputs; the first set's are expected later.
        specs: the outputs.
        eight_bits: whether the file computes with 8 bits.

    Returns:
        Positions among the candidates, ascending; at most ``wanted``.
    """
    expected = runs[0]
    count = len(next(iter(expected.values())))
    noise = np.zeros(count)
    for spec in specs:
        least = _least(expected[spec.name], spec, eight_bits=eight_bits)
        for other in runs[1:]:
            difference = np.abs(_rows(other[spec.name]) - _rows(expected[spec.name])).max(axis=1, initial=0.0)
            noise = np.maximum(noise, difference / least)
    signal = sensitivity(expected, specs)
    # A disagreement below the least allowance costs nothing, so the most telling rows come first there; each doubling
    # above it costs more than any telling is worth. A saturated row tells nothing.
    tier = np.ceil(np.log2(np.maximum(noise, 1.0))) + _LAST_TIER * (signal < _SATURATED)
    order = np.lexsort((np.arange(count), -signal, tier))
    classes = _classes(expected[specs[0].name])
    return sorted(_one_of_each_in_turn(order, tier, classes, min(wanted, count)))


def sensitivity(outputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> Array:
    """Return how much each row would move if something upstream changed, 0..1: the entropy of its probabilities, or 1
    if the first output holds none."""
    scores = _rows(outputs[specs[0].name])
    if not probabilities(scores):
        return np.ones(len(scores))
    p = np.clip(scores, 1e-12, 1.0)
    return np.asarray(-(p * np.log(p)).sum(axis=1) / np.log(scores.shape[1]))


def tolerances(
    runs: Sequence[Mapping[str, Array]], picked: Sequence[int], specs: Sequence[TensorSpec], *, eight_bits: bool
) -> dict[str, Tolerance]:
    """The allowance of each output: the largest deviation of any kernel set on the picked rows, times
    :data:`MARGIN`; at least one step on one element in a hundred (it may round the other way)."""
    rows = list(picked)
    allowed = {}
    for spec in specs:
        every = runs[0][spec.name]
        measured = [deviation(every[rows], other[spec.name][rows]) for other in runs[1:]] or [(0.0, 0.0)]
        least = _least(every, spec, eight_bits=eight_bits)
        small = _FLOAT_FLOOR * _magnitude(every)
        largest = max(MARGIN * max(m for m, _ in measured), least)
        rms = max(MARGIN * max(r for _, r in measured), least * np.sqrt(_LONE), small)
        allowed[spec.name] = Tolerance(float(largest), float(rms))
    return allowed


def _least(output: Array, spec: TensorSpec, *, eight_bits: bool) -> float:
    """Return the smallest tolerance of one element: one 8-bit step, or the noise of float32."""
    magnitude = _magnitude(output)
    step = quantum(output, spec) or (magnitude / _GRID_LEVELS if eight_bits else 0.0)
    return max(step * 1.01, _FLOAT_FLOOR * magnitude)


def _rows(output: Array) -> Array:
    return output.reshape(len(output), -1).astype(np.float64)


def _magnitude(output: Array) -> float:
    return float(np.abs(output.astype(np.float64)).max(initial=0.0)) or 1.0


def _classes(output: Array) -> Array:
    rows = _rows(output)
    return rows.argmax(axis=1) if rows.shape[1] > 1 else np.zeros(len(rows), dtype=np.int64)


def _one_of_each_in_turn(order: Array, tier: Array, classes: Array, wanted: int) -> list[int]:
    """Within each tier the best of each class, then the second best of each, until there are enough; what is beyond
    :data:`LEAST` may not be worse than what is within."""
    turns: dict[tuple[float, int], int] = {}
    keyed = []
    for place, index in enumerate(order):
        key = (float(tier[index]), int(classes[index]))
        turns[key] = turns.get(key, 0) + 1
        keyed.append((key[0], turns[key], place, int(index)))
    keyed.sort()
    worst = keyed[min(LEAST, len(keyed)) - 1][0]
    return [index for found, _, _, index in keyed[:wanted] if found <= worst]
