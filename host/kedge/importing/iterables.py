"""Writes the samples of a Python iterable (a list, a generator, a torch ``DataLoader``) as ``.npy`` files one by one:
memory holds a single item.

An item is a tensor, a mapping from input names to tensors, raw data for a pipeline (a path, bytes, a Pillow picture,
pixels, a text), or a pair of any of these and its label. A tensor of the input's rank is a batch; one with a rank lower
by one is a sample.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.importing.data_folders import npy_stream
from kedge.importing.data_folders.npy_stream import NpyStream
from kedge_protocol import tensors
from kedge_protocol.errors import DatasetError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline import pictures
from kedge_targets.pipeline.execution import Runner

Array = npt.NDArray[Any]

LABEL = "label"
_LABELS = (LABEL, "labels")
_PAIR = 2
_OR_PAIRS = ", or give pairs of a tensor and its label"


def write(
    source: Iterable[Any],
    inputs: Sequence[TensorInfo],
    folder: Path,
    *,
    where: str,
    runner: Runner | None = None,
    most: int | None = None,
) -> dict[str, Path]:
    """Write the samples that an iterable yields.

    Args:
        inputs: the model's inputs, batch axis first.
        folder: an empty folder.
        where: the data set's name in messages.
        runner: the model's pipeline, for raw data.
        most: the maximum number of samples; the iterable is not read beyond it.

    Returns:
        Input name (and ``label``, if there are labels) → file; see :func:`npy_stream.files`.

    Raises:
        DatasetError: an item is invalid; the message says which.
        InputError: the pipeline cannot read the raw data.
    """
    streams: dict[str, NpyStream] = {}
    free = {spec.name for spec in inputs if None in spec.shape[1:]}
    with contextlib.ExitStack() as stack:
        for count, sample in enumerate(_samples(source, inputs, where, runner)):
            if count and set(sample) != set(streams):
                raise DatasetError(
                    f"sample {count} has {', '.join(sorted(sample))}, the first has {', '.join(sorted(streams))}",
                    where=where,
                )
            for name, value in sample.items():
                if name not in streams:
                    unlike = name in free
                    made = NpyStream(folder / f"{len(streams)}.npy", where=where, unlike=unlike)
                    streams[name] = stack.enter_context(made)
                streams[name].add(value)
            if count + 1 == most:
                break
    if not streams:
        raise DatasetError("gives no samples", where=where, remedy="A generator gives its items only once")
    return npy_stream.files(streams)


def _samples(
    source: Iterable[Any], inputs: Sequence[TensorInfo], where: str, runner: Runner | None
) -> Iterator[dict[str, Array]]:
    for number, item in enumerate(source):
        at = f"{where}, item {number}"
        data, label = _parted(item, inputs)
        if runner is not None and _is_raw(data, inputs):
            yield {**_prepared(runner, data), **({} if label is None else {LABEL: _array(label, at)})}
            continue
        yield from _rows(_named(data, inputs, at), label, inputs, at)


def _parted(item: Any, inputs: Sequence[TensorInfo]) -> tuple[Any, Any]:
    """Return an item's data and its label: the second of a pair, or what a mapping calls ``label`` or ``labels``. A
    ``TensorDataset`` without labels gives sequences of one."""
    if isinstance(item, (tuple, list)) and len(item) in (1, _PAIR):
        return item[0], item[1] if len(item) == _PAIR else None
    if isinstance(item, Mapping) and not {spec.name for spec in inputs} & set(_LABELS):
        return item, next((item[name] for name in _LABELS if name in item), None)
    return item, None


def _is_raw(data: Any, inputs: Sequence[TensorInfo]) -> bool:
    if isinstance(data, (str, bytes, os.PathLike)) or pictures.is_picture(data):
        return True
    return isinstance(data, np.ndarray) and len(inputs) == 1 and not _fits(data, inputs[0])


def _fits(array: Array, spec: TensorInfo) -> bool:
    inner = spec.shape[1:]
    have = array.shape[1:] if array.ndim == len(spec.shape) else array.shape
    return len(have) == len(inner) and all(b is None or a == b for a, b in zip(have, inner, strict=True))


def _prepared(runner: Runner, data: Any) -> dict[str, Array]:
    how = runner.pipeline.text
    if how is None:
        return {name: array[0] for name, array in runner.prepare(data)[0].items()}
    # An iterable is read once, so all its texts get the longest length.
    return {name: array[0] for name, array in runner.tokens([runner.tokenizer()(data)], least=how.max_length).items()}


def _named(data: Any, inputs: Sequence[TensorInfo], where: str) -> dict[str, Array]:
    if isinstance(data, Mapping):
        missing = [spec.name for spec in inputs if spec.name not in data]
        if missing:
            raise DatasetError(
                f"has no {missing[0]!r}, it has {', '.join(map(str, data))}",
                where=where,
                remedy="Call its keys as the model's inputs, and the label 'label'"
                + (_OR_PAIRS if len(inputs) == 1 else ""),
            )
        return {spec.name: _column(_array(data[spec.name], where), spec) for spec in inputs}
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DatasetError("is no mapping", where=where, remedy=f"Give one with the model's inputs: {names}")
    return {inputs[0].name: _column(_array(data, where), inputs[0])}


def _column(array: Array, spec: TensorInfo) -> Array:
    """Return a column of a table, or one of its cells, for an input that takes columns: samples of shape [1]."""
    if spec.shape[1:] != (1,):
        return array
    if array.ndim == 0:
        return array.reshape(1)
    return array[:, np.newaxis] if array.ndim == 1 and len(array) != 1 else array


def _rows(
    arrays: Mapping[str, Array], label: Any, inputs: Sequence[TensorInfo], where: str
) -> Iterator[dict[str, Array]]:
    batched = {arrays[spec.name].ndim == len(spec.shape) for spec in inputs}
    for spec in inputs:
        if not _fits(arrays[spec.name], spec):
            have = "x".join(map(str, arrays[spec.name].shape)) or "a number"
            want = "x".join("?" if axis is None else str(axis) for axis in spec.shape[1:])
            raise DatasetError(f"{spec.name!r} has shape {have}, the model takes {want}", where=where)
    labels = None if label is None else _array(label, where)
    if batched != {True}:
        yield {**arrays, **({} if labels is None else {LABEL: labels})}
        return
    lengths = {len(array) for array in arrays.values()} | (set() if labels is None else {_length(labels)})
    if len(lengths) != 1:
        raise DatasetError(f"a batch holds {sorted(lengths)} samples and labels", where=where)
    for row in range(lengths.pop()):
        yield {
            **{name: array[row] for name, array in arrays.items()},
            **({} if labels is None else {LABEL: np.asarray(labels[row])}),
        }


def _length(labels: Array) -> int:
    return len(labels) if labels.ndim else -1


def _array(value: Any, where: str) -> Array:
    try:
        array = np.asarray(value)
    except Exception as error:
        # Tensors of other libraries refuse in their own ways.
        unlike = isinstance(value, (tuple, list))
        raise DatasetError(
            f"no array can be made of it: {error}",
            where=where,
            remedy=f"Give mappings by the inputs' names{_OR_PAIRS}" if unlike else None,
        ) from error
    if array.dtype.kind in "OS" and array.size and all(isinstance(one, (str, bytes)) for one in array.reshape(-1)):
        array = tensors.texts(array, where=where)
    if array.dtype.kind not in "fiubU":
        raise DatasetError(
            f"{type(value).__name__} is no tensor", where=where, remedy="Give arrays, or raw data with --task"
        )
    return array
