"""Rounds a matrix to codes in groups: to the nearest code, optionally with the scales of least error, or so that
rounding errors compensate each other (Frantar et al., "GPTQ", ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.decoder.matrix import Codes

Array = npt.NDArray[Any]

_SHRINK = np.linspace(0.8, 1.05, 11)
"""Factors of the scale that the search tries."""
_DAMPING = 0.01
_BLOCK = 128
_ROWS = 8192
"""Output channels that are rounded together: a head has as many as tokens."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The quantization grid of a matrix: bits (4 or 8), input channels of a group, whether zero-points are fixed."""

    bits: int
    group: int
    symmetric: bool = False


def _grid(values: Array, grid: Grid, importance: Array | None, *, search: bool) -> tuple[Array, Array]:
    """Return scale and zero-point of groups along the last axis, each float32 with that axis of length 1."""
    top = float(2**grid.bits - 1)
    if grid.symmetric:
        at = np.abs(values).argmax(-1, keepdims=True)
        # The largest weight becomes the lowest code, of which there is one more than of positive ones.
        scale = np.take_along_axis(values, at, -1) / -(2.0 ** (grid.bits - 1))
        low = np.zeros_like(scale)
    else:
        low = np.minimum(values.min(-1, keepdims=True), 0)
        scale = (np.maximum(values.max(-1, keepdims=True), 0) - low) / top
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)

    def zero_of(factor: float, narrowed: Array) -> Array:
        if grid.symmetric:
            return np.full(scale.shape, 2.0 ** (grid.bits - 1), np.float32)
        return np.clip(np.rint(-low * np.float32(factor) / narrowed), 0, top).astype(np.float32)

    best_scale, best_zero = scale, zero_of(1.0, scale)
    if not search:
        return best_scale, best_zero
    best: Array | None = None
    for factor in _SHRINK:
        narrowed = (scale * np.float32(factor)).astype(np.float32)
        zero = zero_of(float(factor), narrowed)
        error = ((np.clip(np.rint(values / narrowed) + zero, 0, top) - zero) * narrowed - values) ** 2
        cost = (error if importance is None else error * importance).sum(-1, keepdims=True)
        better = np.full(cost.shape, True) if best is None else cost < best
        best = cost if best is None else np.where(better, cost, best)
        best_scale, best_zero = np.where(better, narrowed, best_scale), np.where(better, zero, best_zero)
    return best_scale, best_zero


def _grouped(values: Array, group: int) -> Array:
    """Reshape [out, in] to [out, groups, group]; a short last group is filled with 0."""
    missing = -values.shape[1] % group
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return values.reshape(values.shape[0], -1, group)


def _codes(codes: Array, scales: Array, zeros: Array, grid: Grid) -> Codes:
    return Codes(
        codes=codes.astype(np.uint8),
        scales=scales.astype(np.float32),
        zeros=None if grid.symmetric else zeros.astype(np.uint8),
        bits=grid.bits,
        group=grid.group,
    )


def plain(weight: Array, grid: Grid, *, importance: Array | None = None, search: bool = False) -> Codes:
    """Round each weight to its nearest code.

    Args:
        weight: float32 [out, in].
        importance: mean square of each input channel [in]; the weight of the search's errors.
        search: whether to try narrower and wider grids for each group and take the one with the least squared error.
    """
    values = _grouped(weight.astype(np.float32, copy=False), grid.group)
    weights = None if importance is None else _grouped(importance[None].astype(np.float32), grid.group)
    scale, zero = _grid(values, grid, weights, search=search)
    codes = np.clip(np.rint(values / scale) + zero, 0, 2**grid.bits - 1)
    flat = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    return _codes(flat, scale[..., 0], zero[..., 0], grid)


@dataclass(frozen=True)
class Inputs:
    """What compensation wants to know of a matrix's inputs; matrices of the same inputs share it.

    Attributes:
        upper: the upper Cholesky factor of the inverse of X'X, float32 [in, in]: row j holds what column j hands on to
            those after it.
        importance: sums of squares of the input channels, float32 [in].
    """

    upper: Array
    importance: Array

    @classmethod
    def of(cls, products: Array) -> Inputs:
        """Return it for X'X of the inputs X, float64 [in, in]."""
        diagonal = np.diag(products).copy()
        damped = products.copy()
        np.fill_diagonal(damped, diagonal + max(_DAMPING * float(diagonal.mean()), 1e-12))
        return cls(_inverse_factor(damped).astype(np.float32), diagonal.astype(np.float32))


def compensated(weight: Array, inputs: Inputs, grid: Grid, *, search: bool = True) -> Codes:
    """Round column after column by GPTQ; the columns to the right compensate each column's error.

    Args:
        weight: float32 [out, in].
        search: as in :func:`plain`.
    """
    parts = [
        _columns_in_turn(weight[first : first + _ROWS], inputs, grid, search=search)
        for first in range(0, len(weight), _ROWS)
    ]
    codes, scales, zeros = (np.concatenate(kind, axis=1) for kind in zip(*parts, strict=True))
    return _codes(codes.T, scales.T, zeros.T, grid)


def _columns_in_turn(weight: Array, inputs: Inputs, grid: Grid, *, search: bool) -> tuple[Array, Array, Array]:
    """Return codes [in, out], scales and zero-points [groups, out]."""
    upper, importance = inputs.upper, inputs.importance
    rows, columns = weight.shape
    # Turned, so that what belongs to one input channel lies together.
    left = np.array(weight.T, np.float32, order="C")
    groups = -(-columns // grid.group)
    codes = np.zeros((columns, rows), np.uint8)
    scales, zeros = np.ones((groups, rows), np.float32), np.zeros((groups, rows), np.float32)
    top = float(2**grid.bits - 1)
    block = max(grid.group, _BLOCK // grid.group * grid.group)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = np.zeros((last - first, rows), np.float32)
        for at in range(first, last):
            group = at // grid.group
            if at % grid.group == 0:
                weighed = importance[at : at + grid.group]
                scale, zero = _grid(left[at : at + grid.group].T, grid, weighed, search=search)
                scales[group], zeros[group] = scale[:, 0], zero[:, 0]
            code = np.clip(np.rint(left[at] / scales[group]) + zeros[group], 0, top)
            codes[at] = code
            error = (left[at] - (code - zeros[group]) * scales[group]) / upper[at, at]
            errors[at - first] = error
            left[at + 1 : last] -= upper[at, at + 1 : last, None] * error
        left[last:] -= upper[first:last, last:].T @ errors
    return codes, scales, zeros


def _inverse_factor(matrix: Array) -> Array:
    """Return the upper triangular U with U'U = matrix⁻¹."""
    # With rows and columns turned round, the Cholesky factor R is upper triangular, and U is its inverse: RR' = matrix.
    return _triangular_inverse(np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1])


def _triangular_inverse(upper: Array) -> Array:
    """Return the inverse of an upper triangular matrix, by halves: most of the work is products of matrices."""
    size = len(upper)
    if size <= _BLOCK:
        return np.linalg.inv(upper)
    half, found = size // 2, np.zeros_like(upper)
    found[:half, :half] = _triangular_inverse(upper[:half, :half])
    found[half:, half:] = _triangular_inverse(upper[half:, half:])
    found[:half, half:] = -found[:half, :half] @ (upper[:half, half:] @ found[half:, half:])
    return found
