"""Traces layers between two forms of a graph: optimizers fuse and rename nodes, but tensors stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def trace_nodes(names: Iterable[str], before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """Return the nodes of ``after`` that do the work of the nodes ``names`` of ``before``, in the order of ``after``.

    A node that is still there is itself; of one that was fused it is the node that now makes the same tensor, or the
    next tensor downstream that is left, and what makes new tensors before it (a product of three axes becomes a Gemm
    between two Reshapes).
    """
    by_name = {node.name: node for node in before.graph.node}
    left = {node.name for node in after.graph.node}
    makers = {tensor: node for node in after.graph.node for tensor in node.output if tensor}
    known = {tensor for node in before.graph.node for tensor in (*node.input, *node.output)}
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in before.graph.node:
        for tensor in set(node.input):
            consumers[tensor].append(node)

    def made(tensor: str) -> set[str]:
        node = makers[tensor]
        return {node.name}.union(*(made(name) for name in node.input if name in makers and name not in known))

    def search(node: onnx.NodeProto, seen: set[str]) -> set[str]:
        if node.name in left:
            return {node.name}
        found: set[str] = set()
        for tensor in node.output:
            if tensor in makers:
                found |= made(tensor)
            elif tensor not in seen:
                seen.add(tensor)
                for consumer in consumers[tensor]:
                    found |= search(consumer, seen)
        return found

    wanted: set[str] = set()
    for name in names:
        wanted |= search(by_name[name], set())
    return [node.name for node in after.graph.node if node.name in wanted]
