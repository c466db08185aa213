"""Resize, axis by axis: the source position of each result is known beforehand, so that the gradient only passes
through indexing and weighting (ONNX specification of Resize)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from kedge.training.operators.kernel import Call, Given, Table, Tensor, at, need, whole

TABLE = Table()


@TABLE.add("Upsample")
def _upsample(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    scales = call.get("scales") or need(given, 1).tolist()
    for axis, scale in enumerate(scales):
        size = math.floor(x.shape[axis] * scale)
        x = _resized(call, x, axis, size, scale, "asymmetric", "linear" if call.get("mode") == "linear" else "nearest")
    return x


@TABLE.add("Resize")
def _resize(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    if call.get("antialias", 0):
        raise call.refuse("antialias")
    where = call.get("coordinate_transformation_mode", "half_pixel")
    if where == "tf_crop_and_resize":
        raise call.refuse(where)
    if call.opset < 11:
        scales, sizes, where = need(given, 1).tolist(), None, "asymmetric"
    else:
        found = at(given, 2)
        scales = None if found is None or not found.numel() else found.tolist()
        sizes = whole(at(given, 3)) or None
    axes = [axis % x.ndim for axis in call.get("axes", list(range(x.ndim)))]
    if sizes is not None:
        scales = [size / x.shape[axis] for size, axis in zip(sizes, axes, strict=True)]
        policy = call.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            one = min(scales) if policy == "not_larger" else max(scales)
            scales = [one] * len(axes)
            sizes = [math.floor(one * x.shape[axis] + 0.5) for axis in axes]
    elif scales is None:
        raise call.refuse("neither scales nor sizes")
    else:
        sizes = [math.floor(x.shape[axis] * scale) for scale, axis in zip(scales, axes, strict=True)]
    for axis, scale, size in zip(axes, scales, sizes, strict=True):
        x = _resized(call, x, axis, size, scale, where, call.get("mode", "nearest"))
    return x


def _resized(call: Call, x: Tensor, axis: int, size: int, scale: float, where: str, mode: str) -> Tensor:
    old = x.shape[axis]
    if size == old and scale == 1.0:
        return x
    at = _positions(old, size, scale, where)
    if mode == "nearest":
        default = "round_prefer_floor" if call.opset >= 11 else "floor"
        places = _ROUNDED[call.get("nearest_mode", default)](at).long().clamp(0, old - 1)
        return x.index_select(axis, places)
    low = torch.floor(at)
    part = at - low
    if mode == "linear":
        taps = [(0, 1 - part), (1, part)]
    else:
        a = call.get("cubic_coeff_a", -0.75)
        taps = [(step, _cubic((part - step).abs(), a)) for step in (-1, 0, 1, 2)]
    if call.get("exclude_outside", 0):
        kept = [(step, torch.where((low + step >= 0) & (low + step < old), w, 0.0)) for step, w in taps]
        total = sum(weight for _, weight in kept)
        taps = [(step, weight / total) for step, weight in kept]
    form = [-1 if index == axis else 1 for index in range(x.ndim)]
    made = torch.zeros((), dtype=x.dtype)
    for step, weight in taps:
        places = (low.long() + step).clamp(0, old - 1)
        made = made + x.index_select(axis, places) * weight.to(x.dtype).reshape(form)
    return made


def _positions(old: int, size: int, scale: float, where: str) -> Tensor:
    new = torch.arange(size, dtype=torch.float64)
    if where == "asymmetric":
        return new / scale
    if where == "align_corners":
        # By the length that the scale gives, which need not be whole; so ONNX has it.
        length = scale * old
        return new * ((old - 1) / (length - 1)) if length > 1 else new * 0
    if where == "pytorch_half_pixel" and size == 1:
        return new * 0
    if where == "half_pixel_symmetric":
        adjustment = size / (scale * old)
        return old / 2 * (1 - adjustment) + (new + 0.5) / scale - 0.5
    return (new + 0.5) / scale - 0.5


_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Return the cubic weights of Keys, "Cubic convolution interpolation for digital image processing", 1981."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
