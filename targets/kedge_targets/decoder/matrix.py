"""Weight matrices as a file stores them: float, or integer codes with a scale for each group of an output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A quantized matrix: ``real = (codes - zeros) * scales`` in groups along the input channels.

    Attributes:
        codes: uint8 [out, in], each below ``2**bits``.
        scales: float32 [out, groups].
        zeros: uint8 [out, groups]; None if all are ``2**(bits - 1)``.
        bits: 4 or 8.
        group: input channels of one scale; the last group may be shorter.
    """

    codes: Array
    scales: Array
    zeros: Array | None
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """Return ``(out, in)``."""
        return self.codes.shape[0], self.codes.shape[1]

    def real(self) -> Array:
        """Return the dequantized matrix, float32 [out, in]."""
        columns = np.arange(self.shape[1]) // self.group
        zeros: Any = 2 ** (self.bits - 1) if self.zeros is None else self.zeros[:, columns].astype(np.float32)
        real: Array = (self.codes.astype(np.float32) - zeros) * self.scales[:, columns]
        return real

    def rows(self, first: int, last: int) -> Codes:
        """Return the output channels from ``first`` up to ``last``."""
        zeros = None if self.zeros is None else self.zeros[first:last]
        return Codes(
            codes=self.codes[first:last],
            scales=self.scales[first:last],
            zeros=zeros,
            bits=self.bits,
            group=self.group,
        )


Matrix = Array | Codes
"""A matrix: float [out, in] (float32 or float16), or codes."""


def real(matrix: Matrix) -> Array:
    """Return a matrix as float32 [out, in]."""
    return matrix.real() if isinstance(matrix, Codes) else matrix.astype(np.float32, copy=False)


def stacked(parts: list[Matrix]) -> Matrix:
    """Concatenate matrices of the same input along the output channels: as codes if all are codes of one kind,
    otherwise as float."""
    coded = [part for part in parts if isinstance(part, Codes)]
    if len(coded) != len(parts):
        return np.concatenate([real(part) if isinstance(part, Codes) else part for part in parts])
    bits, group = coded[0].bits, coded[0].group
    if any((one.bits, one.group) != (bits, group) for one in coded):
        return np.concatenate([one.real() for one in coded])
    every = [one.zeros for one in coded]
    zeros = None
    if any(one is not None for one in every):
        middle = 2 ** (bits - 1)
        zeros = np.concatenate(
            [np.full(one.scales.shape, middle, np.uint8) if one.zeros is None else one.zeros for one in coded]
        )
    return Codes(
        codes=np.concatenate([one.codes for one in coded]),
        scales=np.concatenate([one.scales for one in coded]),
        zeros=zeros,
        bits=bits,
        group=group,
    )


def packed(codes: Array, bits: int) -> Array:
    """Pack codes into bytes along the last axis; 4-bit codes in pairs, the first in the low half."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], axis=-1)
    pairs: Array = (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
    return pairs
