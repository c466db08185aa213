"""ONNX Runtime is given a softmax with at most one axis behind its own."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.pruning import answers

from kedge_targets.backends.onnxruntime import softmax

node = helper.make_node


def graph(given: onnx.NodeProto, shape: list[int | str], *before: onnx.NodeProto, opset: int = 17) -> onnx.ModelProto:
    made = helper.make_graph(
        [*before, given],
        "softmax",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.float32(0.1), "step"), numpy_helper.from_array(np.uint8(9), "zero")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def operators(model: onnx.ModelProto) -> list[str]:
    return [one.op_type for one in model.graph.node]


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [1, -4])
@pytest.mark.parametrize("shape", [[2, 16, 4, 30, 3], ["N", 16, 4, 30, 3], ["N", 16, 4, "width", 3]])
def test_several_axes_behind_it_are_one(operator: str, axis: int, shape: list[int | str]) -> None:
    model = graph(node(operator, ["x"], ["y"], name="s", axis=axis), shape)
    x = np.random.default_rng(0).normal(0, 3, (2, 16, 4, 30, 3)).astype(np.float32)
    want = answers(model, {"x": x})
    softmax.join_axes_behind(model)
    onnx.checker.check_model(model, full_check=True)
    assert operators(model) == ["Reshape", operator, "Reshape"]
    joined = onnx.shape_inference.infer_shapes(model).graph.value_info
    assert len(next(one for one in joined if one.name == "y_joined").type.tensor_type.shape.dim) == 3
    np.testing.assert_array_equal(answers(model, {"x": x}), want)


@pytest.mark.parametrize(
    ("axis", "shape", "opset"),
    [
        (-1, [2, 3, 4, 5], 17),
        (2, [2, 3, 4, 5], 17),
        (1, [2, 3, "height", "width"], 17),  # which is which could not be restored
        (1, [2, 3, 4, 5], 12),  # there it is over all axes from its own on
    ],
)
def test_others_stay_as_they_are(axis: int, shape: list[int | str], opset: int) -> None:
    model = graph(node("Softmax", ["x"], ["y"], axis=axis), shape, opset=opset)
    softmax.join_axes_behind(model)
    assert operators(model) == ["Softmax"]


def test_one_that_integers_lead_to_stays_as_it_is() -> None:
    pair = (
        node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "step", "zero"], ["r"]),
    )
    model = graph(node("Softmax", ["r"], ["y"], axis=1), [2, 3, 4, 5], *pair)
    softmax.join_axes_behind(model)
    assert operators(model) == ["QuantizeLinear", "DequantizeLinear", "Softmax"]


def test_tensors_without_shapes_stay_as_they_are() -> None:
    model = graph(node("Softmax", ["inner"], ["soft"], axis=1), [2, 3, 4, 5], node("Relu", ["x"], ["inner"]))
    model.graph.node.append(node("Neg", ["soft"], ["y"]))
    softmax.join_axes_behind(model)
    assert operators(model) == ["Relu", "Softmax", "Neg"]
