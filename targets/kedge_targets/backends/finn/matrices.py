"""Matrix products of integers, exact in whatever order the library adds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.finn.context import Context, Operation, plain
from kedge_targets.backends.finn.values import Space, Value

Array = npt.NDArray[Any]


def matmul(context: Context) -> Operation:
    """Make ``MatMul`` of an activation with constant weights [depth, columns].

    Every partial sum, in any order, is at most the sum of the products' magnitudes; the carrier dtype is chosen so that
    integers up to this bound are exact.
    """
    return _product(context, context.whole_constant(1), None)


def xnor_popcount(context: Context) -> Operation:
    """Make ``XnorPopcountMatMul`` of bits: for each column the number of places where activation and weight agree, that
    is ``x @ (2 w - 1) + sum(1 - w)``. The last term is left to the readers of the sums, as an offset; thresholds absorb
    it."""
    weights = context.whole_constant(1)
    value = context.integers()
    if value.low < 0 or value.high > 1 or weights.min(initial=0) < 0 or weights.max(initial=0) > 1:
        context.refuse("it takes bits, its inputs are others")
    return _product(context, 2 * weights - 1, (1 - weights).sum(axis=0))


def _product(context: Context, weights: Array, offset: Array | None) -> Operation:
    value = context.integers()
    if weights.ndim != 2 or value.shape[-1] != weights.shape[0]:
        context.refuse(f"it multiplies {value.shape} by {weights.shape}")
    low, high = value.low, value.high
    ends = np.stack([weights * int(low), weights * int(high)])
    largest = float(np.abs(ends).max(axis=0).sum(axis=0).max(initial=0))
    shift = 0 if offset is None else offset
    sums_low = ends.min(axis=0).sum(axis=0)
    sums_high = ends.max(axis=0).sum(axis=0)
    dtype = context.carrier(max(largest, float(np.abs([sums_low + shift, sums_high + shift]).max(initial=0))))
    name = context.node.inputs[0]
    made = Value(
        shape=(*value.shape[:-1], weights.shape[1]),
        integer=True,
        low=float((sums_low + shift).min(initial=0)),
        high=float((sums_high + shift).max(initial=0)),
        dtype=dtype,
        offset=offset,
    )
    context.made(made)
    output, depth, columns = context.output, *weights.shape
    sparse = _diagonal(weights)
    if sparse is not None:
        return _depthwise(name, value, output, sparse.astype(dtype))
    matrix = np.ascontiguousarray(weights.astype(dtype))

    def bind(space: Space) -> None:
        array = space.as_type(plain(space, name, value), dtype)
        rows = space.reshaped(array, (array.size // depth, depth))
        if not rows.flags.c_contiguous:
            copied = space.scratch(rows.shape, dtype)
            space.step(np.copyto, copied, rows)
            rows = copied
        space.step(np.matmul, rows, matrix, out=space.new(output).reshape(-1, columns))

    return bind


def _diagonal(weights: Array) -> Array | None:
    """Return weights [taps, channels] of a matrix [taps * channels, channels] that connects each channel only with
    itself, as a depthwise convolution does; None for any other matrix."""
    depth, columns = weights.shape
    if columns < 2 or depth % columns:
        return None
    taps = weights.reshape(depth // columns, columns, columns)
    diagonal = np.ascontiguousarray(np.diagonal(taps, axis1=1, axis2=2))
    return diagonal if np.count_nonzero(taps) == np.count_nonzero(diagonal) else None


def _depthwise(name: str, value: Value, output: str, weights: Array) -> Operation:
    taps, channels = weights.shape

    def bind(space: Space) -> None:
        array = space.as_type(plain(space, name, value), weights.dtype)
        rows = space.reshaped(array, (array.size // (taps * channels), taps, channels))
        made = space.new(output).reshape(-1, channels)
        product = space.scratch(made.shape, weights.dtype)
        space.step(np.multiply, rows[:, 0], weights[0], out=made)
        for tap in range(1, taps):
            space.step(np.multiply, rows[:, tap], weights[tap], out=product)
            space.step(np.add, made, product, out=made)

    return bind
