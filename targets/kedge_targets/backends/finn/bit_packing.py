"""Stores constants of few bits in a file: each value as a code of 1, 2, 4 or 8 bits, ``value = low + step * code``.

Codes are not compressed, so that a changed weight changes its own block of the file and no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

WIDTHS = (1, 2, 4, 8)
_LARGEST_EXACT = float(1 << 53)


@dataclass(frozen=True, kw_only=True)
class Code:
    """The coding of values: ``bits`` for each, ``value = low + step * code``."""

    bits: int
    low: int
    step: int


def integral(values: Array) -> bool:
    """Return whether all values are integers that float64 holds exactly."""
    if values.dtype.kind in "iub":
        return True
    return bool(
        np.isfinite(values).all() and (np.abs(values) < _LARGEST_EXACT).all() and (values == np.rint(values)).all()
    )


def code_for(values: Array) -> Code | None:
    """Return the code with the fewest bits, or None if there is none (not integers, too many levels, no values)."""
    if values.size == 0 or not integral(values):
        return None
    whole = values.astype(np.int64).ravel()
    low = int(whole.min())
    step = int(np.gcd.reduce(whole - low)) or 1
    levels = (int(whole.max()) - low) // step + 1
    for bits in WIDTHS:
        if levels <= 1 << bits:
            return Code(bits=bits, low=low, step=step)
    return None


def pack(values: Array, code: Code) -> npt.NDArray[np.uint8]:
    """Return the codes of all values, in C order, most significant bit first, as bytes."""
    codes = ((values.astype(np.int64).ravel() - code.low) // code.step).astype(np.uint8)
    bits = np.unpackbits(codes[:, None], axis=1)[:, 8 - code.bits :]
    return np.packbits(bits.ravel())


def packed_size(count: int, code: Code) -> int:
    """Return the number of bytes for ``count`` values."""
    return (count * code.bits + 7) // 8


def unpack(raw: npt.NDArray[np.uint8], code: Code, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return the unpacked values; ``raw`` must have the size :func:`packed_size`."""
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.unpackbits(raw)[: count * code.bits].reshape(count, code.bits)
    weights = (1 << np.arange(code.bits - 1, -1, -1)).astype(np.int64)
    return np.asarray((bits @ weights) * code.step + code.low).astype(dtype).reshape(shape)
