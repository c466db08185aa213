"""Names, operators, plans and layers followed through an optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tests.support.lowering import classifier
from tests.support.pruning import answers

from kedge_protocol.errors import LoweringError
from kedge_targets.graph import attention, node_tracing, nodes, plan_layers
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Plan, Precision


def chain(names: list[str]) -> onnx.ModelProto:
    made = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=name) for i, name in enumerate(names)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        made, "chain", [value("t0", TensorProto.FLOAT, [1])], [value(f"t{len(names)}", TensorProto.FLOAT, [1])]
    )
    return helper.make_model(graph)


def test_an_empty_name_tells_operator_and_place() -> None:
    model = chain(["a", "", "b"])
    nodes.name_nodes(model)
    assert [node.name for node in nodes.nodes(model)] == ["a", "Relu_1", "b"]


def test_names_that_were_given_stay_with_their_first_node() -> None:
    model = chain(["", "Relu_0", "x", "x", "x_2"])
    nodes.name_nodes(model)
    assert [node.name for node in model.graph.node] == ["Relu_0_2", "Relu_0", "x", "x_3", "x_2"]


@given(st.lists(st.sampled_from(["", "a", "b", "a_2", "Relu_0", "Relu_1", "Relu_1_2"]), min_size=1, max_size=12))
def test_names_are_unique_and_stable(given_names: list[str]) -> None:
    model = chain(given_names)
    nodes.name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert set(filter(None, given_names)) <= set(names)
    nodes.name_nodes(model)
    assert [node.name for node in model.graph.node] == names


def test_operators_tell_their_domain() -> None:
    assert nodes.operators(classifier()) == {
        ("ai.onnx", name) for name in ("Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm")
    }


def test_the_smallest_precision_leads_a_plan() -> None:
    assert plan_layers.leading(Plan(default=Precision.FLOAT32)) is Precision.FLOAT32
    assert plan_layers.leading(Plan(default=Precision.INT8, layers={"first": Precision.FLOAT32})) is Precision.INT8
    assert plan_layers.leading(Plan(default=Precision.FLOAT32, layers={"first": Precision.INT8})) is Precision.INT8
    with pytest.raises(LoweringError, match="mixes int8 and float16"):
        plan_layers.leading(Plan(default=Precision.INT8, layers={"first": Precision.FLOAT16}))


def test_the_nodes_of_another_precision() -> None:
    model = classifier()
    mixed = Plan(default=Precision.INT8, layers={"last": Precision.FLOAT32, "first": Precision.FLOAT32})
    assert plan_layers.others(mixed, model, Precision.INT8) == ["first", "last"]
    with pytest.raises(LoweringError, match="'absent'"):
        plan_layers.others(Plan(default=Precision.INT8, layers={"absent": Precision.FLOAT32}), model, Precision.INT8)


def test_a_layer_that_was_fused_is_followed_to_the_node_that_does_its_work() -> None:
    before = classifier()
    after = onnx.ModelProto()
    after.CopyFrom(before)
    # As a fusion of Conv and Relu does: one new node makes the second's tensor.
    first, relu = after.graph.node[0], after.graph.node[1]
    first.name, first.output[0] = "fused", "r1"
    after.graph.node.remove(relu)
    assert node_tracing.trace_nodes(["first"], before, after) == ["fused"]
    assert node_tracing.trace_nodes(["first_relu"], before, after) == ["fused"]
    assert node_tracing.trace_nodes(["last", "first"], before, after) == ["fused", "last"]
    assert node_tracing.trace_nodes(["second"], before, after) == ["second"]


def test_what_stands_between_the_products_and_a_softmax() -> None:
    value = helper.make_tensor_value_info
    made = [
        helper.make_node("MatMul", ["q", "k"], ["scores"], name="scores"),
        helper.make_node("Div", ["scores", "root"], ["scaled"], name="scale"),
        helper.make_node("Where", ["mask", "zero", "infinity"], ["bias"], name="mask"),
        helper.make_node("Add", ["scaled", "bias"], ["masked"], name="add"),
        helper.make_node("Softmax", ["masked"], ["weights"], name="softmax"),
        helper.make_node("Mul", ["weights", "v"], ["out"], name="after"),
    ]
    names = ("q", "k", "root", "mask", "zero", "infinity", "v")
    graph = helper.make_graph(
        made,
        "attention",
        [value(name, TensorProto.BOOL if name == "mask" else TensorProto.FLOAT, [2, 2]) for name in names],
        [value("out", TensorProto.FLOAT, [2, 2])],
    )
    assert attention.before_softmax(helper.make_model(graph)) == ["scale", "mask", "add"]
    assert attention.before_softmax(classifier()) == []


@pytest.mark.parametrize("least", [-10000.0, float(np.finfo(np.float32).min), -np.inf, -500.0])
@pytest.mark.parametrize("kind", ["initializer", "value", "value_float"])
def test_masks_get_a_bound_and_the_answers_stay(least: float, kind: str) -> None:
    value = helper.make_tensor_value_info
    tensor = numpy_helper.from_array(np.float32(least), "hidden")
    how: dict[str, Any] | None = {"value": {"value": tensor}, "value_float": {"value_float": least}}.get(kind)
    made = [
        *([] if how is None else [helper.make_node("Constant", [], ["hidden"], name="hidden", **how)]),
        helper.make_node("MatMul", ["q", "k"], ["scores"], name="scores"),
        helper.make_node("Where", ["shown", "zero", "hidden"], ["bias"], name="mask"),
        helper.make_node("Add", ["scores", "bias"], ["masked"], name="add"),
        helper.make_node("Softmax", ["masked"], ["weights"], name="softmax"),
        # Not before a Softmax: such a number is one here.
        helper.make_node("Mul", ["weights", "much"], ["out"], name="after"),
    ]
    graph = helper.make_graph(
        made,
        "attention",
        [
            value("q", TensorProto.FLOAT, [3, 4]),
            value("k", TensorProto.FLOAT, [4, 5]),
            value("shown", TensorProto.BOOL, [5]),
        ],
        [value("out", TensorProto.FLOAT, [3, 5])],
        [
            numpy_helper.from_array(np.float32(0), "zero"),
            numpy_helper.from_array(np.float32(-1e6), "much"),
            *([tensor] if how is None else []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    rng = np.random.default_rng(0)
    feed = {
        "q": rng.standard_normal((3, 4)).astype(np.float32),
        "k": rng.standard_normal((4, 5)).astype(np.float32),
        "shown": np.array([True, True, False, True, False]),
    }
    before = answers(model, feed)
    attention.bound_masks(model)
    np.testing.assert_allclose(answers(model, feed), before, rtol=1e-6, atol=1e-6)
    constant = Wiring(model).constant
    found, much = constant("hidden"), constant("much")
    assert found is not None
    assert much is not None
    assert float(found) == (-64.0 if least < -5000 else least)
    assert float(much) == -1e6


def test_a_product_of_three_axes_that_became_a_gemm_between_reshapes_is_followed_to_the_gemm() -> None:
    node = helper.make_node
    axes = {"x": ["N", 6, 8], "y": ["N", 6, 4]}
    ends = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in axes.items()}

    def graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
        return helper.make_model(helper.make_graph(nodes, "g", [ends["x"]], [ends["y"]]))

    before = graph(node("MatMul", ["x", "w"], ["p"], name="product"), node("Add", ["p", "b"], ["y"], name="bias"))
    after = graph(
        node("Reshape", ["x", "flat"], ["x_flat"], name="down"),
        node("Gemm", ["x_flat", "w", "b"], ["y_flat"], name="gemm"),
        node("Reshape", ["y_flat", "back"], ["y"], name="up"),
    )
    assert node_tracing.trace_nodes(["product"], before, after) == ["down", "gemm", "up"]
