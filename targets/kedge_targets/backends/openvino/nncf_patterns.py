"""Keeps the patterns that NNCF looks for in every model. They depend on the device and the type of the model alone, and
NNCF (3.4) puts them together anew for each call: with what it then reads of them, a sixth of the time of a small model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class _Kept:
    """A graph of patterns, with its parts as graphs of their own: views of the whole are slow to walk."""

    def __init__(self, patterns: Any) -> None:
        self.graph = patterns.graph
        self._parts = [part.copy() for part in patterns.get_weakly_connected_subgraphs()]

    def get_weakly_connected_subgraphs(self) -> list[Any]:
        """Return one graph for each pattern."""
        return list(self._parts)


@functools.cache
def keep() -> None:
    """Let NNCF put its patterns together once in this process."""
    from nncf.common.graph.patterns.manager import PatternsManager

    for name in ("get_full_hw_pattern_graph", "get_full_ignored_pattern_graph"):
        setattr(PatternsManager, name, staticmethod(_once(getattr(PatternsManager, name))))


def _once(made: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def kept(backend: Any, device: Any, model_type: Any = None) -> Any:
        return _Kept(made(backend, device, model_type))

    return kept
