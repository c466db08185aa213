"""Samples of unlike shapes: flat values and a shape for each, in ``.npy`` files that are mapped.

Each sample keeps its own length in calibration and evaluation; nothing is filled up. A stack of samples with one shape
is an array as ever, so a reader takes runs of samples that are alike (:func:`runs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation.npy_files import open_array
from kedge_targets import free_lengths

Array = npt.NDArray[Any]


class UnlikeSamples:
    """Samples of one rank and dtype.

    Args:
        values: [elements] of all samples, one after the other.
        shapes: int64 [samples, rank] of each.
        path, shapes_path: their files.
    """

    def __init__(self, values: Array, shapes: Array, *, path: Path, shapes_path: Path) -> None:
        self.values, self.shapes = values, shapes
        self.path, self.shapes_path = path, shapes_path
        sizes = np.prod(shapes, axis=1, dtype=np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes

    @classmethod
    def opened(cls, path: Path, shapes_path: Path, *, where: str) -> UnlikeSamples:
        """Map the files.

        Raises:
            DatasetError: one of them cannot be read.
        """
        values, shapes = (open_array(one, name=one.name, where=where) for one in (path, shapes_path))
        return cls(values, np.asarray(shapes), path=path, shapes_path=shapes_path)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all samples."""
        return int(self.values.nbytes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of all samples."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the number of samples and the longest of each axis."""
        return (len(self.shapes), *(int(longest) for longest in self.shapes.max(axis=0)))

    def __len__(self) -> int:
        return len(self.shapes)

    def sample(self, index: int) -> Array:
        """Return one sample, without a batch axis."""
        flat = self.values[self._starts[index] : self._ends[index]]
        return np.asarray(flat).reshape(self.shapes[index])

    def __getitem__(self, key: slice | Sequence[int]) -> Array:
        """Return a stack of samples that have one shape.

        Raises:
            ValueError: they have several.
        """
        rows = range(len(self))[key] if isinstance(key, slice) else key
        return np.stack([self.sample(int(row)) for row in rows])

    def filled(self, rows: Sequence[int], *, repeated: bool = False) -> Array:
        """Return samples filled up to the longest of them: with zeros, or with their own elements anew."""
        longest = tuple(int(size) for size in self.shapes[list(rows)].max(axis=0))
        parts = (free_lengths.filled(self.sample(row)[np.newaxis], longest, repeated=repeated) for row in rows)
        return np.concatenate(list(parts))


def runs(arrays: Sequence[Array | UnlikeSamples], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield ranges between ``start`` and ``stop`` within which every array's samples have one shape."""
    shapes = [array.shapes for array in arrays if isinstance(array, UnlikeSamples)]
    begun = start
    for row in range(start + 1, stop):
        if any((one[row] != one[begun]).any() for one in shapes):
            yield begun, row
            begun = row
    if begun < stop:
        yield begun, stop
