"""Integer graphs that ONNX Runtime's optimizer mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.backends.onnxruntime import barriers

_LOADED = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"x": numpy.load(sys.argv[2])})[0])
"""


def branches(moved: str) -> onnx.ModelProto:
    """A DequantizeLinear, nodes that only move its values, and an If whose branches read them from outside."""
    node = helper.make_node
    moves = {
        "MaxPool": [node("MaxPool", ["c"], ["t"], name="pool", kernel_shape=[2, 2])],
        "Transpose": [node("Transpose", ["c"], ["t"], name="turn", perm=[0, 1, 3, 2])],
        "Flatten": [node("Flatten", ["c"], ["t"], name="flat", axis=1)],
        "both": [
            node("MaxPool", ["c"], ["p"], name="pool", kernel_shape=[2, 2]),
            node("Transpose", ["p"], ["t"], name="turn", perm=[0, 2, 3, 1]),
        ],
        "nothing": [node("Relu", ["c"], ["t"], name="relu")],
    }[moved]

    rank = 2 if moved == "Flatten" else 4

    def branch(operator: str) -> onnx.GraphProto:
        inner = node(operator, ["t"], [f"{operator}_y"], name=f"{operator}_inner")
        made = helper.make_tensor_value_info(f"{operator}_y", TensorProto.FLOAT, ("a", "b", "c", "d")[:rank])
        return helper.make_graph([inner], operator, [], [made])

    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="down"),
        node("DequantizeLinear", ["q", "scale", "zero"], ["c"], name="back"),
        *moves,
        node("ReduceMean", ["t"], ["m"], name="mean", keepdims=0),
        node("Greater", ["m", "nothing"], ["condition"], name="greater"),
        node("If", ["condition"], ["y"], name="if", then_branch=branch("Relu"), else_branch=branch("Tanh")),
    ]
    numbers = {"scale": np.float32(0.03), "zero": np.uint8(128), "nothing": np.float32(0)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("a", "b", "c", "d")[:rank])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("moved", ["MaxPool", "Transpose", "Flatten", "both"])
def test_a_branch_that_reads_moved_integers_runs(moved: str, tmp_path: Path) -> None:
    """ONNX Runtime ends the process while it optimizes such a graph."""
    model = branches(moved)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    reference = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    barriers.insert(model)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node].count("Sum") == 1
    onnx.save(model, tmp_path / "m.onnx")
    values = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    paths = [str(tmp_path / name) for name in ("m.onnx", "x.npy", "y.npy")]
    done = subprocess.run([sys.executable, "-c", _LOADED, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    assert np.allclose(np.load(tmp_path / "y.npy"), reference.run(None, {"x": values})[0], atol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((3, 1, 5), 1), ((3, 4, 1), -1)])
def test_a_softmax_over_one_element_is_one(shape: tuple[int, ...], axis: int) -> None:
    node = helper.make_node
    numbers = {"scale": np.float32(0.02), "zero": np.uint8(128), "to": np.float32(1 / 255), "nothing": np.uint8(0)}
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="down"),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="back"),
        node("Softmax", ["d"], ["p"], name="softmax", axis=axis),
        node("QuantizeLinear", ["p", "to", "nothing"], ["r"], name="down_again"),
        node("DequantizeLinear", ["r", "to", "nothing"], ["y"], name="back_again"),
    ]
    axes = ["N", *shape[1:]]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, axes)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    barriers.insert(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert np.allclose(session.run(None, {"x": values})[0], 1.0)


@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_an_average_whose_last_window_reaches_beyond_the_border_is_onnxs(ceil_mode: int) -> None:
    node = helper.make_node
    numbers = {"scale": np.float32(0.02), "zero": np.uint8(128)}
    window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2], "count_include_pad": 1}
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="down"),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="back"),
        node("AveragePool", ["d"], ["p"], name="average", ceil_mode=ceil_mode, **window),
        node("QuantizeLinear", ["p", "scale", "zero"], ["r"], name="down_again"),
        node("DequantizeLinear", ["r", "scale", "zero"], ["y"], name="back_again"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, "h", "w"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    reference = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    barriers.insert(model)
    # What the integer kernel computes rightly stays with it.
    assert ("Sum" in {node.op_type for node in model.graph.node}) is bool(ceil_mode)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = np.random.default_rng(0).uniform(-2, 2, (3, 4, 6, 6)).astype(np.float32)
    assert np.abs(session.run(None, {"x": values})[0] - reference.run(None, {"x": values})[0]).max() < 0.03


def test_other_graphs_stay_as_they_are() -> None:
    model = branches("nothing")
    before = model.SerializeToString()
    barriers.insert(model)
    assert model.SerializeToString() == before
