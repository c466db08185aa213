"""Determines the shapes that engines are built for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kedge_protocol.errors import LoweringError
from kedge_targets.backends.tensorrt.recipe import InputProfile
from kedge_targets.contract import Array, Calibration
from kedge_targets.graph.signature import TensorInfo


class Watched:
    """A calibration that remembers the shapes of the samples it yields."""

    def __init__(self, inner: Calibration) -> None:
        self._inner = inner
        self.shapes: dict[str, set[tuple[int, ...]]] = {}

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return self._inner.samples

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for sample in self._inner:
            for name, array in sample.items():
                self.shapes.setdefault(name, set()).add(tuple(np.shape(array)))
            yield sample


def of(infos: Sequence[TensorInfo], seen: Watched, max_batch: int) -> tuple[InputProfile, ...]:
    """Return a profile for each input. A dynamic batch ranges from 1 to ``max_batch`` with an optimum of 1; another
    dynamic axis ranges from the shortest to the longest calibration sample, with the longest as its optimum.

    Raises:
        LoweringError: an axis other than the batch is dynamic and no sample shows how long it may be.
    """
    if any(None in info.shape[1:] for info in infos) and not seen.shapes:
        for _ in seen:  # a plan without int8 has not read them
            pass
    return tuple(_profile(info, seen.shapes.get(info.name, ()), max_batch) for info in infos)


def _profile(info: TensorInfo, shapes: Iterable[tuple[int, ...]], max_batch: int) -> InputProfile:
    minimum, optimum, maximum = [], [], []
    for axis, size in enumerate(info.shape):
        if size is not None:
            low = usual = high = size
        elif axis == 0:
            low, usual, high = 1, 1, max_batch
        else:
            lengths = {shape[axis] for shape in shapes}
            if not lengths:
                raise LoweringError(
                    f"axis {axis} is free and there is no calibration sample that tells how long it may be",
                    where=f"input {info.name!r}",
                    remedy="Give calibration samples of every length, or export the model with the length fixed",
                )
            low, usual, high = min(lengths), max(lengths), max(lengths)
        minimum.append(low)
        optimum.append(usual)
        maximum.append(high)
    return InputProfile(name=info.name, minimum=tuple(minimum), optimum=tuple(optimum), maximum=tuple(maximum))
