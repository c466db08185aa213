"""Writes norms out by their definition: onnx2tf (1.28) gives TensorFlow an axis for them that it does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph import opsets

if TYPE_CHECKING:
    import onnx

_AXES_AS_INPUT = 18  # the opset from which ReduceMean takes its axes as an input
_NORMS = frozenset({"ReduceL1", "ReduceL2"})


def spell_out(model: onnx.ModelProto) -> None:
    """Replace ReduceL1 by Abs and ReduceSum, and ReduceL2 by Mul, ReduceSum and Sqrt, in place. The sum keeps the
    node's name and its axes, whether an attribute or an input."""
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


def spell_out_groups(model: onnx.ModelProto) -> None:
    """Replace each GroupNormalization by an InstanceNormalization of its groups (ONNX operators, GroupNormalization),
    in place, since the function that it stands for computes shapes as onnx2tf cannot. Shapes must have been
    inferred."""
    import numpy as np
    from onnx import helper, numpy_helper

    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        shape = shapes.get(node.input[0], []) if node.input else []
        group = node.op_type == "GroupNormalization" and node.domain in ("", "ai.onnx")
        if not group or not shape or not all(shape) or any(name not in stored for name in node.input[1:]):
            made.append(node)
            continue
        given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        groups, base = int(given["num_groups"]), node.output[0]
        factors = [stored[name] for name in node.input[1:]]
        # Up to opset 20 there is one of each group, from 21 on one of each channel.
        factors = [np.repeat(one, shape[1] // len(one)).reshape(-1, *[1] * (len(shape) - 2)) for one in factors]
        constants = {
            "grouped": np.array([shape[0], groups, -1]), "ones": np.ones(groups, factors[0].dtype),
            "zeros": np.zeros(groups, factors[0].dtype), "whole": np.array(shape), "scale": factors[0],
            "bias": factors[1],
        }  # fmt: skip
        for what, value in constants.items():
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), f"{base}_{what}"))
        steps = (
            ("Reshape", [node.input[0], f"{base}_grouped"], f"{base}_apart"),
            ("InstanceNormalization", [f"{base}_apart", f"{base}_ones", f"{base}_zeros"], f"{base}_normed"),
            ("Reshape", [f"{base}_normed", f"{base}_whole"], f"{base}_together"),
            ("Mul", [f"{base}_together", f"{base}_scale"], f"{base}_scaled"),
            ("Add", [f"{base}_scaled", f"{base}_bias"], base),
        )
        for kind, inputs, answer in steps:
            made.append(helper.make_node(kind, inputs, [answer], name=f"{node.name}_{answer}"))
        made[-4].attribute.append(helper.make_attribute("epsilon", float(given.get("epsilon", 1e-5))))
        made[-1].name = node.name
    del model.graph.node[:]
    model.graph.node.extend(made)


def spell_out_layers(model: onnx.ModelProto) -> None:
    """Replace each LayerNormalization by its definition (ONNX operators, LayerNormalization), in place, since onnx2tf
    fails on some of them. Shapes must have been inferred."""
    from onnx import helper

    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        rank = ranks.get(node.input[0]) if node.input else None
        if node.op_type != "LayerNormalization" or node.domain not in ("", "ai.onnx") or rank is None:
            made.append(node)
            continue
        given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        made += _layer(model, node, list(range(int(given.get("axis", -1)) % rank, rank)), given.get("epsilon", 1e-5))
    del model.graph.node[:]
    model.graph.node.extend(made)


def _layer(model: onnx.ModelProto, node: onnx.NodeProto, axes: list[int], epsilon: float) -> list[onnx.NodeProto]:
    import numpy as np
    from onnx import helper, numpy_helper

    made: list[onnx.NodeProto] = []
    base = node.output[0]

    def add(operator: str, inputs: list[str], what: str, answer: str = "", **attributes: object) -> str:
        answer = answer or f"{base}_{what}"
        made.append(helper.make_node(operator, inputs, [answer], name=f"{node.name}_{what}", **attributes))
        return answer

    def stored(what: str, value: object, dtype: type) -> str:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), f"{base}_{what}"))
        return f"{base}_{what}"

    def mean(source: str, what: str, answer: str = "") -> str:
        if opsets.version(model) >= _AXES_AS_INPUT:
            return add("ReduceMean", [source, stored(f"{what}_axes", axes, np.int64)], what, answer, keepdims=1)
        return add("ReduceMean", [source], what, answer, keepdims=1, axes=axes)

    middle, inverse = [*node.output[1:], "", ""][:2]
    centred = add("Sub", [node.input[0], mean(node.input[0], "mean", middle)], "centred")
    variance = mean(add("Mul", [centred, centred], "squared"), "variance")
    kept = add("Add", [variance, stored("epsilon", epsilon, np.float32)], "kept")
    deviation = add("Sqrt", [kept], "deviation")
    if inverse:
        add("Div", [stored("one", 1.0, np.float32), deviation], "inverse", inverse)
    answer = add("Div", [centred, deviation], "even")
    answer = add("Mul", [answer, node.input[1]], "scaled")
    if len(node.input) > 2 and node.input[2]:
        add("Add", [answer, node.input[2]], "moved")
    made[-1].output[0] = base
    made[-1].name = node.name
    return made
