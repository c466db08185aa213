"""Norms that are written out compute what ONNX Runtime's own compute."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.backends.tflite import norms
from kedge_targets.graph import library


@pytest.mark.parametrize("opset", [17, 18, 20])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("also", [[], ["mean", "inverse"], ["", "inverse"]])
def test_written_out_is_the_same(opset: int, axis: int, bias: bool, also: list[str]) -> None:
    source = np.random.default_rng(0)
    shape = [2, 3, 4][axis:] if axis > 0 else [4]
    stored = [numpy_helper.from_array(source.normal(size=shape).astype(np.float32), name) for name in ("g", "b")]
    inputs = ["x", "g", *(["b"] if bias else [])]
    node = helper.make_node("LayerNormalization", inputs, ["y", *also], name="norm", axis=axis, epsilon=1e-3)
    after = helper.make_node("Relu", ["y"], ["z"], name="after")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 4]) for name in ("x", "z")]
    reduced = [2, 3, 1] if axis < 0 else [2, 1, 1]
    values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, reduced) for name in also if name]
    graph = helper.make_graph([node, after], "g", values[:1], values[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    x = source.normal(3, 2, [2, 3, 4]).astype(np.float32)

    def run() -> list[np.ndarray]:
        session = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return [np.asarray(one) for one in session.run(None, {"x": x})]

    expected = run()
    norms.spell_out_layers(model)
    onnx.checker.check_model(model)
    assert "LayerNormalization" not in {each.op_type for each in model.graph.node}
    assert "norm" in {each.name for each in model.graph.node}
    for got, wanted in zip(run(), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 21])
def test_groups_written_out_are_the_same(opset: int) -> None:
    source = np.random.default_rng(0)
    many = 2 if opset < 21 else 6
    stored = [numpy_helper.from_array(source.normal(size=many).astype(np.float32), name) for name in ("g", "b")]
    node = helper.make_node("GroupNormalization", ["x", "g", "b"], ["y"], name="norm", num_groups=2, epsilon=1e-3)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 6, 3, 4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    x = source.normal(3, 2, [1, 6, 3, 4]).astype(np.float32)

    def run() -> np.ndarray:
        session = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"x": x})[0])

    expected = run()
    norms.spell_out_groups(model)
    onnx.checker.check_model(model)
    assert "GroupNormalization" not in {each.op_type for each in model.graph.node}
    assert model.graph.node[-1].name == "norm"
    np.testing.assert_allclose(run(), expected, atol=1e-5)
