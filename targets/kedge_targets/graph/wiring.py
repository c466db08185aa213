"""The wiring of a graph: the producer and the readers of each tensor, and which tensors are constant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import dead_code

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

SAME_VALUES = frozenset({"Identity", "Dropout", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "MaxPool"})
"""Operators that output some of their input values, so that rounding before or after them is the same."""

_NEVER_NEGATIVE = frozenset({"Relu", "Sigmoid", "Softmax", "HardSigmoid", "Exp", "Abs", "Sqrt", "Softplus"})
_KEEP_SIGN = SAME_VALUES | {
    "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "ReduceSum", "Concat", "Add",
    "Mul", "Slice", "Split", "Gather", "Expand", "Tile",
}  # fmt: skip


class Wiring:
    """The tensors of the main graph, as they were at construction.

    Attributes:
        maker: tensor → node.
        readers: tensor → (node, index of its input), in the graph's order.
        outputs: tensors that must keep their names and values: the graph's outputs, and what graphs within it (branches
            of If, bodies of Loop and Scan) take from outside.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.maker: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        self.outputs = {value.name for value in model.graph.output}
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._inputs = {value.name for value in model.graph.input} - set(self._stored)
        for node in model.graph.node:
            for tensor in node.output:
                if tensor:
                    self.maker[tensor] = node
            for index, tensor in enumerate(node.input):
                if tensor:
                    self.readers[tensor].append((node, index))
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                self.outputs |= dead_code.inputs_of(node) - set(node.input)
        self._values: dict[str, Array | None] = {}

    def constant(self, tensor: str) -> Array | None:
        """Return a constant's value: an initializer, a Constant node, or one of these behind Transpose or Identity."""
        if tensor not in self._values:
            self._values[tensor] = self._evaluated(tensor)
        return self._values[tensor]

    def is_input(self, tensor: str) -> bool:
        """Return whether a tensor is an input of the graph."""
        return tensor in self._inputs

    def source(self, tensor: str) -> str:
        """Return the tensor that provides the values of this one, before all of :data:`SAME_VALUES`."""
        while (node := self.maker.get(tensor)) is not None and node.op_type in SAME_VALUES and tensor == node.output[0]:
            tensor = node.input[0]
        return tensor

    def never_negative(self, tensor: str) -> bool:
        """Return whether the operators before it exclude values below 0."""
        pending, seen = [tensor], {tensor}
        while pending:
            name = pending.pop()
            value = self.constant(name)
            if value is not None:
                if value.dtype.kind == "f" and value.size and float(value.min()) < 0:
                    return False
                continue
            node = self.maker.get(name)
            if node is None:
                return False
            if node.op_type in _NEVER_NEGATIVE or (node.op_type == "Clip" and self._clips_at_zero(node)):
                continue
            if node.op_type not in _KEEP_SIGN:
                return False
            # Shapes, axes and indices are integers and say nothing of the values.
            fresh = {given for given in self._numbers(node) if given not in seen}
            seen |= fresh
            pending += fresh
        return True

    def behind(self, tensor: str) -> Iterator[onnx.NodeProto]:
        """Return every node that the tensor depends on."""
        pending, seen = [tensor], {tensor}
        while pending:
            node = self.maker.get(pending.pop())
            if node is None:
                continue
            yield node
            for given in node.input:
                if given and given not in seen:
                    seen.add(given)
                    pending.append(given)

    def _numbers(self, node: onnx.NodeProto) -> list[str]:
        if node.op_type in ("Add", "Mul", "Concat"):
            return [given for given in node.input if given]
        return [node.input[0]]

    def _clips_at_zero(self, node: onnx.NodeProto) -> bool:
        if len(node.input) > 1 and node.input[1]:
            low = self.constant(node.input[1])
            return low is not None and float(low) >= 0
        return any(attribute.name == "min" and attribute.f >= 0 for attribute in node.attribute)

    def _evaluated(self, tensor: str) -> Array | None:
        import onnx

        if tensor in self._stored:
            return np.asarray(onnx.numpy_helper.to_array(self._stored[tensor]))
        node = self.maker.get(tensor)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Constant":
            return _constant_of(attributes)
        if node.op_type not in ("Identity", "Transpose"):
            return None
        value = self.constant(node.input[0])
        if value is None or node.op_type == "Identity":
            return value
        return np.transpose(value, attributes.get("perm"))


def _constant_of(attributes: dict[str, Any]) -> Array | None:
    import onnx

    if "value" in attributes:
        return np.asarray(onnx.numpy_helper.to_array(attributes["value"]))
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64),
                        ("value_ints", np.int64)):  # fmt: skip
        if name in attributes:
            return np.asarray(attributes[name], dtype=dtype)
    return None
