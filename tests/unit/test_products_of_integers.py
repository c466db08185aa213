"""Products of integers for ONNX Runtime: masks that nobody needs go, biases join in, and the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.backends.onnxruntime import integer_products

Array = npt.NDArray[Any]
node = helper.make_node
CHANNELS, COLUMNS = 8, 6
LOUD = [2, 5]


def tensors(*, per_column: bool = True, zeros: bool = True) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    mask = np.ones(CHANNELS, np.float32)
    mask[LOUD] = 0
    made: dict[str, Array] = {"mask": mask, "step": np.float32(0.02), "middle": np.uint8(128), "at": np.array(LOUD)}
    for name in ("w", "v"):
        weight = rng.integers(-63, 64, (CHANNELS, COLUMNS)).astype(np.int8)
        weight[LOUD] = 0 if zeros else 7
        shape = (COLUMNS,) if per_column else ()
        made |= {
            name: weight,
            f"{name}_step": np.asarray(rng.uniform(0.01, 0.02, shape), np.float32),
            f"{name}_zero": np.zeros(shape, np.int8),
            f"{name}_bias": rng.standard_normal(COLUMNS).astype(np.float32),
            f"{name}_apart": rng.standard_normal((len(LOUD), COLUMNS)).astype(np.float32),
        }
    return made


def layer(name: str, *, apart: bool = False, bias: bool = True) -> list[onnx.NodeProto]:
    """Integers times a matrix, what was computed apart, and a bias; gives the tensor named so in upper case."""
    made = [
        node("DequantizeLinear", [name, f"{name}_step", f"{name}_zero"], [f"{name}_back"], axis=1),
        node("MatMul", ["back", f"{name}_back"], [f"{name}_1"], name=f"{name}_product"),
    ]
    last = f"{name}_1"
    if apart:
        made += [
            node("MatMul", ["picked", f"{name}_apart"], [f"{name}_2"], name=f"{name}_beside"),
            node("Add", [last, f"{name}_2"], [f"{name}_3"], name=f"{name}_both"),
        ]
        last = f"{name}_3"
    if bias:
        made.append(node("Add", [f"{name}_bias", last], [f"{name}_4"], name=f"{name}_with_bias"))
        last = f"{name}_4"
    return [*made, node("Identity", [last], [name.upper()], name=f"{name}_answer")]


def graph(
    layers: list[onnx.NodeProto],
    weights: dict[str, Array],
    *,
    masked: bool = True,
    outputs: tuple[str, ...] = ("W", "V"),
) -> onnx.ModelProto:
    nodes = [
        *([node("Mul", ["x", "mask"], ["rest"], name="mask")] if masked else [node("Identity", ["x"], ["rest"])]),
        node("Gather", ["x", "at"], ["picked"], axis=-1),
        node("QuantizeLinear", ["rest", "step", "middle"], ["down"]),
        node("DequantizeLinear", ["down", "step", "middle"], ["back"]),
        *layers,
    ]
    made = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, CHANNELS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, None]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def answers(model: onnx.ModelProto) -> list[Array]:
    """For values that reach over the range of the integers, in the loud channels far over it."""
    x = np.random.default_rng(5).standard_normal((4, 3, CHANNELS)).astype(np.float32)
    x[..., LOUD] *= 100
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, {"x": x})
    return found


def operators(model: onnx.ModelProto) -> list[str]:
    return [one.op_type for one in model.graph.node]


@pytest.mark.parametrize("per_column", [True, False])
def test_a_mask_that_meets_zeros_goes_and_every_bit_stays(per_column: bool) -> None:
    model = graph([*layer("w", apart=True), *layer("v")], tensors(per_column=per_column))
    before = answers(model)
    integer_products.without_masks(model)
    assert "Mul" not in operators(model)
    assert "mask" not in {tensor.name for tensor in model.graph.initializer}
    for old, new in zip(before, answers(model), strict=True):
        np.testing.assert_array_equal(old, new)


def needed_by_weights() -> onnx.ModelProto:
    return graph([*layer("w"), *layer("v")], tensors(zeros=False))


def needed_by_one_of_two() -> onnx.ModelProto:
    weights = tensors()
    weights["v"] = tensors(zeros=False)["v"]
    return graph([*layer("w"), *layer("v")], weights)


def needed_in_float() -> onnx.ModelProto:
    made = [*layer("w"), node("Relu", ["rest"], ["V"])]
    return graph(made, tensors())


def an_answer_itself() -> onnx.ModelProto:
    return graph(layer("w"), tensors(), outputs=("W", "rest"))


def no_mask() -> onnx.ModelProto:
    weights = tensors()
    weights["mask"][LOUD] = 0.5
    return graph([*layer("w"), *layer("v")], weights)


def integers_read_otherwise() -> onnx.ModelProto:
    made = [*layer("w"), node("Relu", ["back"], ["V"])]
    return graph(made, tensors())


@pytest.mark.parametrize(
    "make",
    [needed_by_weights, needed_by_one_of_two, needed_in_float, an_answer_itself, no_mask, integers_read_otherwise],
)
def test_a_mask_that_is_needed_stays(make: Any) -> None:
    model = make()
    kept = answers(model)
    integer_products.without_masks(model)
    assert "Mul" in operators(model)
    for old, new in zip(kept, answers(model), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("per_column", [True, False])
def test_a_bias_joins_its_product(per_column: bool, apart: bool) -> None:
    model = graph([*layer("w", apart=apart), *layer("v", bias=False)], tensors(per_column=per_column), masked=False)
    before = answers(model)
    integer_products.with_biases(model)
    onnx.checker.check_model(model)
    found = operators(model)
    assert found.count("MatMulIntegerToFloat") == 1
    # Without a bias it is left to ONNX Runtime, which makes the same of it.
    assert found.count("Add") == int(apart)
    assert found.count("MatMul") == 1 + int(apart)
    assert [one.name for one in model.graph.node if one.op_type == "MatMulIntegerToFloat"] == ["w_product"]
    for old, new in zip(before, answers(model), strict=True):
        np.testing.assert_allclose(old, new, rtol=1e-5, atol=1e-5)


def test_a_bias_of_two_products_is_added_once() -> None:
    made = [*layer("w", bias=False)[:-1], *layer("v", bias=False)[:-1]]
    made += [node("Add", ["w_1", "v_1"], ["both"]), node("Add", ["both", "w_bias"], ["W"])]
    model = graph(made, tensors(), outputs=("W",))
    before = answers(model)
    integer_products.with_biases(model)
    assert operators(model).count("MatMulIntegerToFloat") == 1
    np.testing.assert_allclose(answers(model)[0], before[0], rtol=1e-5, atol=1e-5)


def read_by_another() -> onnx.ModelProto:
    return graph([*layer("w"), node("Relu", ["w_1"], ["V"])], tensors())


def a_number_for_all() -> onnx.ModelProto:
    weights = tensors()
    weights["w_bias"] = weights["w_bias"][:1]
    return graph(layer("w"), weights, outputs=("W",))


def rounded_at_once() -> onnx.ModelProto:
    made = layer("w", bias=False)[:-1]
    made += [
        node("QuantizeLinear", ["w_1", "step", "middle"], ["w_2"]),
        node("DequantizeLinear", ["w_2", "step", "middle"], ["w_3"]),
        node("Add", ["w_3", "w_bias"], ["W"]),
    ]
    return graph(made, tensors(), outputs=("W",))


def a_zero_point() -> onnx.ModelProto:
    weights = tensors()
    weights["w_zero"] = weights["w_zero"] + np.int8(3)
    return graph(layer("w"), weights, outputs=("W",))


@pytest.mark.parametrize("make", [read_by_another, a_number_for_all, rounded_at_once, a_zero_point])
def test_other_products_are_left_alone(make: Any) -> None:
    model = make()
    before = answers(model)
    integer_products.with_biases(model)
    assert "MatMulIntegerToFloat" not in operators(model)
    for old, new in zip(before, answers(model), strict=True):
        np.testing.assert_array_equal(old, new)
