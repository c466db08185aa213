"""Caches of layers that see the last positions only: they hold a window and a little more, whatever the context is.

Whenever such a cache is full, what it no longer needs is dropped and the rest moved to its front. What is resident
depends on the number of positions alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A cache of ``room`` positions for layers that see ``span`` of them, their own included."""

    span: int
    room: int

    def resident(self, positions: int) -> int:
        """Return how many of so many positions the cache holds: the last ones."""
        if positions <= self.room:
            return positions
        step = self.room - self.span + 1
        return positions - step * -(-(positions - self.room) // step)

    def can_drop(self, positions: int, to: int) -> bool:
        """Return whether a cache of so many positions can be taken for one of fewer."""
        return positions - self.resident(positions) == to - self.resident(to)
