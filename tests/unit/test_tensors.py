"""Preprocessing and tensors: between what a caller gives and gets and what a file takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kedge_protocol import tensors
from kedge_protocol.bundle.config import NO_BATCH, FileTensor, Preprocess, TensorSpec
from kedge_protocol.errors import InputError
from kedge_targets.pipeline import normalization

pytestmark = pytest.mark.device

Array = npt.NDArray[Any]

shapes = arrays.array_shapes(min_dims=1, max_dims=4, max_side=5)
floats = st.floats(-1e4, 1e4, width=32)


def spec_of(
    shape: Sequence[int | None],
    *,
    dtype: str = "float32",
    permutation: tuple[int, ...] | None = None,
    scale: float | None = None,
    zero_point: int | None = None,
    file_dtype: str | None = None,
) -> TensorSpec:
    moved = tuple(shape) if permutation is None else tuple(shape[axis] for axis in permutation)
    file = FileTensor(
        name="file",
        index=0,
        shape=moved,
        dtype=file_dtype or dtype,
        permutation=permutation,
        scale=scale,
        zero_point=zero_point,
    )
    return TensorSpec(name="x", shape=tuple(shape), dtype=dtype, file=file)


@given(st.data(), shapes)
def test_a_permutation_there_and_back_is_the_same(data: st.DataObject, shape: tuple[int, ...]) -> None:
    array = data.draw(arrays.arrays(np.float32, shape, elements=floats))
    permutation = tuple(data.draw(st.permutations(range(len(shape)))))
    spec = spec_of(shape, permutation=permutation)
    moved = tensors.to_file(array, spec)
    assert moved.shape == spec.file.shape
    assert moved.flags.c_contiguous
    np.testing.assert_array_equal(moved, array.transpose(permutation))
    back = tensors.from_file(moved, spec)
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, array)


@given(
    arrays.arrays(np.float32, shapes, elements=floats),
    st.floats(2**-13, 128, width=32),
    st.sampled_from([("int8", -128, 127), ("uint8", 0, 255), ("int16", -32768, 32767)]),
    st.data(),
)
def test_quantization_is_within_half_a_step_and_saturates(
    array: Array, scale: float, kind: tuple[str, int, int], data: st.DataObject
) -> None:
    dtype, low, high = kind
    zero_point = data.draw(st.integers(low, high))
    spec = spec_of(array.shape, scale=scale, zero_point=zero_point, file_dtype=dtype)
    stored = tensors.to_file(array, spec)
    assert stored.dtype == np.dtype(dtype)
    back = tensors.from_file(stored, spec)
    assert back.dtype == np.float32
    smallest, largest = (low - zero_point) * scale, (high - zero_point) * scale
    wanted = np.clip(array.astype(np.float64), smallest, largest)
    # Half a step, and what float32 loses on the way.
    allowed = 0.5 * scale + 1e-5 * max(abs(smallest), abs(largest), 1.0)
    assert np.all(np.abs(back - wanted) <= allowed)


@given(st.integers(-120, 120), st.floats(2**-10, 8, width=32), st.integers(-5, 5))
def test_what_a_file_can_hold_comes_back_exactly(stored: int, scale: float, zero_point: int) -> None:
    spec = spec_of((1,), scale=scale, zero_point=zero_point, file_dtype="int8")
    array = np.array([stored], np.int8)
    np.testing.assert_array_equal(tensors.to_file(tensors.from_file(array, spec), spec), array)


def test_rounding_is_half_to_even_as_in_onnx() -> None:
    spec = spec_of((6,), scale=1.0, zero_point=0, file_dtype="int8")
    halves = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert tensors.to_file(halves, spec).tolist() == [-2, -2, 0, 0, 2, 2]


def test_the_callers_array_is_not_changed() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept = array.copy()
    tensors.to_file(array, spec_of((2, 3), scale=0.5, zero_point=3, file_dtype="int8"))
    normalization.apply(array, Preprocess(scale=(2.0,), mean=(1.0,), std=(3.0,)), layout=None)
    np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64, np.float16, np.bool_])
def test_numeric_dtypes_are_taken(dtype: type) -> None:
    spec = spec_of((None, 3))
    array = np.ones((2, 3), dtype)
    tensors.check_input(array, spec)
    assert tensors.to_file(array, spec).dtype == np.float32


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((2, 4)), "shape 2x4 does not fit ?x3"),
        (np.zeros((3,)), "shape 3 does not fit ?x3"),
        (np.zeros((2, 3, 1)), "shape 2x3x1"),
        (np.array([["a", "b", "c"]]), "dtype <U1 is not numeric"),
        (np.array("photo.jpg"), "is not numeric. Give numbers; files and texts need a pipeline"),
        (np.array([[1j, 0, 0]]), "complex128"),
        (np.zeros((2, 3), object), "object"),
    ],
)
def test_an_array_that_does_not_fit_is_told_with_the_input(array: Array, told: str) -> None:
    with pytest.raises(InputError) as caught:
        tensors.check_input(array, spec_of((None, 3)))
    assert told in str(caught.value)
    assert "'x'" in str(caught.value)


def test_a_list_for_an_input_of_one_number_is_told_as_such() -> None:
    spec = replace(spec_of(()), batch_axis=NO_BATCH)
    with pytest.raises(InputError, match=r"shape 1 does not fit one number \(it has no batch axis\)"):
        tensors.check_input(np.ones(1), spec)


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))
def test_any_batch_fits_and_free_axes_take_any_length(batch: int, first: int, second: int) -> None:
    tensors.check_input(np.zeros((batch, first, second)), spec_of((1, None, second)))


@given(
    arrays.arrays(np.uint8, (2, 3, 4, 4)),
    st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3),
    st.lists(st.floats(0.125, 3, width=32), min_size=3, max_size=3),
)
def test_values_for_each_channel_follow_the_layout(raw: Array, mean: list[float], std: list[float]) -> None:
    how = Preprocess(scale=(1 / 255,), mean=tuple(mean), std=tuple(std))
    first = normalization.apply(raw, how, layout="NCHW")
    last = normalization.apply(np.ascontiguousarray(raw.transpose(0, 2, 3, 1)), how, layout="NHWC")
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first.transpose(0, 2, 3, 1), last)
    for channel in range(3):
        wanted = (raw[:, channel].astype(np.float64) / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(first[:, channel], wanted, rtol=1e-4, atol=1e-5)


@given(arrays.arrays(np.float32, shapes, elements=floats))
def test_no_preprocessing_changes_nothing(raw: Array) -> None:
    out = normalization.apply(raw, Preprocess(), layout=None)
    np.testing.assert_array_equal(out, raw)
    assert out is not raw


@pytest.mark.parametrize(
    ("layout", "rank", "axis"), [("NCHW", 4, 1), ("NHWC", 4, 3), (None, 4, 3), ("NCHW", 3, 2), (None, 2, 1)]
)
def test_the_axis_of_the_channels(layout: str | None, rank: int, axis: int) -> None:
    assert normalization.channel_axis(layout, rank) == axis


@pytest.mark.parametrize("field", ["scale", "mean", "std"])
def test_as_many_values_as_there_are_no_channels(field: str) -> None:
    how = Preprocess(**{field: (1.0, 2.0)})
    with pytest.raises(InputError, match=rf"preprocess: {field} has 2 values for 3 channels"):
        normalization.apply(np.zeros((1, 3, 2, 2), np.float32), how, layout="NCHW")
