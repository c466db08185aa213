"""Compact forms of golden vectors: inputs with few bits and lower resolution, outputs as checksums.

Both sides of a proof read the same numbers: an input is *defined* as what :meth:`CodedInput.decoded` gives
(multiplication and addition in float32, one after the other, are the same on every processor), and the expected outputs
are those of these very inputs.
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
"""Axes shorter than this keep their resolution: they may be channels."""
_MOST_ELEMENTS = 1 << 28
_SIGNS = 0x9E3779B97F4A7C15
"""The multiplier of Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4)."""


@dataclass(frozen=True)
class CodedInput:
    """Samples of one input.

    Attributes:
        codes: first axis the sample.
        shape: of one sample as the model takes it; longer axes than those of ``codes`` are filled by repetition.
        dtype: as the model takes it.
        scale, offset: ``value = codes * scale + offset`` in float32; None where the codes are the values.
    """

    codes: Array
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    offset: float = 0.0

    def decoded(self) -> Array:
        """Decode the samples.

        Raises:
            ValueError: a shape that the codes do not fill, or one beyond all reason.
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
        """What :meth:`how` tells of these codes.

        Raises:
            ValueError, TypeError: something else.
        """
        shape, dtype, scale, offset = json.loads(how)
        return cls(codes, tuple(int(axis) for axis in shape), str(dtype), scale, float(offset))


def code(samples: Array, *, eight_bits: bool, step: int = 1) -> CodedInput:
    """Encode samples in a compact form.

    Args:
        samples: first axis the sample.
        eight_bits: round floats to 256 levels between their smallest and largest value; whole numbers of that range
            stay what they are. Integers never lose anything.
        step: of every axis of 32 or more only each ``step``-th value is kept, and repeated when it is read.
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
    """``[N, count]`` sums, in float64, of every output's elements with signs: each element is in one sum, and a change
    of any element changes it by as much. (A count sketch, Charikar et al. 2002, whose hash is the element's place.)"""
    rows = outputs.reshape(len(outputs), -1).astype(np.float64)
    places = np.arange(rows.shape[1], dtype=np.uint64) * np.uint64(_SIGNS)
    signs = np.where(places >> np.uint64(63), -1.0, 1.0)
    width = -(-rows.shape[1] // count)
    padded = np.zeros((len(rows), width * count))
    padded[:, : rows.shape[1]] = rows * signs
    sums: Array = padded.reshape(len(rows), width, count).sum(axis=1)
    return sums
