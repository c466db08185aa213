"""Float16 with some nodes in float32, by ONNX Runtime's converter and what it leaves undone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.pruning import answers

from kedge_targets.graph import model_reader, quantizer_preparation

node = helper.make_node


def graph() -> onnx.ModelProto:
    """A product whose answer three nodes read."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) * 0.3 for name in ("w1", "w2", "w3")}
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="first"),
        node("MatMul", ["a", "w2"], ["b"], name="left"),
        node("Mul", ["a", "a"], ["c"], name="square"),
        node("MatMul", ["a", "w3"], ["d"], name="right"),
        node("Add", ["b", "c"], ["e"], name="sum"),
        node("Add", ["e", "d"], ["y"], name="whole"),
    ]
    made = helper.make_graph(
        nodes,
        "three",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("excluded", [[], ["left"], ["left", "square"], ["left", "square", "right"], ["sum", "left"]])
def test_every_mixture_is_a_sound_graph(excluded: list[str]) -> None:
    model = graph()
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    wanted = answers(model, {"x": x})
    made = quantizer_preparation.convert_to_float16(model_reader.infer_shapes(graph(), where="graph"), excluded)
    # Unique names and outputs, each node behind what it reads.
    onnx.checker.check_model(made, full_check=True)
    names = [one.name for one in made.graph.node]
    assert len(names) == len(set(names))
    types = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
    assert floats == {{"left": "w2", "right": "w3"}[name] for name in excluded if name in ("left", "right")}
    np.testing.assert_allclose(answers(made, {"x": x}), wanted, rtol=0.02, atol=0.02)
