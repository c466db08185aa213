"""Nodes are put in order where a file has them otherwise; a circle is left to ONNX's checker."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from kedge_protocol.errors import ModelError
from kedge_targets.graph import model_reader


def model(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_node_before_what_it_reads_is_moved_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(helper.make_node("Relu", ["a"], ["y"]), helper.make_node("Neg", ["x"], ["a"])), path)
    assert [node.op_type for node in model_reader.read(path).graph.node] == ["Neg", "Relu"]


def test_a_circle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(helper.make_node("Add", ["x", "y"], ["a"]), helper.make_node("Relu", ["a"], ["y"])), path)
    with pytest.raises(ModelError, match="topologically sorted"):
        model_reader.read(path)
