"""Comparisons, logic, and type conversions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kedge.training.operators.kernel import Call, Given, Kernel, Table, Tensor, need

TABLE = Table()

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,
    11: torch.float64,
    16: torch.float32,
}
"""ONNX's number of a type → the type it is computed in. Half floats are computed in float32: gradients of small steps
vanish in them."""


def _compared(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    return lambda call, given: function(need(given, 0), need(given, 1))


for _name, _function in {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}.items():
    TABLE.put(_compared(_function), _name)


@TABLE.add("Not")
def _not(call: Call, given: Given) -> Tensor:
    return torch.logical_not(need(given, 0))


@TABLE.add("Where")
def _where(call: Call, given: Given) -> Tensor:
    return torch.where(need(given, 0), need(given, 1), need(given, 2))


@TABLE.add("IsNaN")
def _is_nan(call: Call, given: Given) -> Tensor:
    return torch.isnan(need(given, 0))


@TABLE.add("IsInf")
def _is_inf(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    below = torch.isneginf(x) if call.get("detect_negative", 1) else torch.zeros_like(x, dtype=torch.bool)
    above = torch.isposinf(x) if call.get("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)
    return below | above


@TABLE.add("Cast")
def _cast(call: Call, given: Given) -> Tensor:
    wanted = DTYPES.get(int(call.get("to")))
    if wanted is None:
        raise call.refuse("a type that torch has not")
    return need(given, 0).to(wanted)


@TABLE.add("CastLike")
def _cast_like(call: Call, given: Given) -> Tensor:
    return need(given, 0).to(need(given, 1).dtype)
