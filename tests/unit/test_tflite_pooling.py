"""MaxPool with its padding before it computes what MaxPool computes, and pads with nothing that spoils a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.backends.tflite import pooling
from kedge_targets.graph import library


def graph(size: int, *, positive: bool, **attributes: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Relu" if positive else "Tanh", ["x"], ["a"], name="before"),
        helper.make_node("MaxPool", ["a"], ["y"], name="pool", **attributes),
    ]
    shape = [1, 2, size, size + 1]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_empty_tensor_value_info("y")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    return onnx.shape_inference.infer_shapes(made)


def same(model: onnx.ModelProto) -> list[str]:
    """The operators after the change, whose answers are the same as before it."""
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def run() -> Any:
        session = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    expected = run()
    pooling.spell_out_pads(model)
    del model.graph.value_info[:]
    np.testing.assert_array_equal(run(), expected)
    return [node.op_type for node in model.graph.node]


def test_zeros_are_put_before_what_is_never_negative() -> None:
    assert same(graph(8, positive=True, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)) == [
        "Relu",
        "Pad",
        "MaxPool",
    ]


def test_the_edge_is_repeated_before_the_rest() -> None:
    found = same(graph(8, positive=False, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4))
    assert found.count("Concat") == 2
    assert "Pad" not in found


def test_padding_that_tensorflow_knows_stays() -> None:
    assert same(graph(8, positive=True, kernel_shape=[3, 3], pads=[1] * 4)) == ["Relu", "MaxPool"]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(4, 9),
    kernel=st.integers(2, 4),
    stride=st.integers(1, 3),
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    positive=st.booleans(),
    how=st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    ceil=st.booleans(),
)
def test_any_padding_gives_the_same_answer(
    size: int, kernel: int, stride: int, pads: list[int], positive: bool, how: str, ceil: bool
) -> None:
    # ONNX Runtime refuses windows that leave something out between them where it pads by itself.
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [min(stride, kernel)] * 2}
    if how == "NOTSET":
        attributes |= {"pads": [min(one, kernel - 1) for one in pads], "ceil_mode": int(ceil)}
    else:
        attributes["auto_pad"] = how
    same(graph(size, positive=positive, **attributes))


@pytest.mark.parametrize("pads", [{}, {"pads": [1] * 4}])
def test_windows_with_gaps_are_refused_by_name(pads: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"node 'pool': .*windows have gaps.* without dilations"):
        pooling.spell_out_pads(graph(9, positive=True, kernel_shape=[3, 3], dilations=[2, 2], **pads))


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_last_partial_window_is_written_as_tensorflow_pads(kernel: int) -> None:
    # onnx2tf pads for ceil_mode itself, with the lowest float.
    made = graph(7, positive=False, kernel_shape=[kernel, kernel], strides=[2, 2], ceil_mode=1)
    assert "Pad" not in same(made)
    names = {attribute.name for attribute in made.graph.node[-1].attribute}
    assert "ceil_mode" not in names
