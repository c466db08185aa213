"""Encodes weights: 4-bit groups, codebooks and logarithms, in numpy.

A weight has a channel axis; all else of it, in its own order, are the channel's weights. Three forms:

- ``int4``: each ``group_size`` weights of a channel share a scale s and, where asymmetric, a zero-point z:
  ``w = (code - z) * s``. The range always holds 0. Without zero-points z is 8 and the weight of largest magnitude
  gets code 0. These are the formulas of ONNX Runtime's MatMulNBits.
- ``codebook4``, ``codebook8``: ``w = table[code] * s`` with 16 or 256 entries that k-means finds (Han et al., "Deep
  Compression", ICLR 2016).
- ``log4``, ``log8``: ``w = table[code] * s``, the table fixed: 0 and ``±2**-(k / steps)``, so that a product is a shift
  (Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation", 2016). ``log4`` has 7 whole
  powers of two, ``log8`` 127 magnitudes with 8 in an octave.

Where a table is read with 4 bits and channels are long, each ``group_size`` weights have a scale s of their own, in
float16 where that holds it: one large weight then costs its neighbours their precision and not the whole channel. It
is the group's largest magnitude; for ``log4`` the one of several candidates with the least square error. Else s is a
float32 for each channel: of ``codebook8`` the root mean square, of logarithms as for groups. Short channels of a
codebook have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import LoweringError
from kedge_targets.graph import kmeans
from kedge_targets.numerics import Family, Precision

Array = npt.NDArray[Any]

_LOG_STEPS = {Precision.LOG4: 1, Precision.LOG8: 8}
_SCALED_FROM = 128
"""Smallest number of weights per channel for its own scales beside a codebook, and for scales in groups."""
_JUDGED = 128
"""Number of weights of a channel or group that choose a logarithmic scale."""
_HALF = np.finfo(np.float16)
_NOTHING = 1e-36
"""Magnitudes below it are stored as 0: float32 cannot hold their scale."""
_CHUNK = 1 << 20
"""Number of weights compared with a table in one go."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An encoded weight.

    Attributes:
        precision: of family ``weights``.
        axis: of the channels.
        codes: uint8, the weight's shape; below 16 in the forms of 4 bits.
        table: float32, code → value before scaling; None for ``int4``.
        scales: float32 or float16, channels x groups; None where nothing is scaled.
        zero_points: uint8, as ``scales``; None but for ``int4``.
        group_size: weights in a group, the last of a channel may have fewer; 0 where a channel is one group.
    """

    precision: Precision
    axis: int
    codes: Array
    table: Array | None
    scales: Array | None
    zero_points: Array | None = None
    group_size: int = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, table, scales and zero-points (two per byte) in a file."""
        bits = self.precision.weight_bits
        parts = [array.nbytes for array in (self.table, self.scales) if array is not None]
        zero_points = 0 if self.zero_points is None else -(-self.zero_points.size // 2)
        return -(-self.codes.size * bits // 8) + zero_points + sum(parts)

    def decoded(self) -> Array:
        """Decode the weights, float32."""
        if self.table is None and self.zero_points is None:
            raise LoweringError("codes without a table need scales and zero-points")
        channels = self.codes.shape[self.axis]
        length = self.codes.size // channels
        codes = to_groups(to_rows(self.codes, self.axis), self.group_size or length)
        values = codes.astype(np.float32) if self.table is None else self.table[codes]
        if self.zero_points is not None:
            values -= self.zero_points[..., None]
        if self.scales is not None:
            values = values * self.scales[..., None].astype(np.float32)
        return from_rows(values.reshape(channels, -1)[:, :length], self.axis, self.codes.shape)


def dequantized(
    weight: Array, precision: Precision, *, axis: int, group_size: int = 32, asymmetric: bool = True, seed: int = 0
) -> Array:
    """Encode and decode a weight, in its own shape and dtype; see :func:`encode`."""
    made = encode(weight, precision, axis=axis, group_size=group_size, asymmetric=asymmetric, seed=seed)
    return made.decoded().astype(weight.dtype, copy=False)


def encode(
    weight: Array, precision: Precision, *, axis: int, group_size: int = 32, asymmetric: bool = True, seed: int = 0
) -> Encoded:
    """Encode a weight.

    Args:
        weight: float, at least one axis, any shape without a 0.
        precision: of family ``weights``.
        axis: of the channels: 0 of a convolution's or an embedding's weight, 1 of MatMul's K x N.
        group_size: of the forms of 4 bits.
        asymmetric: of ``int4``.
        seed: of k-means.

    Raises:
        LoweringError: another precision, or weights that are not finite.
    """
    if precision.family is not Family.WEIGHTS:
        raise LoweringError(f"{precision.value} is no form of stored weights")
    if not weight.size or not np.isfinite(weight).all():
        raise LoweringError("the weights are empty or not finite", remedy="Export the model from a sound checkpoint")
    axis %= weight.ndim
    values = weight.astype(np.float32)
    if precision is Precision.INT4:
        return _int4(values, axis, group_size, asymmetric)
    if precision in _LOG_STEPS:
        return _log(values, precision, axis, group_size)
    return _codebook(values, precision, axis, group_size, seed)


def to_rows(array: Array, axis: int) -> Array:
    """Reshape a weight to channels x weights per channel."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def from_rows(array: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """Undo :func:`to_rows` for the given shape."""
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(array.reshape(moved), 0, axis))


def to_groups(array: Array, group_size: int) -> Array:
    """Reshape to channels x groups x weights per group; the last group is padded with 0."""
    missing = -array.shape[1] % group_size
    padded: Array = np.pad(array, ((0, 0), (0, missing)))
    return padded.reshape(len(array), -1, group_size)


def pack_codes(codes: Array) -> Array:
    """Pack two 4-bit codes per byte, the first in the low half: uint8 of half the length, rounded up."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    pairs: Array = flat[0::2] | (flat[1::2] << 4)
    return pairs.astype(np.uint8)


def _int4(values: Array, axis: int, group_size: int, asymmetric: bool) -> Encoded:
    groups = to_groups(to_rows(values, axis), group_size)
    low, high = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
    if asymmetric:
        scales = (high - low) / np.float32(15)
        scales[scales == 0] = 1
        zero_points = np.clip(np.rint(-low / scales), 0, 15).astype(np.uint8)
    else:
        # The extreme of largest magnitude gets code 0, whatever its sign: a negative scale costs nothing.
        extreme = np.where(high > -low, high, low)
        scales = extreme / np.float32(-8)
        scales[scales == 0] = 1
        zero_points = np.full(scales.shape, 8, np.uint8)
    codes = np.clip(np.rint(groups / scales[..., None]) + zero_points[..., None], 0, 15).astype(np.uint8)
    return Encoded(
        precision=Precision.INT4,
        axis=axis,
        codes=_without_padding(codes, values, axis),
        table=None,
        scales=scales.astype(np.float32),
        zero_points=zero_points,
        group_size=group_size,
    )


def _codebook(values: Array, precision: Precision, axis: int, group_size: int, seed: int) -> Encoded:
    entries = 1 << precision.weight_bits
    channels = to_rows(values, axis)
    if channels.shape[1] < _SCALED_FROM:
        table = kmeans.clusters(values.reshape(-1), entries, seed=seed)
        codes = _nearest(values, table)
        return Encoded(precision=precision, axis=axis, codes=codes, table=table, scales=None)
    size = _group_size(precision, channels, group_size)
    groups = to_groups(channels, size or channels.shape[1])
    if size:
        scales = _short(_largest(groups))
    else:
        scales = np.sqrt(np.square(groups, dtype=np.float64).mean(axis=-1)).astype(np.float32)
        scales[scales == 0] = 1
    scaled = _without_padding(groups / scales[..., None].astype(np.float32), values, axis)
    table = kmeans.clusters(scaled.reshape(-1), entries, seed=seed)
    codes = _nearest(scaled, table)
    return Encoded(precision=precision, axis=axis, codes=codes, table=table, scales=scales, group_size=size)


def _group_size(precision: Precision, channels: Array, group_size: int) -> int:
    """Return the number of weights under one scale beside a table; 0 for the whole channel."""
    grouping = precision.weight_bits == 4 and channels.shape[1] >= _SCALED_FROM and group_size < channels.shape[1]
    return group_size if grouping else 0


def _largest(groups: Array) -> Array:
    largest: Array = np.abs(groups).max(axis=-1)
    largest[largest < _NOTHING] = 1
    return largest


def _short(scales: Array) -> Array:
    """Convert to float16 if it holds all values without losing digits."""
    if scales.min() < _HALF.smallest_normal or scales.max() > _HALF.max:
        return scales
    return scales.astype(np.float16)


def _without_padding(groups: Array, like: Array, axis: int) -> Array:
    channels = like.shape[axis]
    return from_rows(groups.reshape(channels, -1)[:, : like.size // channels], axis, like.shape)


def log_table(precision: Precision) -> Array:
    """Return the values of a logarithmic precision by code (float32, largest 1): 0, the positive values ascending, then
    the same negated."""
    half = 1 << (precision.weight_bits - 1)
    magnitudes = np.exp2((np.arange(1, half) - (half - 1)) / _LOG_STEPS[precision])
    positive = np.concatenate(([0.0], magnitudes))
    return np.concatenate((positive, -positive)).astype(np.float32)


def _log(values: Array, precision: Precision, axis: int, group_size: int) -> Encoded:
    table = log_table(precision)
    channels = to_rows(values, axis)
    size = _group_size(precision, channels, group_size)
    groups = to_groups(channels, size or channels.shape[1])
    largest = _largest(groups)
    some = groups[..., :: -(-groups.shape[-1] // _JUDGED)]
    best_error = np.full(largest.shape, np.inf)
    scales = largest
    # Scales that differ by a whole power of two are alike but at the ends of the table; with many steps all are.
    for shift in np.arange(-4, 9) / 8 if _LOG_STEPS[precision] == 1 else ():
        candidate = (largest * np.exp2(-shift)).astype(np.float32)
        scaled = some / candidate[..., None]
        error = np.square(table[_nearest(scaled, table)] - scaled).sum(axis=-1) * np.square(candidate)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        scales = np.where(better, candidate, scales)
    if size:
        scales = _short(scales)
    codes = _nearest(_without_padding(groups / scales[..., None].astype(np.float32), values, axis), table)
    return Encoded(precision=precision, axis=axis, codes=codes, table=table, scales=scales, group_size=size)


def _nearest(values: Array, table: Array) -> Array:
    """Return the codes (uint8) of the nearest table entries."""
    order = np.argsort(table, kind="stable")
    entries = table[order]
    edges = (entries[1:] + entries[:-1]) / 2
    flat = values.reshape(-1)
    codes = np.empty(flat.size, np.uint8)
    for start in range(0, flat.size, _CHUNK):
        codes[start : start + _CHUNK] = order[np.searchsorted(edges, flat[start : start + _CHUNK])]
    return codes.reshape(values.shape)
