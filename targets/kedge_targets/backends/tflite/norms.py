"""Norms by their definition: onnx2tf (1.28) gives TensorFlow an axis for them that it does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_NORMS = frozenset({"ReduceL1", "ReduceL2"})


def spell_out(model: onnx.ModelProto) -> None:
    """Replace ReduceL1 by Abs and ReduceSum, ReduceL2 by Mul, ReduceSum and Sqrt, in place. The sum keeps the node's
    name and its axes, be they an attribute or an input."""
    from onnx import helper

    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made.append(node)
        if node.op_type not in _NORMS or node.domain not in ("", "ai.onnx"):
            continue
        given, answer = node.input[0], node.output[0]
        euclidean = node.op_type == "ReduceL2"
        each = f"{answer}_{'squared' if euclidean else 'absolute'}"
        if euclidean:
            made.insert(-1, helper.make_node("Mul", [given, given], [each], name=f"{node.name}_square"))
            made.append(helper.make_node("Sqrt", [f"{answer}_sum"], [answer], name=f"{node.name}_root"))
            node.output[0] = f"{answer}_sum"
        else:
            made.insert(-1, helper.make_node("Abs", [given], [each], name=f"{node.name}_absolute"))
        node.op_type = "ReduceSum"
        node.input[0] = each
    del model.graph.node[:]
    model.graph.node.extend(made)
