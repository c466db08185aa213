"""The user's arrays whose samples differ in length: a folder of ``.npy`` files, or an array that is filled up, with
the lengths of its samples beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation.npy_files import open_array
from kedge.evaluation.unlike_lengths import UnlikeSamples
from kedge.importing.data_folders.npy_stream import SHAPES, NpyStream
from kedge_protocol.errors import DatasetError
from kedge_targets.graph.signature import TensorInfo

Array = npt.NDArray[Any]

LENGTHS = ".lengths"
"""``NAME.lengths``: int [samples] or [samples, axes], how much of each sample of ``NAME`` is its own, along the first
axes of a sample."""


def taken(files: dict[str, Path], scratch: Path, *, where: str) -> dict[str, UnlikeSamples]:
    """Take from a data set's files what holds samples of unlike length, and return it by name. Where all turn out to
    have one length, an array takes its place among the files.

    Args:
        files: name → ``.npy`` file, a folder of such, or ``NAME.shapes`` and ``NAME.lengths``; changed in place.
        scratch: a folder for new files.
        where: the data set's name in messages.

    Raises:
        DatasetError: lengths that do not fit their array, or samples of another rank or dtype than the first.
    """
    found = {}
    for name in list(files):
        if name.endswith(SHAPES) and name.removesuffix(SHAPES) in files:
            shapes = files.pop(name)
            found[name.removesuffix(SHAPES)] = _opened(files.pop(name.removesuffix(SHAPES)), shapes, where)
    for name in [one for one in files if one.endswith(LENGTHS) and one.removesuffix(LENGTHS) in files]:
        lengths = open_array(files.pop(name), name=name, where=where)
        array = open_array(files[name.removesuffix(LENGTHS)], name=name.removesuffix(LENGTHS), where=where)
        _put(found, files, name.removesuffix(LENGTHS), _cut(array, lengths, name, scratch, where), where)
    for name in [one for one, path in files.items() if path.is_dir()]:
        _put(found, files, name, _gathered(name, files[name], scratch, where), where)
    return found


def _put(found: dict[str, UnlikeSamples], files: dict[str, Path], name: str, made: NpyStream, where: str) -> None:
    if made.shapes is None:
        files[name] = made.path
    else:
        del files[name]
        found[name] = _opened(made.path, made.shapes, where)


def _opened(path: Path, shapes: Path, where: str) -> UnlikeSamples:
    return UnlikeSamples.opened(path, shapes, where=where)


def _cut(array: Array, lengths: Array, name: str, scratch: Path, where: str) -> NpyStream:
    """Write the own part of each sample."""
    rows = lengths.reshape(len(lengths), -1) if lengths.ndim else lengths.reshape(1, 1)
    fits = lengths.dtype.kind in "iu" and len(rows) == len(array) and rows.shape[1] < array.ndim
    if not fits or (rows < 1).any() or (rows > array.shape[1 : 1 + rows.shape[1]]).any():
        raise DatasetError(
            f"array {name!r} does not hold the lengths of {len(array)} samples of at most "
            f"{'x'.join(map(str, array.shape[1:]))}",
            where=where,
            remedy="Give a whole number from 1 up for each sample",
        )
    with NpyStream(scratch / f"{name}.npy", where=where, unlike=True) as stream:
        for sample, own in zip(array, rows, strict=True):
            stream.add(np.asarray(sample[tuple(slice(int(size)) for size in own)]))
    return stream


def _gathered(name: str, folder: Path, scratch: Path, where: str) -> NpyStream:
    """Write the samples of a folder, in the order of their names."""
    with NpyStream(scratch / f"{name}{LENGTHS}.npy", where=f"{where}, folder {name}", unlike=True) as stream:
        for file in sorted(folder.glob("*.npy")):
            stream.add(np.asarray(open_array(file, name=f"{name}/{file.name}", where=where)))
    return stream


def check(found: Mapping[str, UnlikeSamples], specs: Mapping[str, TensorInfo], *, where: str, in_steps: bool) -> None:
    """Check arrays against the inputs that take them.

    Args:
        specs: array's name → its input, with the batch first.
        in_steps: samples are the steps of sequences.

    Raises:
        DatasetError: a sample does not fit, or no sample may differ in length.
    """
    for name, spec in specs.items():
        samples = found[name]
        for row, shape in enumerate(samples.shapes.tolist()):
            want = spec.shape[1:]
            if len(shape) != len(want) or any(b is not None and a != b for a, b in zip(shape, want, strict=True)):
                takes = "x".join("?" if axis is None else str(axis) for axis in want) or "one number"
                have = "x".join(map(str, shape)) or "one number"
                raise DatasetError(f"sample {row} of {name!r} has shape {have}, the model takes {takes}", where=where)
        if not spec.batched or in_steps:
            raise DatasetError(
                f"the samples of {name!r} differ in length",
                where=where,
                remedy="Give one value for all samples" if not spec.batched else "Give sequences of one length",
            )
