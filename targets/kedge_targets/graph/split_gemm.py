"""Prepares Gemm nodes for ONNX Runtime's dynamic quantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph import dead_code

if TYPE_CHECKING:
    import onnx


def split_gemm(model: onnx.ModelProto) -> None:
    """Make of each Gemm that is a plain product with a constant matrix a MatMul and an Add, in place: what knows
    MatMul alone takes both then. The MatMul keeps the Gemm's name."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        made.append(node)
        how = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = how.get("alpha", 1.0) == how.get("beta", 1.0) == 1.0 and not how.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in constants:
            continue
        weight, bias, answer = node.input[1], node.input[2] if len(node.input) > 2 else "", node.output[0]
        if how.get("transB", 0):
            turned = f"{weight}_turned"
            if turned not in constants:
                value = numpy_helper.to_array(constants[weight]).T
                constants[turned] = numpy_helper.from_array(value.copy(), turned)
                model.graph.initializer.append(constants[turned])
            weight = turned
        product = f"{answer}_product" if bias else answer
        made[-1] = helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name)
        if bias:
            made.append(helper.make_node("Add", [product, bias], [answer], name=f"{node.name}_bias"))
    del model.graph.node[:]
    model.graph.node.extend(made)
    dead_code.remove_dead_nodes(model)
