"""Bit-exact quantization arithmetic in numpy: scales, zero-points, rounding half to even.

All arithmetic is float32, as runtimes do it. A quantized value is ``q = clip(round(x / scale) + zero_point, low,
high)`` and stands for ``(q - zero_point) * scale`` (ONNX, QuantizeLinear and DequantizeLinear).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_TINY = float(np.finfo(np.float32).tiny)
_SHARES = np.concatenate([np.linspace(0.08, 0.6, 27), np.linspace(0.625, 1.0, 16)])
"""Fractions of the largest weight at which the search clips before it refines by least squares."""
_SETTLE = 4
_CHUNK = 1 << 16  # values that the search holds in cache at once


def bounds(bits: int, *, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Return the smallest and the largest integer; ``narrow`` omits one, so that signed integers are symmetric.

    Raises:
        ValueError: fewer than 1 bit, or 1 bit with one level left.
    """
    if bits < 1 or (bits == 1 and narrow):
        raise ValueError(f"{bits} bits{' in narrow range' if narrow else ''} hold no two levels")
    if signed:
        return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - int(narrow)


def scale_and_zero_point(low: float, high: float, *, bits: int, signed: bool, symmetric: bool) -> tuple[float, int]:
    """Return scale and zero-point for the range ``low`` to ``high`` (widened to include 0) in ``bits`` bits; 0 is
    represented exactly.

    Args:
        symmetric: the zero-point is the middle (0 for signed integers) and the scale fits the larger side.

    Returns:
        The scale, a float32 above 0 (1 for an empty range), and the zero-point.
    """
    low, high = min(0.0, float(low)), max(0.0, float(high))
    least, most = bounds(bits, signed=signed)
    if symmetric:
        middle = 0 if signed else 2 ** (bits - 1)
        # One bit has no level above the middle: the scale is then the range itself.
        return _positive(max(-low, high) / max(1, most - middle)), middle
    scale = _positive((high - low) / (most - least))
    return scale, int(np.clip(np.rint(least - low / scale), least, most))


def _positive(scale: float) -> float:
    if scale <= 0.0:
        return 1.0
    return float(np.float32(min(max(scale, _TINY), float(np.finfo(np.float32).max))))


def quantize(array: Array, scale: Any, zero_point: Any, low: int, high: int, axis: int | None = None) -> Floats:
    """Return the integers as float32; arguments as in :func:`fake_quantize`."""
    values = np.asarray(array, dtype=np.float32)
    steps = broadcast_along(scale, values.ndim, axis)
    zero = broadcast_along(zero_point, values.ndim, axis)
    with np.errstate(over="ignore"):  # what overflows is clipped
        integers: Floats = np.clip(np.rint(values / steps) + zero, np.float32(low), np.float32(high))
    return integers


def fake_quantize(array: Array, scale: Any, zero_point: Any, low: int, high: int, axis: int | None = None) -> Floats:
    """Quantize and dequantize an array.

    Args:
        array: of any shape, float.
        scale, zero_point: numbers, or one for each index of ``axis``.
        low, high: smallest and largest integer.
        axis: that scale and zero-point belong to; None for one of the whole array.

    Returns:
        float32 of the same shape.
    """
    integers = quantize(array, scale, zero_point, low, high, axis)
    made: Floats = (integers - broadcast_along(zero_point, integers.ndim, axis)) * broadcast_along(
        scale, integers.ndim, axis
    )
    return made


def broadcast_along(values: Any, rank: int, axis: int | None) -> Floats:
    """Reshape values of one axis so that they broadcast over an array of rank ``rank``; float32."""
    made = np.asarray(values, dtype=np.float32)
    if axis is None or made.ndim == 0:
        return made
    shape = [1] * rank
    shape[axis] = -1
    return made.reshape(shape)


def weight_scales(weight: Array, *, bits: int, axis: int | None, method: str = "max", narrow: bool = True) -> Floats:
    """Return the scales of signed weights with zero-point 0.

    Args:
        weight: of any shape, finite.
        bits: 2 or more.
        axis: of the output channels, each with a scale of its own; None for one scale.
        method: ``max``, so that the largest weight is just held, or ``mse``, the clipping of least square error
            (a search over the share of the largest weight, then alternating least squares between integers and scale:
            for given integers q the best scale is <w, q> / <q, q>).
        narrow: without the lowest integer.

    Returns:
        float32 above 0, of shape () or (channels,); 1 for channels that are all zero.

    Raises:
        ValueError: another method, or too few bits.
    """
    if method not in ("max", "mse"):
        raise ValueError(f"{method!r} is no way to find the scales of weights")
    if bits < 2:
        raise ValueError(f"signed weights of {bits} bit have no level for 0 and both signs")
    low, high = bounds(bits, signed=True, narrow=narrow)
    values = np.asarray(weight, dtype=np.float32)
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    if rows.size == 0:
        largest = np.zeros(len(rows), dtype=np.float32)
    else:
        largest = np.maximum(rows.max(axis=1) / np.float32(high), rows.min(axis=1) / np.float32(low))
    scales = np.where(largest > 0, np.maximum(largest, np.float32(_TINY)), np.float32(1)).astype(np.float32)
    if method == "mse" and rows.size:
        step = max(1, _CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            scales[part] = _least_squares(rows[part], scales[part], low, high)
    return scales.reshape(()) if axis is None else scales


def _least_squares(rows: Floats, full: Floats, low: int, high: int) -> Floats:
    """Return the scale of least square error for each row."""
    best, least = full.copy(), _errors(rows, full, low, high)
    for share in _SHARES:
        best, least = _better(rows, best, least, np.maximum(full * np.float32(share), np.float32(_TINY)), low, high)
    for _ in range(_SETTLE):
        integers = np.clip(np.rint(rows / best[:, None]), low, high)
        weight = np.einsum("ij,ij->i", integers, integers)
        product = np.einsum("ij,ij->i", rows, integers)
        settled = np.divide(product, weight, out=best.copy(), where=(weight > 0) & (product > 0))
        best, least = _better(rows, best, least, np.maximum(settled, np.float32(_TINY)), low, high)
    return best


def _better(rows: Floats, best: Floats, least: Floats, tried: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    errors = _errors(rows, tried, low, high)
    wins = errors < least
    return np.where(wins, tried, best), np.where(wins, errors, least)


def _errors(rows: Floats, scales: Floats, low: int, high: int) -> Floats:
    steps = scales[:, None]
    made = np.rint(rows / steps)
    np.clip(made, low, high, out=made)
    made *= steps
    made -= rows
    errors: Floats = np.einsum("ij,ij->i", made, made)
    return errors


def sqnr_db(reference: Array, other: Array) -> float:
    """Return the signal-to-quantization-noise ratio, 10 log10(sum reference² / sum (other - reference)²), in dB.

    Returns:
        ``inf`` where both are equal, ``-inf`` where ``other`` holds NaN or infinity or the reference is all zero.
    """
    wanted = np.asarray(reference, dtype=np.float64).ravel()
    noise = np.asarray(other, dtype=np.float64).ravel() - wanted
    error = float(noise @ noise)
    if error == 0.0:
        return float("inf")
    signal = float(wanted @ wanted)
    if signal == 0.0 or not np.isfinite(error):
        return float("-inf")
    return float(10.0 * np.log10(signal / error))
