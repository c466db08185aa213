"""Decides which tensors of a float graph are rounded to integers, and which of them share a scale."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kedge_targets.graph import nodes
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
CUTTING = frozenset({"Relu", "Clip"})
MOVING = frozenset({
    "ArgMax", "AveragePool", "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Reshape", "Resize", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that select, move or average values, so that the output has the input's scale."""
ANSWERS_IN_FLOAT = frozenset({"Gemm", "MatMul"})
"""Operators whose kernels output float sums if no reader needs integers."""


@dataclass
class QdqPlacement:
    """The tensors of a graph that are rounded.

    Attributes:
        integers: names of the nodes that compute in integers.
        roots: rounded tensor → the tensor whose range gives its scale: itself, or what it was picked from. A table of
            embeddings is the root of what is looked up in it.
        reads: (node, index of its input) that must be given rounded values.
        constants: (node, index of its input) of constants that are read like an activation.
        cuts: Relu or Clip → the tensor before it, which only it reads: where the integers end at the same bounds, the
            node has nothing left to do.
    """

    integers: set[str]
    roots: dict[str, str] = field(default_factory=dict)
    reads: set[tuple[str, int]] = field(default_factory=set)
    constants: set[tuple[str, int]] = field(default_factory=set)
    cuts: dict[str, str] = field(default_factory=dict)


def place_quantizers(
    model: onnx.ModelProto, operators: Collection[str], floating: Collection[str], *, answers: bool = True
) -> QdqPlacement:
    """Decide which tensors to round.

    Args:
        model: a float graph, constants folded, shapes inferred.
        operators: with an integer form.
        floating: names of nodes that stay in float.
        answers: whether what a node computes is rounded too, or only what it reads.
    """
    excluded = set(floating)
    chosen = {node.name for node in model.graph.node if node.op_type in operators and node.name not in excluded}
    placing = _Placing(model, chosen, answers)
    for node in model.graph.node:
        if node.name in chosen:
            placing.visit(node)
    return placing.places


def floats(model: onnx.ModelProto) -> set[str]:
    """Return the names of the tensors known to be float32, including constants."""
    import onnx

    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return found | {one.name for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT}


class _Placing:
    def __init__(self, model: onnx.ModelProto, chosen: set[str], answers: bool) -> None:
        self.places = QdqPlacement(integers=set(chosen))
        self._wiring = Wiring(model)
        self._floats = floats(model)
        self._stored = {tensor.name for tensor in model.graph.initializer}
        self._answers = answers

    def visit(self, node: onnx.NodeProto) -> None:
        data = self._data(node)
        given = [node.input[index] for index in data]
        usable = node.domain in ("", nodes.DEFAULT_DOMAIN) and bool(given) and self._floats.issuperset(given)
        if usable and node.op_type in WEIGHTED:
            usable = self._weighted(node)
        elif usable and node.op_type in CUTTING:
            usable = self._cutting(node)
        elif usable and node.op_type in MOVING:
            usable = self._moving(node)
        elif usable and node.op_type == "Where" and not all(self._known(name) for name in given):
            usable = False
        elif usable:
            usable = self._computing(node, data)
        if not usable:
            self.places.integers.discard(node.name)

    def _data(self, node: onnx.NodeProto) -> list[int]:
        """Return the indices of the data inputs: no shapes, bounds or biases."""
        if node.op_type in ("Add", "Concat", "Mul", "Sub", "Div", "MatMul", "Gemm", "Conv", "ConvTranspose"):
            count = 2 if node.op_type in WEIGHTED else len(node.input)
            return [index for index in range(min(count, len(node.input))) if node.input[index]]
        return [1, 2] if node.op_type == "Where" else [0]

    def _known(self, tensor: str) -> bool:
        return tensor in self.places.roots or tensor in self._stored

    def _weighted(self, node: onnx.NodeProto) -> bool:
        weight = node.input[1]
        if node.op_type != "MatMul" and (weight not in self._stored or node.input[0] in self._stored):
            return False
        if any(self._rank(name) == 1 for name in node.input[:2] if name in self._stored):
            return False
        if len(node.input) > 2 and node.input[2] and node.input[2] not in self._stored:
            return False
        for index in (0, 1):
            if node.input[index] not in self._stored:
                self._round(node, index)
        if self._answers and (node.op_type not in ANSWERS_IN_FLOAT or self._wanted(node.output[0])):
            self.places.roots.setdefault(node.output[0], node.output[0])
        return True

    def _wanted(self, tensor: str) -> bool:
        """Return whether some node needs it in integers."""
        return any(reader.name in self.places.integers for reader, _ in self._wiring.readers[tensor])

    def _rank(self, name: str) -> int:
        value = self._wiring.constant(name)
        return -1 if value is None else value.ndim

    def _cutting(self, node: onnx.NodeProto) -> bool:
        before, behind = node.input[0], node.output[0]
        maker = self._wiring.maker.get(before)
        rounded = maker is not None and maker.name in self.places.integers and maker.op_type not in MOVING
        alone = len(self._wiring.readers[before]) == 1 and before not in self._wiring.outputs
        if rounded and alone and before in self.places.roots:
            del self.places.roots[before]
            self.places.cuts[node.name] = before
        elif before not in self.places.roots:
            return False
        else:
            self._round(node, 0)
        self.places.roots.setdefault(behind, behind)
        return True

    def _moving(self, node: onnx.NodeProto) -> bool:
        source = node.input[0]
        if (node.op_type == "MaxPool" and len(node.output) > 1) or _overshoots(node):
            return False
        table = node.op_type == "Gather" and source in self._stored
        if (table and self._rank(source) < 2) or (not table and source not in self.places.roots):
            return False
        root = source if table else self.places.roots[source]
        self.places.reads.add((node.name, 0))
        if not self._answers or node.op_type == "ArgMax" or (table and not self._wanted(node.output[0])):
            return True
        for tensor in node.output:
            if tensor:
                self.places.roots.setdefault(tensor, root)
        return True

    def _computing(self, node: onnx.NodeProto, data: list[int]) -> bool:
        if all(node.input[index] in self._stored for index in data):
            return False
        for index in data:
            if node.input[index] in self._stored:
                self.places.constants.add((node.name, index))
            else:
                self._round(node, index)
        if self._answers:
            self.places.roots.setdefault(node.output[0], node.output[0])
        return True

    def _round(self, node: onnx.NodeProto, index: int) -> None:
        tensor = node.input[index]
        self.places.roots.setdefault(tensor, tensor)
        self.places.reads.add((node.name, index))


def _overshoots(node: onnx.NodeProto) -> bool:
    """Return whether values may come out that are larger than all that go in: a cubic resize's."""
    return node.op_type == "Resize" and any(one.name == "mode" and one.s == b"cubic" for one in node.attribute)


def bounds_of(node: onnx.NodeProto, wiring: Wiring) -> tuple[float, float] | None:
    """Return the bounds of a Relu or Clip; None if they are not constant."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    attributes = {attribute.name: attribute.f for attribute in node.attribute}
    found = [attributes.get("min", -np.inf), attributes.get("max", np.inf)]
    for index in (1, 2):
        if len(node.input) > index and node.input[index]:
            value = wiring.constant(node.input[index])
            if value is None or value.size != 1:
                return None
            found[index - 1] = float(value.reshape(()))
    return float(found[0]), float(found[1])
