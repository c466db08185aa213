"""The user's arrays, laid out as the model's own tensors or with the samples first, brought to samples first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import DatasetError
from kedge_targets.graph.signature import TensorInfo

Array = npt.NDArray[Any]


def arranged(
    arrays: Mapping[str, Array],
    specs: Mapping[str, TensorInfo],
    *,
    where: str,
    in_steps: bool,
    known: Mapping[str, int] | None = None,
) -> tuple[dict[str, Array], int]:
    """Views of the arrays with the samples along the first axis, and how many samples there are.

    Args:
        arrays: by the data set's names.
        specs: the input of each, with its shape's first axis the samples and ``batch_axis`` that of the model's own.
        known: other arrays whose number of samples is known.
        in_steps: inputs may have one axis more, ``[sequences, steps, …]``: steps become samples.

    Raises:
        DatasetError: a shape that no reading fits, or numbers of samples that disagree.
    """
    readings = {name: dict(_readings(arrays[name], spec, in_steps=in_steps)) for name, spec in specs.items()}
    for name, found in readings.items():
        if not found:
            have = "x".join(map(str, arrays[name].shape)) or "one number"
            raise DatasetError(f"array {name!r} has shape {have}, the model takes {_words(specs[name])}", where=where)
    others: dict[str, dict[int, Any]] = {name: {count: None} for name, count in (known or {}).items()}
    batched = [found for name, found in readings.items() if specs[name].batched]
    every = [*others.values(), *batched] or list(readings.values())
    common = [count for count in every[0] if all(count in found for found in every)]
    if not common:
        listed = ", ".join(f"{name} {next(iter(found))}" for name, found in sorted((others | readings).items()))
        raise DatasetError(f"the arrays have different numbers of samples: {listed}", where=where)
    samples = common[0]
    made = {}
    for name, found in readings.items():
        if samples in found:
            made[name] = found[samples]
        elif 1 in found and not specs[name].batched:
            made[name] = np.broadcast_to(found[1], (samples, *found[1].shape[1:]))
        else:
            raise DatasetError(
                f"array {name!r} is for {next(iter(found))} samples, the others have {samples}",
                where=where,
                remedy="Give one value for all, or one for each sample",
            )
    return made, samples


def _readings(array: Array, spec: TensorInfo, *, in_steps: bool) -> Iterator[tuple[int, Array]]:
    """``(samples, view)`` of each way to read the array, the likeliest first."""
    sample = spec.shape[1:]
    if not spec.batched:
        if _fits(array.shape, sample):
            yield 1, array[np.newaxis]
        if array.shape == (1,) and not sample:
            yield 1, array
    elif spec.batch_axis > 0 and array.ndim == len(spec.shape):
        first = np.moveaxis(array, spec.batch_axis, 0)
        if _fits(first.shape[1:], sample):
            yield len(first), first
    if array.ndim == len(spec.shape) and _fits(array.shape[1:], sample):
        yield len(array), array
    if array.ndim == len(spec.shape) - 1 and sample[-1:] == (1,) and _fits(array.shape[1:], sample[:-1]):
        yield len(array), array[..., np.newaxis]  # a column of a table
    if in_steps and array.ndim == len(spec.shape) + 1 and _fits(array.shape[2:], sample):
        yield array.shape[0] * array.shape[1], array.reshape(-1, *array.shape[2:])


def _fits(have: tuple[int, ...], want: tuple[int | None, ...]) -> bool:
    return len(have) == len(want) and all(b is None or a == b for a, b in zip(have, want, strict=True))


def _words(spec: TensorInfo) -> str:
    axes = ["?" if axis is None else str(axis) for axis in spec.shape[1:]]
    if not spec.batched:
        return f"{'x'.join(axes) or 'one number'} (for all samples, or one for each)"
    return "x".join([*axes[: spec.batch_axis], "samples", *axes[spec.batch_axis :]])
