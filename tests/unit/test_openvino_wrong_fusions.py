"""Fusions of OpenVINO that change a graph's answers, and graphs that are written so that it does not make them."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.backends.openvino.wrong_fusions import barriers, without_wrong_fusions
from kedge_targets.contract import Array
from kedge_targets.graph import model_reader
from kedge_targets.graph.rounding import sqnr_db

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 4, 8, 8)).astype(np.float32)
STORED = {
    "w": RNG.standard_normal((8, 4, 3, 3)).astype(np.float32),
    "row": RNG.standard_normal((4, 4, 1, 1)).astype(np.float32),
    "less": np.full(1, -1.2, np.float32),
    "cycle": np.array([2, 0, 1, 3]),
}
CONVOLUTION = helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1] * 4)


def pooled(given: str = "c") -> onnx.NodeProto:
    return helper.make_node("MaxPool", [given], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2])


def model(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in STORED.items() if name in read],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model_reader.infer_shapes(made, where="test")


def noise(given: onnx.ModelProto) -> float:
    """The dB of OpenVINO's answer to the rewritten graph, against ONNX Runtime's to the given one."""
    session = onnxruntime.InferenceSession(given.SerializeToString(), providers=["CPUExecutionProvider"])
    return sqnr_db(np.asarray(session.run(None, {"x": X})[0]), by_openvino(without_wrong_fusions(given)))


def by_openvino(given: onnx.ModelProto) -> Array:
    core = openvino.Core()
    read = core.read_model(given.SerializeToString())
    return np.asarray(core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([X])[0])


ACTIVATIONS = {
    "abs": [helper.make_node("Abs", ["p"], ["y"])],
    "silu": [helper.make_node("Sigmoid", ["p"], ["s"]), helper.make_node("Mul", ["p", "s"], ["y"])],
    "hard swish": [helper.make_node("HardSwish", ["p"], ["y"])],
    "falling leaky relu": [helper.make_node("LeakyRelu", ["p"], ["y"], alpha=-0.5)],
    "abs behind tanh": [helper.make_node("Tanh", ["p"], ["t"]), helper.make_node("Abs", ["t"], ["y"])],
    "abs of the turned": [
        helper.make_node("Transpose", ["p"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Abs", ["t"], ["y"]),
    ],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_that_falls_stays_behind_the_pooling_of_a_convolution(name: str) -> None:
    given = model(CONVOLUTION, pooled(), *ACTIVATIONS[name])
    assert noise(given) > 100
    assert len(barriers(without_wrong_fusions(given))) == 1


def test_a_scaled_convolution_is_one() -> None:
    scaled = helper.make_node("Mul", ["c", "less"], ["s"])
    assert noise(model(CONVOLUTION, scaled, pooled("s"), helper.make_node("Abs", ["p"], ["y"]))) > 100


def test_what_never_falls_is_still_fused() -> None:
    given = model(CONVOLUTION, pooled(), helper.make_node("Relu", ["p"], ["y"]))
    assert without_wrong_fusions(given) is given


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[:12])
def test_channels_in_another_order_reach_a_convolution_in_that_order(order: tuple[int, ...]) -> None:
    gathered = helper.make_node("Gather", ["x", "cycle"], ["g"], name="gather", axis=1)
    given = model(
        gathered, helper.make_node("Relu", ["g"], ["r"]), helper.make_node("Conv", ["r", "w"], ["y"], pads=[1] * 4)
    )
    given.graph.initializer[[one.name for one in given.graph.initializer].index("cycle")].CopyFrom(
        numpy_helper.from_array(np.array(order), "cycle")
    )
    assert noise(given) > 100


@pytest.mark.parametrize("gate", [False, True])
def test_a_convolution_steps_over_what_is_computed_of_two_parts(gate: bool) -> None:
    both = [helper.make_node("Sub", ["a", "b"], ["m"])]
    if gate:
        both = [helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Mul", ["s", "b"], ["m"])]
    split = helper.make_node("Split", ["c"], ["a", "b"], axis=1)
    assert noise(model(CONVOLUTION, split, *both, helper.make_node("Conv", ["m", "row"], ["y"], strides=[2, 2]))) > 100
