"""What an encoder reads before a decoder writes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """A source: tokens int64 [count], or features float32 [mels, frames], and a digest of them."""

    values: Array
    key: bytes

    @classmethod
    def of(cls, values: Array) -> Reading:
        """Return a source with its digest."""
        return cls(values=values, key=hashlib.sha256(values.tobytes()).digest())

    @property
    def tokens(self) -> int:
        """Return the number of tokens; 0 of a sound."""
        return len(self.values) if self.values.ndim == 1 else 0
