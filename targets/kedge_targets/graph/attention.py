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
