"""Equalization and bias correction: the same function in float, a better one rounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.lowering import classifier, images

from kedge.quantization import range_explosion
from kedge.quantization.equalization import Weights, fold_batch_normalization, joints
from kedge.step import Context
from kedge.steps.correct_bias import CorrectBias, CorrectBiasOptions
from kedge.steps.equalize import Equalize, EqualizeOptions
from kedge_protocol.errors import ConfigError, KedgeError, StepError
from kedge_targets.graph import fakequant, library, qonnx, weight_encodings
from kedge_targets.numerics import Plan, Precision

Array = npt.NDArray[Any]


class Samples:
    def __init__(self, name: str, values: Array) -> None:
        self._name, self._values, self.samples = name, values, len(values)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        for start in range(0, self.samples, size):
            yield {self._name: self._values[start : start + size]}


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> Array:
    session = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answer: Array = session.run(None, feed)[0]
    return answer


def context(model: onnx.ModelProto, values: Array, folder: Path, plan: Plan | None = None) -> Context:
    given = Samples(model.graph.input[0].name, values)
    return Context(teacher=model, samples=given, plan=plan or Plan(default=Precision.INT8), workdir=folder)


def uneven(seed: int = 0) -> onnx.ModelProto:
    """Conv (with batch normalization), depthwise Conv, Conv, each with a Relu; the average, Flatten, Gemm. Channels
    differ by powers of ten between the layers."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int, scale: Array | float = 1.0) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name)

    spread = 10.0 ** rng.uniform(-1.5, 1.5, 8)
    column = spread.reshape(-1, 1, 1, 1)
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance"], ["n1"], name="norm"),
        helper.make_node("Relu", ["n1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="depthwise", group=8, pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], name="point"),
        helper.make_node("Relu", ["c3"], ["r3"], name="relu3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["score"], name="last", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "uneven",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", 4])],
        [
            weight("w1", 8, 3, 3, 3), weight("w2", 8, 1, 3, 3, scale=column), weight("b2", 8, scale=spread),
            weight("w3", 16, 8, 1, 1, scale=1 / spread.reshape(1, -1, 1, 1)), weight("b3", 16),
            weight("w4", 4, 16), weight("b4", 4),
            numpy_helper.from_array(rng.uniform(0.5, 2, 8).astype(np.float32), "scale"), weight("shift", 8),
            weight("mean", 8), numpy_helper.from_array(rng.uniform(0.5, 2, 8).astype(np.float32), "variance"),
        ],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def encoder(*, gamma: float = 40.0, seed: int = 0) -> onnx.ModelProto:
    """LayerNormalization with two large channels, read by two MatMuls and a residual Add; then MatMul, Gelu-like Tanh,
    MatMul."""
    rng = np.random.default_rng(seed)
    scale = np.ones(16, np.float32)
    scale[[3, 9]] = gamma

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) * 0.2).astype(np.float32), name)

    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "wa"], ["a"], name="query"),
        helper.make_node("MatMul", ["n", "wb"], ["b0"], name="key"),
        helper.make_node("Add", ["b0", "bias"], ["b"], name="key_bias"),
        helper.make_node("Mul", ["a", "b"], ["ab"], name="gate"),
        helper.make_node("Add", ["ab", "n"], ["res"], name="residual"),
        helper.make_node("MatMul", ["res", "wc"], ["c"], name="up"),
        helper.make_node("Tanh", ["c"], ["t"], name="tanh"),
        helper.make_node("MatMul", ["t", "wd"], ["y"], name="down"),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "L", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "L", 16])],
        [
            numpy_helper.from_array(scale, "gamma"), weight("beta", 16), weight("wa", 16, 16), weight("wb", 16, 16),
            weight("bias", 16), weight("wc", 16, 32), weight("wd", 32, 16),
        ],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def words(count: int, seed: int = 4) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 5, 16)).astype(np.float32)


def simulated(model: onnx.ModelProto, values: Array, plan: Plan) -> onnx.ModelProto:
    given = list(Samples(model.graph.input[0].name, values).batches(8))
    return qonnx.expand_qonnx(fakequant.insert_quantizers(model, plan, fakequant.calibrate(model, plan, given)))


def test_folding_batch_normalization_changes_nothing() -> None:
    model = uneven()
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    assert fold_batch_normalization(folded) == 1
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
    np.testing.assert_allclose(
        run(folded, {"image": images(6)}), run(model, {"image": images(6)}), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    "options",
    [
        EqualizeOptions(),
        EqualizeOptions(activations=False),
        EqualizeOptions(weights=False, spread=1.0),
        EqualizeOptions(strength=0.0, spread=1.0),
        EqualizeOptions(multiply=False),
    ],
)
@pytest.mark.parametrize("which", ["uneven", "encoder", "classifier"])
def test_in_float_the_answers_stay(tmp_path: Path, which: str, options: EqualizeOptions) -> None:
    model = {"uneven": uneven, "encoder": encoder, "classifier": classifier}[which]()
    values = words(12) if which == "encoder" else images(12)
    before = model.SerializeToString()
    made = Equalize(options).apply(model, context(model, values, tmp_path))
    assert model.SerializeToString() == before
    onnx.checker.check_model(made)
    feed = {model.graph.input[0].name: values}
    expected = run(model, feed)
    np.testing.assert_allclose(run(made, feed), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    kept = {node.name for node in model.graph.node} - {"norm" if which == "uneven" else ""}
    assert kept <= {node.name for node in made.graph.node}


def test_weights_of_layers_in_a_row_get_equal_ranges(tmp_path: Path) -> None:
    model = uneven()
    made = Equalize(EqualizeOptions(activations=False)).apply(model, context(model, images(4), tmp_path))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    behind = np.abs(tensors["w3"]).max(axis=(0, 2, 3))
    before = np.abs(tensors["w2"]).max(axis=(1, 2, 3))
    np.testing.assert_allclose(before, behind, rtol=0.02)
    assert behind.max() / behind.min() < 20


def test_every_joint_of_a_network_is_found() -> None:
    model = uneven()
    fold_batch_normalization(model)
    found = {joint.activation: joint.first for joint in joints(model, Weights(model))}
    assert found == {"image": None, "r1": ("w1", 0), "r2": ("w2", 0), "f": ("w3", 0)}


def test_rounded_it_is_better_where_channels_differ(tmp_path: Path) -> None:
    plan = Plan(default=Precision.INT8)
    model, values, held_out = uneven(), images(32), images(32, seed=7)
    made = Equalize(EqualizeOptions()).apply(model, context(model, values, tmp_path))
    expected = run(model, {"image": held_out})
    before, after = (
        np.square(run(simulated(one, values, plan), {"image": held_out}) - expected).mean() for one in (model, made)
    )
    assert after < 0.01 * before


def test_what_a_residual_reads_too_is_multiplied_aside(tmp_path: Path) -> None:
    model = encoder()
    used = context(model, words(8), tmp_path)
    made = Equalize(EqualizeOptions()).apply(model, used)
    added = [node for node in made.graph.node if node.name.endswith("_evened")]
    assert added
    (residual,) = (node for node in made.graph.node if node.name == "residual")
    assert "n" in residual.input
    assert used.figures["equalize.multiplications"] == len(added)
    assert "multiplications added" in used.notes[0]


@pytest.mark.parametrize("options", [{"strength": 1.5}, {"spread": 0.5}, {"rounds": 0}, {"samples": 0}])
def test_options_without_a_meaning(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Equalize(EqualizeOptions(**options)).apply(uneven(), context(uneven(), images(2), tmp_path))


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.W4A4, Precision.LOG4])
@pytest.mark.parametrize("which", ["uneven", "encoder"])
def test_a_corrected_bias_takes_the_mean_error_away(tmp_path: Path, which: str, precision: Precision) -> None:
    model = uneven() if which == "uneven" else encoder(gamma=2.0)
    values = images(64) if which == "uneven" else words(64)
    name = model.graph.input[0].name
    # One layer rounds, so that the output's error is its own.
    last = "last" if which == "uneven" else "down"
    plan = Plan(default=Precision.FLOAT32, layers={last: precision})
    made = CorrectBias(CorrectBiasOptions()).apply(model, context(model, values, tmp_path, plan))
    onnx.checker.check_model(made)
    expected = run(model, {name: values})

    def shift(one: onnx.ModelProto) -> float:
        if precision is Precision.LOG4:
            rounded = onnx.ModelProto()
            rounded.CopyFrom(one)
            for tensor in rounded.graph.initializer:
                if tensor.name in ("w4", "wd"):
                    axis = 0 if tensor.name == "w4" else 1
                    back = weight_encodings.dequantized(numpy_helper.to_array(tensor), precision, axis=axis)
                    tensor.CopyFrom(numpy_helper.from_array(back, tensor.name))
        else:
            rounded = simulated(one, values, plan)
        error = run(rounded, {name: values}) - expected
        return float(np.abs(error.reshape(-1, expected.shape[-1]).mean(axis=0)).max())

    assert shift(made) < 0.05 * shift(model) + 1e-6


def test_all_layers_are_corrected_at_once_and_it_helps(tmp_path: Path) -> None:
    model, values = classifier(), np.abs(images(64))
    plan = Plan(default=Precision.W4A4)
    used = context(model, values, tmp_path, plan)
    made = CorrectBias(CorrectBiasOptions()).apply(model, used)
    assert used.figures["correct-bias.layers"] == 3
    expected = run(model, {"image": values})
    errors = [
        np.abs((run(simulated(one, values, plan), {"image": values}) - expected).mean(axis=0)).max()
        for one in (model, made)
    ]
    assert errors[1] < errors[0]


def test_a_plan_that_rounds_nothing_corrects_nothing(tmp_path: Path) -> None:
    model = classifier()
    used = context(model, images(2), tmp_path, Plan(default=Precision.FLOAT16))
    assert CorrectBias(CorrectBiasOptions()).apply(model, used).graph == model.graph
    assert used.notes == ["correct-bias: the plan rounds nothing"]


@pytest.mark.parametrize("step", [Equalize(EqualizeOptions()), CorrectBias(CorrectBiasOptions())])
def test_samples_that_the_graph_does_not_take(tmp_path: Path, step: Any) -> None:
    model = classifier()
    with pytest.raises(KedgeError):
        step.apply(model, context(model, np.zeros((2, 3, 8, 9), np.float32), tmp_path))


def test_dead_channels_are_left_alone(tmp_path: Path) -> None:
    """Training leaves channels with weights of 1e-30, which only their bias moves: no factor is theirs."""
    model = uneven()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, rows in (("w1", [1, 4]), ("w2", [2, 5]), ("w3", [3, 9])):
        weight = numpy_helper.to_array(tensors[name]).copy()
        weight[rows] *= 1e-30
        tensors[name].CopyFrom(numpy_helper.from_array(weight, name))
    values = images(16)
    made = Equalize(EqualizeOptions()).apply(model, context(model, values, tmp_path))
    feed = {"image": images(8, seed=3)}
    np.testing.assert_allclose(run(made, feed), run(model, feed), rtol=1e-3, atol=1e-4)
    assert max(float(np.abs(numpy_helper.to_array(one)).max()) for one in made.graph.initializer) < 1e4
    plan = Plan(default=Precision.INT8)
    wanted = run(model, feed)

    def noise(graph: onnx.ModelProto) -> float:
        return float(np.square(run(simulated(graph, values, plan), feed) - wanted).sum())

    assert noise(made) <= 1.2 * noise(model)


def test_a_step_that_makes_a_range_explode_is_refused(tmp_path: Path) -> None:
    model = onnx.shape_inference.infer_shapes(uneven())
    made = onnx.ModelProto()
    made.CopyFrom(model)
    bias = next(tensor for tensor in made.graph.initializer if tensor.name == "b3")
    value = numpy_helper.to_array(bias).copy()
    value[3] = 9e16
    bias.CopyFrom(numpy_helper.from_array(value, "b3"))
    samples = context(model, images(8), tmp_path)
    range_explosion.check(model, model, samples, where="step")
    with pytest.raises(StepError, match=r"'c3' \(node 'point'\) explode.* 9e\+16"):
        range_explosion.check(model, made, samples, where="step")
