"""GELU in front of integers takes its tanh form, where that cannot be told from the rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.pruning import answers

from kedge_targets.backends.onnxruntime import gelu

node = helper.make_node


def graph(step: float, *more: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    tensors: dict[str, npt.NDArray[Any]] = {"step": np.float32(step), "zero": np.uint8(10)}  # type: ignore[dict-item]
    nodes = [
        node("Gelu", ["x"], ["g"], name="gelu"),
        node("QuantizeLinear", ["g", "step", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
        *more,
    ]
    made = helper.make_graph(
        nodes,
        "gelu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def form(model: onnx.ModelProto) -> str:
    (found,) = (one for one in model.graph.node if one.op_type == "Gelu")
    return next((attribute.s.decode() for attribute in found.attribute), "none")


def values() -> npt.NDArray[np.float32]:
    return np.linspace(-6, 6, 20001, dtype=np.float32)


def test_its_error_is_what_is_said() -> None:
    x = values().astype(np.float64)
    exact = x / 2 * (1 + np.array([math.erf(one / math.sqrt(2)) for one in x]))
    tanh = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert 0.9 * gelu.ERROR < np.abs(exact - tanh).max() <= gelu.ERROR


def test_before_coarse_steps_it_is_the_tanh_form() -> None:
    model = graph(0.02, node("Relu", ["g"], ["z"]), outputs=("y", "z"))
    before = answers(model, {"x": values()})
    gelu.by_tanh(model)
    onnx.checker.check_model(model, full_check=True)
    assert form(model) == "tanh"
    after = answers(model, {"x": values()})
    differing = np.abs(after - before) > 1e-6
    # Here and there a value lies so near to the middle between two steps that it is rounded to the other side.
    assert 0 < differing.mean() < 0.05
    assert np.abs(after - before).max() <= 0.02 + 1e-6


@pytest.mark.parametrize(
    "model",
    [
        graph(0.002),
        graph(0.02, outputs=("g",)),
        graph(0.02, node("QuantizeLinear", ["g", "fine", "zero"], ["q2"]),
              node("Constant", [], ["fine"], value_float=0.001),
              node("DequantizeLinear", ["q2", "fine", "zero"], ["z"]), outputs=("y", "z")),
    ],
    ids=["fine steps", "an answer itself", "fine steps of another reader"],
)  # fmt: skip
def test_else_it_stays_exact(model: onnx.ModelProto) -> None:
    gelu.by_tanh(model)
    assert form(model) == "none"
