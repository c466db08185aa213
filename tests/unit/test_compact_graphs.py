"""Equal constants once, short names: a smaller file that computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.graph import deduplication

Array = npt.NDArray[Any]
node = helper.make_node


def model() -> onnx.ModelProto:
    """Two additions of equal constants, one of other numbers, rounding in between; an output that is a constant."""
    graph = helper.make_graph(
        [
            node("Add", ["x", "ones"], ["first_long_name"], name="first"),
            node("QuantizeLinear", ["first_long_name", "scale", "zero"], ["rounded"], name="down"),
            node("DequantizeLinear", ["rounded", "scale", "zero"], ["back"], name="up"),
            node("Add", ["back", "more_ones"], ["second_long_name"], name="second"),
            node("Clip", ["second_long_name", "", "most"], ["a"], name="third"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 3]),
            helper.make_tensor_value_info("fixed", TensorProto.FLOAT, [3]),
        ],
        [
            numpy_helper.from_array(np.ones(3, np.float32), "ones"),
            numpy_helper.from_array(np.ones(3, np.float32), "more_ones"),
            numpy_helper.from_array(np.ones(3, np.float32), "fixed"),
            numpy_helper.from_array(np.float32(0.5), "scale"),
            numpy_helper.from_array(np.uint8(10), "zero"),
            numpy_helper.from_array(np.float32(2.5), "most"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def answers(given: onnx.ModelProto) -> list[Array]:
    x = np.array([[0.1, -3, 40], [1.4, 0, 2]], np.float32)
    session = onnxruntime.InferenceSession(given.SerializeToString(), providers=["CPUExecutionProvider"])
    made: list[Array] = session.run(None, {"x": x})
    return made


def test_it_computes_the_same_and_is_smaller() -> None:
    plain, small = model(), model()
    deduplication.share_constants(small)
    deduplication.shorten_names(small)
    onnx.checker.check_model(small, full_check=True)
    for first, second in zip(answers(plain), answers(small), strict=True):
        np.testing.assert_array_equal(first, second)
    assert small.ByteSize() < plain.ByteSize()
    assert [value.name for value in (*small.graph.input, *small.graph.output)] == ["x", "a", "fixed"]
    assert [one.name for one in small.graph.node] == ["first", "", "", "second", "third"]
    assert small.graph.node[4].input[1] == ""


def test_equal_constants_are_stored_once_but_for_an_output() -> None:
    small = model()
    deduplication.share_constants(small)
    assert [tensor.name for tensor in small.graph.initializer] == ["ones", "fixed", "scale", "zero", "most"]
    assert small.graph.node[3].input[1] == "ones"


def test_names_are_never_given_twice() -> None:
    names = [name for name, _ in zip(deduplication._short(), range(3000), strict=False)]
    assert len(set(names)) == 3000
    assert max(map(len, names)) == 3


def test_a_graph_within_a_graph_keeps_its_names() -> None:
    inner = helper.make_graph(
        [node("Add", ["long", "ones"], ["inside"])],
        "inner",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(
        [
            node("Identity", ["x"], ["long"], name="same"),
            node("If", ["which"], ["y"], name="if", then_branch=inner, else_branch=inner),
        ],
        "outer",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("which", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(2, np.float32), name) for name in ("ones", "more")],
    )
    given = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    before = given.SerializeToString()
    deduplication.share_constants(given)
    deduplication.shorten_names(given)
    assert given.SerializeToString() == before
