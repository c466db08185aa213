"""Samples as the worker reads them: mapped files in, batches out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation.dataset import Data, open_array
from kedge_protocol.bundle.config import Preprocess
from kedge_targets import free_lengths
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline import normalization

Array = npt.NDArray[Any]


class Samples:
    """A data set in the worker.

    Args:
        data: checked by the parent.
    """

    def __init__(self, data: Data) -> None:
        self.arrays = {name: _opened(name, path) for name, path in data.arrays.items()}
        self.label = None if data.label is None else _opened("label", data.label)
        self.count = data.samples

    def rows(self, start: int, stop: int) -> dict[str, Array]:
        """Raw samples of a range, by input name."""
        return {name: np.asarray(array[start:stop]) for name, array in self.arrays.items()}

    def picked(self, indices: Sequence[int]) -> dict[str, Array]:
        """Raw samples at the indices, by input name."""
        return {name: np.ascontiguousarray(array[list(indices)]) for name, array in self.arrays.items()}


class PreprocessedSamples:
    """Samples as the model takes them, streamed; a :class:`kedge_targets.contract.Calibration`."""

    def __init__(self, samples: Samples, inputs: Sequence[TensorInfo], how: Mapping[str, Preprocess]) -> None:
        self._samples = samples
        self._inputs = inputs
        self._how = how

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._samples.count

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self.batches(1)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Batches of up to ``size`` samples."""
        for start in range(0, self.samples, size):
            yield preprocess(self._samples.rows(start, start + size), self._inputs, self._how)


def preprocess(
    raw: Mapping[str, Array], inputs: Sequence[TensorInfo], how: Mapping[str, Preprocess]
) -> dict[str, Array]:
    """Raw samples as the model takes them: preprocessed, in the input's dtype."""
    made = {}
    for spec in inputs:
        array: Array = raw[spec.name]
        if spec.name in how:
            array = normalization.apply(array, how[spec.name], layout=spec.layout)
        made[spec.name] = np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))
    return made


class NpyWriter:
    """An ``.npy`` file written batch by batch; samples of different shapes are filled up to the largest. Plain writes,
    because a mapped file on a full disk ends in a signal.

    Args:
        path: of the new file.
        samples: how many there will be.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self.path = path
        self._samples = samples
        self._file = path.open("wb")
        self._begun = False
        self._sample: tuple[int, ...] = ()
        self._dtype: np.dtype[Any] = np.dtype(np.float32)
        self._start = 0

    def add(self, batch: Array) -> None:
        """Append one batch; its first axis is the samples."""
        if not self._begun:
            self._begin(batch.shape[1:], batch.dtype)
        elif batch.shape[1:] != self._sample:
            longest = tuple(max(pair) for pair in zip(self._sample, batch.shape[1:], strict=True))
            if longest != self._sample:
                self._widen(longest)
            batch = free_lengths.filled(batch, longest)
        self._file.write(np.ascontiguousarray(batch).data)

    def _begin(self, sample: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (self._samples, *sample),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
        self._begun, self._sample, self._dtype, self._start = True, sample, dtype, self._file.tell()

    def _widen(self, sample: tuple[int, ...]) -> None:
        """Write what is there anew, filled up to longer samples."""
        self._file.close()
        narrow = self.path.with_suffix(".narrow")
        self.path.replace(narrow)
        raw = np.fromfile(narrow, self._dtype, offset=self._start)
        before = raw.reshape(-1, *self._sample) if raw.size else np.zeros((0, *self._sample), self._dtype)
        narrow.unlink()
        self._file = self.path.open("wb")
        self._begin(sample, self._dtype)
        self._file.write(np.ascontiguousarray(free_lengths.filled(before, sample)).data)

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _opened(name: str, path: str) -> Array:
    return open_array(Path(path), name=name, where=path)
