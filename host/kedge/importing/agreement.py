"""Checks that an imported graph computes what the framework computes, by running both on the same arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ModelError
from kedge_targets.graph import library

Array = npt.NDArray[Any]

AGREES = 1e-3
"""The largest allowed difference relative to the output's largest value: kernels of two libraries differ in the order
of their sums, while a wrong graph differs by far more."""


def check(
    graph: Path,
    feeds: Sequence[Mapping[str, Array]],
    framework: Callable[[Mapping[str, Array]], list[Array]],
    *,
    where: str,
    at_thresholds: float = 0.0,
) -> int:
    """Run both on each feed and return how many samples differ, which are none but in models that decide at thresholds.

    Args:
        graph: the ONNX file.
        feeds: input name → array.
        framework: returns its outputs in the order of the graph's outputs.
        at_thresholds: largest share of a feed's samples that may differ: of a model of trees, whose numbers, rounded to
            float32, may fall on a threshold's other side.

    Raises:
        ModelError: the outputs differ, or one of the two fails.
    """
    onnxruntime = library.load()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"ONNX Runtime refuses its graph: {library.reason_of(error)}", where=where) from error
    names = [output.name for output in session.get_outputs()]
    differing = 0
    for feed in feeds:
        try:
            found = session.run(names, dict(feed))
        except Exception as error:
            raise ModelError(f"ONNX Runtime fails in its graph: {library.reason_of(error)}", where=where) from error
        wanted = framework(feed)
        off: set[int] = set()
        for name, mine, theirs in zip(names, found, wanted, strict=True):
            apart = difference(np.asarray(mine), theirs)
            if apart <= AGREES:
                continue
            off |= set(_samples_apart(np.asarray(mine), theirs))
            if not apart < float("inf") or len(off) > at_thresholds * len(theirs):
                shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
                raise ModelError(
                    f"its ONNX graph does not compute what the model computes: output {name!r} is {apart:.2g} off, "
                    f"relative to its largest value (inputs {shapes})",
                    where=where,
                    remedy="Export it to ONNX yourself and give the .onnx file",
                )
        differing += len(off)
    return differing


def difference(mine: Array, theirs: Array) -> float:
    """Return the largest difference relative to the largest value, or infinity if shapes or non-finite values
    differ."""
    if mine.shape != theirs.shape:
        return float("inf")
    if mine.size == 0:
        return 0.0
    a, b = mine.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(1e-6, np.abs(b[finite]).max()))


def _samples_apart(mine: Array, theirs: Array) -> list[int]:
    """Return the numbers of the samples that differ; all, where the shapes do."""
    if mine.shape != theirs.shape or not mine.ndim:
        return list(range(len(theirs) if theirs.ndim else 1))
    a, b = mine.astype(np.float64).reshape(len(mine), -1), theirs.astype(np.float64).reshape(len(mine), -1)
    largest = np.abs(b[np.isfinite(b)]).max(initial=1e-6)
    same = np.isclose(a, b, rtol=0.0, atol=AGREES * largest, equal_nan=True)
    return np.flatnonzero(~same.all(axis=1)).tolist()


def varied(
    names: Sequence[str], arrays: Sequence[Array], shapes: Mapping[str, Sequence[int | str]]
) -> list[dict[str, Array]]:
    """Return feeds that vary the free axes: the arrays themselves, one sample, three samples, and one element less
    along each other free axis.

    Args:
        names: the inputs' names.
        arrays: one for each input.
        shapes: input name → axes; a free axis is given by its name.
    """
    feeds = [dict(zip(names, arrays, strict=True))]
    free = {axis for shape in shapes.values() for axis in shape if isinstance(axis, str)}
    firsts = {shape[0] for shape in shapes.values() if shape and isinstance(shape[0], str)}
    for axis in sorted(free):
        for change in (_first, _tripled) if axis in firsts else (_shorter,):
            feeds.append(
                {
                    name: _along(array, [at for at, one in enumerate(shapes[name]) if one == axis], change)
                    for name, array in feeds[0].items()
                }
            )
    return feeds


def _along(array: Array, positions: Sequence[int], change: Callable[[Array, int], Array]) -> Array:
    for position in positions:
        array = change(array, position)
    return np.ascontiguousarray(array)


def _first(array: Array, axis: int) -> Array:
    return array.take([0], axis)


def _tripled(array: Array, axis: int) -> Array:
    return array.take([0, array.shape[axis] - 1, 0], axis)


def _shorter(array: Array, axis: int) -> Array:
    return array.take(range(max(2, array.shape[axis] - 1)), axis) if array.shape[axis] > 2 else array
