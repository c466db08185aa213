"""Makes names that a graph does not contain yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph import nodes

if TYPE_CHECKING:
    import onnx


class Names:
    """Makes new names for tensors and nodes of a model, unique across nested graphs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._tensors: set[str] = set()
        self._nodes: set[str] = set()
        for graph in nodes.graphs(model.graph):
            self._tensors |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
            for node in graph.node:
                self._nodes.add(node.name)
                self._tensors |= {*node.input, *node.output}

    def fresh(self, base: str) -> str:
        """Return a new tensor name and reserve it."""
        return _unlike(self._tensors, base)

    def fresh_node(self, base: str) -> str:
        """Return a new node name and reserve it."""
        return _unlike(self._nodes, base)


def _unlike(taken: set[str], base: str) -> str:
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name
