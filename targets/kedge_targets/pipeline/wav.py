"""Reads wav files: integers of 8 to 32 bits and floats, also from a pipe, whose writer did not know the length.

Format: RIFF (Microsoft, Multimedia Programming Interface and Data Specifications 1.0; WAVE_FORMAT_EXTENSIBLE). The
standard library's ``wave`` knows no floats, before Python 3.12 no extensible ones, and takes a file that was cut short
for a whole one.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]

_INTEGERS, _FLOATS, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN_LENGTH = 0x7FFF0000
"""A writer to a pipe states a length like 2**31 or 2**32 - 1 (arecord, ffmpeg, sox)."""


class WavError(Exception):
    """Content that is no wav file, or one that cannot be read; the text says why."""


def read(content: bytes) -> tuple[Float, int]:
    """Return the samples, frames x channels in -1..1, and their rate.

    Raises:
        WavError: see there.
    """
    if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise WavError("it does not begin as one")
    how: tuple[int, int, int, int] | None = None
    at = 12
    while at + 8 <= len(content):
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        at += 8
        if name == b"fmt ":
            how = _form(content[at : at + size])
        elif name == b"data":
            if how is None:
                raise WavError("its samples come before their format")
            there = len(content) - at
            if there < size < _UNKNOWN_LENGTH:
                raise WavError(f"it is cut short, {there} bytes of {size} are there")
            return _numbers(memoryview(content)[at : at + size], *how), how[2]
        at += size + size % 2
    raise WavError("it is cut short, it holds no samples")


def _form(chunk: bytes) -> tuple[int, int, int, int]:
    """Return the kind of numbers, the channels, the rate and the bytes of one number."""
    if len(chunk) < 16:
        raise WavError("its format is cut short")
    kind, channels, rate, _, step, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == _EXTENSIBLE and len(chunk) >= 26:
        kind = int.from_bytes(chunk[24:26], "little")
    width = step // channels if channels else 0
    if not rate or not width or step % channels or bits > 8 * width:
        raise WavError("its format contradicts itself")
    if not (kind == _INTEGERS and width <= 4) and not (kind == _FLOATS and width in (4, 8)):
        raise WavError(f"its samples are coded (format {kind}, {bits} bits)")
    return kind, channels, rate, width


def _numbers(raw: memoryview, kind: int, channels: int, rate: int, width: int) -> Float:
    usable = raw[: len(raw) - len(raw) % (width * channels)]
    found: npt.NDArray[Any]
    if kind == _FLOATS:
        found = np.frombuffer(usable, f"<f{width}")
        if not np.isfinite(found).all():
            raise WavError("it holds NaN or infinity")
    elif width == 1:
        found = (np.frombuffer(usable, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        # Three bytes become the upper three of four.
        wide = np.zeros((len(usable) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(usable, np.uint8).reshape(-1, 3)
        found = wide.reshape(-1).view("<i4").astype(np.float64) / 2**31
    else:
        found = np.frombuffer(usable, f"<i{width}").astype(np.float64) / 2 ** (8 * width - 1)
    return found.reshape(-1, channels).astype(np.float32)
