"""A model file that is cut off is told so, by the constant, when it is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_protocol.errors import ModelError
from kedge_targets.graph import model_reader


def product(kind: type = np.float32) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])
    matrix = numpy_helper.from_array(np.ones((64, 32), kind), "w")
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [matrix])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8])
def test_a_constant_that_is_cut_off_is_named(kind: type, tmp_path: Path) -> None:
    model, path = product(kind), tmp_path / "m.onnx"
    onnx.save(model, path)
    model_reader.read(path)
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:100]
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"damaged: constant 'w' of shape 64x32 .* has 100 bytes.*again"):
        model_reader.read(path)


def test_external_data_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(product(), path, save_as_external_data=True, location="m.bin", size_threshold=0)
    model_reader.read(path)
    os.truncate(tmp_path / "m.bin", 1000)
    with pytest.raises(ModelError, match=r"m\.onnx: .*again|m\.onnx: its external data cannot be read"):
        model_reader.read(path)


def test_a_model_without_outputs_is_refused(tmp_path: Path) -> None:
    model = product()
    del model.graph.output[:]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="has no outputs"):
        model_reader.read(tmp_path / "m.onnx")
