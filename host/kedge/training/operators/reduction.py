"""Operators that reduce axes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kedge.training.operators.kernel import Call, Given, Kernel, Table, Tensor, need, wholes

TABLE = Table()


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Kernel:
    def kernel(call: Call, given: Given) -> Tensor:
        x = need(given, 0)
        axes = wholes(call, given, "axes", 1)
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return x if call.operator in _PLAIN else function(x.unsqueeze(0), [0], False)
            axes = list(range(x.ndim))
        return x if not axes else function(x, [axis % x.ndim for axis in axes], bool(call.get("keepdims", 1)))

    return kernel


_PLAIN = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _extreme(function: Callable[..., Tensor]) -> Callable[[Tensor, list[int], bool], Tensor]:
    def extreme(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return function(x.to(torch.uint8), axes, keep).to(torch.bool)
        return function(x, axes, keep)

    return extreme


def _summed(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


for _name, _function in {
    "ReduceSum": _summed,
    "ReduceMean": lambda x, axes, keep: torch.mean(x, axes, keepdim=keep),
    "ReduceMax": _extreme(torch.amax),
    "ReduceMin": _extreme(torch.amin),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: _summed(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(_summed(x * x, axes, keep)),
    "ReduceSumSquare": lambda x, axes, keep: _summed(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(_summed(x, axes, keep)),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}.items():
    TABLE.put(_reduced(_function), _name)


def _where(function: Callable[..., Tensor]) -> Kernel:
    def kernel(call: Call, given: Given) -> Tensor:
        x, axis = need(given, 0), call.get("axis", 0)
        keep = bool(call.get("keepdims", 1))
        if call.get("select_last_index", 0):
            size = x.shape[axis]
            return size - 1 - function(torch.flip(x, [axis]), axis, keepdim=keep)
        return function(x, axis, keepdim=keep)

    return kernel


TABLE.put(_where(torch.argmax), "ArgMax")
TABLE.put(_where(torch.argmin), "ArgMin")
