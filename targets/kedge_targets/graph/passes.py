"""What the quantizer of ONNX Runtime needs before it and leaves undone after it, as passes over the graph."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from kedge_targets.graph import dead

if TYPE_CHECKING:
    import onnx


def flatten_biases(model: onnx.ModelProto) -> None:
    """Gemm's C may be 1 x N, as the optimizer makes it of MatMul and Add; the quantizer (1.31) takes N only."""
    biases = {node.input[2] for node in model.graph.node if node.op_type == "Gemm" and len(node.input) > 2}
    elsewhere = {
        name
        for node in model.graph.node
        for index, name in enumerate(node.input)
        if node.op_type != "Gemm" or index != 2
    }
    for tensor in model.graph.initializer:
        if tensor.name in biases - elsewhere and len(tensor.dims) == 2 and tensor.dims[0] == 1:
            del tensor.dims[0]


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
    dead.removed(model)


def free_answers(model: onnx.ModelProto) -> None:
    """Let the answers of Gemm and MatMul leave in float, as their kernels can: quantized they would be cut off at the
    largest that calibration saw, and come in steps. Softmax and its like between them and the output stay float."""
    outputs = {value.name for value in model.graph.output}
    maker = {tensor: node for node in model.graph.node for tensor in node.output}
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for tensor in node.input:
            consumers[tensor].append(node)
    dropped = []
    for back in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        down = maker.get(back.input[0])
        source = maker.get(down.input[0]) if down is not None and down.op_type == "QuantizeLinear" else None
        if down is None or source is None or source.op_type not in ("Gemm", "MatMul"):
            continue
        users = consumers[back.output[0]]
        is_answer = back.output[0] in outputs or all(
            user.op_type in ("Softmax", "LogSoftmax") and user.output[0] in outputs for user in users
        )
        if is_answer and len(consumers[down.output[0]]) == 1 and len(consumers[source.output[0]]) == 1:
            source.output[0] = back.output[0]
            dropped += [down, back]
    for node in dropped:
        model.graph.node.remove(node)
    used = {tensor for node in model.graph.node for tensor in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
