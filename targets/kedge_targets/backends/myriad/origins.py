"""Finds the node of the trained model's graph that a layer stems from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


class Origins:
    """Maps layers' names to nodes' names.

    OpenVINO names a layer after its node or after the tensor that it produces; if it splits a node into several, the
    last has the name and the preceding ones are numbered.

    Args:
        model: an ``openvino.Model`` as it was read from ``given``; it may be changed afterwards, as long as layers keep
            their names, and names of a layer's parts begin with its own and ``/``.
    """

    def __init__(self, model: Any, given: onnx.ModelProto) -> None:
        self._known: dict[str, str] = {tensor: node.name for node in given.graph.node for tensor in node.output}
        self._known |= {node.name: node.name for node in given.graph.node}
        # From the last to the first: one without a name of its own is the next one's downstream.
        for operation in reversed(model.get_ordered_ops()):
            name = operation.get_friendly_name()
            followers = (target.get_node() for output in operation.outputs() for target in output.get_target_inputs())
            found = self._named(name) or next(
                (node for node in map(self._named, (other.get_friendly_name() for other in followers)) if node), None
            )
            if found is not None:
                self._known[name] = found

    def node_of(self, layer: str) -> str:
        """Return the node's name, or the layer's own if there is no node."""
        return self._named(layer) or layer

    def _named(self, layer: str) -> str | None:
        while layer not in self._known:
            layer, cut, _ = layer.rpartition("/")  # ``NODE/part``
            if not cut:
                return None
        return self._known[layer]
