"""Samples as the worker reads them: mapped files in, batches out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation.dataset import Data
from kedge.evaluation.npy_files import open_array
from kedge.evaluation.unlike_lengths import UnlikeSamples, runs
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
        self.arrays: dict[str, Array | UnlikeSamples] = {
            name: UnlikeSamples.opened(Path(path), Path(data.shapes[name]), where=path)
            if name in data.shapes
            else _opened(name, path)
            for name, path in data.arrays.items()
        }
        self.unlike = bool(data.shapes)
        """Whether samples differ in length."""
        self.label = None if data.label is None else _opened("label", data.label)
        self.count = data.samples

    @property
    def whole(self) -> dict[str, Array]:
        """All raw samples, by input name; those of unlike length repeated up to the longest."""
        return {
            name: array.filled(range(self.count), repeated=True) if isinstance(array, UnlikeSamples) else array
            for name, array in self.arrays.items()
        }

    def parts(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of up to ``size`` samples that have one shape: what can be given to a model at once."""
        for start in range(0, self.count, size):
            yield from runs(list(self.arrays.values()), start, min(start + size, self.count))

    def rows(self, start: int, stop: int) -> dict[str, Array]:
        """Raw samples of a range, by input name.

        Raises:
            ValueError: they have several shapes, see :meth:`parts`.
        """
        return {name: np.asarray(array[start:stop]) for name, array in self.arrays.items()}

    def picked(self, indices: Sequence[int]) -> dict[str, Array]:
        """Raw samples at the indices, by input name; they have one shape."""
        return {name: np.ascontiguousarray(array[list(indices)]) for name, array in self.arrays.items()}

    def filled(self, indices: Sequence[int]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Raw samples at the indices, filled up with zeros where they differ in length; and the shape of each then."""
        unlike = {name: array for name, array in self.arrays.items() if isinstance(array, UnlikeSamples)}
        made = {
            name: array.filled(indices)
            if isinstance(array, UnlikeSamples)
            else np.ascontiguousarray(array[list(indices)])
            for name, array in self.arrays.items()
        }
        return made, {name: array.shapes[list(indices)] for name, array in unlike.items()}


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
        """Batches of up to ``size`` samples, all of one shape."""
        for start, stop in self._samples.parts(size):
            yield preprocess(self._samples.rows(start, stop), self._inputs, self._how)


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
        repeated: see :func:`kedge_targets.free_lengths.filled`.
    """

    def __init__(self, path: Path, samples: int, *, repeated: bool = False) -> None:
        self.path = path
        self._repeated = repeated
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
            batch = free_lengths.filled(batch, longest, repeated=self._repeated)
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
        self._file.write(np.ascontiguousarray(free_lengths.filled(before, sample, repeated=self._repeated)).data)

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
