"""Operators on integers, written as float operators between pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.quantized_files import FORMS, NETWORKS, Form, Samples, written

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.contract import Array
from kedge_targets.graph import dequantization, integer_operators, model_reader
from kedge_targets.graph.rounding import sqnr_db


def answer(model: onnx.ModelProto, feed: Mapping[str, Array]) -> Array:
    """What the file says: without optimization, which makes integer kernels of pairs, nothing saturates."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], feed)[0])


def saturates(form: Form) -> bool:
    """Whether ONNX Runtime's kernels of operators on integers saturate on processors without VNNI."""
    return form.activation == "uint8" and form.weight == "int8" and form.kind != "pairs"


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_quantized_file_says_the_same_in_pairs_and_in_float(network: str, form: Form, tmp_path: Path) -> None:
    written(network, form, tmp_path)
    model = model_reader.load(tmp_path / "quantized.onnx")
    made = integer_operators.in_pairs(model)
    onnx.checker.check_model(made)
    assert not {node.op_type for node in made.graph.node} & integer_operators.INTEGER_OPERATORS
    shapes = NETWORKS[network]()[1]
    feed = Samples(shapes, 3, seed=9).arrays
    floating = answer(onnx.load(tmp_path / "float.onnx"), feed)
    if form.kind != "dynamic" and not saturates(form):
        # Integers are rounded again at the end of a float sum: a step now and then.
        assert sqnr_db(answer(model, feed), answer(made, feed)) > 40
    restored, notes = dequantization.restored(model, Samples(shapes))
    assert "taken as they are" in notes[0]
    assert {node.op_type for node in restored.graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    assert sqnr_db(floating, answer(restored, feed)) > 25


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_other_opsets_are_taken(opset: int, tmp_path: Path) -> None:
    form = Form("operators", "int8", per_channel=True)
    written("pictures", form, tmp_path, opset=opset)
    model = model_reader.load(tmp_path / "quantized.onnx")
    made = integer_operators.in_pairs(model)
    onnx.checker.check_model(made)
    feed = Samples({"x": (3, 16, 16)}, 3, seed=9).arrays
    assert sqnr_db(answer(model, feed), answer(made, feed)) > 40


def small(nodes: list[onnx.NodeProto], given: int, **constants: object) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    ends = [
        helper.make_tensor_value_info("x", given, ["N", 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4]),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


WEIGHT = np.random.default_rng(0).integers(-60, 60, (8, 4)).astype(np.int8)


def test_integers_that_the_model_is_given_are_read_back(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QLinearMatMul", ["x", "s", "z", "w", "s", "o", "t", "z"], ["m"], name="product"),
        helper.make_node("DequantizeLinear", ["m", "t", "z"], ["y"], name="up"),
    ]
    scales = {"s": np.float32(0.02), "t": np.float32(0.1), "z": np.uint8(128), "o": np.int8(0)}
    model = small(nodes, TensorProto.UINT8, w=WEIGHT, **scales)
    made, _ = dequantization.restored(model)
    assert {node.op_type for node in made.graph.node} >= {"Cast", "MatMul"}
    feed = {"x": np.random.default_rng(1).integers(0, 255, (5, 8)).astype(np.uint8)}
    assert sqnr_db(answer(model, feed), answer(made, feed)) > 25


def test_products_that_onnxruntime_fuses_are_taken() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "o", "b"], ["m"], "fused", domain="com.microsoft"),
        helper.make_node("DynamicQuantizeLinear", ["m"], ["q", "qs", "qz"], name="down"),
        helper.make_node(
            "MatMulIntegerToFloat", ["q", "v", "qs", "s", "qz", "o"], ["y"], "behind", domain="com.microsoft"
        ),
    ]
    numbers = {"s": np.float32(0.02), "o": np.int8(3), "b": np.linspace(-1, 1, 4, dtype=np.float32)}
    model = small(nodes, TensorProto.FLOAT, w=WEIGHT, v=WEIGHT[:4], **numbers)
    made, _ = dequantization.restored(model)
    feed = {"x": np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)}
    assert sqnr_db(answer(model, feed), answer(made, feed)) > 25


def test_a_sum_of_integers_that_is_never_scaled_is_refused_by_its_node() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="down"),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["m"], name="the sum"),
        helper.make_node("Cast", ["m"], ["y"], name="number", to=1),
    ]
    with pytest.raises(UnsupportedOperatorError) as refused:
        integer_operators.in_pairs(small(nodes, TensorProto.FLOAT, w=WEIGHT))
    assert refused.value.where in ("node 'down'", "node 'the sum'")
    assert "QDQ" in str(refused.value.remedy)


def test_a_relu_that_the_ends_of_integers_replace_stays_without_samples_too(tmp_path: Path) -> None:
    written("pictures", Form("pairs", "int8"), tmp_path)
    model = model_reader.load(tmp_path / "quantized.onnx")
    assert all(node.op_type != "Clip" for node in model.graph.node)
    restored, _ = dequantization.restored(model)
    feed = Samples({"x": (3, 16, 16)}, 3, seed=9).arrays
    assert sqnr_db(answer(onnx.load(tmp_path / "float.onnx"), feed), answer(restored, feed)) > 20
