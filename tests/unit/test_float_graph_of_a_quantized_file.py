"""The float graph of a file that holds its weights as integers."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.graph import dequantization


@pytest.mark.parametrize(("axis", "blocks"), [(0, (2, 12)), (1, (16, 2))])
@pytest.mark.parametrize("zero", [True, False])
def test_weights_with_a_scale_for_each_block_are_read_back(axis: int, blocks: tuple[int, int], zero: bool) -> None:
    rng = np.random.default_rng(0)
    codes = helper.make_tensor("q", TensorProto.INT4, [16, 12], rng.integers(-8, 8, 192))
    scale = numpy_helper.from_array(rng.uniform(0.05, 0.2, blocks).astype(np.float32), "s")
    zeros = [helper.make_tensor("z", TensorProto.INT4, blocks, rng.integers(-2, 3, np.prod(blocks)))] if zero else []
    size = 8 if axis == 0 else 6
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["q", "s", *(["z"] if zero else [])], ["w"], name="back", axis=axis, block_size=size
        ),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", many]) for name, many in (("x", 16), ("y", 12))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [codes, scale, *zeros])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made, notes = dequantization.restored(model)
    assert [node.op_type for node in made.graph.node] == ["MatMul"]
    assert "taken as they are" in notes[0]
    x = rng.standard_normal((5, 16)).astype(np.float32)
    wanted, got = (
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for one in (model, made)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
