"""Operators that change shapes, and that make tensors from shapes."""

from __future__ import annotations

import torch
from torch.nn import functional

from kedge.training.operators.kernel import Call, Given, Table, Tensor, at, need, whole, wholes

TABLE = Table()


@TABLE.add("Reshape")
def _reshape(call: Call, given: Given) -> Tensor:
    x, wanted = need(given, 0), wholes(call, given, "shape", 1) or []
    if not call.get("allowzero", 0):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


@TABLE.add("Flatten")
def _flatten(call: Call, given: Given) -> Tensor:
    x, axis = need(given, 0), call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, 0)


@TABLE.add("Transpose")
def _transpose(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    return x.permute(call.get("perm", list(range(x.ndim))[::-1]))


@TABLE.add("Squeeze")
def _squeeze(call: Call, given: Given) -> Tensor:
    x, axes = need(given, 0), wholes(call, given, "axes", 1)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@TABLE.add("Unsqueeze")
def _unsqueeze(call: Call, given: Given) -> Tensor:
    x, axes = need(given, 0), wholes(call, given, "axes", 1) or []
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@TABLE.add("Concat")
def _concat(call: Call, given: Given) -> Tensor:
    return torch.cat([need(given, index) for index in range(len(given))], call.get("axis", 1))


@TABLE.add("Split")
def _split(call: Call, given: Given) -> tuple[Tensor, ...]:
    x, axis = need(given, 0), call.get("axis", 0)
    parts = wholes(call, given, "split", 1)
    if parts is None:
        size, count = x.shape[axis], call.outputs
        each = -(-size // count)
        parts = [min(each, size - start * each) for start in range(count)]
    return tuple(torch.split(x, parts, axis))


@TABLE.add("Expand")
def _expand(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    return x.expand(torch.broadcast_shapes(x.shape, tuple(whole(given[1]) or [])))


@TABLE.add("Tile")
def _tile(call: Call, given: Given) -> Tensor:
    return need(given, 0).repeat(whole(given[1]) or [])


@TABLE.add("Shape")
def _shape(call: Call, given: Given) -> Tensor:
    return torch.tensor(list(need(given, 0).shape)[slice(call.get("start", 0), call.get("end"))], dtype=torch.int64)


@TABLE.add("Size")
def _size(call: Call, given: Given) -> Tensor:
    return torch.tensor(need(given, 0).numel())


@TABLE.add("ConstantOfShape")
def _constant_of_shape(call: Call, given: Given) -> Tensor:
    value = call.get("value", torch.zeros(1))
    return value.reshape(-1)[0].expand(whole(given[0]) or []).clone()


@TABLE.add("Range")
def _range(call: Call, given: Given) -> Tensor:
    start, limit, delta = need(given, 0), need(given, 1), need(given, 2)
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@TABLE.add("EyeLike")
def _eye_like(call: Call, given: Given) -> Tensor:
    x, offset = need(given, 0), call.get("k", 0)
    if "dtype" in call.attributes:
        raise call.refuse("a type of its own")
    rows, columns = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1]).unsqueeze(0)
    return (columns - rows == offset).to(x.dtype)


@TABLE.add("DepthToSpace")
def _depth_to_space(call: Call, given: Given) -> Tensor:
    x, block = need(given, 0), int(call.get("blocksize"))
    n, c, h, w = x.shape
    if call.get("mode", "DCR") == "DCR":
        x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // block**2, h * block, w * block)


@TABLE.add("SpaceToDepth")
def _space_to_depth(call: Call, given: Given) -> Tensor:
    x, block = need(given, 0), int(call.get("blocksize"))
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block, block, w // block, block)
    order = (0, 3, 5, 1, 2, 4) if call.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.permute(order).reshape(n, c * block**2, h // block, w // block)


@TABLE.add("Pad")
def _pad(call: Call, given: Given) -> Tensor:
    x, pads, value = need(given, 0), wholes(call, given, "pads", 1) or [], at(given, 2)
    axes = whole(at(given, 3))
    axes = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes]
    before, after = [0] * x.ndim, [0] * x.ndim
    for index, axis in enumerate(axes):
        before[axis], after[axis] = pads[index], pads[index + len(axes)]
    mode = call.get("mode", "constant")
    if mode == "constant":
        fill = call.get("value", 0.0) if value is None else value.item()
        flat = [pad for pair in reversed(list(zip(before, after, strict=True))) for pad in pair]
        return functional.pad(x, flat, value=fill)
    for axis in range(x.ndim):
        x = _lengthened(x, axis, before[axis], after[axis], mode)
    return x


def _lengthened(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Extend an axis beyond its ends: by its edge, by its mirror image without the edge, or by wrapping around."""
    if not before and not after:
        return x
    size = x.shape[axis]
    places = torch.arange(-before, size + after)
    if mode == "edge":
        places = places.clamp(0, size - 1)
    elif mode == "wrap":
        places = places % size
    else:
        period = max(1, 2 * (size - 1))
        places = places % period
        places = torch.where(places < size, places, period - places)
    return x.index_select(axis, places)
