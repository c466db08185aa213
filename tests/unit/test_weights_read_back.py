"""Weights stored small in a graph: ONNX Runtime reads back just what the form says."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from kedge_targets.graph import weight_dequantization, weight_encodings
from kedge_targets.numerics import Family, Precision

FORMS = [precision for precision in Precision if precision.family is Family.WEIGHTS]
Array = npt.NDArray[Any]


def graph(node: onnx.NodeProto, weight: Array, shape: list[int | str], *, integers: bool = False) -> onnx.ModelProto:
    """One layer from ``x`` to ``y`` with the weight ``w``."""
    kind = onnx.TensorProto.INT64 if integers else onnx.TensorProto.FLOAT
    made = helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_empty_tensor_value_info("y")],
            [numpy_helper.from_array(weight, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 8
    return onnx.shape_inference.infer_shapes(made)


def run(model: onnx.ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answer: Array = session.run(None, {"x": x})[0]
    return answer


def with_weight(model: onnx.ModelProto, weight: Array) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    return made


CASES = {
    "matmul": (helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"), (192, 40), 1, (5, 192)),
    "gemm": (helper.make_node("Gemm", ["x", "w"], ["y"], name="layer", transB=1), (30, 192), 0, (5, 192)),
    # 45 and 150 weights a channel: no whole number of groups, the first too short for a scale of a codebook.
    "narrow": (helper.make_node("Conv", ["x", "w"], ["y"], name="layer"), (64, 5, 3, 3), 0, (1, 5, 6, 6)),
    "conv": (helper.make_node("Conv", ["x", "w"], ["y"], name="layer"), (24, 6, 5, 5), 0, (1, 6, 7, 7)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", FORMS)
@pytest.mark.parametrize("asymmetric", [True, False])
def test_a_layer_computes_with_the_decoded_weight(case: str, precision: Precision, asymmetric: bool) -> None:
    node, shape, axis, taken = CASES[case]
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal(taken).astype(np.float32)
    model = graph(node, weight, list(taken))
    made = weight_dequantization.store_weights(model, {"layer": precision}, asymmetric=asymmetric, contributed=False)
    assert made.ByteSize() < model.ByteSize()
    wanted = weight_encodings.dequantized(weight, precision, axis=axis, asymmetric=asymmetric)
    np.testing.assert_allclose(run(made, x), run(with_weight(model, wanted), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", FORMS)
@pytest.mark.parametrize("length", [192, 160])
def test_rows_of_an_embedding_are_read_back_alone(precision: Precision, length: int) -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((64, length)).astype(np.float32)
    weight[7, 3] = 40
    node = helper.make_node("Gather", ["w", "x"], ["y"], name="layer")
    model = graph(node, weight, ["n", 3], integers=True)
    made = weight_dequantization.store_weights(model, {"layer": precision})
    asked = np.array([[0, 7, 63], [-1, 7, 12]])
    wanted = weight_encodings.dequantized(weight, precision, axis=0)[asked]
    np.testing.assert_allclose(run(made, asked), wanted, rtol=1e-6)
    # The codes themselves are picked from: no node has the whole table in float.
    tables = {tensor.name for tensor in made.graph.initializer if list(tensor.dims)[:1] == [64]}
    read = {name for one in made.graph.node if one.op_type == "Gather" for name in one.input[:1]}
    assert tables <= read
