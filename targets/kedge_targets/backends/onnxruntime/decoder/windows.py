"""Caches of layers that see the last positions only: they hold a window and a little more, whatever the context is.

The operator moves what it still needs to the front whenever the cache is full (``sliding_window_cache`` of
GroupQueryAttention, docs/ContribOperators.md of ONNX Runtime, "Windowed KV Cache"). What is resident depends on the
number of positions alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from kedge_targets.decoder.spec import LayerKind

SLACK = 64
"""Positions beyond the window: so many steps pass between two moves."""


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


def window_of(kind: LayerKind, context: int) -> Window | None:
    """Return the cache of a layer; None if it holds the whole context."""
    if kind.window is None or kind.window + SLACK >= context:
        return None
    return Window(kind.window, kind.window + SLACK)
