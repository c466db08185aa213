"""The order of nodes: each behind what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kedge_targets.graph import dead_code

if TYPE_CHECKING:
    import onnx


def sort_nodes(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes so that each stands behind those that it takes from, otherwise in the given order."""
    makers = {tensor: index for index, node in enumerate(nodes) for tensor in node.output if tensor}
    made: list[onnx.NodeProto] = []
    done = [False] * len(nodes)
    for start in range(len(nodes)):
        pending = [start]
        while pending:
            index = pending[-1]
            needed = [
                makers[tensor]
                for tensor in dead_code.inputs_of(nodes[index])
                if tensor in makers and not done[makers[tensor]]
            ]
            if needed and not done[index]:
                pending += sorted(needed)
                continue
            pending.pop()
            if not done[index]:
                done[index] = True
                made.append(nodes[index])
    return made
