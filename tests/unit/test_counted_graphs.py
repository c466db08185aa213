"""Multiply-accumulates and weight bytes of one sample, held against counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge_targets.backends.openvino import counting as openvino_counting
from kedge_targets.graph import counting

RNG = np.random.default_rng(0)


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(RNG.normal(size=shape).astype(np.float32), name)


def node(operator: str, inputs: str, output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


def own(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """A node of ONNX Runtime's own domain."""
    return node(operator, inputs, output, domain="com.microsoft", **attributes)


ROWS = ["N", 6, 10]
CASES: dict[str, tuple[list[onnx.NodeProto], list[Any], list[onnx.TensorProto], int, int]] = {
    "groups": ([node("Conv", "x w", group=2, pads=[1] * 4, strides=[2, 2])], ["N", 4, 8, 8], [weight("w", 6, 2, 3, 3)],
               6 * 4 * 4 * 2 * 9, 108),
    "transposed in groups": ([node("ConvTranspose", "x w", group=2, strides=[2, 2])], ["N", 4, 5, 5],
                             [weight("w", 4, 3, 3, 3)], 25 * 4 * 3 * 9, 108),
    "a matrix for each row": ([node("MatMul", "x w")], ["N", 4, 6, 10], [weight("w", 4, 10, 3)], 4 * 6 * 10 * 3, 120),
    "used twice": ([node("MatMul", "x w", "h"), node("MatMul", "h w")], ROWS, [weight("w", 10, 10)], 2 * 600, 100),
    "both ways": ([node("LSTM", "x w r", hidden_size=6, direction="bidirectional")], [7, "N", 4],
                  [weight("w", 2, 24, 4), weight("r", 2, 24, 6)], 7 * 2 * 24 * 10, 480),
    "einsum with a weight": ([node("Einsum", "x w", equation="btc,chd->bthd")], ROWS, [weight("w", 10, 2, 3)], 360, 60),
    "einsum of what is computed": ([node("Einsum", "x x", equation="b i d, b j d")], ROWS, [], 6 * 6 * 10, 0),
    "einsum with dots": ([node("Einsum", "x w", equation="...c,cd->...d")], ROWS, [weight("w", 10, 3)], 180, 30),
    "behind a norm": ([own("SkipLayerNormalization", "x x s", "h"), node("MatMul", "h w")], ROWS,
                      [weight("s", 10), weight("w", 10, 3)], 180, 30),
    "behind a fused product": ([own("FusedMatMul", "x w", "h", transB=1), node("MatMul", "h v")], ["N", 2, 6, 10],
                               [weight("w", 3, 10), weight("v", 3, 5)], 2 * 6 * (30 + 15), 45),
}  # fmt: skip


def model_of(made: list[onnx.NodeProto], shape: list[Any], weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(made, "g", [x], [y], weights), opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("name", CASES)
def test_one_sample_costs_what_it_does_by_hand(name: str) -> None:
    made, shape, weights, macs, elements = CASES[name]
    one = [1 if size == "N" else size for size in shape]
    found = counting.numbers(model_of(made, shape, weights), {"x": one}, integer_operators=("Conv", "Gemm", "MatMul"))
    assert (found.macs, found.integer_macs) == (macs, 0)
    assert sum(found.weight_bytes.values()) == 4 * elements


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("behind")])
def test_openvinos_file_costs_the_same(name: str, tmp_path: Path) -> None:
    made, shape, weights, macs, elements = CASES[name]
    onnx.save(model_of(made, shape, weights), tmp_path / "m.onnx")
    read = openvino.convert_model(str(tmp_path / "m.onnx"))
    openvino.save_model(read, str(tmp_path / "m.xml"), compress_to_fp16=False)
    one = [1 if size == "N" else size for size in shape]
    found = openvino_counting.numbers(tmp_path / "m.xml", {"x": one})
    assert (found.macs, sum(found.weight_bytes.values())) == (macs, 4 * elements)


def test_an_einsum_in_float_counts_against_the_name() -> None:
    """It holds no weights, and no runtime computes it in integers."""
    scale, zero = numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z")
    matrix = numpy_helper.from_array(RNG.integers(-9, 9, (10, 10)).astype(np.int8), "w")
    made = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"),
            node("DequantizeLinear", "w s z", "v"), node("MatMul", "d v", "h"),
            node("Einsum", "h h", equation="bid,bjd->bij")]  # fmt: skip
    model = model_of(made, ROWS, [scale, zero, matrix])
    found = counting.numbers(model, {"x": [1, 6, 10]}, integer_operators=("MatMul",))
    assert (found.macs, found.integer_macs) == (600 + 360, 600)
    assert found.weights_in_integers == 1
