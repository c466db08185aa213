"""Where a graph of integers leaves them: what stays in float, and what is read unrounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.backends.onnxruntime.int8 import INTEGER_OPERATORS
from kedge_targets.graph import float_regions

Array = npt.NDArray[Any]
node = helper.make_node


def graph(nodes: list[onnx.NodeProto], inputs: dict[str, Any], weights: dict[str, Array]) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def random(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answer: Array = session.run(None, feed)[0]
    return answer


def block() -> onnx.ModelProto:
    """Half of a transformer's layer: table, sum, norm, product with bias, residual sum, norm, product."""
    return graph(
        [
            node("Gather", ["table", "ids"], ["e"], name="words"),
            node("Add", ["e", "place"], ["p"], name="places"),
            node("LayerNormalization", ["p", "g"], ["n"], name="norm"),
            node("MatMul", ["n", "w1"], ["m"], name="dense"),
            node("Add", ["m", "b1"], ["d"], name="bias"),
            node("Add", ["d", "n"], ["r"], name="residual"),
            node("LayerNormalization", ["r", "g"], ["o"], name="norm2"),
            node("Mul", ["o", "g"], ["s"], name="scale"),
            node("MatMul", ["s", "w2"], ["y"], name="last"),
        ],
        {"ids": (TensorProto.INT64, ["N", 3])},
        {
            "table": random(20, 8), "place": random(3, 8), "g": np.ones(8, np.float32), "w1": random(8, 8),
            "b1": random(8), "w2": random(8, 4),
        },
    )  # fmt: skip


def test_between_norms_only_products_and_tables_are_integers() -> None:
    kept = float_regions.extend_float_regions(block(), [], INTEGER_OPERATORS)
    assert kept == ["places", "norm", "bias", "residual", "norm2", "scale"]


def test_a_convolutional_network_is_integers_throughout() -> None:
    model = graph(
        [
            node("Conv", ["x", "w1"], ["c"], name="first", pads=[1] * 4),
            node("Relu", ["c"], ["r"], name="relu"),
            node("Conv", ["r", "w2"], ["d"], name="second", pads=[1] * 4),
            node("Add", ["d", "r"], ["a"], name="residual"),
            node("GlobalAveragePool", ["a"], ["p"], name="pool"),
            node("Flatten", ["p"], ["f"], name="flat"),
            node("Gemm", ["f", "w3"], ["l"], name="last"),
            node("Softmax", ["l"], ["y"], name="softmax"),
        ],
        {"x": (TensorProto.FLOAT, ["N", 4, 6, 6])},
        {"w1": random(4, 4, 3, 3), "w2": random(4, 4, 3, 3), "w3": random(4, 3)},
    )
    assert float_regions.extend_float_regions(model, [], INTEGER_OPERATORS) == ["softmax"]
    # Of a layer that must be float the way back to the layer before.
    assert float_regions.extend_float_regions(model, ["last"], INTEGER_OPERATORS) == [
        "residual",
        "pool",
        "flat",
        "last",
        "softmax",
    ]


def test_rows_are_picked_before_they_are_read_back_and_the_answer_is_the_same() -> None:
    codes = np.random.default_rng(0).integers(0, 255, (20, 4), np.uint8)
    model = graph(
        [
            node("DequantizeLinear", ["codes", "s", "z"], ["table"], name="up"),
            node("Gather", ["table", "ids"], ["row"], name="words"),
            node("Neg", ["row"], ["y"], name="negated"),
        ],
        {"ids": (TensorProto.INT64, ["N"])},
        {"codes": codes, "s": np.float32(0.25), "z": np.uint8(127)},
    )
    asked = {"ids": np.array([0, 19, 7, 7])}
    before = run(model, asked)
    float_regions.pick_before_reading_back(model)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model))
    assert [one.op_type for one in model.graph.node] == ["Gather", "DequantizeLinear", "Neg"]
    assert model.graph.node[0].input[0] == "codes"
    np.testing.assert_array_equal(run(model, asked), before)
