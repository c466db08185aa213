"""Weights stored small: 4-bit groups, codebooks and logarithms, in numpy.

A weight has a channel axis; all else of it, in its own order, are the channel's weights. Three forms:

- ``int4``: each ``group_size`` weights of a channel share a scale s and, where asymmetric, a zero-point z:
  ``w = (code - z) * s``. The range always holds 0. Without zero-points z is 8 and the weight of largest magnitude
  gets code 0. These are the formulas of ONNX Runtime's MatMulNBits.
- ``codebook4``, ``codebook8``: ``w = table[code] * s`` with 16 or 256 entries that k-means finds (Han et al., "Deep
  Compression", ICLR 2016). s is the channel's root mean square, where the channel is long enough to pay for it; else
  there is none.
- ``log4``, ``log8``: ``w = table[code] * s``, the table fixed: 0 and ``±2**-(k / steps)``, so that a product is a shift
  (Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation", 2016). ``log4`` has 7 whole
  powers of two, ``log8`` 127 magnitudes with 8 in an octave. s is a float for each channel: its largest magnitude for
  ``log8``, for ``log4`` the one of several candidates with the least square error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import LoweringError
from kedge_targets.numerics import Family, Precision

Array = npt.NDArray[Any]

_LOG_STEPS = {Precision.LOG4: 1, Precision.LOG8: 8}
_SCALED_FROM = 128
"""Weights that a channel must have for a scale of its own beside a codebook: 32 bits are then at most 0.25 each."""
_BINS = 1 << 16
_RESTARTS = 3
_ROUNDS = 200
_JUDGED = 128
"""Weights of a channel that choose a logarithmic scale."""
_CHUNK = 1 << 20
"""Weights that are compared with a table at once."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A weight as it is stored.

    Attributes:
        precision: of family ``weights``.
        axis: of the channels.
        codes: uint8, the weight's shape; below 16 in the forms of 4 bits.
        table: float32, code → value before scaling; None for ``int4``.
        scales: float32, channels x groups (one group where there is a table); None where nothing is scaled.
        zero_points: uint8, as ``scales``; None but for ``int4``.
        group_size: weights in a group, the last of a channel may have fewer.
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
        """Of codes, table, scales and zero-points (two in a byte), as files hold them."""
        bits = self.precision.weight_bits
        parts = [array.nbytes for array in (self.table, self.scales) if array is not None]
        zero_points = 0 if self.zero_points is None else -(-self.zero_points.size // 2)
        return -(-self.codes.size * bits // 8) + zero_points + sum(parts)

    def decoded(self) -> Array:
        """The weights that these codes stand for, float32."""
        if self.table is not None:
            values = self.table[self.codes]
            return values if self.scales is None else values * broadcast(self.scales[:, 0], self.axis, values.ndim)
        scales, zero_points = self.scales, self.zero_points
        if scales is None or zero_points is None:
            raise LoweringError("codes without a table need scales and zero-points")
        codes = grouped(rows(self.codes, self.axis), self.group_size)
        values = (codes.astype(np.float32) - zero_points[..., None]) * scales[..., None]
        channels = self.codes.shape[self.axis]
        return _unrowed(values.reshape(channels, -1)[:, : self.codes.size // channels], self.axis, self.codes.shape)


def simulated(
    weight: Array, precision: Precision, *, axis: int, group_size: int = 32, asymmetric: bool = True, seed: int = 0
) -> Array:
    """The weight as it comes back from storage, in its own shape and dtype; see :func:`encoded`."""
    made = encoded(weight, precision, axis=axis, group_size=group_size, asymmetric=asymmetric, seed=seed)
    return made.decoded().astype(weight.dtype, copy=False)


def encoded(
    weight: Array, precision: Precision, *, axis: int, group_size: int = 32, asymmetric: bool = True, seed: int = 0
) -> Encoded:
    """A weight in one of the forms above.

    Args:
        weight: float, at least one axis, any shape without a 0.
        precision: of family ``weights``.
        axis: of the channels: 0 of a convolution's or an embedding's weight, 1 of MatMul's K x N.
        group_size, asymmetric: of ``int4``.
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
        return _log(values, precision, axis)
    return _codebook(values, precision, axis, seed)


def rows(array: Array, axis: int) -> Array:
    """Channels x weights of a channel."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def grouped(array: Array, group_size: int) -> Array:
    """Channels x groups x weights of a group; the last is filled up with 0."""
    missing = -array.shape[1] % group_size
    padded: Array = np.pad(array, ((0, 0), (0, missing)))
    return padded.reshape(len(array), -1, group_size)


def broadcast(scales: Array, axis: int, axes: int) -> Array:
    """One number a channel, shaped so that it multiplies a weight of so many axes."""
    shape = [1] * axes
    shape[axis] = scales.size
    return scales.reshape(shape)


def packed(codes: Array) -> Array:
    """Two codes below 16 in a byte, the first in the low half: uint8 of half the length, rounded up."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    pairs: Array = flat[0::2] | (flat[1::2] << 4)
    return pairs.astype(np.uint8)


def unpacked(raw: Array, count: int) -> Array:
    """The first ``count`` codes of :func:`packed`, flat."""
    return np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)[:count].astype(np.uint8)


def _unrowed(array: Array, axis: int, shape: tuple[int, ...]) -> Array:
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(array.reshape(moved), 0, axis))


def _int4(values: Array, axis: int, group_size: int, asymmetric: bool) -> Encoded:
    groups = grouped(rows(values, axis), group_size)
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
    channels = values.shape[axis]
    return Encoded(
        precision=Precision.INT4,
        axis=axis,
        codes=_unrowed(codes.reshape(channels, -1)[:, : values.size // channels], axis, values.shape),
        table=None,
        scales=scales.astype(np.float32),
        zero_points=zero_points,
        group_size=group_size,
    )


def _codebook(values: Array, precision: Precision, axis: int, seed: int) -> Encoded:
    entries = 1 << precision.weight_bits
    scales = None
    if values.size // values.shape[axis] >= _SCALED_FROM:
        scales = np.sqrt(np.square(rows(values, axis), dtype=np.float64).mean(axis=1)).astype(np.float32)
        scales[scales == 0] = 1
        values = values / broadcast(scales, axis, values.ndim)
    table = clusters(values.reshape(-1), entries, seed=seed)
    return Encoded(
        precision=precision,
        axis=axis,
        codes=_nearest(values, table),
        table=table,
        scales=None if scales is None else scales[:, None],
    )


def log_table(precision: Precision) -> Array:
    """The values of a logarithmic precision by code, float32, largest 1: 0, the positive ones from small to large, and
    the same with the other sign."""
    half = 1 << (precision.weight_bits - 1)
    magnitudes = np.exp2((np.arange(1, half) - (half - 1)) / _LOG_STEPS[precision])
    positive = np.concatenate(([0.0], magnitudes))
    return np.concatenate((positive, -positive)).astype(np.float32)


def _log(values: Array, precision: Precision, axis: int) -> Encoded:
    table = log_table(precision)
    channels = rows(values, axis)
    largest = np.abs(channels).max(axis=1)
    largest[largest == 0] = 1
    steps = _LOG_STEPS[precision]
    best_error = np.full(len(channels), np.inf)
    scales = largest
    some = channels[:, :: -(-channels.shape[1] // _JUDGED)]
    # Scales that differ by a whole power of two are alike but at the ends of the table; with many steps all are.
    for shift in np.arange(-4, 9) / 8 if steps == 1 else ():
        candidate = (largest * np.exp2(-shift)).astype(np.float32)
        scaled = some / candidate[:, None]
        error = np.square(table[_nearest(scaled, table)] - scaled).sum(axis=1) * np.square(candidate)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        scales = np.where(better, candidate, scales)
    codes = _nearest(values / broadcast(scales, axis, values.ndim), table)
    return Encoded(precision=precision, axis=axis, codes=codes, table=table, scales=scales[:, None])


def _nearest(values: Array, table: Array) -> Array:
    """Codes (uint8) of the table's entries nearest to the values."""
    order = np.argsort(table, kind="stable")
    entries = table[order]
    edges = (entries[1:] + entries[:-1]) / 2
    flat = values.reshape(-1)
    codes = np.empty(flat.size, np.uint8)
    for start in range(0, flat.size, _CHUNK):
        codes[start : start + _CHUNK] = order[np.searchsorted(edges, flat[start : start + _CHUNK])]
    return codes.reshape(values.shape)


def clusters(values: Array, entries: int, *, seed: int = 0) -> Array:
    """The ``entries`` numbers, ascending, that k-means finds for ``values``: float32, filled up with the last where
    there are fewer different values.

    On a line the clusters are intervals, so one round of Lloyd's algorithm is a look-up in prefix sums. It starts from
    where the density's cube root says (Panter and Dite, 1951: best for many entries) and from k-means++ (Arthur and
    Vassilvitskii, 2007) some times, and the least square error wins.
    """
    points, counts = _histogram(values)
    if len(points) <= entries:
        table = np.full(entries, points[-1], np.float32)
        table[: len(points)] = points
        return table
    rng = np.random.default_rng(seed)
    starts = [_by_density(points, counts, entries)]
    starts += [_plus_plus(points, counts, entries, rng) for _ in range(_RESTARTS)]
    found = [_lloyd(points, counts, start) for start in starts]
    return min(found, key=lambda one: one[1])[0].astype(np.float32)


def _histogram(values: Array) -> tuple[Array, Array]:
    """Points in ascending order and how many values each stands for: all there are, or the means of many bins."""
    exact = values.astype(np.float64)
    if values.size <= _BINS:
        points, counts = np.unique(exact, return_counts=True)
        return points, counts.astype(np.float64)
    low, high = float(exact.min()), float(exact.max())
    if low == high:
        return np.array([low]), np.array([float(values.size)])
    bins = np.minimum(((exact - low) * (_BINS / (high - low))).astype(np.int64), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    sums = np.bincount(bins, weights=exact, minlength=_BINS)
    filled = counts > 0
    return sums[filled] / counts[filled], counts[filled].astype(np.float64)


def _by_density(points: Array, counts: Array, entries: int) -> Array:
    coarse, edges = np.histogram(points, bins=4 * entries, weights=counts)
    share = np.concatenate(([0.0], np.cumsum(np.cbrt(coarse))))
    start: Array = np.interp((np.arange(entries) + 0.5) / entries, share / share[-1], edges)
    return start


def _plus_plus(points: Array, counts: Array, entries: int, rng: np.random.Generator) -> Array:
    centres = [points[rng.choice(len(points), p=counts / counts.sum())]]
    distance = np.square(points - centres[0])
    while len(centres) < entries:
        weights = np.cumsum(counts * distance)
        index = int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
        centres.append(points[min(index, len(points) - 1)])
        np.minimum(distance, np.square(points - centres[-1]), out=distance)
    return np.sort(np.array(centres))


def _lloyd(points: Array, counts: Array, centres: Array) -> tuple[Array, float]:
    """Centres that no round moves any more, and their square error."""
    number = np.concatenate(([0.0], np.cumsum(counts)))
    total = np.concatenate(([0.0], np.cumsum(counts * points)))
    ends = None
    for _ in range(_ROUNDS):
        now = np.concatenate(([0], np.searchsorted(points, (centres[1:] + centres[:-1]) / 2), [len(points)]))
        if ends is not None and np.array_equal(now, ends):
            break
        ends = now
        members = np.diff(number[ends])
        # A cluster without members stays where it is.
        centres = np.where(members > 0, np.diff(total[ends]) / np.maximum(members, 1e-300), centres)
        centres = np.sort(centres)
    nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, points)]
    return centres, float((counts * np.square(points - nearest)).sum())
