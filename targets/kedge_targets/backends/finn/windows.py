"""Convolution windows and pooling, on integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.finn.context import Context, Operation, plain
from kedge_targets.backends.finn.values import Space, Value

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Windows:
    """The positions of windows over two axes of an image.

    Attributes:
        kernel, stride, dilation, before, after: values for both axes; the last two are the padding.
        image: sizes without the padding.
        count: number of windows along each axis.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    image: tuple[int, int]
    count: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int]:
        """Return the sizes that hold the padding and every window."""
        ends = [
            (count - 1) * stride + (kernel - 1) * dilation + 1
            for count, stride, kernel, dilation in zip(self.count, self.stride, self.kernel, self.dilation, strict=True)
        ]
        whole = [b + size + a for b, size, a in zip(self.before, self.image, self.after, strict=True)]
        return max(ends[0], whole[0]), max(ends[1], whole[1])

    def of(self, array: Array) -> Array:
        """Return a view [batch, rows, columns, kernel rows, kernel columns, channels] of [batch, height, width,
        channels]."""
        batch, down, across, channel = array.strides
        return np.lib.stride_tricks.as_strided(
            array,
            (array.shape[0], *self.count, *self.kernel, array.shape[3]),
            (
                batch,
                down * self.stride[0],
                across * self.stride[1],
                down * self.dilation[0],
                across * self.dilation[1],
                channel,
            ),
            writeable=False,
        )


def im2col(context: Context) -> Operation:
    """Make QONNX's ``Im2Col`` on NHWC: each output pixel holds its window, as (kernel row, kernel column, channel)."""
    value = context.integers() if any(context.ints("pad_amount", [0] * 4)) else context.value()
    pads = context.ints("pad_amount", [0, 0, 0, 0])
    fill = int(context.number("pad_value", 0))
    windows = _windows(
        context,
        value.shape[:2],
        kernel=context.ints("kernel_size"),
        stride=context.ints("stride"),
        dilation=context.ints("dilations", [1, 1]),
        pads=pads,
    )
    context.made(context.same(low=min(value.low, fill), high=max(value.high, fill), offset=None))
    name, output, channels = context.node.inputs[0], context.output, value.shape[2]
    untouched = windows.kernel == (1, 1) and windows.stride == (1, 1) and not any(pads)

    def bind(space: Space) -> None:
        array = plain(space, name, value)
        if untouched and value.offset is None:
            space.alias(output, name, array)
            return
        view = windows.of(_padded(space, array, windows, fill))
        made = space.new(output).reshape(space.batch, *windows.count, *windows.kernel, channels)
        space.step(np.copyto, made, view)

    return bind


def max_pool(context: Context) -> Operation:
    """Make ``MaxPool`` (NCHW) or QONNX's ``MaxPoolNHWC``."""
    value = context.value()
    last = context.node.operator == "MaxPoolNHWC"
    height, width = value.shape[:2] if last else value.shape[1:3]
    windows = _windows(
        context,
        (height, width),
        kernel=context.ints("kernel_shape"),
        stride=context.ints("strides", [1, 1]),
        dilation=context.ints("dilations", [1, 1]),
        pads=context.ints("pads", [0, 0, 0, 0]),
        count=context.sample_shape()[:2] if last else context.sample_shape()[1:],
    )
    context.made(context.same(offset=None))
    name, output = context.node.inputs[0], context.output

    def bind(space: Space) -> None:
        array, made = plain(space, name, value), space.new(output)
        if not last:
            array, made = array.transpose(0, 2, 3, 1), made.transpose(0, 2, 3, 1)
        view = windows.of(_padded(space, array, windows, -np.inf))
        _reduced(space, np.maximum, view, made)

    return bind


def quant_average_pool(context: Context) -> Operation:
    """Make QONNX's ``QuantAvgPool2d``: the sum of a window, shifted right by as many bits as its result is narrower."""
    value = context.integers()
    kernel, stride = int(context.number("kernel", 1)), int(context.number("stride", 1))
    last = context.attributes.get("data_layout", "NCHW") == "NHWC"
    height, width = value.shape[:2] if last else value.shape[1:3]
    bits = int((2 ** int(context.number("ibits", 1)) - 1) * kernel * kernel).bit_length()
    shift = max(0, bits - int(context.number("obits", 1)))
    windows = _windows(
        context,
        (height, width),
        kernel=[kernel, kernel],
        stride=[stride, stride],
        dilation=[1, 1],
        pads=[0, 0, 0, 0],
        count=context.sample_shape()[:2] if last else context.sample_shape()[1:],
    )
    area = kernel * kernel
    dtype = context.carrier(max(abs(value.low), abs(value.high)) * area)
    scale = 0.5**shift
    low, high = (float(np.floor(end * area * scale)) for end in (value.low, value.high))
    context.made(context.same(low=low, high=high, dtype=dtype, offset=None))
    name, output = context.node.inputs[0], context.output

    def bind(space: Space) -> None:
        array, made = space.as_type(plain(space, name, value), dtype), space.new(output)
        turned = array if last else array.transpose(0, 2, 3, 1)
        result = made if last else made.transpose(0, 2, 3, 1)
        _reduced(space, np.add, windows.of(turned), result)
        if shift:
            # A power of two: exact, as the shift is.
            space.step(np.multiply, made, dtype.type(scale), out=made)
            space.step(np.floor, made, out=made)

    return bind


def global_average_pool(context: Context) -> Operation:
    """Make ``GlobalAveragePool``: the exact sum divided by its count in float32, as in ONNX Runtime."""
    value = context.integers()
    if len(value.shape) != 3:
        context.refuse(f"it pools {value.shape}, an image was expected")
    area = value.shape[1] * value.shape[2]
    dtype = context.carrier(max(abs(value.low), abs(value.high)) * area)
    context.made(Value(shape=context.sample_shape(), integer=False))
    name, output, count = context.node.inputs[0], context.output, np.float32(area)

    def bind(space: Space) -> None:
        array, made = space.as_type(plain(space, name, value), dtype), space.new(output)
        total = made if dtype == made.dtype else space.scratch(made.shape, dtype)
        space.step(np.add.reduce, array, axis=(2, 3), keepdims=True, out=total)
        space.step(np.divide, total, count, out=made, casting="same_kind")

    return bind


def pad(context: Context) -> Operation:
    """Make ``Pad`` with a constant."""
    value = context.value()
    if context.attributes.get("mode", "constant") != "constant":
        context.refuse("it pads with another mode than a constant")
    amounts = context.ints("pads") if "pads" in context.attributes else [int(a) for a in context.whole_constant(1)]
    given = context.node.inputs[2] if len(context.node.inputs) > 2 else ""
    fill = float(context.constant(2).reshape(())) if given else context.number("value", 0.0)
    rank = len(value.shape) + 1
    before, after = amounts[:rank], amounts[rank:]
    if before[0] or after[0] or min(amounts) < 0:
        context.refuse("it pads the batch, or cuts something off")
    whole = value.integer and fill == int(fill)
    context.made(context.same(integer=whole, low=min(value.low, fill), high=max(value.high, fill), offset=None))
    inner = tuple(slice(b, b + size) for b, size in zip(before[1:], value.shape, strict=True))
    name, output = context.node.inputs[0], context.output

    def bind(space: Space) -> None:
        array, made = plain(space, name, value), space.new(output)
        space.step(made.fill, fill)
        space.step(np.copyto, made[(slice(None), *inner)], array)

    return bind


def _windows(
    context: Context,
    image: Sequence[int],
    *,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    pads: list[int],
    count: Sequence[int] | None = None,
) -> _Windows:
    if len(kernel) != 2 or len(stride) != 2 or len(dilation) != 2 or len(pads) != 4 or len(image) != 2:
        context.refuse("its windows are not over two axes")
    if min(*kernel, *stride, *dilation) < 1 or min(pads) < 0:
        context.refuse("its windows have a size, a stride or a dilation below 1, or a negative padding")
    counts = (
        tuple(count)
        if count is not None
        else tuple(
            (size + pads[axis] + pads[axis + 2] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
            for axis, size in enumerate(image)
        )
    )
    return _Windows(
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (dilation[0], dilation[1]),
        (pads[0], pads[1]),
        (pads[2], pads[3]),
        (image[0], image[1]),
        (counts[0], counts[1]),
    )


def _padded(space: Space, array: Array, windows: _Windows, fill: float) -> Array:
    """Return [batch, height, width, channels] with every window's pixels."""
    batch, height, width, channels = array.shape
    if windows.padded == (height, width):
        return array
    # Its border is written once, so it is this operation's alone for good.
    whole = np.full((batch, *windows.padded, channels), fill, dtype=array.dtype)
    top, left = windows.before
    space.step(np.copyto, whole[:, top : top + height, left : left + width], array)
    return whole


def _reduced(space: Space, function: np.ufunc, view: Array, made: Array) -> None:
    """Reduce the windows' pixels (axes 3 and 4 of the view)."""
    rows, columns = view.shape[3:5]
    parts = [view[:, :, :, row, column] for row in range(rows) for column in range(columns)]
    if len(parts) == 1:
        space.step(np.copyto, made, parts[0])
        return
    space.step(function, parts[0], parts[1], out=made)
    for part in parts[2:]:
        space.step(function, made, part, out=made)
