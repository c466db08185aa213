"""What stands before a Softmax: in attention the mask, whose values are minus infinity or as good as."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

# They make scores and masks ready; a product (MatMul, Conv, Gemm) ends the way back.
_BETWEEN = frozenset({"Add", "Cast", "Div", "Expand", "Mul", "Sub", "Unsqueeze", "Where"})


def before_softmax(model: onnx.ModelProto) -> list[str]:
    """Names of the element-wise nodes between the last products and each Softmax, in the graph's order.

    Quantized they would do harm: a range that reaches to minus infinity has no scale, one that reaches to -10000 has
    no resolution left, and the Softmax after them works in float anyway.
    """
    maker = {tensor: node for node in model.graph.node for tensor in node.output}
    found: set[str] = set()
    pending = [node.input[0] for node in model.graph.node if node.op_type in ("Softmax", "LogSoftmax")]
    seen = set(pending)
    while pending:
        node = maker.get(pending.pop())
        if node is None or node.op_type not in _BETWEEN:
            continue
        found.add(node.name)
        fresh = set(node.input) - seen
        seen |= fresh
        pending += fresh
    return [node.name for node in model.graph.node if node.name in found]


def products(model: onnx.ModelProto) -> list[str]:
    """Names of the products of two activations on both sides of each inner Softmax (scores before it, their use after
    it), in the graph's order; none of a graph whose only Softmax gives its answer."""
    constant = {tensor.name for tensor in model.graph.initializer}
    maker = {tensor: node for node in model.graph.node for tensor in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for tensor in node.input:
            users.setdefault(tensor, []).append(node)
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        after = _forward(node.output[0], users)
        if after is None:
            continue
        found.add(after.name)
        pending, seen = [node.input[0]], {node.input[0]}
        while pending:
            before = maker.get(pending.pop())
            if before is None:
                continue
            if before.op_type == "MatMul" and not set(before.input) & constant:
                found.add(before.name)
            elif before.op_type in _BETWEEN:
                fresh = set(before.input) - seen
                seen |= fresh
                pending += fresh
    return [node.name for node in model.graph.node if node.name in found]


def _forward(tensor: str, users: dict[str, list[onnx.NodeProto]]) -> onnx.NodeProto | None:
    """The product that takes a Softmax's answer, through what leaves it as it is."""
    for node in users.get(tensor, []):
        if node.op_type == "MatMul":
            return node
        if node.op_type in ("Dropout", "Cast", "Identity", "Where", "Reshape"):
            return _forward(node.output[0], users)
    return None
