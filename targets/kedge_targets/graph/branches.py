"""Finds what decides which branch of a graph runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

_SHAPES = frozenset({"Shape", "Size"})


def deciding(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that compute the conditions of If, in graph order, without what only gives them a
    shape. Rounded, they let another branch run wherever a number lies near its threshold, and the answer is another
    one, not a less accurate one."""
    wiring = Wiring(model)
    found: set[str] = set()
    pending = [node.input[0] for node in model.graph.node if node.op_type == "If"]
    while pending:
        maker = wiring.maker.get(pending.pop())
        if maker is not None and maker.op_type not in _SHAPES and maker.name not in found:
            found.add(maker.name)
            pending += [name for name in maker.input if name]
    return [node.name for node in model.graph.node if node.name in found]


def note(names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on such nodes; none if there are none."""
    if not names:
        return ()
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (f"{len(names)} nodes stay in float ({listed}): they decide which branch of an If runs",)
