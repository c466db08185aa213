"""FINN's names of integer types, and their ranges."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMED = {"BINARY": (0, 1), "BIPOLAR": (-1, 1), "TERNARY": (-1, 1)}
_SIZED = re.compile(r"(UINT|INT)([1-9]\d?)")


@dataclass(frozen=True)
class Range:
    """The smallest and the largest integer of a type."""

    low: int
    high: int


def integers(datatype: str) -> Range | None:
    """Return the range of an integer type, or None if the type is not an integer type (``FLOAT32``, ``FIXED<8,4>``,
    …)."""
    if datatype in _NAMED:
        return Range(*_NAMED[datatype])
    sized = _SIZED.fullmatch(datatype)
    if sized is None:
        return None
    bits = int(sized.group(2))
    if sized.group(1) == "UINT":
        return Range(0, (1 << bits) - 1)
    return Range(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
