"""Rounding that makes up for itself: what a layer's weights meet, the codes that are chosen on it, and the grid that
they stay in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from tests.support.pruning import Samples
from tests.support.pruning import answers as run

from kedge.step import Context
from kedge.steps.correct_bias import CorrectBias, CorrectBiasOptions
from kedge.steps.fine_tune import FineTune, FineTuneOptions
from kedge_protocol.errors import KedgeError, LoweringError
from kedge_targets.graph import gptq, im2col, layers, weight_dequantization, weight_encodings
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Plan, Precision

Array = npt.NDArray[Any]
FEW_BITS = [Precision.INT4, Precision.CODEBOOK4, Precision.LOG4]


def graph(weight: Array, shape: list[int | str], operator: str = "Conv", **attributes: Any) -> onnx.ModelProto:
    """One layer from ``x`` to ``y`` with the weight ``w``."""
    node = helper.make_node(operator, ["x", "w"], ["y"], name="layer", **attributes)
    made = helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [helper.make_empty_tensor_value_info("y")],
            [numpy_helper.from_array(weight.astype(np.float32), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 8
    return onnx.shape_inference.infer_shapes(made)


def reading(model: onnx.ModelProto) -> im2col.RowReader | None:
    (layer,) = layers.layers(model)
    weight = Wiring(model).constant("w")
    assert weight is not None
    return im2col.read_rows(layer, model.graph.node[0], weight.shape)


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((8, 3, 3, 3), (2, 3, 7, 9), {}),
    "strides": ((4, 3, 3, 2), (2, 3, 9, 8), {"strides": [2, 3], "pads": [1, 0, 2, 1]}),
    "dilations": ((4, 2, 3, 3), (1, 2, 11, 9), {"dilations": [2, 3], "strides": [1, 2]}),
    "groups": ((6, 2, 3, 3), (2, 6, 6, 5), {"group": 3, "pads": [1, 1, 1, 1]}),
    "depthwise": ((5, 1, 3, 3), (2, 5, 6, 6), {"group": 5}),
    "same upper": ((4, 3, 3, 4), (2, 3, 7, 6), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ((4, 3, 2, 4), (2, 3, 7, 6), {"auto_pad": "SAME_LOWER"}),
    "valid": ((4, 3, 2, 4), (2, 3, 7, 6), {"auto_pad": "VALID"}),
    "one axis": ((4, 3, 5), (2, 3, 12), {"pads": [2, 1]}),
    "three axes": ((4, 2, 2, 3, 2), (2, 2, 4, 5, 4), {"strides": [1, 2, 1]}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_is_a_product_with_the_patches_of_its_input(case: str) -> None:
    shape, given_shape, attributes = CONVOLUTIONS[case]
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal(shape), rng.standard_normal(given_shape).astype(np.float32)
    model = graph(weight, list(given_shape), **attributes)
    one = reading(model)
    assert one is not None
    rows = one.rows(x)
    assert rows.shape[0] == attributes.get("group", 1)
    channels = weight.reshape(one.groups, -1, one.length)
    made = rows @ channels.transpose(0, 2, 1)  # groups x rows x channels
    wanted = run(model, {"x": x})  # samples x channels x space
    flat = wanted.reshape(*wanted.shape[:2], -1).transpose(1, 0, 2).reshape(shape[0], -1)
    np.testing.assert_allclose(made.transpose(0, 2, 1).reshape(shape[0], -1), flat, rtol=1e-4, atol=1e-4)


def test_of_a_large_picture_some_patches_evenly_over_it_are_taken() -> None:
    one = reading(graph(np.ones((2, 3, 3, 3)), [1, 3, 130, 70], pads=[1, 1, 1, 1]))
    assert one is not None
    x = np.broadcast_to(np.arange(130, dtype=np.float32)[:, None], (2, 3, 130, 70))
    rows = one.rows(np.ascontiguousarray(x))
    assert rows.shape == (1, 2 * im2col.POSITIONS, 27)
    centres = rows[0, : im2col.POSITIONS, 4]
    assert centres[0] == 0
    assert centres[-1] == 129
    assert np.abs(np.histogram(centres, bins=10)[0] - im2col.POSITIONS / 10).max() <= 16


@pytest.mark.parametrize(
    "model",
    [
        graph(np.ones((4, 3)), [3, 5], "Gemm", transA=1),
        graph(np.ones((3, 4, 2, 2)), [1, 3, 5, 5], "ConvTranspose"),
        graph(np.ones((2, 3, 4)), [2, 5, 3], "MatMul"),
    ],
    ids=["turned input", "turned convolution", "several matrices"],
)
def test_what_meets_no_rows_is_rounded_each_weight_by_itself(model: onnx.ModelProto) -> None:
    assert reading(model) is None
    samples = [{"x": np.ones([one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim], np.float32)}]
    assert gptq.products(model, samples, {"layer": Precision.INT4}) == {}


LAYERS: dict[str, tuple[str, tuple[int, ...], list[int | str], int, dict[str, Any]]] = {
    "matmul": ("MatMul", (256, 32), ["n", 256], 1, {}),
    "gemm": ("Gemm", (32, 256), ["n", 256], 0, {"transB": 1}),
    "conv": ("Conv", (32, 16, 3, 3), ["n", 16, 8, 8], 0, {"pads": [1, 1, 1, 1]}),
    "groups": ("Conv", (32, 16, 3, 3), ["n", 32, 8, 8], 0, {"group": 2}),
}


def mixed(rng: np.random.Generator, shape: list[int | str]) -> Array:
    """Inputs that go together, as those of a real layer do."""
    width = int(shape[1])
    rows = 400 if len(shape) == 2 else 8 * 64
    x = (rng.standard_normal((rows, width // 8)) @ rng.standard_normal((width // 8, width))).astype(np.float32)
    return x if len(shape) == 2 else np.ascontiguousarray(np.moveaxis(x.reshape(8, 8, 8, width), -1, 1))


@pytest.mark.parametrize("precision", FEW_BITS)
@pytest.mark.parametrize("case", LAYERS)
def test_the_layer_answers_nearer_and_its_weights_stay_in_their_grid(case: str, precision: Precision) -> None:
    operator, size, shape, axis, attributes = LAYERS[case]
    rng = np.random.default_rng(5)
    weight, x = rng.standard_normal(size).astype(np.float32), mixed(rng, shape)
    model = graph(weight, shape, operator, **attributes)
    product = gptq.products(model, [{"x": x}], {"layer": precision})["layer"]
    plain = weight_encodings.encode(weight, precision, axis=axis)
    better = gptq.encode_weights(weight, precision, product, axis=axis)
    np.testing.assert_array_equal(better.scales, plain.scales)
    assert (better.table is None) == (plain.table is None)
    if better.table is not None:
        np.testing.assert_array_equal(better.table, plain.table)
    wanted = run(model, {"x": x})
    errors = []
    for made in (plain, better):
        rounded = graph(made.decoded(), shape, operator, **attributes)
        errors.append(float(np.square(run(rounded, {"x": x}) - wanted).sum()))
    assert errors[1] < 0.5 * errors[0]


def test_a_few_long_rows_do_not_decide_for_a_product() -> None:
    rng = np.random.default_rng(5)
    weight, x = rng.standard_normal((256, 32)).astype(np.float32), mixed(rng, ["n", 256])
    x[::50] *= 300
    model = graph(weight, ["n", 256], "MatMul")
    product = gptq.products(model, [{"x": x}], {"layer": Precision.INT4})["layer"]
    usual = np.delete(x, np.s_[::50], axis=0)
    errors = [
        np.square(usual @ (made.decoded() - weight)).sum()
        for made in (
            weight_encodings.encode(weight, Precision.INT4, axis=1),
            gptq.encode_weights(weight, Precision.INT4, product, axis=1),
        )
    ]
    assert errors[1] < 0.5 * errors[0]


@given(
    seed=st.integers(0, 2**16),
    channels=st.integers(1, 5),
    length=st.integers(2, 150),
    asymmetric=st.booleans(),
    offset=st.sampled_from([0.0, 3.0, -3.0]),
    precision=st.sampled_from([Precision.INT4, Precision.LOG4]),
)
@settings(deadline=None, max_examples=60)
def test_what_was_rounded_once_is_rounded_to_itself(
    seed: int, channels: int, length: int, asymmetric: bool, offset: float, precision: Precision
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((channels, length)) + offset).astype(np.float32)
    x = rng.standard_normal((length + 3, length)) @ rng.standard_normal((length, length))
    product = (x.T @ x)[None]
    once = gptq.encode_weights(weight, precision, product, axis=0, asymmetric=asymmetric).decoded()
    for again in (None, product):
        twice = gptq.encode_weights(once, precision, again, axis=0, asymmetric=asymmetric).decoded()
        np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-6 * float(np.abs(weight).max()))


def test_eight_bits_and_channels_that_are_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph(np.ones((40, 8)), ["n", 40], "MatMul")
    samples = [{"x": np.ones((2, 40), np.float32)}]
    for precision in (Precision.CODEBOOK8, Precision.LOG8, Precision.INT8, Precision.FLOAT16):
        assert gptq.products(model, samples, {"layer": precision}) == {}
    assert list(gptq.products(model, samples, {"layer": Precision.LOG4})) == ["layer"]
    monkeypatch.setattr(gptq, "LONGEST", 39)
    assert gptq.products(model, samples, {"layer": Precision.LOG4}) == {}


def test_samples_that_the_graph_does_not_take_are_an_error_that_says_so() -> None:
    model = network()
    with pytest.raises(LoweringError, match="does not run on the calibration samples"):
        gptq.products(model, [{"x": np.ones((1, 3, 5, 5), np.float32)}], {"second": Precision.INT4})


def network() -> onnx.ModelProto:
    """Two convolutions and what is between them."""
    rng = np.random.default_rng(8)
    stored = {"w1": (24, 8, 3, 3), "w2": (10, 24, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="second"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], name="pool"),
        helper.make_node("Flatten", ["d"], ["y"], name="flat"),
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "two",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8, 6, 6])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 10])],
            [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) / 10, n) for n, s in stored.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    made.ir_version = 8
    return onnx.shape_inference.infer_shapes(made)


def weights(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("precision", FEW_BITS)
def test_training_starts_where_the_backend_would_round_and_ends_with_what_is_stored(
    tmp_path: Path, precision: Precision
) -> None:
    model = network()
    x = mixed(np.random.default_rng(3), ["n", 8, 6, 6])[:, :, :6, :6]
    used = Context(teacher=model, samples=Samples(x=x), plan=Plan(default=precision), workdir=tmp_path)
    precisions = {"first": precision, "second": precision}
    # A rate at which nothing moves: the start is the result.
    tuned = FineTune(FineTuneOptions(steps=1, learning_rate=1e-12)).apply(model, used)
    start = gptq.round_weights(model, [{"x": x}], precisions)
    for name, value in weights(tuned).items():
        np.testing.assert_allclose(value, start[name], rtol=0.02, atol=1e-6)
    stored = weight_dequantization.store_weights(
        tuned, precisions, products=gptq.products(tuned, [{"x": x}], precisions)
    )
    plain = weight_dequantization.store_weights(model, precisions)
    wanted = run(model, {"x": x})
    tuned_error, plain_error = (np.square(run(one, {"x": x}) - wanted).mean() for one in (stored, plain))
    assert tuned_error < 0.5 * plain_error


def test_a_bias_is_corrected_for_the_codes_that_are_stored(tmp_path: Path) -> None:
    model = network()
    x = mixed(np.random.default_rng(3), ["n", 8, 6, 6])[:, :, :6, :6]
    plan = Plan(default=Precision.FLOAT32, layers={"second": Precision.INT4})
    used = Context(teacher=model, samples=Samples(x=x), plan=plan, workdir=tmp_path)
    made = CorrectBias(CorrectBiasOptions()).apply(model, used)
    wanted = run(model, {"x": x})

    def shift(one: onnx.ModelProto) -> float:
        products = gptq.products(one, [{"x": x}], plan.layers)
        stored = weight_dequantization.store_weights(one, plan.layers, products=products)
        return float(np.abs((run(stored, {"x": x}) - wanted).mean(axis=0)).max())

    assert shift(made) < 0.05 * shift(model)


@pytest.mark.parametrize("step", [CorrectBias(CorrectBiasOptions()), FineTune(FineTuneOptions(steps=1))])
def test_a_step_says_that_the_samples_do_not_fit(tmp_path: Path, step: Any) -> None:
    model = network()
    samples = Samples(x=np.ones((2, 3, 6, 6), np.float32))
    used = Context(teacher=model, samples=samples, plan=Plan(default=Precision.INT4), workdir=tmp_path)
    with pytest.raises(KedgeError, match="does not run on the calibration samples"):
        step.apply(model, used)
