"""LSTM, GRU and RNN written out step by step compute what ONNX Runtime's own compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.backends.tflite import unrolling
from kedge_targets.graph import library, model_reader

STEPS, BATCH, WIDTH, HIDDEN = 5, 2, 3, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def graph(
    kind: str, *, directions: int = 1, state: bool = False, bias: bool = True, steps: int = STEPS, **attributes: Any
) -> onnx.ModelProto:
    source = np.random.default_rng(1)

    def stored(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(source.normal(0, 0.5, shape).astype(np.float32), name)

    gates = GATES[kind]
    inputs = ["x", "W", "R", "B" if bias else "", "", "h0" if state else ""]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, BATCH, WIDTH])]
    outputs = ["y", "yh"]
    states = ["h0"]
    if kind == "LSTM":
        inputs.append("c0" if state else "")
        outputs.append("yc")
        states.append("c0")
    if state:
        given += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [directions, BATCH, HIDDEN]) for n in states]
    initializers = [
        stored("W", directions, gates * HIDDEN, WIDTH), stored("R", directions, gates * HIDDEN, HIDDEN),
        *([stored("B", directions, 2 * gates * HIDDEN)] if bias else []),
    ]  # fmt: skip
    node = helper.make_node(kind, inputs, outputs, name="the layer", hidden_size=HIDDEN, **attributes)
    values = [helper.make_empty_tensor_value_info(name) for name in outputs]
    made = helper.make_model(
        helper.make_graph([node], "g", given, values, initializers),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    return onnx.shape_inference.infer_shapes(made)


def answers(model: onnx.ModelProto) -> list[npt.NDArray[Any]]:
    source = np.random.default_rng(2)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    feed = {name: source.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    session = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"state": True},
        {"direction": "reverse", "state": True},
        {"direction": "bidirectional", "directions": 2},
        {"direction": "bidirectional", "directions": 2, "state": True},
        {"steps": 1, "state": True},
        {"steps": 1},
    ],
)
def test_unrolled_is_the_same(kind: str, options: dict[str, Any]) -> None:
    model = graph(kind, **options)
    expected = answers(model)
    unrolling.unroll(model)
    onnx.checker.check_model(model)
    assert not {node.op_type for node in model.graph.node} & set(GATES)
    for mine, theirs in zip(answers(model), expected, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("state", [False, True])
def test_gru_that_resets_after_the_product(state: bool) -> None:
    model = graph("GRU", state=state, linear_before_reset=1)
    expected = answers(model)
    unrolling.unroll(model)
    for mine, theirs in zip(answers(model), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("LSTM", {"clip": 1.0}, "clip is set"),
        ("GRU", {"activations": ["HardSigmoid", "Tanh"]}, "HardSigmoid, Tanh"),
        ("LSTM", {"steps": unrolling.MOST_STEPS + 1}, f"{unrolling.MOST_STEPS} at most"),
    ],
)
def test_what_cannot_be_unrolled_is_refused_by_name(kind: str, options: dict[str, Any], reason: str) -> None:
    model = graph(kind, **options)
    with pytest.raises(UnsupportedOperatorError) as caught:
        unrolling.unroll(model)
    assert reason in str(caught.value)
    assert "'the layer'" in str(caught.value)
    assert caught.value.remedy


def test_other_graphs_are_left_alone() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]))
    before = model_reader.infer_shapes(model, where="test").SerializeToString()
    unrolling.unroll(model)
    assert model_reader.infer_shapes(model, where="test").SerializeToString() == before
