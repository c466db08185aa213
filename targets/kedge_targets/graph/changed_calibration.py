"""Calibration samples of which each array is changed as it is read."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kedge_targets.contract import Array, Calibration


class ChangedCalibration(abc.ABC):
    """Calibration samples of which each array is changed as it is read."""

    def __init__(self, inner: Calibration) -> None:
        self._inner = inner

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return self._inner.samples

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for sample in self._inner:
            yield {name: self.changed(name, array) for name, array in sample.items()}

    @abc.abstractmethod
    def changed(self, name: str, array: Array) -> Array:
        """Return what stands for an input's array."""
