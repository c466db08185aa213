"""Compact forms of golden vectors: inputs with few bits and lower resolution, outputs as checksums.

Both sides of a verification read the same numbers: an input is *defined* as the result of :meth:`CodedInput.decoded`
(a multiplication and then an addition in float32 give the same result on every processor), and the expected outputs are
those of exactly these inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_LEVELS = 255
_LEAST_AXIS = 32
"""Axes shorter than this keep their resolution, because they may be channels."""
_MOST_ELEMENTS = 1 << 28
_SIGNS = 0x9E3779B97F4A7C15
"""The multiplier of Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4)."""


@dataclass(frozen=True)
class CodedInput:
    """The encoded samples of one input.

    Attributes:
        codes: the codes, sample axis first.
        shape: the shape of one sample for the model; axes longer than those of ``codes`` are filled by repetition.
        dtype: the dtype for the model.
        scale, offset: ``value = codes * scale + offset`` in float32; None if the codes are the values.
    """

    codes: Array
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    offset: float = 0.0

    def decoded(self) -> Array:
        """Decode the samples.

        Raises:
            ValueError: the codes do not fill the shape, or the shape is unreasonably large.
        """
        values = self.codes
        if values.ndim != len(self.shape) + 1 or math.prod(self.shape) * len(values) > _MOST_ELEMENTS:
            raise ValueError(f"codes of shape {values.shape} for samples of shape {self.shape}")
        for axis, want in enumerate(self.shape, start=1):
            have = values.shape[axis]
            if have != want:
                values = np.repeat(values, -(-want // have), axis=axis).take(range(want), axis=axis)
        if self.scale is None:
            return np.ascontiguousarray(values, np.dtype(self.dtype))
        real = values.astype(np.float32)
        np.multiply(real, np.float32(self.scale), out=real)
        np.add(real, np.float32(self.offset), out=real)
        return real.astype(np.dtype(self.dtype))

    def rows(self, indices: Sequence[int]) -> CodedInput:
        """Return some of the samples in the same encoding."""
        return CodedInput(self.codes[list(indices)], self.shape, self.dtype, self.scale, self.offset)

    def how(self) -> bytes:
        """Return everything except the codes."""
        return json.dumps([list(self.shape), self.dtype, self.scale, self.offset]).encode()

    @classmethod
    def of(cls, codes: Array, how: bytes) -> CodedInput:
        """Make a coded input from codes and the result of :meth:`how`.

        Raises:
            ValueError, TypeError: ``how`` is something else.
        """
        shape, dtype, scale, offset = json.loads(how)
        return cls(codes, tuple(int(axis) for axis in shape), str(dtype), scale, float(offset))


def code(samples: Array, *, eight_bits: bool, step: int = 1) -> CodedInput:
    """Encode samples in a compact form.

    Args:
        samples: the samples, sample axis first.
        eight_bits: round floats to 256 levels between their smallest and largest value; whole numbers in such a range
            stay exact. Integers are always exact.
        step: of every axis of 32 or more, only every ``step``-th value is kept, and repeated when decoded.
    """
    kept = tuple(slice(None, None, step if size >= _LEAST_AXIS else 1) for size in samples.shape[1:])
    values = samples[(slice(None), *kept)]
    shape, dtype = samples.shape[1:], str(samples.dtype)
    if values.dtype.kind in "iu" and values.size:
        return CodedInput(values.astype(_smallest(values)), shape, dtype)
    if not eight_bits or values.dtype.kind != "f" or not values.size or not np.isfinite(values).all():
        return CodedInput(np.ascontiguousarray(values), shape, dtype)
    low, high = (float(end) for end in _ends(values))
    whole = high - low <= _LEVELS and np.array_equal(values, np.rint(values))
    scale = float(np.float32(1.0 if whole or high == low else (high - low) / _LEVELS))
    low = float(np.float32(low))
    codes = np.rint((values.astype(np.float64) - low) / scale).clip(0, _LEVELS).astype(np.uint8)
    return CodedInput(codes, shape, dtype, scale, low)


def _ends(values: Array) -> tuple[Any, Any]:
    return values.min(), values.max()


def _smallest(values: Array) -> np.dtype[Any]:
    """Return the smallest integer dtype that holds all values."""
    low, high = (int(end) for end in _ends(values))
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32"):
        fits = np.iinfo(name).min <= low and high <= np.iinfo(name).max
        if fits and np.dtype(name).itemsize < values.dtype.itemsize:
            return np.dtype(name)
    return values.dtype


def checksums(outputs: Array, count: int) -> Array:
    """Return ``[N, count]`` signed sums, in float64, of every output's elements: each element is in one sum, and a
    change of any element changes that sum by as much. (A count sketch, Charikar et al. 2002, whose hash is the
    element's position.)"""
    rows = outputs.reshape(len(outputs), -1).astype(np.float64)
    places = np.arange(rows.shape[1], dtype=np.uint64) * np.uint64(_SIGNS)
    signs = np.where(places >> np.uint64(63), -1.0, 1.0)
    width = -(-rows.shape[1] // count)
    padded = np.zeros((len(rows), width * count))
    padded[:, : rows.shape[1]] = rows * signs
    sums: Array = padded.reshape(len(rows), width, count).sum(axis=1)
    return sums
