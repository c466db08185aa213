"""What one sample looks like, for a report: a small picture, the outline of a sound, a text."""

from __future__ import annotations

import base64
import enum
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SIDE = 96
"""Pixels of a picture's longer side, columns of a sound's outline."""
_LEAST_SIDE = 8
_LEAST_SOUND = 256
_MOST_TEXT = 300
_FEW = 6


class Form(str, enum.Enum):
    """What a preview shows."""

    PICTURE = "picture"  # content: a PNG as a data URI
    SOUND = "sound"  # content: an SVG path in a box of SIDE x 32
    TEXT = "text"
    NUMBERS = "numbers"  # content: the first few


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One sample of one input."""

    name: str
    form: Form
    content: str


def of(sample: Mapping[str, Array]) -> tuple[Preview, ...]:
    """Previews of one raw sample.

    Args:
        sample: input name → array without the sample axis.
    """
    return tuple(_one(name, np.asarray(array)) for name, array in sample.items())


def _one(name: str, array: Array) -> Preview:
    if array.dtype.kind in "OUS":
        text = " ".join(str(one) for one in array.ravel())
        return Preview(name=name, form=Form.TEXT, content=text[:_MOST_TEXT])
    pixels = _pixels(array)
    if pixels is not None:
        return Preview(name=name, form=Form.PICTURE, content=png(pixels))
    if array.dtype.kind in "fi" and array.size >= _LEAST_SOUND and array.size == max(array.shape, default=0):
        return Preview(name=name, form=Form.SOUND, content=_outline(array.ravel()))
    numbers = ", ".join(f"{one:.4g}" for one in array.ravel()[:_FEW].astype(np.float64))
    shape = "x".join(map(str, array.shape))
    return Preview(name=name, form=Form.NUMBERS, content=f"{numbers}{', …' if array.size > _FEW else ''} ({shape})")


def _pixels(array: Array) -> npt.NDArray[np.uint8] | None:
    """HxWx3 or HxW bytes; None for what is no picture."""
    array = np.squeeze(array, axis=0) if array.ndim == 4 and array.shape[0] == 1 else array
    if array.ndim == 3 and array.shape[0] in (1, 3) and min(array.shape[1:]) >= _LEAST_SIDE:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not fits or min(array.shape[:2]) < _LEAST_SIDE:
        return None
    step = max(1, -(-max(array.shape[:2]) // SIDE))
    array = array[::step, ::step]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    return np.round((values - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8)


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """A PNG (ISO/IEC 15948) as a data URI.

    Args:
        pixels: HxW (grey) or HxWx3 (red, green, blue).
    """
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter 0: each row as it is
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _outline(values: Array) -> str:
    """An SVG path of the lowest and highest value in each column, in a box of SIDE x 32."""
    middle, half = 16.0, 15.0
    loudest = float(np.abs(values.astype(np.float64)).max()) or 1.0
    parts = np.array_split(values.astype(np.float64) / loudest, min(SIDE, values.size))
    return "".join(
        f"M{x} {middle - half * float(part.max()):.1f}V{middle - half * float(part.min()) + 0.5:.1f}"
        for x, part in enumerate(parts)
    )
