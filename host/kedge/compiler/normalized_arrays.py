"""Tells arrays of a picture model that are normalized already from raw pictures, by their range.

A pipeline of pictures normalizes what a camera gives, 0 to 255. Whoever has arrays for a model often has the model's
own tensors. Normalized twice they are all but black, and what is calibrated and judged on them means nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation.dataset import Data, chunks
from kedge.evaluation.npy_files import open_array
from kedge.evaluation.samples import NpyWriter
from kedge_protocol.bundle.config import Preprocess
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline.normalization import channel_axis

Array = npt.NDArray[Any]

_MOST = 255.0
_NARROWS = 0.5
"""Share of the raw range that a normalization's results fill at most, for the two to be told apart."""
_SLACK = 0.02
"""Share of that range by which results may lie outside of it (a filter that overshoots)."""
_WHOLE = 1e-3


def turned_back(
    data: Data, inputs: tuple[TensorInfo, ...], how: Mapping[str, Preprocess], *, role: str, scratch: Path
) -> tuple[Data, tuple[str, ...]]:
    """Return a data set that holds raw pictures, and notes on the arrays that were normalized already.

    Args:
        data: bound to the model.
        how: the pipeline's normalization of each input.
        role: ``calibration`` or ``evaluation``, for the notes.
        scratch: a folder for new arrays.
    """
    arrays, notes = dict(data.arrays), []
    for spec in inputs:
        if spec.name not in how or spec.name not in arrays:
            continue
        array = open_array(Path(arrays[spec.name]), name=spec.name, where=role)
        normalization = how[spec.name]
        if array.dtype.kind != "f" or not _normalized(array, normalization):
            continue
        file = Path(tempfile.mkdtemp(prefix="raw-", dir=scratch)) / "array.npy"
        with NpyWriter(file, len(array)) as writer:
            for _, part in chunks(array):
                writer.add(_raw(part, normalization, spec))
        arrays[spec.name] = str(file)
        notes.append(
            f"{role}: {spec.name!r} holds the model's own tensors, not pictures of 0 to 255: the pipeline's "
            "normalization is undone for them. Model.raw takes 0 to 255, as the pipeline does"
        )
    return replace(data, arrays=arrays), tuple(notes)


def _normalized(array: Array, how: Preprocess) -> bool:
    """Return whether all values are what the normalization makes of 0 to 255, and raw pictures would be darker than
    any are."""
    scale, mean, std = _steps(how)
    ends = np.stack([-mean / std, (_MOST * scale - mean) / std])
    low, high = float(ends.min()), float(ends.max())
    if high - low > _NARROWS * _MOST:
        return False
    slack = _SLACK * (high - low)
    return all(low - slack <= part.min() and part.max() <= high + slack for _, part in chunks(array))


def _raw(array: Array, how: Preprocess, spec: TensorInfo) -> Array:
    """Return float32 pixels; whole where they are nearly so."""
    axis = channel_axis(spec.layout, array.ndim)
    shape = tuple(-1 if at == axis else 1 for at in range(array.ndim))
    scale, mean, std = (step.reshape(shape) if step.size > 1 else step for step in _steps(how))
    raw = (array.astype(np.float64) * std + mean) / scale
    whole = np.rint(raw)
    return np.asarray(np.where(np.abs(raw - whole) < _WHOLE, whole, raw), np.float32)


def _steps(how: Preprocess) -> tuple[Array, Array, Array]:
    """Return scale, mean and std, one value or one for each channel."""
    scale, mean, std = (np.asarray(values, np.float64) for values in (how.scale, how.mean, how.std))
    return scale, mean, std
