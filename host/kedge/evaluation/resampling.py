"""What error bars are made of: what each sample contributes, and which samples are drawn."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DRAWS = 1000
"""Bootstrap samples where rows are at hand."""
CALLS = 100
"""Where the metric has to be called on each."""
FOLDS = 5
_SEED = 20261128
_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What each sample contributes to a metric, as it travels: float64, compressed."""

    shape: tuple[int, ...]
    data: str

    @classmethod
    def of(cls, rows: Array) -> Rows:
        """Pack."""
        plain = np.ascontiguousarray(rows, dtype="<f8")
        return cls(shape=tuple(plain.shape), data=base64.b64encode(zlib.compress(plain.tobytes(), 1)).decode())

    @property
    def array(self) -> Array:
        """Unpack: first axis the sample."""
        return np.frombuffer(zlib.decompress(base64.b64decode(self.data)), dtype="<f8").reshape(self.shape)


def indices(count: int) -> list[Array]:
    """Which samples a metric without rows is computed on, the same for the float model and every candidate: first
    :data:`CALLS` bootstrap draws, then for each fold the samples outside of it, then those in it."""
    drawn = draws(count, CALLS)
    parts = folds(count)
    outside = [np.setdiff1d(np.arange(count), part) for part in parts]
    return [*drawn, *outside, *parts]


def draws(count: int, number: int) -> Iterator[Array]:
    """Samples drawn with replacement, the same for the same numbers: ``number`` rows of ``count`` indices."""
    generator = np.random.default_rng(_SEED)
    at_once = max(1, min(number, _AT_ONCE // count))
    for start in range(0, number, at_once):
        yield from generator.integers(0, count, (min(at_once, number - start), count), dtype=np.int32)


def drawn_means(values: Array, number: int) -> Array:
    """Means of :func:`draws` of one number for each sample."""
    generator, count = np.random.default_rng(_SEED), len(values)
    at_once = max(1, min(number, _AT_ONCE // count))
    return np.concatenate(
        [
            values[generator.integers(0, count, (min(at_once, number - start), count), dtype=np.int32)].mean(axis=1)
            for start in range(0, number, at_once)
        ]
    )


def folds(count: int) -> list[Array]:
    """The samples divided into :data:`FOLDS` parts at random, the same for the same number; fewer where there are
    fewer samples."""
    order = np.random.default_rng(_SEED).permutation(count)
    return [np.sort(part) for part in np.array_split(order, min(FOLDS, count)) if len(part)]
