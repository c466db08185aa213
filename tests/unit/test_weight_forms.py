"""Weights stored small: what comes back is close, small and the same each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kedge_protocol.errors import LoweringError
from kedge_targets.graph import kmeans, weight_encodings
from kedge_targets.numerics import Family, Precision

FORMS = [precision for precision in Precision if precision.family is Family.WEIGHTS]
SHAPES = arrays.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=9)
WEIGHTS = arrays.arrays(np.float32, SHAPES, elements=st.floats(-100, 100, width=32))

# Decibels over the error, for weights of a normal distribution. What theory says of 16 levels: 20.2 (Max, 1960).
DECIBELS = {
    Precision.INT4: 21.0,
    Precision.CODEBOOK4: 19.7,
    Precision.LOG4: 14.0,
    Precision.CODEBOOK8: 42.0,
    Precision.LOG8: 32.0,
}


def normal(*shape: int, seed: int = 0) -> npt.NDArray[Any]:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(np.float32)


def decibels(weight: npt.NDArray[Any], back: npt.NDArray[Any]) -> float:
    return float(10 * np.log10(np.square(weight).sum() / np.square(weight - back).sum()))


@pytest.mark.parametrize("precision", FORMS)
@pytest.mark.parametrize(("shape", "axis"), [((256, 384), 0), ((384, 256), 1), ((64, 32, 3, 3), 0)])
def test_the_error_is_what_the_form_allows(precision: Precision, shape: tuple[int, ...], axis: int) -> None:
    weight = normal(*shape)
    back = weight_encodings.dequantized(weight, precision, axis=axis)
    assert back.shape == weight.shape
    assert back.dtype == np.float32
    assert decibels(weight, back) > DECIBELS[precision]


@pytest.mark.parametrize("precision", FORMS)
@settings(max_examples=40, deadline=None)
@given(weight=WEIGHTS, data=st.data())
def test_any_weight_comes_back_within_its_steps(
    precision: Precision, weight: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-weight.ndim, weight.ndim - 1))
    asymmetric = data.draw(st.booleans())
    made = weight_encodings.encode(weight, precision, axis=axis, group_size=4, asymmetric=asymmetric)
    back = made.decoded()
    assert made.codes.shape == back.shape == weight.shape
    assert made.codes.max(initial=0) < 1 << precision.weight_bits
    largest = np.abs(weight).max()
    # Half a step of the coarsest grid, or what a logarithm's missing top costs.
    assert np.abs(back - weight).max() <= 0.35 * largest + 1e-6
    assert np.abs(back).max() <= 1.45 * largest + 1e-6
    if not weight.any():
        assert not back.any()


@settings(max_examples=40, deadline=None)
@given(codes=arrays.arrays(np.uint8, st.integers(0, 50), elements=st.integers(0, 15)))
def test_packing_two_codes_in_a_byte_loses_nothing(codes: npt.NDArray[np.uint8]) -> None:
    raw = weight_encodings.pack_codes(codes)
    assert raw.size == -(-codes.size // 2)
    unpacked = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)[: codes.size]
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("precision", FORMS)
def test_the_same_weight_gives_the_same_codes(precision: Precision) -> None:
    weight = normal(96, 300)
    first, second = (weight_encodings.encode(weight, precision, axis=0, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.decoded(), second.decoded())


def test_logarithmic_weights_are_powers_of_two() -> None:
    made = weight_encodings.encode(normal(8, 200), Precision.LOG4, axis=0)
    assert made.table is not None
    magnitudes = np.unique(np.abs(made.table))
    assert magnitudes[0] == 0
    np.testing.assert_array_equal(magnitudes[1:], np.exp2(np.arange(-6, 1)))


def test_a_codebook_finds_the_values_that_there_are() -> None:
    values = np.random.default_rng(1).choice(np.array([-3.0, -0.5, 0.25, 7.0], np.float32), (6, 20))
    np.testing.assert_array_equal(weight_encodings.dequantized(values, Precision.CODEBOOK4, axis=0), values)


@pytest.mark.packages("sklearn")
def test_k_means_is_as_good_as_scikit_learns() -> None:
    from sklearn import cluster

    values = normal(5000).reshape(-1)
    theirs = cluster.KMeans(16, n_init=5, random_state=0).fit(values[:, None]).inertia_
    table = kmeans.clusters(values, 16)
    ours = np.square(values[:, None] - table).min(axis=1).sum()
    assert ours <= 1.02 * theirs


def test_a_zero_point_serves_weights_of_one_sign() -> None:
    weight = np.abs(normal(8, 64)) + 0.01
    errors = [
        decibels(weight, weight_encodings.dequantized(weight, Precision.INT4, axis=0, asymmetric=asymmetric))
        for asymmetric in (True, False)
    ]
    assert errors[0] > errors[1] + 3


def test_a_group_larger_than_a_channel_is_the_channel() -> None:
    weight = normal(4, 10)
    made = weight_encodings.encode(weight, Precision.INT4, axis=0, group_size=32)
    assert made.scales is not None
    assert made.scales.shape == (4, 1)


@pytest.mark.parametrize("weight", [np.array([1, np.nan], np.float32), np.zeros((0, 3), np.float32)])
def test_weights_that_are_none(weight: npt.NDArray[Any]) -> None:
    with pytest.raises(LoweringError, match="empty or not finite"):
        weight_encodings.encode(weight, Precision.INT4, axis=0)


def test_a_precision_of_another_family() -> None:
    with pytest.raises(LoweringError, match="int8 is no form of stored weights"):
        weight_encodings.encode(normal(2, 2), Precision.INT8, axis=0)


@pytest.mark.parametrize("precision", [Precision.CODEBOOK4, Precision.LOG4])
def test_one_giant_costs_its_group_and_not_the_channel(precision: Precision) -> None:
    weight = normal(16, 512)
    weight[:, 100] *= 200
    neighbours = np.ones(512, bool)
    neighbours[96:128] = False
    apart, together = (
        weight_encodings.dequantized(weight, precision, axis=0, group_size=size)[:, neighbours] for size in (32, 512)
    )
    assert decibels(weight[:, neighbours], apart) > DECIBELS[precision] - 3
    assert decibels(weight[:, neighbours], together) < DECIBELS[precision] - 6


@pytest.mark.parametrize("precision", [Precision.CODEBOOK4, Precision.LOG4])
@pytest.mark.parametrize(("size", "dtype"), [(1.0, np.float16), (1e-9, np.float32), (1e9, np.float32)])
def test_scales_of_groups_are_short_where_that_holds_them(precision: Precision, size: float, dtype: type) -> None:
    weight = normal(8, 256) * np.float32(size)
    made = weight_encodings.encode(weight, precision, axis=0, group_size=32)
    assert made.scales is not None
    assert made.scales.dtype == dtype
    assert made.scales.shape == (8, 8)
    assert decibels(weight, made.decoded()) > DECIBELS[precision]
    assert made.table is not None
    assert made.stored_bytes == weight.size // 2 + made.scales.nbytes + made.table.nbytes
