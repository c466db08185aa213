"""An ``.npy`` file that grows sample by sample: its header is written last, into space reserved for it."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import DatasetError, StorageError

Array = npt.NDArray[Any]

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = 256
"""The size of the whole header in bytes; a multiple of 64, as the format requires."""
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class NpyStream:
    """A writer for one array of samples.

    Args:
        path: the new file.
        where: the data set's name in messages.
        expected: the expected number of samples, if known, to check the free disk space before the long work.
        unlike: whether samples may differ in length; the file is then flat, and :attr:`shapes` names another one.
    """

    def __init__(self, path: Path, *, where: str, expected: int | None = None, unlike: bool = False) -> None:
        self.path = path
        self.samples = 0
        self._where = where
        self._expected = expected
        self._file = path.open("wb")
        self._file.write(b"\0" * _HEADER)
        self._unlike: list[tuple[int, ...]] | None = [] if unlike else None
        self.shapes: Path | None = None
        """Once it is closed, the file of int64 [samples, rank]; None if all samples have one shape."""
        self._shape: tuple[int, ...] | None = None
        self._dtype: np.dtype[Any] = np.dtype(np.float32)

    def add(self, sample: Array) -> None:
        """Append one sample without a batch axis.

        Raises:
            DatasetError: its shape differs from that of the first; the message names it.
            StorageError: the disk is full.
        """
        if self._shape is None:
            self._begin(sample)
        if sample.shape != self._shape and (self._unlike is None or sample.ndim != len(self._shape or ())):
            have, want = ("x".join(map(str, one or ())) or "a number" for one in (sample.shape, self._shape))
            raise DatasetError(f"sample {self.samples} has shape {have}, the first has {want}", where=self._where)
        if sample.dtype.kind == "U" == self._dtype.kind:
            if sample.dtype.itemsize > self._dtype.itemsize:
                self._widen(sample.dtype)
        elif sample.dtype != self._dtype and not np.can_cast(sample.dtype, self._dtype, "same_kind"):
            raise DatasetError(
                f"sample {self.samples} has dtype {sample.dtype}, the first has {self._dtype}", where=self._where
            )
        try:
            self._file.write(np.ascontiguousarray(sample, dtype=self._dtype).tobytes())
        except OSError as error:
            raise self._storage(error) from error
        self.samples += 1
        if self._unlike is not None:
            self._unlike.append(sample.shape)

    def _widen(self, dtype: np.dtype[Any]) -> None:
        """Write the texts so far anew, with room for longer ones: by half at least, so that it happens seldom."""
        width = np.dtype("U1").itemsize
        wider = np.dtype(f"U{max(dtype.itemsize // width, 3 * self._dtype.itemsize // width // 2)}")
        self._file.flush()
        before = np.fromfile(self.path, self._dtype, offset=_HEADER)
        try:
            self._file.seek(_HEADER)
            self._file.write(before.astype(wider).tobytes())
        except OSError as error:
            raise self._storage(error) from error
        self._dtype = wider

    def _begin(self, sample: Array) -> None:
        self._shape, self._dtype = sample.shape, sample.dtype
        if self._expected is None:
            return
        needed, free = sample.nbytes * self._expected, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise StorageError(
                f"{self._expected} samples need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free",
                where=self._where,
                remedy="Free space where OUT will be, or take fewer samples "
                "(--calibration-samples, --evaluation-samples)",
            )

    def close(self) -> None:
        """Write the header and close the file."""
        if self._file.closed:
            return
        descr = np.lib.format.dtype_to_descr(self._dtype)
        shape = (self.samples, *(self._shape or ()))
        if self._unlike is not None and len(set(self._unlike)) > 1:
            self.shapes = self.path.with_name(f"{self.path.stem}-shapes.npy")
            np.save(self.shapes, np.array(self._unlike, np.int64))
            shape = (sum(math.prod(one) for one in self._unlike),)
        text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
        room = _HEADER - len(_MAGIC) - 2
        self._file.seek(0)
        self._file.write(_MAGIC + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n")
        try:
            self._file.close()
        except OSError as error:
            raise self._storage(error) from error

    def _storage(self, error: OSError) -> StorageError | DatasetError:
        if error.errno in _FULL:
            return StorageError("no space for its samples", where=self._where, remedy="Free space where OUT will be")
        return DatasetError(f"its samples cannot be written: {error.strerror}", where=self._where)

    def __enter__(self) -> NpyStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


SHAPES = ".shapes"
"""``NAME.shapes``: the shapes of samples that differ in length."""


def files(streams: Mapping[str, NpyStream]) -> dict[str, Path]:
    """Return the files of closed streams: name → array, and :data:`SHAPES` where samples differ in length."""
    shapes = {f"{name}{SHAPES}": stream.shapes for name, stream in streams.items() if stream.shapes is not None}
    return {**{name: stream.path for name, stream in streams.items()}, **shapes}
