"""Choosing golden vectors, and measuring what they allow.

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
CANDIDATES = 256
"""Samples of the evaluation set that are run by every kernel set."""
MARGIN = 1.5
"""Allowed over measured deviation: a device may have kernels that no host has (other vector lengths)."""
_FLOAT_FLOOR = 1e-5
"""Smallest allowance of a float output, of the largest expected magnitude: float32 sums in another order."""
_GRID_LEVELS = 256


def candidates(samples: int, wanted: int = CANDIDATES) -> list[int]:
    """Indices of the candidates: all, or ``wanted`` spread evenly."""
    if samples <= wanted:
        return list(range(samples))
    return [int(i) for i in np.linspace(0, samples - 1, wanted).round()]


def quantum(output: Array, spec: TensorSpec) -> float:
    """The step between two neighbouring values of an output; 0 for one that moves freely.

    A file may give float numbers that come from 8 bits inside: they lie on a grid of at most 256 levels, and the
    smallest gap is its step.
    """
    if spec.file.scale is not None:
        return float(spec.file.scale)
    if output.dtype.kind != "f":
        return 1.0
    levels = np.unique(output)
    if not 2 < len(levels) <= _GRID_LEVELS or output.size < 2 * len(levels):
        return 0.0
    gaps = np.diff(levels.astype(np.float64))
    step = float(gaps[gaps > 1e-7 * np.abs(levels).max()].min(initial=np.inf))
    on_grid = np.allclose(gaps / step, np.round(gaps / step), atol=1e-2) if np.isfinite(step) else False
    return step if on_grid else 0.0


def choose(runs: Sequence[Mapping[str, Array]], specs: Sequence[TensorSpec], wanted: int = WANTED) -> list[int]:
    """Pick vectors among the candidates, deterministically.

    Args:
        runs: for each kernel set, output name → candidates' outputs; the first set's are expected later.
        specs: the outputs.

    Returns:
        Positions among the candidates, ascending; at most ``wanted``.
    """
    expected = runs[0]
    count = len(next(iter(expected.values())))
    noise = np.zeros(count)
    for spec in specs:
        unit = max(quantum(expected[spec.name], spec), _FLOAT_FLOOR * _magnitude(expected[spec.name]))
        for other in runs[1:]:
            difference = np.abs(_rows(other[spec.name]) - _rows(expected[spec.name])).max(axis=1, initial=0.0)
            noise = np.maximum(noise, difference / unit)
    # Sensitive rows first among those whose kernels agree equally well (in powers of two of the step).
    rank = np.ceil(np.log2(1.0 + noise)) - sensitivity(expected, specs)
    order = np.lexsort((np.arange(count), rank))
    classes = _classes(expected[specs[0].name])
    return sorted(_one_of_each_in_turn(order, classes, min(wanted, count)))


def sensitivity(outputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> Array:
    """How much each row would move if something upstream changed, 0..1: the entropy of its scores, for scores that
    lie between 0 and 1 and sum to 1; else 0 for all."""
    scores = _rows(outputs[specs[0].name])
    probable = scores.shape[1] > 1 and scores.min() >= -1e-3 and np.allclose(scores.sum(axis=1), 1.0, atol=0.1)
    if not probable:
        return np.zeros(len(scores))
    p = np.clip(scores, 1e-12, 1.0)
    return np.asarray(-(p * np.log(p)).sum(axis=1) / np.log(scores.shape[1]))


def tolerances(
    runs: Sequence[Mapping[str, Array]], picked: Sequence[int], specs: Sequence[TensorSpec]
) -> dict[str, Tolerance]:
    """The allowance of each output: the largest deviation of any kernel set on the picked rows, times
    :data:`MARGIN`, and at least one step of the output's grid (one element may round the other way)."""
    rows = list(picked)
    allowed = {}
    for spec in specs:
        every = runs[0][spec.name]
        measured = [deviation(every[rows], other[spec.name][rows]) for other in runs[1:]] or [(0.0, 0.0)]
        step = quantum(every, spec)
        small = _FLOAT_FLOOR * _magnitude(every)
        largest = max(MARGIN * max(m for m, _ in measured), step * 1.01, small)
        # One step on every tenth element is what a harmless difference of rounding costs.
        rms = max(MARGIN * max(r for _, r in measured), step * np.sqrt(0.1), small)
        allowed[spec.name] = Tolerance(float(largest), float(rms))
    return allowed


def _rows(output: Array) -> Array:
    return output.reshape(len(output), -1).astype(np.float64)


def _magnitude(output: Array) -> float:
    return float(np.abs(output.astype(np.float64)).max(initial=0.0)) or 1.0


def _classes(output: Array) -> Array:
    rows = _rows(output)
    return rows.argmax(axis=1) if rows.shape[1] > 1 else np.zeros(len(rows), dtype=np.int64)


def _one_of_each_in_turn(order: Array, classes: Array, wanted: int) -> list[int]:
    """The best of each class, then the second best of each, until there are enough."""
    turns: dict[int, int] = {}
    keyed = []
    for place, index in enumerate(order):
        turn = turns.get(int(classes[index]), 0)
        turns[int(classes[index])] = turn + 1
        keyed.append((turn, place, int(index)))
    return [index for _, _, index in sorted(keyed)[:wanted]]
