"""Channels as numbers that are followed through the tensors of a graph.

Each index of each axis of each floating-point constant gets its own number. An axis of a tensor carries an array of
such numbers, one for each index. Operators pass them on or join them: joined numbers can only be cut together, and
held numbers cannot be cut. An axis that carries none (batch, image, sentence) is not cut either. An array shorter than
its axis repeats along it (batch and heads in one axis).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Axes = tuple["Ids | None", ...]


class Tracker:
    """The numbers given out so far, which of them are joined, and which are held."""

    def __init__(self) -> None:
        self.count = 0
        self._left: list[Ids] = []
        self._right: list[Ids] = []
        self._held: list[Ids] = []

    def fresh(self, length: int) -> Ids:
        """Return new, unused numbers."""
        ids: Ids = np.arange(self.count, self.count + length, dtype=np.int64)
        self.count += length
        return ids

    def join(self, one: Ids | None, other: Ids | None) -> None:
        """Join two axes index by index: they can only be cut together. If one of them cannot be cut, neither can the
        other."""
        if one is None or other is None or len(one) != len(other):
            self.hold(one, other)
            return
        self._left.append(one)
        self._right.append(other)

    def together(self, blocks: Ids) -> Ids:
        """Join each row of a matrix, which can then only be cut as a whole; return one number of each row."""
        first: Ids = np.ascontiguousarray(blocks[:, 0])
        for column in range(1, blocks.shape[1]):
            self.join(first, blocks[:, column])
        return first

    def hold(self, *arrays: Ids | None) -> None:
        """Mark numbers as held: they cannot be cut."""
        self._held += [ids.ravel() for ids in arrays if ids is not None]

    def solved(self) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Return for each number the smallest one that it is joined with, and whether it is held."""
        roots: Ids = np.arange(self.count, dtype=np.int64)
        if self._left:
            left, right = np.concatenate(self._left), np.concatenate(self._right)
            while True:
                lowest = np.minimum(roots[left], roots[right])
                before = roots.copy()
                # Both the ends and their present roots follow, or a chain would take as many rounds as it has links.
                for targets in (roots[left], roots[right], left, right):
                    np.minimum.at(roots, targets, lowest)
                roots = roots[roots]
                if np.array_equal(roots, before):
                    break
        held = np.zeros(self.count, dtype=bool)
        if self._held:
            held[roots[np.concatenate(self._held)]] = True
        return roots, held[roots]


def none(rank: int) -> Axes:
    """Return axes that carry nothing."""
    return (None,) * rank


def same(one: Any, other: Any) -> bool:
    """Return whether two axes carry exactly the same numbers, or both none."""
    if one is None or other is None:
        return one is other
    return bool(np.array_equal(one, other))
