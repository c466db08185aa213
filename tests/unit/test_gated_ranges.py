"""Ranges of what goes into a SiLU or its like: nothing is spent on what the activation does not tell apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tests.support.lowering import Calibration

from kedge_targets.graph import flat_activations, ranges
from kedge_targets.numerics import RangeMethod

SAMPLES = np.linspace(-150, 20, 512, dtype=np.float32).reshape(64, 8)


def node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=output, **attributes)


SILU = [node("Sigmoid", "n", "s"), node("Mul", "n s", "y")]
FORMS = {
    "silu": SILU,
    "silu, the gate first": [node("Sigmoid", "n", "s"), node("Mul", "s n", "y")],
    "hardswish": [node("HardSwish", "n", "y")],
    "hardswish in two": [node("HardSigmoid", "n", "s", alpha=1 / 6), node("Mul", "n s", "y")],
    "mish": [node("Mish", "n", "y")],
    "mish in three": [node("Softplus", "n", "p"), node("Tanh", "p", "s"), node("Mul", "n s", "y")],
    "elu": [node("Elu", "n", "y")],
    "gelu": [node("Gelu", "n", "y")],
}


def graph(nodes: list[onnx.NodeProto], *, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    made = helper.make_graph(
        [node("Identity", "x", "n"), *nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in outputs],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def observed(model: onnx.ModelProto, **options: Any) -> tuple[float, float]:
    return ranges.observe(model, Calibration("x", SAMPLES), ["n"], **options)["n"]


@pytest.mark.parametrize("form", list(FORMS))
def test_the_flat_part_of_an_activation_takes_no_steps(form: str) -> None:
    low, high = observed(graph(FORMS[form]))
    assert -8 < low <= -2.5
    assert high == 20


@pytest.mark.parametrize("method", list(RangeMethod))
def test_every_method_of_calibration_leaves_it_out(method: RangeMethod) -> None:
    assert observed(graph(SILU), method=method)[0] > -8


def test_a_symmetric_range_is_that_of_the_side_that_answers() -> None:
    assert observed(graph(SILU), symmetric=True) == (-20, 20)


@pytest.mark.parametrize(
    "model",
    [
        graph(SILU, outputs=("y", "n")),
        graph([*SILU, node("Neg", "n", "z")], outputs=("y", "z")),
        graph([*SILU, node("Neg", "s", "z")], outputs=("y", "z")),
        graph([node("Sigmoid", "n", "y")]),
    ],
    ids=["an output", "read elsewhere", "the gate is read elsewhere", "a probability"],
)
def test_what_others_read_too_keeps_its_whole_range(model: onnx.ModelProto) -> None:
    assert observed(model)[0] == -150


@given(low=st.floats(-300, 0), high=st.floats(0, 300), levels=st.sampled_from([15, 255]))
def test_what_is_cut_off_costs_less_than_rounding(low: float, high: float, levels: int) -> None:
    def silu(x: Any) -> Any:
        return x / (1 + np.exp(-x))

    begins = flat_activations.least(low, high, (silu,), levels=levels)
    assert low <= begins <= 0
    lost = silu(np.linspace(low, begins, 4096)) - silu(begins)
    assert np.abs(lost).max() <= (high - begins) / levels / 2 + 1e-9
