"""Element-wise operations: thresholds, and the scales and biases around the integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.finn import bit_packing, thresholds
from kedge_targets.backends.finn.context import Context, Operation, plain
from kedge_targets.backends.finn.values import Space, Value

Array = npt.NDArray[Any]

_LAYOUTS = {2: "NC", 3: "NWC", 4: "NCHW"}
_LARGEST_TABLE = 1 << 22
"""Largest number of entries in a table of counts, all channels together."""
_FEW = 3
"""Largest number of thresholds that are compared one by one if there is neither a line nor a table."""


def multi_threshold(context: Context) -> Operation:
    """Make QONNX's ``MultiThreshold``: ``out_scale * (number of the channel's thresholds reached) + out_bias``."""
    value = context.value()
    scale, bias = context.number("out_scale", 1.0), context.number("out_bias", 0.0)
    steps = np.sort(context.constant(1).astype(np.float64), axis=1)
    shape = _channels(context, value, steps.shape[0])
    whole = scale == int(scale) and bias == int(bias)
    ends = sorted((bias, bias + scale * steps.shape[1]))
    if value.integer:
        # x + offset >= t for integers x: x >= ceil(t) - offset.
        steps = np.ceil(steps)
        if value.offset is not None:
            if shape[-1] == 1:
                steps, shape = np.repeat(steps, value.shape[-1], axis=0), (*shape[:-1], value.shape[-1])
            steps = steps - value.offset[:, None]
    context.made(context.same(integer=whole, low=ends[0], high=ends[1], dtype=np.dtype(np.float32), offset=None))
    counted = _counted(context, value, steps, shape, int(bias) if scale == 1 and whole else 0)
    scaled = scale != 1 or not whole
    name, output = context.node.inputs[0], context.output

    def bind(space: Space) -> None:
        array = space[name]
        made = space.new(output, over=name)
        counted(space, array, made)
        if scaled:
            if scale != 1:
                space.step(np.multiply, made, np.float32(scale), out=made)
            if bias != 0:
                space.step(np.add, made, np.float32(bias), out=made)

    return bind


_Counted = Callable[[Space, Array, Array], None]
"""Adds the steps that count the thresholds of one array into another."""


def _channels(context: Context, value: Value, rows: int) -> tuple[int, ...]:
    """Return the shape in which one number per channel broadcasts over a batch."""
    rank = len(value.shape) + 1
    layout = context.attributes.get("data_layout") or _LAYOUTS.get(rank, "")
    axis = layout.index("C") if "C" in layout else 1
    if not 0 < axis < rank or rows not in (1, value.shape[axis - 1]):
        context.refuse(f"it has thresholds for {rows} channels, its input is {value.shape}")
    shape = [1] * rank
    shape[axis] = rows
    return tuple(shape)


def _counted(context: Context, value: Value, steps: Array, shape: tuple[int, ...], bias: int) -> _Counted:
    """Choose how thresholds are counted and ``bias`` is added: the fastest way that is exact."""
    if value.integer and np.isfinite([value.low, value.high]).all():
        # In the stored numbers, before the offset.
        shift = 0 if value.offset is None else value.offset
        low, high = int(np.min(value.low - shift)), int(np.max(value.high - shift))
        # Beyond the ends all are alike, and int64 must hold them.
        kept = steps.clip(low - 1, high + 1).astype(np.int64)
        found = thresholds.line(kept, low, high, value.dtype, bias=bias)
        if found is not None:
            return _by_line(found, shape)
        if len(kept) * (high - low + 1) <= _LARGEST_TABLE:
            return _by_table(thresholds.table(kept, low, high) + bias, low, shape)
    if steps.shape[1] <= _FEW:
        return _by_comparison(steps.astype(value.dtype), shape, bias)
    return _by_search(steps.astype(value.dtype), shape, bias)


def _by_line(line: thresholds.Line, shape: tuple[int, ...]) -> _Counted:
    def parameter(values: Array) -> Any:
        return values[0] if (values == values[0]).all() else values.reshape(shape)

    slope, start, low, high = map(parameter, (line.slope, line.start, line.low, line.high))
    flat, whole = bool((line.slope == 1).all()), line.whole

    def bind(space: Space, array: Array, made: Array) -> None:
        work = made if made.dtype == array.dtype else space.scratch(array.shape, array.dtype)
        if flat:
            space.step(np.add, array, start, out=work)
        else:
            space.step(np.multiply, array, slope, out=work)
            space.step(np.add, work, start, out=work)
        if not whole:
            space.step(np.floor, work, out=work)
        space.step(np.maximum, work, low, out=work)
        space.step(np.minimum, work, high, out=work)
        if work is not made:
            space.step(np.copyto, made, work, casting="same_kind")

    return bind


def _by_table(table: Array, low: int, shape: tuple[int, ...]) -> _Counted:
    width = table.shape[1]
    places = (np.arange(len(table), dtype=np.int64) * width - low).reshape(shape)
    flat = table.astype(np.float32).ravel()

    def bind(space: Space, array: Array, made: Array) -> None:
        index = space.scratch(array.shape, np.int64)
        space.step(np.copyto, index, array, casting="unsafe")
        space.step(np.add, index, places, out=index)
        space.step(np.take, flat, index, out=made, mode="clip")

    return bind


def _by_comparison(steps: Array, shape: tuple[int, ...], bias: int) -> _Counted:
    columns = [np.ascontiguousarray(column).reshape(shape) for column in steps.T]

    def bind(space: Space, array: Array, made: Array) -> None:
        reached = space.scratch(array.shape, np.bool_)
        total = made if len(columns) == 1 else space.scratch(array.shape, np.float32)
        for number, column in enumerate(columns):
            space.step(np.greater_equal, array, column, out=reached)
            space.step(*((np.copyto, total, reached) if number == 0 else (np.add, total, reached, total)))
        if total is not made:
            space.step(np.copyto, made, total)
        if bias:
            space.step(np.add, made, np.float32(bias), out=made)

    return bind


def _by_search(steps: Array, shape: tuple[int, ...], bias: int) -> _Counted:
    axis = next((place for place, size in enumerate(shape) if size > 1), -1)

    def bind(space: Space, array: Array, made: Array) -> None:
        if len(steps) == 1:
            pairs = [(steps[0], array, made)]
        else:
            first, target = np.moveaxis(array, axis, 0), np.moveaxis(made, axis, 0)
            pairs = [(row, first[channel], target[channel]) for channel, row in enumerate(steps)]

        def search() -> None:
            for row, numbers, counts in pairs:
                counts[...] = row.searchsorted(numbers, side="right")

        space.step(search)
        if bias:
            space.step(np.add, made, np.float32(bias), out=made)

    return bind


_FUNCTIONS: dict[str, np.ufunc] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}


def arithmetic(context: Context) -> Operation:
    """Make ``Add``, ``Sub``, ``Mul`` or ``Div``: exact for integers, one float32 operation for real numbers, as in
    ONNX."""
    function = _FUNCTIONS[context.node.operator]
    sides = [_side(context, index) for index in (0, 1)]
    shapes = [side.shape if isinstance(side, np.ndarray) else (1, *side.shape) for side in sides]
    if any(len(shape) > len(context.sample_shape()) + 1 for shape in shapes):
        context.refuse(f"its operands have the shapes {shapes}")
    bounds = [_bounds(side) for side in sides]
    integer = function is not np.divide and all(known for known, _, _ in bounds)
    low, high = -np.inf, np.inf
    dtype = np.dtype(np.float32)
    if integer:
        corners = [float(function(a, b)) for a in bounds[0][1:] for b in bounds[1][1:]]
        low, high = min(corners), max(corners)
        dtype = context.carrier(max(abs(low), abs(high)))
    context.made(Value(shape=context.sample_shape(), integer=integer, low=low, high=high, dtype=dtype))
    output = context.output

    def bind(space: Space) -> None:
        operands = []
        for name, side in zip(context.node.inputs, sides, strict=True):
            if isinstance(side, np.ndarray):
                operands.append(side.astype(dtype))
            else:
                operands.append(space.as_type(plain(space, name, side), dtype))
        free = [name for name, side in zip(context.node.inputs, sides, strict=True) if not isinstance(side, np.ndarray)]
        made = space.new(output, over=free[0] if len(free) == 1 else None)
        space.step(function, *operands, out=made)

    return bind


def _side(context: Context, index: int) -> Value | Array:
    return context.constant(index) if context.is_constant(index) else context.value(index)


def _bounds(side: Value | Array) -> tuple[bool, float, float]:
    """Return whether all are integers, and the smallest and the largest."""
    if isinstance(side, np.ndarray):
        return bit_packing.integral(side), float(side.min()), float(side.max())
    return side.integer, side.low, side.high
