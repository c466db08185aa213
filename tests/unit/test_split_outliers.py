"""Outliers computed apart: the same function in float, and a small range for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.pruning import Samples, answers, context

from kedge.steps.equalize import Equalize, EqualizeOptions
from kedge.steps.split_outliers import SplitOutliers, SplitOutliersOptions
from kedge_protocol.errors import ConfigError
from kedge_targets.numerics import Precision

Array = npt.NDArray[Any]
LOUD = [3, 9]


def graph(operator: str, *, groups: int = 1) -> tuple[onnx.ModelProto, Array]:
    """Tanh, then channels of which two are loud, then two layers that read them; also samples."""
    rng = np.random.default_rng(2)
    scale = np.ones(16, np.float32)
    scale[LOUD] = 80
    image = operator == "Conv"
    shape = (16, 5, 5) if image else (16,)
    weight = {"MatMul": (16, 7), "Gemm": (7, 16), "Conv": (16 if groups > 1 else 7, 16 // groups, 3, 3)}[operator]
    more: dict[str, Any] = {"MatMul": {}, "Gemm": {"transB": 1}, "Conv": {"group": groups, "pads": [1] * 4}}[operator]
    nodes = [
        helper.make_node("Tanh", ["x"], ["t"], name="tanh"),
        helper.make_node("Mul", ["t", "scale"], ["m"], name="loud"),
        helper.make_node("Identity", ["m"], ["a"], name="activation"),
        helper.make_node(operator, ["a", "w1", *(["b1"] if operator != "MatMul" else [])], ["y1"], name="one", **more),
        helper.make_node(operator, ["a", "w2"], ["y2"], name="two", **more),
        helper.make_node("Add", ["y1", "y2"], ["y"], name="sum"),
    ]
    tensors = {
        "scale": scale.reshape(-1, 1, 1) if image else scale,
        "w1": rng.standard_normal(weight).astype(np.float32),
        "w2": rng.standard_normal(weight).astype(np.float32),
        "b1": rng.standard_normal(weight[0]).astype(np.float32),
    }
    made = helper.make_graph(
        nodes,
        "loud",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *(weight[0], 5, 5)] if image else ["N", 7])],
        [
            numpy_helper.from_array(value, name)
            for name, value in tensors.items()
            if name != "b1" or operator != "MatMul"
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, rng.standard_normal((40, *shape)).astype(np.float32)


def split(model: onnx.ModelProto, values: Array, folder: Path, **options: Any) -> tuple[onnx.ModelProto, Any]:
    used = context(model, Samples(x=values), folder)
    return SplitOutliers(SplitOutliersOptions(**options)).apply(model, used), used


@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Conv"])
def test_in_float_it_computes_the_same_with_the_outliers_apart(operator: str, tmp_path: Path) -> None:
    model, samples = graph(operator)
    made, used = split(model, samples, tmp_path)
    onnx.checker.check_model(made, full_check=True)
    np.testing.assert_allclose(answers(made, {"x": samples}), answers(model, {"x": samples}), rtol=1e-4, atol=1e-4)
    assert used.figures == {"split-outliers.activations": 1, "split-outliers.channels": 2}
    assert "2 channels of 1 activations" in used.notes[0]
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    axis = {"MatMul": 0, "Gemm": 1, "Conv": 1}[operator]
    for name in ("w1", "w2"):
        assert not np.take(tensors[name], LOUD, axis=axis).any()
        assert np.take(tensors[name], [0, 15], axis=axis).all()
    (apart,) = (list(tensor.dims) for tensor in made.graph.initializer if tensor.name == "w1_outliers")
    assert apart[axis] == 2
    # What is computed apart is float whatever the plan says.
    names = {node.name for node in made.graph.node}
    assert {"one_outliers", "two_outliers", "a_outliers"} <= set(used.layers) <= names
    assert set(used.layers.values()) == {Precision.FLOAT32}
    assert model.SerializeToString() == graph(operator)[0].SerializeToString()


def test_what_the_layers_read_has_the_range_of_the_rest(tmp_path: Path) -> None:
    model, samples = graph("MatMul")
    made, _ = split(model, samples, tmp_path)
    (reader,) = (node for node in made.graph.node if node.name == "one")
    made.graph.output.append(helper.make_empty_tensor_value_info(reader.input[0]))
    from kedge_targets.graph import library

    session = library.load().InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.abs(session.run([reader.input[0]], {"x": samples})[0]).max() <= 1


def test_what_was_dealt_with_is_not_evened_out(tmp_path: Path) -> None:
    model, samples = graph("MatMul")
    made, before = split(model, samples, tmp_path)
    used = context(model, Samples(x=samples), tmp_path)
    used.plan.layers.update(before.layers)
    evened = Equalize(EqualizeOptions(spread=1.0)).apply(made, used)
    assert used.figures["equalize.activations"] == 0
    assert evened.SerializeToString() == made.SerializeToString()


@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Conv"])
def test_before_layers_that_give_more_than_they_take_it_can_be_left(operator: str, tmp_path: Path) -> None:
    # Two layers of 7 behind 16 channels, then the second one more than twice as wide.
    model, samples = graph(operator)
    _, used = split(model, samples, tmp_path, widening=False)
    assert used.figures["split-outliers.activations"] == 1
    for name in ("w1", "w2"):
        (tensor,) = (one for one in model.graph.initializer if one.name == name)
        value = np.concatenate([numpy_helper.to_array(tensor)] * 2, axis=1 if operator == "MatMul" else 0)
        tensor.CopyFrom(numpy_helper.from_array(value, name))
    for bias in (one for one in model.graph.initializer if one.name == "b1"):
        bias.CopyFrom(numpy_helper.from_array(np.concatenate([numpy_helper.to_array(bias)] * 2), "b1"))
    model.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("y"))
    for widening in (False, True):
        _, used = split(model, samples, tmp_path, widening=widening)
        assert used.figures["split-outliers.activations"] == int(widening)


@pytest.mark.parametrize("options", [{"channels": 1}, {"spread": 100.0}])
def test_no_outliers_no_change(options: dict[str, Any], tmp_path: Path) -> None:
    model, samples = graph("Gemm")
    made, used = split(model, samples, tmp_path, **options)
    assert made.SerializeToString() == model.SerializeToString()
    assert used.layers == {}
    assert "no channel is an outlier" in used.notes[0]


def test_a_depthwise_convolution_is_left_alone(tmp_path: Path) -> None:
    model, samples = graph("Conv", groups=16)
    made, _ = split(model, samples, tmp_path)
    assert made.SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize("options", [{"channels": 0}, {"spread": 0.5}, {"samples": 0}])
def test_options_without_a_meaning(options: dict[str, Any], tmp_path: Path) -> None:
    model, samples = graph("MatMul")
    with pytest.raises(ConfigError, match=next(iter(options))):
        split(model, samples, tmp_path, **options)
