"""Measures how much of an output's energy and of its variation over the samples is preserved, element by element.

What an output tells is how it differs from sample to sample, so its noise is held against that variation and not
against its magnitude alone: a temperature of 300 K that no longer varies is lost at 30 dB.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Energies:
    """Sums over samples: for each element of an output, or for a slice of it (summed over its elements).

    Attributes:
        count: finite values of the float model.
        power: of the float model's values.
        variation: of their differences from each entry's mean.
        noise: of the differences from the float model's.
        shared: product of the float model's variation and the candidate's.
        varied: of the candidate's differences from their means.
        broken: values that are not finite where the float model's are.
    """

    count: Array
    power: Array
    variation: Array
    noise: Array
    shared: Array
    varied: Array
    broken: Array

    def along(self, axis: int) -> Energies:
        """Return the energies of each index along an axis of the output (1 or higher)."""
        others = tuple(place for place in range(self.count.ndim) if place != axis - 1)
        return Energies(**{one.name: getattr(self, one.name).sum(axis=others) for one in fields(self)})

    def at(self, axis: int | None, indices: tuple[int, ...] = ()) -> Energies:
        """Return the summed energies of some indices along an axis, or of everything without an axis."""
        made = {}
        for one in fields(self):
            array = getattr(self, one.name)
            made[one.name] = np.asarray((array if axis is None else np.take(array, indices, axis=axis - 1)).sum())
        return Energies(**made)


NOTHING = Energies(**{one.name: np.zeros(()) for one in fields(Energies)})
"""Energies of an output without real numbers."""


def measure(output: Array, reference: Array) -> Energies:
    """Return the energies of every element: arrays of the output's shape without the sample axis.

    Args:
        output: the candidate's answers, first axis the sample.
        reference: the float model's, of the same shape.
    """
    step = max(1, _BYTES // max(1, 8 * reference[:1].size))
    mean = _means(reference, step)
    names = [one.name for one in fields(Energies)]
    sums = {name: np.zeros(reference.shape[1:], dtype=np.float64) for name in [*names, "apart"]}
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(reference), step):
            wanted = np.asarray(reference[start : start + step], dtype=np.float64)
            got = np.asarray(output[start : start + step], dtype=np.float64)
            finite = np.isfinite(wanted)
            broken = finite & ~np.isfinite(got)
            used = finite & ~broken
            wanted, got = np.where(used, wanted, mean), np.where(used, got, mean)
            off, apart = wanted - mean, got - mean
            sums["count"] += finite.sum(axis=0)
            sums["broken"] += broken.sum(axis=0)
            sums["power"] += np.where(used, wanted**2, 0.0).sum(axis=0)
            sums["variation"] += (off**2).sum(axis=0)
            sums["noise"] += ((got - wanted) ** 2).sum(axis=0)
            sums["shared"] += (off * apart).sum(axis=0)
            sums["varied"] += (apart**2).sum(axis=0)
            sums["apart"] += apart.sum(axis=0)
    number = np.maximum(sums["count"], 1)
    sums["varied"] = np.maximum(sums["varied"] - sums.pop("apart") ** 2 / number, 0.0)
    return Energies(**sums)


def _means(reference: Array, step: int) -> Array:
    total = np.zeros(reference.shape[1:], dtype=np.float64)
    number = np.zeros(reference.shape[1:], dtype=np.float64)
    for start in range(0, len(reference), step):
        part = np.asarray(reference[start : start + step], dtype=np.float64)
        finite = np.isfinite(part)
        total += np.where(finite, part, 0.0).sum(axis=0)
        number += finite.sum(axis=0)
    found: Array = total / np.maximum(number, 1)
    return found
