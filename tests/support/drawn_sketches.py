"""Sketches of samples drawn at random, some of which repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import drift
from kedge_protocol.drift import REPEAT_BITS, REPEATS, Kind, Shift, Statistic, Stream, repeat_bits

Array = npt.NDArray[Any]

STREAM = Stream(
    kind=Kind.INPUT,
    tensor="x",
    statistic=Statistic.MEAN,
    edges=tuple(float(edge) for edge in np.round(-np.log(1 - np.arange(1, 10) / 10), 4)),
    counts=(20,) * 10,
)
"""A baseline of 200 samples, exponentially distributed, in ten bins of equal population."""


def counted(values: Array, keys: Sequence[int]) -> dict[str, list[int]]:
    """Sketches of samples with these values, which are the same inputs where their keys are equal."""
    counts = [0] * len(STREAM.counts)
    repeats = [0] * (REPEAT_BITS + 1)
    for value, key in zip(values, keys, strict=True):
        place = STREAM.bin_of(float(value))
        assert place is not None
        counts[place] += 1
        repeats[0] += 1
        for bit in repeat_bits(hashlib.blake2b(str(key).encode(), digest_size=8).digest()):
            repeats[1 + bit] += 1
    return {STREAM.name: counts, REPEATS: repeats}


def shifts(turn: int, *, pictures: int, samples: int, scale: float = 1.0) -> tuple[Shift, Shift]:
    """The shift of samples drawn from so many pictures: as it is judged, and as it was without the repeats.

    Args:
        turn: the seed.
        pictures: 0 for a new one each time.
        scale: of the pictures' values against the baseline's.
    """
    chance = np.random.default_rng(turn)
    held = chance.exponential(size=pictures or samples) * scale
    drawn = chance.integers(pictures, size=samples) if pictures else np.arange(samples)
    sketch = counted(held[drawn], [turn * 10**6 + int(one) for one in drawn])
    (judged,) = drift.shifts([STREAM], sketch)
    (blind,) = drift.shifts([STREAM], {STREAM.name: sketch[STREAM.name]})
    return judged, blind
