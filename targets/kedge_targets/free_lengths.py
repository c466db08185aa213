"""Tensors whose length differs from sample to sample (the detections of a graph with its own suppression): filled up
with zeros, which as scores mean that nothing was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def stacked(rows: Sequence[Array]) -> Array:
    """Concatenate batches of outputs, each padded to the longest along every axis except the first."""
    if len({row.shape[1:] for row in rows}) == 1:
        return np.concatenate(rows)
    longest = tuple(max(row.shape[axis] for row in rows) for axis in range(1, rows[0].ndim))
    return np.concatenate([filled(row, longest) for row in rows])


def filled(array: Array, sample: tuple[int, ...], *, repeated: bool = False) -> Array:
    """Pad samples so that they have at least this shape.

    Args:
        repeated: with their own elements from the beginning, in place of zeros: where the length of an output is that
            of its input, a mean over positions is then not one over what fills it up.
    """
    widths = [(0, 0)] + [(0, max(0, want - have)) for want, have in zip(sample, array.shape[1:], strict=True)]
    if not any(after for _, after in widths):
        return array
    return np.pad(array, widths, mode="wrap") if repeated and array.size else np.pad(array, widths)


def aligned(output: Array, reference: Array) -> tuple[Array, Array]:
    """Pad two outputs of the same rank to the longer one along each axis."""
    if output.shape == reference.shape or output.ndim != reference.ndim or len(output) != len(reference):
        return output, reference
    longest = tuple(max(pair) for pair in zip(output.shape[1:], reference.shape[1:], strict=True))
    return filled(output, longest), filled(reference, longest)


def fitted(output: Array, reference: Array) -> Array:
    """Bring an output to the reference's shape: pad with zeros or cut."""
    if output.shape == reference.shape or output.ndim != reference.ndim or len(output) != len(reference):
        return output
    cut = output[tuple(slice(size) for size in reference.shape)]
    return filled(cut, reference.shape[1:])
