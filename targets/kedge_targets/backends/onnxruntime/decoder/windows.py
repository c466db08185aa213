"""How many positions the cache of a layer with a window holds. The operator moves what it still needs to the front
whenever the cache is full (``sliding_window_cache`` of GroupQueryAttention, docs/ContribOperators.md of ONNX Runtime,
"Windowed KV Cache")."""

from __future__ import annotations

from kedge_targets.decoder.spec import LayerKind
from kedge_targets.decoder.windows import Window

_SLACK = 64
"""Positions beyond the window: so many steps pass between two moves."""


def window_of(kind: LayerKind, context: int) -> Window | None:
    """Return the cache of a layer; None if it holds the whole context."""
    if kind.window is None or kind.window + _SLACK >= context:
        return None
    return Window(kind.window, kind.window + _SLACK)


def window_in(room: int) -> Window:
    """Return what :func:`window_of` returned for a cache with room for so many positions."""
    return Window(room - _SLACK, room)
