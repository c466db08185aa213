"""What the graph for TensorFlow computes is what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.backends.tflite import graph_preparation


@pytest.mark.parametrize("operator", ["ReduceSum", "ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("noop", [0, 1])
def test_a_reduction_over_no_axis_is_none_where_it_says_so(operator: str, stored: bool, noop: int) -> None:
    inputs = ["x", "none"] if stored else ["x"]
    node = helper.make_node(operator, inputs, ["y"], name="reduce", noop_with_empty_axes=noop, keepdims=1)
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 4] if noop else [1, 1, 1]),
    ]
    weights = [numpy_helper.from_array(np.zeros(0, np.int64), "none")] if stored else []
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    made, _ = graph_preparation.prepare(model)
    assert (operator in {one.op_type for one in made.graph.node}) == (not noop)
    x = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
    wanted, got = (
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for one in (model, made)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
