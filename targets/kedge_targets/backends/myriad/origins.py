"""Which node of the trained model's graph a layer stems from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


class Origins:
    """Layers' names to nodes' names.

    OpenVINO names a layer by its node or by the tensor that it makes; where it splits a node into several, the last
    has the name and the ones before it are counted.

    Args:
        model: an ``openvino.Model`` that was read from ``given``; it may be changed afterwards.
    """

    def __init__(self, model: Any, given: onnx.ModelProto) -> None:
        self._model = model
        self._known: dict[str, str] = {
            tensor: node.name for node in given.graph.node for tensor in node.output if tensor
        }
        self._known |= {node.name: node.name for node in given.graph.node}

    def node_of(self, layer: str) -> str:
        """The node: by name, or that of the next layer downstream that has one; the layer's own name where there is
        none."""
        if (known := self._named(layer)) is not None:
            return known
        pending = [operation for operation in self._model.get_ordered_ops() if operation.get_friendly_name() == layer]
        seen = set()
        while pending:
            operation = pending.pop(0)
            name = operation.get_friendly_name()
            if (known := self._named(name)) is not None:
                return known
            if name not in seen:
                seen.add(name)
                pending += [
                    target.get_node() for output in operation.outputs() for target in output.get_target_inputs()
                ]
        return layer

    def _named(self, layer: str) -> str | None:
        while layer not in self._known:
            layer, cut, _ = layer.rpartition("/")  # ``NODE/part``
            if not cut:
                return None
        return self._known[layer]
