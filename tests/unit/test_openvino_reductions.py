"""Reductions that OpenVINO reads or computes otherwise than ONNX says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.lowering import Calibration

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.backends.openvino import float_check, integer_reductions, nncf_preparation
from kedge_targets.backends.openvino.older_reductions import with_axes_of_onnx
from kedge_targets.contract import Array
from kedge_targets.graph import model_reader
from kedge_targets.graph.rounding import sqnr_db

X = np.random.default_rng(0).standard_normal((3, 12, 8)).astype(np.float32)


def model(nodes: list[onnx.NodeProto], rank: int, opset: int, **constants: Array) -> onnx.ModelProto:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 12, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [given], [answer], stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def by_openvino(given: onnx.ModelProto, folder: Path) -> Array:
    onnx.save(given, folder / "model.onnx")
    core = openvino.Core()
    read = core.read_model(str(folder / "model.onnx"))
    return np.asarray(core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([X])[0])


def by_onnxruntime(given: onnx.ModelProto) -> Array:
    session = onnxruntime.InferenceSession(given.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def reduced(operator: str, axes: list[int], keep: int, opset: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], name="abs"),
        helper.make_node(operator, ["a"], ["y"], name="over", axes=axes, keepdims=keep),
    ]
    return model(nodes, 3 if keep else 3 - len(axes), opset)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(("axes", "keep"), [([1], 0), ([-1], 1), ([1, 2], 0)])
@pytest.mark.parametrize("operator", ["ReduceL1", "ReduceLogSum", "ReduceLogSumExp"])
def test_the_axes_of_older_opsets_are_the_ones_of_onnx(
    operator: str, axes: list[int], keep: int, opset: int, tmp_path: Path
) -> None:
    given = reduced(operator, axes, keep, opset)
    made = with_axes_of_onnx(given)
    assert made.graph.node[-1].name == "over"
    wanted, got = by_onnxruntime(given), by_openvino(made, tmp_path)
    assert got.shape == wanted.shape
    assert sqnr_db(wanted, got) > 80


def test_a_reading_that_joins_samples_is_refused(tmp_path: Path) -> None:
    """One sample at a time would hide it: an axis of one is reduced to one."""
    given = model_reader.infer_shapes(reduced("ReduceL1", [1, 2], 1, 17), where="test")
    onnx.save(given, tmp_path / "model.onnx")
    read = openvino.Core().read_model(str(tmp_path / "model.onnx"))
    with pytest.raises(UnsupportedOperatorError, match="ReduceL1") as refused:
        float_check.check(openvino, read, given, Calibration("x", X))
    assert refused.value.where == "node 'over'"


@pytest.mark.parametrize(("operator", "opset"), [("ReduceMean", 13), ("ReduceMean", 18), ("ReduceSum", 13)])
@pytest.mark.parametrize("keep", [0, 1])
def test_rows_of_integers_are_reduced_for_each_sample(operator: str, opset: int, keep: int, tmp_path: Path) -> None:
    by_input = operator == "ReduceSum" or opset >= 18
    over: Callable[..., onnx.NodeProto] = helper.make_node
    nodes = [
        over("QuantizeLinear", ["x", "s", "z"], ["q"], name="down"),
        over("DequantizeLinear", ["q", "s", "z"], ["r"], name="up"),
        over(operator, ["r", "axes"], ["y"], name="over", keepdims=keep)
        if by_input
        else over(operator, ["r"], ["y"], name="over", keepdims=keep, axes=[1]),
    ]
    stored = {"s": np.float32(0.03), "z": np.uint8(120)} | ({"axes": np.array([1])} if by_input else {})
    given = model(nodes, 2 + keep, opset, **{name: np.asarray(value) for name, value in stored.items()})
    made = model_reader.infer_shapes(given, where="test")
    integer_reductions.with_four_axes(made)
    onnx.checker.check_model(made)
    wanted, got = by_onnxruntime(given), by_openvino(made, tmp_path)
    assert got.shape == wanted.shape
    assert sqnr_db(wanted, got) > 40


@pytest.mark.parametrize("square", ["Pow", "Mul"])
def test_a_norm_that_is_written_out_runs_as_one_operator(square: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], name="mean", axes=[-1]),
        helper.make_node("Sub", ["x", "mean"], ["rest"], name="rest"),
        helper.make_node(square, ["rest", "two" if square == "Pow" else "rest"], ["squares"], name="squares"),
        helper.make_node("ReduceMean", ["squares"], ["variance"], name="variance", axes=[-1]),
        helper.make_node("Add", ["variance", "least"], ["above"], name="above"),
        helper.make_node("Sqrt", ["above"], ["deviation"], name="deviation"),
        helper.make_node("Div", ["rest", "deviation"], ["y"], name="over"),
    ]
    constants = {"two": np.float32(2), "least": np.float32(1e-5)}
    given = model_reader.infer_shapes(
        model(nodes, 3, 13, **{name: np.asarray(value) for name, value in constants.items()}), where="test"
    )
    made = nncf_preparation.prepare_for_nncf(given)
    assert set(nncf_preparation.of_norms(made)) == {"mean", "rest", "variance"}
    assert sqnr_db(by_onnxruntime(given), by_openvino(made, tmp_path)) > 80
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU")
    ran = {one.get_rt_info()["layerType"].astype(str) for one in compiled.get_runtime_model().get_ops()}
    assert "MVN" in ran
