"""Rounding to integers: bit for bit as ONNX Runtime does it, scales that hold what they must, the best clipping."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from kedge_targets.graph import library, rounding

Array = npt.NDArray[Any]
FLOATS = st.floats(-1e4, 1e4, width=32)
VECTORS = hnp.arrays(np.float32, st.integers(1, 50), elements=FLOATS)


def runtime(values: Array, scale: float, zero: int, *, signed: bool) -> Array:
    """QuantizeLinear and DequantizeLinear of ONNX Runtime."""
    kind = TensorProto.INT8 if signed else TensorProto.UINT8
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor("s", TensorProto.FLOAT, [], [scale]), helper.make_tensor("z", kind, [], [zero])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    settings = library.load().SessionOptions()
    settings.log_severity_level = 4
    session = library.opened(model.SerializeToString(), settings, where="g")
    made: Array = session.run(None, {"x": values})[0]
    return made


@given(values=VECTORS, low=FLOATS, high=FLOATS, signed=st.booleans(), symmetric=st.booleans())
def test_eight_bits_are_those_of_the_runtime(
    values: Array, low: float, high: float, signed: bool, symmetric: bool
) -> None:
    scale, zero = rounding.scale_and_zero_point(
        min(low, high), max(low, high), bits=8, signed=signed, symmetric=symmetric
    )
    made = rounding.fake_quantize(values, scale, zero, *rounding.bounds(8, signed=signed))
    np.testing.assert_array_equal(made, runtime(values, scale, zero, signed=signed))


def test_halves_go_to_the_even_neighbour() -> None:
    halves = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], dtype=np.float32)
    assert rounding.fake_quantize(halves, 1.0, 0, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]


@given(
    low=st.floats(-(2.0**100), 0, width=32),
    high=st.floats(0, 2.0**100, width=32),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    symmetric=st.booleans(),
)
def test_a_range_is_held_and_zero_is_exact(low: float, high: float, bits: int, signed: bool, symmetric: bool) -> None:
    scale, zero = rounding.scale_and_zero_point(low, high, bits=bits, signed=signed, symmetric=symmetric)
    least, most = rounding.bounds(bits, signed=signed)
    assert scale > 0
    assert np.float32(scale) == scale
    assert least <= zero <= most
    assert rounding.fake_quantize(np.zeros(1), scale, zero, least, most)[0] == 0
    ends = np.array([low, high], dtype=np.float32)
    made = rounding.fake_quantize(ends, scale, zero, least, most)
    # The zero-point is rounded too, so that an end may lie half a step outside.
    assert (np.abs(made - ends) <= scale * 1.01).all()


def test_the_edges_of_scales() -> None:
    assert rounding.scale_and_zero_point(0, 0, bits=8, signed=True, symmetric=True) == (1.0, 0)
    assert rounding.scale_and_zero_point(0, 255, bits=8, signed=False, symmetric=False) == (1.0, 0)
    assert rounding.scale_and_zero_point(-128, 127, bits=8, signed=True, symmetric=False) == (1.0, 0)
    assert rounding.scale_and_zero_point(-127, 50, bits=8, signed=True, symmetric=True) == (1.0, 0)
    assert rounding.scale_and_zero_point(-127, 50, bits=8, signed=False, symmetric=True) == (1.0, 128)
    # A range that does not hold 0 is widened.
    assert rounding.scale_and_zero_point(5, 255, bits=8, signed=False, symmetric=False) == (1.0, 0)
    assert rounding.scale_and_zero_point(0, 1e-45, bits=8, signed=False, symmetric=False)[0] > 0
    assert rounding.bounds(4, signed=True, narrow=True) == (-7, 7)
    with pytest.raises(ValueError, match="no two levels"):
        rounding.bounds(1, signed=True, narrow=True)
    with pytest.raises(ValueError, match="no way"):
        rounding.weight_scales(np.ones(3), bits=4, axis=None, method="least")
    with pytest.raises(ValueError, match="1 bit"):
        rounding.weight_scales(np.ones(3), bits=1, axis=None)


@given(
    weight=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6), elements=FLOATS),
    bits=st.integers(2, 8),
    axis=st.sampled_from([None, 0, 1, -1]),
    narrow=st.booleans(),
)
def test_scales_of_weights(weight: Array, bits: int, axis: int | None, narrow: bool) -> None:
    low, high = rounding.bounds(bits, signed=True, narrow=narrow)
    scales = rounding.weight_scales(weight, bits=bits, axis=axis, narrow=narrow)
    assert scales.shape == (() if axis is None else (weight.shape[axis],))
    assert (scales > 0).all()
    integers = rounding.quantize(weight, scales, 0, -(10**9), 10**9, axis)
    assert (integers >= low).all()
    assert (integers <= high).all()
    clipped = rounding.weight_scales(weight, bits=bits, axis=axis, method="mse", narrow=narrow)
    assert clipped.shape == scales.shape

    def error(with_scales: Array) -> Array:
        made = rounding.fake_quantize(weight, with_scales, 0, low, high, axis)
        squares = np.square((made - weight).astype(np.float64))
        kept = axis if axis is None else axis % weight.ndim
        return np.asarray(squares.sum(axis=tuple(i for i in range(weight.ndim) if i != kept)))

    assert (error(clipped) <= error(scales) * (1 + 1e-4) + 1e-20).all()


@pytest.mark.parametrize(("bits", "share"), [(2, 1.224), (3, 0.655), (4, 0.352)])
def test_the_clipping_of_normal_weights_is_the_known_optimum(bits: int, share: float) -> None:
    """Steps of the best uniform symmetric quantizer with an odd number of levels for a normal distribution: found by
    a fine search over its exact error, and near those of J. Max ("Quantizing for minimum distortion", 1960)."""
    weight = np.random.default_rng(0).standard_normal((1, 200_000)).astype(np.float32)
    found = float(rounding.weight_scales(weight, bits=bits, axis=0, method="mse")[0])
    low, high = rounding.bounds(bits, signed=True, narrow=True)

    def error(scale: float) -> float:
        return float(np.square(rounding.fake_quantize(weight, scale, 0, low, high) - weight).mean())

    steps = np.linspace(0.1, 2.0, 381)
    assert error(found) <= min(error(step) for step in steps) * 1.0005
    assert found == pytest.approx(share, rel=0.03)


def test_signal_to_noise() -> None:
    reference = np.array([3.0, -4.0], dtype=np.float32)
    assert rounding.sqnr_db(reference, reference) == np.inf
    assert rounding.sqnr_db(reference, reference + np.array([0.3, -0.4], np.float32)) == pytest.approx(20.0, abs=1e-4)
    assert rounding.sqnr_db(reference, np.array([np.nan, 0])) == -np.inf
    assert rounding.sqnr_db(np.zeros(2), np.ones(2)) == -np.inf
    assert rounding.sqnr_db(np.zeros(2), np.zeros(2)) == np.inf
