"""Groups the channels of an output by range: the four box rows of a detector apart from its eighty score rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FACTOR = 8.0
"""Between two neighbours in order of their ranges, from which on they are unlike: 3 of 8 bits."""
_MOST = 4
"""Groups of one output at most: where ranges are spread wide, only the widest gaps divide them."""
_DEAD = 1e-6
_ROWS = 64


@dataclass(frozen=True)
class Group:
    """A group of indices along one axis of an output.

    Attributes:
        axis: 1 or more; None for the whole output.
        indices: along it.
    """

    axis: int | None = None
    indices: tuple[int, ...] = ()

    def of(self, array: Array) -> Array:
        """Return the group's part of an output (first axis is the sample)."""
        return array if self.axis is None else np.take(array, self.indices, axis=self.axis)

    @property
    def label(self) -> str:
        """``axis 1: 0-3``; empty for the whole output."""
        if self.axis is None:
            return ""
        return f"axis {self.axis}: {_ranges(self.indices)}"


def of(reference: Array, *, bounded: bool = False) -> list[Group]:
    """Return the groups of an output along the axis where ranges differ most; one group if none differ.

    Channels that are dead (nothing, or less than a millionth of the largest) go with the smallest of the others.

    Args:
        reference: the float model's answers, first axis the sample.
        bounded: a part of it is probabilities: what lies within 0..1 is one group, whether it ever comes near 1 or not.
    """
    if reference.ndim < 2 or reference.dtype.kind != "f" or not reference.size:
        return [Group()]
    peaks = peaks_along(reference)
    best: list[Group] = [Group()]
    widest = 0.0
    for axis, values in peaks.items():
        ranged = np.where(values <= 1.0, 1.0, values) if bounded else values
        found, gap = _divided(axis, ranged)
        if gap > widest:
            best, widest = found, gap
    return best


def peaks_along(reference: Array) -> dict[int, Array]:
    """Return axis → largest finite magnitude of each index along it; axes of length one are left out."""
    largest = np.zeros(reference.shape[1:], dtype=np.float64)
    for start in range(0, len(reference), _ROWS):
        part = np.abs(np.asarray(reference[start : start + _ROWS], dtype=np.float64))
        np.maximum(largest, np.where(np.isfinite(part), part, 0.0).max(axis=0), out=largest)
    return {
        axis + 1: largest.max(axis=tuple(other for other in range(largest.ndim) if other != axis))
        for axis in range(largest.ndim)
        if largest.shape[axis] > 1
    }


def _divided(axis: int, peaks: Array) -> tuple[list[Group], float]:
    """Return the groups along an axis and the logarithm of the widest gap between them; 0 if there is no gap."""
    order = np.argsort(peaks, kind="stable")
    ordered = peaks[order]
    least = ordered[ordered > _DEAD * ordered[-1]][:1]
    if not least.size:
        return [Group()], 0.0
    logs = np.log(np.maximum(ordered, least[0]))
    gaps = np.diff(logs)
    cuts = np.flatnonzero(gaps > np.log(FACTOR))
    if not cuts.size:
        return [Group()], 0.0
    widest = float(gaps.max())
    cuts = np.sort(cuts[np.argsort(-gaps[cuts], kind="stable")][: _MOST - 1])
    return [Group(axis, tuple(sorted(int(i) for i in part))) for part in np.split(order, cuts + 1)], widest


def _ranges(indices: tuple[int, ...]) -> str:
    """``0-3, 7``."""
    found: list[list[int]] = []
    for index in indices:
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    said = [str(low) if low == high else f"{low}-{high}" for low, high in found]
    return ", ".join(said if len(said) <= 6 else [*said[:5], f"… {said[-1]}"])
