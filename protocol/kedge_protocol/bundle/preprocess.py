"""Preprocessing of raw samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Preprocessing of a raw sample into the model's input: ``(raw * scale - mean) / std`` in float32.

    Each of the three is one number, or one per channel.
    """

    scale: tuple[float, ...] = (1.0,)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
