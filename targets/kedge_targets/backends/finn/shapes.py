"""Operations that move numbers without changing them: axes, shapes, order."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.finn.context import Context, Operation, plain
from kedge_targets.backends.finn.values import Space, Value

Array = npt.NDArray[Any]


def reshape(context: Context) -> Operation:
    """Make ``Reshape``, ``Flatten``, ``Squeeze``, ``Unsqueeze`` or ``Identity``: to the graph's shape, sample by
    sample."""
    value = context.value()
    shape = context.sample_shape()
    if int(np.prod(shape)) != int(np.prod(value.shape)):
        context.refuse(f"it turns {value.shape} into {shape}")
    context.made(context.same(offset=None))
    name, output = context.node.inputs[0], context.output

    def bind(space: Space) -> None:
        array = plain(space, name, value)
        wanted = (space.batch, *shape)
        turned = array.view()
        try:
            turned.shape = wanted
        except AttributeError:
            # Its memory is not in order, so it must be put so.
            space.step(np.copyto, space.new(output).reshape(array.shape), array)
            return
        if value.offset is None:
            space.alias(output, name, turned)
        else:
            space.step(np.copyto, space.new(output), turned)

    return bind


def transpose(context: Context) -> Operation:
    """Make ``Transpose`` of any axes but the batch."""
    value = context.value()
    rank = len(value.shape) + 1
    order = context.ints("perm", list(range(rank))[::-1])
    if sorted(order) != list(range(rank)) or order[0] != 0:
        context.refuse(f"it moves the batch: {order}")
    context.made(context.same(offset=None))
    name, output = context.node.inputs[0], context.output

    def bind(space: Space) -> None:
        turned = plain(space, name, value).transpose(order)
        if value.offset is None:
            space.alias(output, name, turned)
        else:
            space.step(np.copyto, space.new(output), turned)

    return bind


def concatenate(context: Context) -> Operation:
    """Make ``Concat`` of activations along any axis but the batch."""
    values = [context.value(index) for index in range(len(context.node.inputs))]
    rank = len(values[0].shape) + 1
    axis = int(context.number("axis", 1)) % rank
    if axis == 0 or len({value.dtype for value in values}) > 1:
        context.refuse("it joins batches, or numbers of different carriers")
    shape = list(values[0].shape)
    shape[axis - 1] = sum(value.shape[axis - 1] for value in values)
    context.made(
        Value(
            shape=tuple(shape),
            integer=all(value.integer for value in values),
            low=min(value.low for value in values),
            high=max(value.high for value in values),
            dtype=values[0].dtype,
        )
    )
    names, output = context.node.inputs, context.output

    def bind(space: Space) -> None:
        parts = [plain(space, name, value) for name, value in zip(names, values, strict=True)]
        space.step(np.concatenate, parts, axis=axis, out=space.new(output))

    return bind


def top_k(context: Context) -> Operation:
    """Make ``TopK``: of equal numbers the first comes first, as in ONNX Runtime."""
    value = context.value()
    rank = len(value.shape) + 1
    axis = int(context.number("axis", -1)) % rank
    wanted = int(context.constant(1).reshape(-1)[0]) if context.is_constant(1) else int(context.number("k", 1))
    largest = bool(context.number("largest", 1))
    if axis == 0 or len(context.node.outputs) != 2:
        context.refuse("it picks among the samples of a batch, or does not give both its outputs")
    context.made(
        Value(shape=context.sample_shape(0), integer=value.integer, low=value.low, high=value.high, dtype=value.dtype)
    )
    size = value.shape[axis - 1]
    context.made(
        Value(shape=context.sample_shape(1), integer=True, low=0, high=size - 1, dtype=np.dtype(np.int64)), output=1
    )
    name, (numbers, places) = context.node.inputs[0], context.node.outputs
    head = (slice(None),) * axis + (slice(0, wanted),)

    def bind(space: Space) -> None:
        array, picked, index = plain(space, name, value), space.new(numbers), space.new(places)

        def pick() -> None:
            order = np.argsort(-array if largest else array, axis=axis, kind="stable")[head]
            index[...] = order
            picked[...] = np.take_along_axis(array, order, axis=axis)

        space.step(pick)

    return bind
