"""Scales 8-bit pictures in Pillow's integer arithmetic: the same bits with any version of Pillow and without it.

Source: Pillow's ``Resample.c``, for 8 bits per channel. Each output pixel is a weighted sum of the input pixels under
the filter, with weights rounded to 22 fractional bits; first along rows, then along columns, rounded to 8 bits in
between. Without antialiasing (which Pillow does not offer) the filter keeps its size when a picture is scaled down, as
in OpenCV's ``resize``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Filter

Pixels = npt.NDArray[np.uint8]
"""Height x width x channels."""

_BITS = 22


def resize(pixels: Pixels, size: tuple[int, int], *, by: Filter = Filter.BILINEAR, antialias: bool = True) -> Pixels:
    """Scale a picture.

    Args:
        pixels: height x width x channels.
        size: the new width and height.
        by: the filter.
        antialias: whether the filter widens when the picture is scaled down.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if by is Filter.NEAREST:
        rows, columns = _nearest(height, size[1]), _nearest(width, size[0])
        return np.ascontiguousarray(pixels[rows][:, columns])
    # Rows before columns, one pass each: Pillow 13 begins with the columns where that is cheaper, Pillow 12 never does.
    made = pixels
    for axis, wanted in ((1, size[0]), (0, size[1])):
        given = made.shape[axis]
        if wanted != given:
            # Enlarging, the filter has its own size in any case.
            quick = _by_pillow(made, axis, wanted, by) if antialias or wanted > given else None
            made = _along(made, axis, wanted, by, antialias) if quick is None else quick
    return made


def sampled(pixels: Pixels, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Pixels:
    """Return the picture's values at places between its pixels: bicubic, edges repeated.

    Args:
        x, y: the places, height x width each; 0 is the middle of the first pixel.
    """
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    across, down = _cubic_weights(x - left), _cubic_weights(y - top)
    columns = [np.clip(left + tap - 1, 0, pixels.shape[1] - 1) for tap in range(4)]
    source = pixels.reshape(-1, pixels.shape[2])
    total = np.zeros((*x.shape, pixels.shape[2]), np.float32)
    for row in range(4):
        begin = np.clip(top + row - 1, 0, pixels.shape[0] - 1) * pixels.shape[1]
        for column in range(4):
            total += source[begin + columns[column]] * (down[row] * across[column])[..., None]
    return np.clip(np.rint(total), 0, 255).astype(np.uint8)


def _cubic_weights(share: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float32]]:
    """Return the weights (a = -0.5) of the pixels at -1, 0, 1 and 2 for a place between 0 and 1."""
    t = share.astype(np.float32)
    return [
        ((-0.5 * t + 1.0) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1.0,
        ((-1.5 * t + 2.0) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    ]


def _nearest(given: int, wanted: int) -> npt.NDArray[np.int64]:
    return np.minimum(((np.arange(wanted) + 0.5) * (given / wanted)).astype(np.int64), given - 1)


def _by_pillow(pixels: Pixels, axis: int, wanted: int, by: Filter) -> Pixels | None:
    """Scale one side with Pillow, which is faster; None if it is not installed or does not support the picture."""
    try:
        from PIL import Image
    except ImportError:
        return None
    height, width, channels = pixels.shape
    if channels not in (1, 3):
        return None
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    size = (wanted, height) if axis == 1 else (width, wanted)
    made = np.asarray(picture.resize(size, Image.Resampling[by.name]))
    return np.ascontiguousarray(made.reshape(size[1], size[0], channels))


def _along(pixels: Pixels, axis: int, wanted: int, by: Filter, antialias: bool) -> Pixels:
    first, weights = _weights(pixels.shape[axis], wanted, by, antialias)
    moved = np.moveaxis(pixels, axis, 0).astype(np.int32)
    shape = (-1,) + (1,) * (moved.ndim - 1)
    total = np.full((wanted, *moved.shape[1:]), 1 << (_BITS - 1), dtype=np.int32)
    last = len(moved) - 1
    for tap in np.flatnonzero(weights.any(axis=0)):
        total += moved[np.minimum(first + tap, last)] * weights[:, tap].reshape(shape)
    return np.ascontiguousarray(np.moveaxis(np.clip(total >> _BITS, 0, 255).astype(np.uint8), 0, axis))


@functools.lru_cache(maxsize=64)
def _weights(given: int, wanted: int, by: Filter, antialias: bool) -> tuple[Any, Any]:
    """Return for each output pixel its first input pixel and the weights from there on (output x taps)."""
    function, reach = _FILTERS[by]
    scale = given / wanted
    growth = max(scale, 1.0) if antialias else 1.0
    support = reach * growth
    taps = math.ceil(support) * 2 + 1
    first = np.zeros(wanted, dtype=np.int64)
    weights = np.zeros((wanted, taps), dtype=np.int32)
    for place in range(wanted):
        centre = (place + 0.5) * scale
        low = max(0, int(centre - support + 0.5))
        high = min(given, int(centre + support + 0.5))
        row = [function((at - centre + 0.5) / growth) for at in range(low, high)]
        total = sum(row)
        first[place] = low
        for tap, value in enumerate(row):
            share = value / total if total else value
            weights[place, tap] = int((0.5 if share >= 0 else -0.5) + share * (1 << _BITS))
    return first, weights


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


_FILTERS: dict[Filter, tuple[Callable[[float], float], float]] = {
    Filter.BOX: (_box, 0.5),
    Filter.BILINEAR: (_bilinear, 1.0),
    Filter.BICUBIC: (_bicubic, 2.0),
    Filter.LANCZOS: (_lanczos, 3.0),
}
