"""What FINN will not bring into the fabric is said before its toolchain runs: the node, and what to change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tests.support import few_bits, lowering
from tests.support.few_bits import Builder

from kedge_protocol.errors import LoweringError, UnsupportedOperatorError
from kedge_targets.backends.finn import convertibility, graph_preparation, precisions, quantization
from kedge_targets.backends.finn.toolchain_client import Outside
from kedge_targets.graph import model_writer, qonnx
from kedge_targets.graph.library import load as library
from kedge_targets.numerics import Plan, Precision, RangeMethod

W4A4 = Plan(default=Precision.W4A4, range_method=RangeMethod.MSE)


def taken(model: onnx.ModelProto, folder: Path, *, input_type: str | None = None) -> quantization.Quantized:
    path = folder / "model.onnx"
    model_writer.save(model, path)
    calibration = lowering.Calibration("image", np.random.default_rng(0).random((8, 1, 8, 8), dtype=np.float32))
    return quantization.quantize_graph(path, W4A4, calibration, workdir=folder, input_type=input_type)


def refusal(model: onnx.ModelProto, folder: Path) -> UnsupportedOperatorError:
    with pytest.raises(UnsupportedOperatorError) as caught:
        taken(model, folder)
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


def answers(model: onnx.ModelProto, samples: np.ndarray) -> np.ndarray:
    session = library().InferenceSession(
        qonnx.expand_qonnx(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.concatenate([session.run(None, {"image": sample[None]})[0] for sample in samples])


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_chain_of_layers_is_taken_as_it_is(tmp_path: Path, depthwise: bool) -> None:
    model = few_bits.network(depthwise=depthwise)
    found = taken(model, tmp_path)
    assert found.taken
    assert found.samples == 0
    assert precisions.of(found.model) == "w4a4"
    names = ["first", *(["depthwise"] if depthwise else []), "second", "hidden", "scores"]
    assert convertibility.weighted(found.model) == names


def test_a_residual_network_names_where_it_branches_and_where_it_joins(tmp_path: Path) -> None:
    error = refusal(few_bits.network(residual=True), tmp_path)
    assert "skip" in str(error)
    assert "residual" in str(error)
    assert "MaxPool" in str(error.where)


def test_a_float_residual_network_is_refused_before_calibration(tmp_path: Path) -> None:
    make = Builder()
    left = make.node("Relu", make.node("Conv", "image", make.constant(np.ones((1, 1, 3, 3))), pads=[1, 1, 1, 1]))
    joined = make.node("Add", left, "image", name="skip")
    model = make.model((1, 1, 8, 8), make.node("Flatten", joined, name="flat"), classes=64)
    path = tmp_path / "float.onnx"
    model_writer.save(model, path)
    calibration = lowering.Calibration("image", np.zeros((4, 1, 8, 8), dtype=np.float32))
    with pytest.raises(UnsupportedOperatorError, match="skip"):
        quantization.quantize_graph(path, W4A4, calibration, workdir=tmp_path)
    assert calibration.passes == 0


def test_an_unsupported_layer_is_named(tmp_path: Path) -> None:
    error = refusal(few_bits.network(softmax=True), tmp_path)
    assert error.where == "node 'softmax' (Softmax)"
    assert "without it" in str(error.remedy)


def test_an_input_that_leaves_a_convolution_outside_is_named(tmp_path: Path) -> None:
    error = refusal(few_bits.network(quantized_input=False), tmp_path)
    assert error.where == "node 'first' (Conv)"
    assert "outside the fabric" in error.what
    assert "UINT8" in str(error.remedy)


def test_an_input_of_integers_needs_no_quantizer(tmp_path: Path) -> None:
    model = few_bits.network(quantized_input=False)
    assert taken(model, tmp_path, input_type="UINT8").taken
    note = onnx.TensorAnnotation(tensor_name="image")
    note.quant_parameter_tensor_names.add(key="finn_datatype", value="UINT8")
    model.graph.quantization_annotation.append(note)
    assert taken(model, tmp_path).taken


@pytest.mark.parametrize(
    ("bits", "zero", "scale", "message"),
    [
        (9, 0.0, 0.1, "9"),
        (4, 3.0, 0.1, "zero-point"),
        (4, 0.0, np.full((1, 8, 1, 1), 0.1), "8 scales"),
    ],
)
def test_a_quantizer_that_is_no_threshold_is_named(
    tmp_path: Path, bits: float, zero: float, scale: object, message: str
) -> None:
    make = Builder()
    x = make.quant("image", 1 / 255, 8, signed=0)
    x = make.node("Relu", make.conv(x, 4, (8, 1, 3, 3), name="first", pads=[1, 1, 1, 1]))
    x = make.quant(x, scale, bits, signed=0, zero=zero, name="odd")
    x = make.gemm(make.node("Flatten", x), 4, 512, 10)
    error = refusal(make.model((1, 1, 8, 8), x), tmp_path)
    assert error.where == "node 'odd' (Quant)"
    assert message in error.what


def test_a_weight_without_a_quantizer_is_named(tmp_path: Path) -> None:
    make = Builder()
    x = make.quant("image", 1 / 255, 8, signed=0)
    x = make.node("Conv", x, make.constant(np.ones((8, 1, 3, 3))), name="plain", kernel_shape=[3, 3])
    error = refusal(make.model((1, 1, 8, 8), make.node("Flatten", x), classes=288), tmp_path)
    assert error.where == "node 'plain' (Conv)"
    assert "weight" in error.what


def test_values_between_two_layers_must_be_quantized(tmp_path: Path) -> None:
    make = Builder()
    x = make.quant("image", 1 / 255, 8, signed=0)
    x = make.conv(x, 4, (8, 1, 3, 3), name="first")
    x = make.conv(x, 4, (8, 8, 3, 3), name="second")
    error = refusal(make.model((1, 1, 8, 8), make.node("Flatten", x), classes=128), tmp_path)
    assert error.where == "node 'second' (Conv)"


def test_groups_of_several_channels_are_named(tmp_path: Path) -> None:
    make = Builder()
    x = make.relu(make.conv(make.quant("image", 1 / 255, 8, signed=0), 4, (8, 1, 3, 3), name="first"), 4)
    x = make.conv(x, 4, (8, 4, 3, 3), name="grouped", group=2)
    error = refusal(make.model((1, 1, 8, 8), make.node("Flatten", x), classes=128), tmp_path)
    assert error.where == "node 'grouped' (Conv)"
    assert "2 groups" in error.what


def test_attributes_left_to_defaults_are_written_out_and_told(tmp_path: Path) -> None:
    found = taken(few_bits.network(bare=True), tmp_path)
    first = next(node for node in found.model.graph.node if node.name == "first")
    assert graph_preparation.attributes_of(first) == {
        "kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1], "group": 1,
    }  # fmt: skip
    assert any("first" in note for note in found.notes)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(5, 9), kernel=st.integers(1, 4), stride=st.integers(1, 3),
    how=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
)  # fmt: skip
def test_written_out_padding_is_what_onnx_computes(size: int, kernel: int, stride: int, how: str) -> None:
    make = Builder()
    weight = make.constant(np.random.default_rng(0).standard_normal((2, 1, kernel, kernel)))
    x = make.node("Conv", "image", weight, name="conv", auto_pad=how, strides=[stride, stride])
    model = make.model((1, 1, size, size), make.node("Flatten", x))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(model.graph.output[0].name, TensorProto.FLOAT, None))
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    assert graph_preparation.complete_attributes(whole) == ["conv"]
    samples = np.random.default_rng(1).standard_normal((2, 1, size, size)).astype(np.float32)
    np.testing.assert_allclose(answers(whole, samples), answers(model, samples), rtol=1e-5, atol=1e-6)


def test_an_average_becomes_a_convolution_that_computes_the_same(tmp_path: Path) -> None:
    model = few_bits.network(average=True)
    found = taken(model, tmp_path)
    node = next(node for node in found.model.graph.node if node.name == "average")
    assert node.op_type == "Conv"
    assert any("average" in note for note in found.notes)
    samples = np.random.default_rng(2).random((20, 1, 8, 8), dtype=np.float32)
    difference = np.abs(answers(found.model, samples) - answers(model, samples))
    # A mean in the middle of two steps may fall to either side: sums in another order.
    assert np.median(difference) < 1e-5


def test_what_finn_leaves_outside_is_listed_or_refused() -> None:
    turn = Outside(name="Transpose_0", operator="Transpose", place="before", weights=0)
    largest = Outside(name="TopK_0", operator="TopK", place="behind", weights=0)
    assert convertibility.judge([]) == ["the whole network is in the fabric"]
    (note,) = convertibility.judge([turn, largest])
    assert "Transpose" in note
    assert "TopK" in note
    with pytest.raises(LoweringError, match="MatMul_0") as caught:
        convertibility.judge([turn, Outside(name="MatMul_0", operator="MatMul", place="before", weights=1)])
    assert "quantize the model's input" in str(caught.value)
    with pytest.raises(LoweringError, match="and 1 more") as caught:
        convertibility.judge(
            [Outside(name=name, operator="Mul", place="between", weights=1) for name in ("Mul_3", "Mul_7")]
        )
    assert "behind the last scaling" in str(caught.value)
    with pytest.raises(LoweringError, match="between"):
        convertibility.judge([Outside(name="Transpose_1", operator="Transpose", place="between", weights=0)])


def test_a_plan_of_another_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    model_writer.save(lowering.classifier(), path)
    calibration = lowering.Calibration("image", lowering.images(4))
    with pytest.raises(LoweringError, match="int8"):
        quantization.quantize_graph(path, Plan(default=Precision.INT8), calibration, workdir=tmp_path)


def test_layers_of_several_widths_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    model_writer.save(lowering.classifier(), path)
    calibration = lowering.Calibration("image", lowering.images(16))
    plan = Plan(default=Precision.W2A2, layers={"second": Precision.W8A8}, range_method=RangeMethod.MSE)
    found = quantization.quantize_graph(path, plan, calibration, workdir=tmp_path)
    assert found.samples == 16
    bits = {
        node.input[0]: float(onnx.numpy_helper.to_array(constant).reshape(()))
        for node in found.model.graph.node
        if node.op_type == "Quant"
        for constant in found.model.graph.initializer
        if constant.name == node.input[3]
    }
    assert (bits["w1"], bits["w2"], bits["w3"]) == (2.0, 8.0, 2.0)
