"""Operators of transformers that are not products or normalizations."""

from __future__ import annotations

import torch

from kedge.training.operators.kernel import Call, Given, Table, Tensor, at, need

TABLE = Table()


@TABLE.add("Trilu")
def _trilu(call: Call, given: Given) -> Tensor:
    x, offset = need(given, 0), at(given, 1)
    diagonal = 0 if offset is None else int(offset)
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


@TABLE.add("CumSum")
def _cumulated(call: Call, given: Given) -> Tensor:
    x, axis = need(given, 0), int(need(given, 1))
    backwards = bool(call.get("reverse", 0))
    x = torch.flip(x, [axis]) if backwards else x
    total = torch.cumsum(x, axis, dtype=x.dtype)
    total = total - x if call.get("exclusive", 0) else total
    return torch.flip(total, [axis]) if backwards else total


@TABLE.add("OneHot")
def _one_hot(call: Call, given: Given) -> Tensor:
    indices, depth, values = need(given, 0).long(), int(need(given, 1)), need(given, 2)
    inside = torch.where(indices < 0, indices + depth, indices).unsqueeze(-1)
    hot = inside == torch.arange(depth)
    axis = call.get("axis", -1) % hot.ndim
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)
