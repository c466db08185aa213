"""Operators that pick elements."""

from __future__ import annotations

import torch

from kedge.training.operators.kernel import Call, Given, Table, Tensor, at, need, whole, wholes

TABLE = Table()


def _inside(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@TABLE.add("Slice")
def _slice(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    starts, ends = wholes(call, given, "starts", 1) or [], wholes(call, given, "ends", 2) or []
    axes = wholes(call, given, "axes", 3) or list(range(len(starts)))
    steps = whole(at(given, 4)) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x


@TABLE.add("Gather")
def _gather(call: Call, given: Given) -> Tensor:
    x, indices = need(given, 0), need(given, 1)
    axis = call.get("axis", 0) % x.ndim
    places = _inside(indices, x.shape[axis])
    picked = x.index_select(axis, places.reshape(-1))
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@TABLE.add("GatherElements")
def _gather_elements(call: Call, given: Given) -> Tensor:
    x, axis = need(given, 0), call.get("axis", 0)
    return torch.gather(x, axis, _inside(need(given, 1), x.shape[axis]))


@TABLE.add("GatherND")
def _gather_nd(call: Call, given: Given) -> Tensor:
    x, indices, batch = need(given, 0), need(given, 1), call.get("batch_dims", 0)
    depth = indices.shape[-1]
    places = [_inside(indices[..., level], x.shape[batch + level]) for level in range(depth)]
    lead = [
        torch.arange(x.shape[axis]).reshape([-1 if at == axis else 1 for at in range(indices.ndim - 1)])
        for axis in range(batch)
    ]
    return x[tuple(lead + places)]


@TABLE.add("ScatterND")
def _scatter_nd(call: Call, given: Given) -> Tensor:
    x, indices, updates = need(given, 0), need(given, 1), need(given, 2)
    how = call.get("reduction", "none")
    if how not in ("none", "add"):
        raise call.refuse(f"reduction {how!r}")
    places = tuple(_inside(indices[..., level], x.shape[level]) for level in range(indices.shape[-1]))
    return x.index_put(places, updates, accumulate=how == "add")


@TABLE.add("ScatterElements")
def _scatter_elements(call: Call, given: Given) -> Tensor:
    x, indices, updates = need(given, 0), need(given, 1), need(given, 2)
    axis, how = call.get("axis", 0), call.get("reduction", "none")
    if how not in ("none", "add"):
        raise call.refuse(f"reduction {how!r}")
    places = _inside(indices, x.shape[axis])
    return x.scatter_add(axis, places, updates) if how == "add" else x.scatter(axis, places, updates)


@TABLE.add("TopK")
def _top_k(call: Call, given: Given) -> tuple[Tensor, ...]:
    x = need(given, 0)
    count = int(call.get("k")) if call.opset < 10 else int(need(given, 1))
    axis, largest = call.get("axis", -1), bool(call.get("largest", 1))
    # A stable sort, because of equal values the lower index comes first; torch.topk promises no order.
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@TABLE.add("NonZero")
def _non_zero(call: Call, given: Given) -> Tensor:
    return torch.nonzero(need(given, 0)).transpose(0, 1)
