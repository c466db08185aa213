"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from kedge.training.operators.kernel import Call, Given, Table, Tensor, need
from kedge.training.operators.layers import padded, pads_of

TABLE = Table()

_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def _windows(call: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
    """Return kernel, strides, dilations, padding before and after, and what ``ceil_mode`` adds after that."""
    count = x.ndim - 2
    if count not in _MAX:
        raise call.refuse(f"{count} spatial axes")
    kernel = list(call.get("kernel_shape"))
    strides, dilations = list(call.get("strides", [1] * count)), list(call.get("dilations", [1] * count))
    before, after = pads_of(call, x.shape[2:], kernel, strides, dilations)
    more = [0] * count
    if call.get("ceil_mode", 0):
        for axis in range(count):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            room = x.shape[2 + axis] + before[axis] + after[axis] - reach
            if room < 0 and dilations[axis] == 1:
                # A single window that reaches beyond the end (EfficientNet's has 2560 x 2560 over a map of a few
                # pixels): what lies there counts in no way, and as padding would fill the memory.
                kernel[axis] += room
                continue
            steps = math.ceil(room / strides[axis])
            if steps * strides[axis] >= x.shape[2 + axis] + before[axis]:
                steps -= 1  # a window must not begin in the padding after the end
            more[axis] = max(0, steps * strides[axis] - room)
    return kernel, strides, dilations, before, after, more


def _plus(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


@TABLE.add("MaxPool")
def _max_pool(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    if call.outputs > 1:
        raise call.refuse("indices")
    kernel, strides, dilations, before, after, more = _windows(call, x)
    kind = x.dtype
    floats = x if x.is_floating_point() else x.to(torch.float32)  # torch pools floats only; small integers are exact
    floats = padded(floats, before, _plus(after, more), -math.inf)
    return _MAX[x.ndim - 2](floats, kernel, strides, 0, dilations).to(kind)


@TABLE.add("AveragePool")
def _average_pool(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    kernel, strides, dilations, before, after, more = _windows(call, x)
    average = _average(x.ndim - 2, kernel, strides, dilations)
    if not any(before) and not any(after) and not any(more):
        return average(x)
    ends = _plus(after, more)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    if call.get("count_include_pad", 0):  # what ceil_mode adds is never counted
        counted = padded(padded(counted, before, after, 1.0), [0] * len(more), more)
    else:
        counted = padded(counted, before, ends)
    return average(padded(x, before, ends)) / average(counted)


def _average(count: int, kernel: list[int], strides: list[int], dilations: list[int]):  # type: ignore[no-untyped-def]
    if all(dilation == 1 for dilation in dilations):
        return lambda x: _AVERAGE[count](x, kernel, strides)

    def dilated(x: Tensor) -> Tensor:
        channels = x.shape[1]
        ones = torch.full((channels, 1, *kernel), 1.0 / math.prod(kernel), dtype=x.dtype)
        return _CONV[count](x, ones, None, strides, 0, dilations, channels)

    return dilated


@TABLE.add("GlobalAveragePool")
def _global_average(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@TABLE.add("GlobalMaxPool")
def _global_max(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    return x.amax(list(range(2, x.ndim)), keepdim=True)
