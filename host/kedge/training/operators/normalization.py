"""Normalizations. Batch normalization keeps its statistics: a few calibration samples would give worse ones."""

from __future__ import annotations

import torch
from torch.nn import functional

from kedge.training.operators.kernel import Call, Given, Table, Tensor, at, need

TABLE = Table()


@TABLE.add("BatchNormalization")
def _batch(call: Call, given: Given) -> Tensor:
    if call.get("training_mode", 0) or call.outputs > 1:
        raise call.refuse("training_mode")
    x, scale, bias, mean, variance = (need(given, index) for index in range(5))
    # Written out, so that gradients reach scale and bias whatever their shape, and a batch of one is no special case.
    form = (-1, *[1] * (x.ndim - 2)) if x.ndim > 1 else (-1,)
    factor = scale * torch.rsqrt(variance + call.get("epsilon", 1e-5))
    return x * factor.reshape(form) + (bias - mean * factor).reshape(form)


@TABLE.add("InstanceNormalization")
def _instance(call: Call, given: Given) -> Tensor:
    x, scale, bias = need(given, 0), need(given, 1), need(given, 2)
    return functional.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


@TABLE.add("LayerNormalization")
def _layer(call: Call, given: Given) -> Tensor | tuple[Tensor, ...]:
    x, scale, bias = need(given, 0), need(given, 1), at(given, 2)
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + call.get("epsilon", 1e-5))
    y = centred * inverse * scale
    y = y if bias is None else y + bias
    return y if call.outputs == 1 else (y, mean, inverse)[: call.outputs]


@TABLE.add("RMSNormalization")
def _root_mean_square(call: Call, given: Given) -> Tensor:
    x, scale = need(given, 0), need(given, 1)
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + call.get("epsilon", 1e-5)) * scale


@TABLE.add("GroupNormalization")
def _group(call: Call, given: Given) -> Tensor:
    x, scale, bias = need(given, 0), need(given, 1), need(given, 2)
    groups = int(call.get("num_groups"))
    y = functional.group_norm(x, groups, eps=call.get("epsilon", 1e-5))
    if call.opset < 21:  # one value for each group then, for each channel since
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    form = (-1, *[1] * (x.ndim - 2))
    return y * scale.reshape(form) + bias.reshape(form)


@TABLE.add("LpNormalization")
def _lp(call: Call, given: Given) -> Tensor:
    x, axis = need(given, 0), call.get("axis", -1)
    norm = torch.linalg.vector_norm(x, ord=call.get("p", 2), dim=axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))


@TABLE.add("Softmax")
def _softmax(call: Call, given: Given) -> Tensor:
    return _over_classes(call, need(given, 0), logarithm=False)


@TABLE.add("LogSoftmax")
def _log_softmax(call: Call, given: Given) -> Tensor:
    return _over_classes(call, need(given, 0), logarithm=True)


def _over_classes(call: Call, x: Tensor, *, logarithm: bool) -> Tensor:
    function = torch.log_softmax if logarithm else torch.softmax
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % x.ndim  # everything from the axis on was one
    return function(x.flatten(axis), -1).reshape(x.shape)
