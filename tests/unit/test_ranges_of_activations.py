"""Ranges of activations: every method, masks, outliers, constants, bad input, bounded memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from tests.support.lowering import Calibration, classifier, images

from kedge_protocol.errors import DatasetError, ModelError
from kedge_targets.graph import range_clipping, ranges, rounding
from kedge_targets.numerics import RangeMethod

Array = npt.NDArray[Any]
METHODS = list(RangeMethod)


def graph(
    nodes: list[onnx.NodeProto], *, batch: int | str = "N", width: int = 4, constants: Any = ()
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, width])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def relu(**options: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Neg", ["x"], ["n"], name="negate"),
        helper.make_node("Relu", ["n"], ["y"], name="cut"),
    ]
    return graph(nodes, **options)


def batches(samples: Array, name: str = "x") -> Calibration:
    return Calibration(name, samples)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_lie_within_what_was_seen_and_hold_zero(method: RangeMethod) -> None:
    samples = np.random.default_rng(0).standard_normal((37, 4)).astype(np.float32) + np.float32(0.3)
    found = ranges.observe(relu(), batches(samples), ["x", "n", "y"], method=method)
    assert list(found) == ["x", "n", "y"]
    for name, values in (("x", samples), ("n", -samples), ("y", np.maximum(-samples, 0))):
        low, high = found[name]
        assert values.min() - 1e-6 <= low <= 0 <= high <= values.max() + 1e-6
    assert found["y"][0] == 0.0
    if method is RangeMethod.MIN_MAX:
        assert found["x"] == (float(samples.min()), float(samples.max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_a_fixed_batch_sees_the_same(method: RangeMethod, batch: int | str) -> None:
    samples = np.random.default_rng(1).standard_normal((30, 4)).astype(np.float32)
    free = ranges.observe(relu(), batches(samples), ["n", "y"], method=method)
    assert ranges.observe(relu(batch=batch), batches(samples), ["n", "y"], method=method) == free


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 2.5, -3e-20, 1e-42, 1e29])
def test_constant_tensors_and_single_samples(method: RangeMethod, value: float) -> None:
    samples = np.full((1, 4), value, dtype=np.float32)
    low, high = ranges.observe(relu(), batches(samples), ["x"], method=method)["x"]
    stored = float(np.float32(value))
    assert (low, high) == pytest.approx((min(0.0, stored), max(0.0, stored)), rel=1e-3)
    assert ranges.observe(relu(), batches(samples), ["x"], method=method, symmetric=True)["x"][1] == pytest.approx(
        abs(stored), rel=1e-3
    )


def test_initializers_are_tensors_too() -> None:
    weight = np.array([[-2.0, 1.0, 0.0, 3.0]], dtype=np.float32)
    model = graph([helper.make_node("Add", ["x", "w"], ["y"], name="add")], constants=[("w", weight)])
    samples = np.zeros((3, 4), dtype=np.float32)
    assert ranges.observe(model, batches(samples), ["w", "y"], method=RangeMethod.MIN_MAX) == {
        "w": (-2.0, 3.0),
        "y": (-2.0, 3.0),
    }


@pytest.mark.parametrize("method", [RangeMethod.PERCENTILE, RangeMethod.ENTROPY, RangeMethod.MSE])
@pytest.mark.parametrize("symmetric", [False, True])
def test_an_outlier_is_cut_off(method: RangeMethod, symmetric: bool) -> None:
    samples = np.random.default_rng(2).standard_normal((200, 256)).astype(np.float32)
    samples[0, 0] = 40.0
    found = ranges.observe(
        relu(width=256), batches(samples), ["x"], method=method, bits=4, percentile=99.9, symmetric=symmetric
    )
    low, high = found["x"]
    assert 1.5 < high < 12.0
    assert low == -high if symmetric else -12.0 < low < -1.5


def test_percentile_counts_zeros_and_cuts_both_ends() -> None:
    values = np.concatenate([np.zeros(9000), np.linspace(1, 10, 1000)]).astype(np.float32)
    found = ranges.observe(
        relu(width=100), batches(values.reshape(100, 100)), ["x"], method=RangeMethod.PERCENTILE, percentile=95.0
    )
    # 5 % of all values, zeros among them, is the upper half of those that are not.
    assert found["x"][1] == pytest.approx(5.5, abs=0.1)
    both = np.linspace(-1, 1, 10000).astype(np.float32).reshape(100, 100)
    low, high = ranges.observe(relu(width=100), batches(both), ["x"], method=RangeMethod.PERCENTILE, percentile=90.0)[
        "x"
    ]
    assert (low, high) == pytest.approx((-0.9, 0.9), abs=0.01)


def test_least_square_error_is_what_it_says() -> None:
    """The range found is no worse than any other of a fine grid, measured on the values themselves."""
    values = (np.random.default_rng(3).standard_normal((100, 100)) ** 3).astype(np.float32)
    found = ranges.observe(relu(width=100), batches(values), ["x"], method=RangeMethod.MSE, bits=4, symmetric=True)

    def error(limit: float) -> float:
        scale, zero = rounding.scale_and_zero_point(-limit, limit, bits=4, signed=True, symmetric=True)
        return float(np.square(rounding.fake_quantize(values, scale, zero, -7, 7) - values).mean())

    assert error(found["x"][1]) <= 1.02 * min(error(limit) for limit in np.linspace(0.5, np.abs(values).max(), 200))


def test_entropy_is_the_divergence_of_migacz() -> None:
    """Against the definition, written out bin by bin."""
    counts = np.random.default_rng(4).integers(0, 50, 64).astype(np.int64)
    counts[20:30] = 0
    stop, levels = 40, 8
    p = counts[:stop].astype(float)
    p[-1] += counts[stop:].sum()
    q = np.zeros(stop)
    for level in range(levels):
        part = slice(level * stop // levels, (level + 1) * stop // levels)
        filled = p[part] > 0
        if filled.any():
            q[part][filled] = counts[:stop][part].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    wanted = sum(a * np.log(a / max(b, 1e-9)) for a, b in zip(p, q, strict=True) if a > 0)
    assert range_clipping._divergence(counts, 0, stop, levels) == pytest.approx(wanted)


def masked() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["scaled"], name="scale"),
        helper.make_node("Add", ["scaled", "mask"], ["scores"], name="mask_scores"),
        helper.make_node("Softmax", ["scores"], ["y"], name="softmax", axis=-1),
    ]
    return graph(nodes, constants=[("two", np.float32(2)), ("mask", np.array([0, 0, 0, -10000], dtype=np.float32))])


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_left_out(method: RangeMethod) -> None:
    samples = np.random.default_rng(5).standard_normal((50, 4)).astype(np.float32)
    low, high = ranges.observe(masked(), batches(samples), ["scores"], method=method)["scores"]
    assert -10 < low < 0 < high < 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, -3.4e38])
def test_infinity_is_left_out(method: RangeMethod, value: float) -> None:
    samples = np.random.default_rng(6).standard_normal((20, 4)).astype(np.float32)
    samples[3] = value
    low, high = ranges.observe(relu(), batches(samples), ["n"], method=method)["n"]
    assert -5 < low < 0 < high < 5


def test_a_nan_names_the_node_and_the_sample() -> None:
    nodes = [
        helper.make_node("Sqrt", ["x"], ["root"], name="the_root"),
        helper.make_node("Relu", ["root"], ["y"], name="cut"),
    ]
    samples = np.ones((40, 4), dtype=np.float32)
    samples[0, 1] = -1.0
    with pytest.raises(ModelError, match=r"node 'the_root' \(Sqrt\), tensor 'root'.*NaN on sample 0"):
        ranges.observe(graph(nodes), batches(samples), ["y", "root"], method=RangeMethod.MIN_MAX)


def test_bad_requests_are_refused() -> None:
    samples = np.ones((2, 4), dtype=np.float32)
    with pytest.raises(ModelError, match=r"tensor 'nowhere'.*no such tensor"):
        ranges.observe(relu(), batches(samples), ["nowhere"], method=RangeMethod.MIN_MAX)
    with pytest.raises(DatasetError, match="no sample"):
        ranges.observe(relu(), batches(samples[:0]), ["y"], method=RangeMethod.MIN_MAX)
    with pytest.raises(TypeError, match="twice"):
        ranges.observe(relu(), iter(batches(samples)), ["y"], method=RangeMethod.MSE)


def test_min_max_reads_once_and_tells_how_far_it_is() -> None:
    samples = batches(np.ones((5, 4), dtype=np.float32))
    heard: list[tuple[str, int, int]] = []
    ranges.observe(relu(), samples, ["y"], method=RangeMethod.MIN_MAX, progress=lambda *said: heard.append(said))
    assert samples.passes == 1
    assert heard[-1] == ("calibrate", 5, 5)
    ranges.observe(relu(), samples, ["y"], method=RangeMethod.MSE, progress=lambda *said: heard.append(said))
    assert samples.passes == 3
    assert heard[-1] == ("calibrate", 10, 10)


def test_samples_of_different_lengths_are_not_joined() -> None:
    made = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"], name="negate")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "length"])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    samples = [{"x": np.full((1, length), length, dtype=np.float32)} for length in (3, 3, 5, 2, 2, 2)]
    assert ranges.observe(model, samples, ["y"], method=RangeMethod.PERCENTILE, percentile=100.0)["y"] == (-5.0, 0.0)


def test_memory_does_not_grow_with_the_samples() -> None:
    class Stream:
        samples = 400

        def __iter__(self) -> Iterator[dict[str, Array]]:
            rng = np.random.default_rng(0)
            for _ in range(self.samples):
                yield {"image": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}

    model = classifier()
    tensors = ["image", "c1", "r1", "c2", "r2", "p"]
    ranges.observe(model, batches(images(3), "image"), tensors, method=RangeMethod.ENTROPY)
    tracemalloc.start()
    try:
        ranges.observe(model, Stream(), tensors, method=RangeMethod.ENTROPY)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20


@settings(max_examples=60)
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    method=st.sampled_from(METHODS),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_whatever_comes_the_range_is_sound(values: Array, method: RangeMethod, bits: int, symmetric: bool) -> None:
    counts = np.zeros(ranges.BINS, dtype=np.int64)
    observed = ranges.Histogram(counts=counts)
    assert observed.extend(values)
    observed.count(values)
    assert observed.zeros + counts.sum() == values.size
    low, high = observed.range(method=method, percentile=99.0, bits=bits, symmetric=symmetric)
    assert np.isfinite([low, high]).all()
    assert low <= 0 <= high
    assert max(-low, high) <= np.abs(values).max() * (1 + 1e-6)
    assert (low == -high) if symmetric else (low >= values.min() or low == 0)
    assert (low, high) != (0, 0) or not values.any()
