"""Layers that hold weights: convolutions and products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from kedge.training.operators.kernel import Call, Given, Table, Tensor, at, need
from kedge_targets.graph import auto_pad

TABLE = Table()

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def pads_of(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the padding before and after each spatial axis, by ``pads`` or ``auto_pad`` (ONNX specification of
    Conv)."""
    count = len(sizes)
    how = call.get("auto_pad", "NOTSET")
    if how in ("NOTSET", ""):
        pads = [int(pad) for pad in call.get("pads", [0] * (2 * count))]
        return pads[:count], pads[count:]
    return auto_pad.explicit_pads(how, sizes, kernel, strides, dilations)


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last axes with a constant."""
    if not any(before) and not any(after):
        return x
    flat = [pad for pair in reversed(list(zip(before, after, strict=True))) for pad in pair]
    return functional.pad(x, flat, value=value)


@TABLE.add("Conv")
def _conv(call: Call, given: Given) -> Tensor:
    x, weight, bias = need(given, 0), need(given, 1), at(given, 2)
    count = x.ndim - 2
    if count not in _CONV:
        raise call.refuse(f"{count} spatial axes")
    strides, dilations = call.get("strides", [1] * count), call.get("dilations", [1] * count)
    before, after = pads_of(call, x.shape[2:], weight.shape[2:], strides, dilations)
    inside = before
    if before != after:
        x, inside = padded(x, before, after), [0] * count
    return _CONV[count](x, weight, bias, strides, inside, dilations, call.get("group", 1))


@TABLE.add("ConvTranspose")
def _conv_transpose(call: Call, given: Given) -> Tensor:
    x, weight, bias = need(given, 0), need(given, 1), at(given, 2)
    count = x.ndim - 2
    if count not in _TRANSPOSED:
        raise call.refuse(f"{count} spatial axes")
    strides, dilations = call.get("strides", [1] * count), call.get("dilations", [1] * count)
    extra = list(call.get("output_padding", [0] * count))
    kernel = weight.shape[2:]
    full = [
        (size - 1) * stride + (width - 1) * dilation + 1
        for size, stride, width, dilation in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    how = call.get("auto_pad", "NOTSET")
    shape = call.get("output_shape")
    if shape is None and how in ("SAME_UPPER", "SAME_LOWER"):
        shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if shape is not None:
        totals = [whole + more - wanted for whole, more, wanted in zip(full, extra, shape[-count:], strict=True)]
        small = [total // 2 for total in totals]
        large = [total - total // 2 for total in totals]
        before, after = (small, large) if how == "SAME_UPPER" else (large, small)
    else:
        before, after = pads_of(call, x.shape[2:], kernel, strides, dilations)
    # torch cuts the same at both ends only, so everything is made and the ends are cut here.
    made = _TRANSPOSED[count](x, weight, None, strides, 0, 0, call.get("group", 1), dilations)
    made = padded(made, [-pad for pad in before], [more - pad for more, pad in zip(extra, after, strict=True)])
    return made if bias is None else made + bias.reshape(-1, *[1] * count)


@TABLE.add("Gemm")
def _gemm(call: Call, given: Given) -> Tensor:
    a, b, c = need(given, 0), need(given, 1), at(given, 2)
    a = a.transpose(0, 1) if call.get("transA", 0) else a
    b = b.transpose(0, 1) if call.get("transB", 0) else b
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    product = a @ b
    if alpha != 1.0:
        product = alpha * product
    if c is None:
        return product
    return product + (c if beta == 1.0 else beta * c)


@TABLE.add("MatMul")
def _matmul(call: Call, given: Given) -> Tensor:
    return torch.matmul(need(given, 0), need(given, 1))


@TABLE.add("Einsum")
def _einsum(call: Call, given: Given) -> Tensor:
    equation = str(call.get("equation")).replace(" ", "")
    return torch.einsum(equation, *[need(given, index) for index in range(len(given))])
