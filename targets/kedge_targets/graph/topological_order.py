"""Sorts nodes topologically."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kedge_targets.graph import dead_code

if TYPE_CHECKING:
    import onnx


def sort_model(model: onnx.ModelProto) -> None:
    """Put the nodes of the main graph in order, in place: converters to float16 put their Casts at the end, which
    runtimes take and ONNX's checker does not."""
    arranged = sort_nodes(model.graph.node)
    if [list(node.output) for node in arranged] != [list(node.output) for node in model.graph.node]:
        # Nodes that are taken away are no longer to be read.
        kept = [type(node).FromString(node.SerializeToString()) for node in arranged]
        del model.graph.node[:]
        model.graph.node.extend(kept)


def sort_nodes(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes in topological order, otherwise in the given order; unchanged if they form a cycle."""
    makers = {tensor: index for index, node in enumerate(nodes) for tensor in node.output if tensor}
    made: list[onnx.NodeProto] = []
    done = [False] * len(nodes)
    waiting: set[int] = set()
    for start in range(len(nodes)):
        pending = [start]
        while pending:
            index = pending[-1]
            needed = [
                makers[tensor]
                for tensor in dead_code.inputs_of(nodes[index])
                if tensor in makers and not done[makers[tensor]]
            ]
            if not waiting.isdisjoint(needed):
                return list(nodes)
            if needed and not done[index]:
                waiting.add(index)
                pending += sorted(needed)
                continue
            pending.pop()
            waiting.discard(index)
            if not done[index]:
                done[index] = True
                made.append(nodes[index])
    return made
