"""Finds and bounds what precedes a Softmax: in attention the mask, whose values are minus infinity or very negative."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

MASKED = -5000.0
"""Scores below it are masks: exporters write -10000, the lowest float, or minus infinity."""
ENOUGH = -64.0
"""Replacement for a mask: exp(-64) is 1.6e-28."""

# They make scores and masks ready; a product (MatMul, Conv, Gemm) ends the way back.
_BETWEEN = frozenset({"Add", "Cast", "Div", "Expand", "Mul", "Sub", "Unsqueeze", "Where"})
# A mask takes its shape on the way.
_MOVING = frozenset({"Concat", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose"})


def before_softmax(model: onnx.ModelProto) -> list[str]:
    """Return the names of the element-wise nodes between the last products and each Softmax, in graph order.

    Quantized they would do harm: a range that reaches to minus infinity has no scale, one that reaches to -10000 has
    no resolution left, and the Softmax after them works in float anyway.
    """
    found = _leading_to_softmax(model, _BETWEEN)
    return [node.name for node in model.graph.node if node.name in found]


def _leading_to_softmax(model: onnx.ModelProto, through: frozenset[str]) -> set[str]:
    """Return the names of the nodes of these kinds that lead to a Softmax through such nodes only."""
    maker = {tensor: node for node in model.graph.node for tensor in node.output}
    found: set[str] = set()
    pending = [node.input[0] for node in model.graph.node if node.op_type in ("Softmax", "LogSoftmax")]
    seen = set(pending)
    while pending:
        node = maker.get(pending.pop())
        if node is None or node.op_type not in through:
            continue
        found.add(node.name)
        fresh = set(node.input) - seen
        seen |= fresh
        pending += fresh
    return found


def bound_masks(model: onnx.ModelProto, least: float = ENOUGH) -> None:
    """Replace mask constants between the last products and a Softmax by -64, in place. In float the result is
    practically the same if the scores themselves stay far from it: a masked position has a share of 1e-28 instead of 0.
    In integers minus infinity has no scale, and TensorFlow's quantizer aborts; -10000 leaves one step for all scores.

    Args:
        least: takes the place of -64.
    """
    import onnx
    from onnx import helper, numpy_helper

    def bounded(tensor: onnx.TensorProto) -> onnx.TensorProto:
        value = np.asarray(numpy_helper.to_array(tensor))
        return numpy_helper.from_array(np.where(value < MASKED, value.dtype.type(least), value), tensor.name)

    for found in masks(model):
        if isinstance(found, onnx.TensorProto):
            found.CopyFrom(bounded(found))
        elif found.name == "value_float":
            found.f = least
        else:
            found.CopyFrom(helper.make_attribute("value", bounded(found.t)))


def masks(model: onnx.ModelProto) -> list[onnx.TensorProto | onnx.AttributeProto]:
    """Return the constants with minus infinity (or as good) between the last products and a Softmax: initializers, and
    the values of Constant nodes."""
    from onnx import numpy_helper

    between = _leading_to_softmax(model, _BETWEEN | _MOVING)
    read = {name for node in model.graph.node if node.name in between for name in node.input}
    elsewhere = {name for node in model.graph.node if node.name not in between for name in node.input}

    def masking(tensor: onnx.TensorProto) -> bool:
        value = np.asarray(numpy_helper.to_array(tensor))
        return value.dtype.kind == "f" and bool((value < MASKED).any())

    found: list[onnx.TensorProto | onnx.AttributeProto] = [
        tensor for tensor in model.graph.initializer if tensor.name in read - elsewhere and masking(tensor)
    ]
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in read - elsewhere:
            found += [one for one in node.attribute if one.name == "value_float" and one.f < MASKED]
            found += [one for one in node.attribute if one.name == "value" and masking(one.t)]
    return found


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
    """Return the product that reads a Softmax's output, through operators that leave it unchanged."""
    for node in users.get(tensor, []):
        if node.op_type == "MatMul":
            return node
        if node.op_type in ("Dropout", "Cast", "Identity", "Where", "Reshape"):
            return _forward(node.output[0], users)
    return None
