"""Finding the order of axes of a converted file by running it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge_targets.backends.tflite import axis_matching
from kedge_targets.contract import Array, Session


class Turned(Session):
    """A file that computes twice its input plus a number of each place's own, with both turned."""

    def __init__(
        self, shape: tuple[int, ...], inward: axis_matching.Permutation, outward: axis_matching.Permutation
    ) -> None:
        self._places = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        self._back = np.argsort(inward)
        self._outward = outward

    def compute(self, array: Array) -> Array:
        return np.asarray(2 * array + self._places)

    def run(self, inputs: list[Array]) -> list[Array]:
        return [self.compute(inputs[0].transpose(self._back)).transpose(self._outward)]


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_whatever_the_file_turned_is_found(sizes: list[int], data: st.DataObject) -> None:
    shape = (1, *sizes)
    orders = [(0, *rest) for rest in itertools.permutations(range(1, len(shape)))]
    inward, outward = (data.draw(st.sampled_from(orders)) for _ in range(2))
    session = Turned(shape, inward, outward)
    source = np.random.default_rng(0)
    arrays = [source.standard_normal(shape).astype(np.float32) for _ in range(2)]
    probes = [axis_matching.Probe([array], [session.compute(array)]) for array in arrays]
    found = axis_matching.match(session, [tuple(shape[axis] for axis in inward)], [0], probes)
    assert found is not None
    assert found.error < 1e-6
    # Another order may stand for the same data where axes have size 1.
    (position, back), order = found.outputs[0], found.inputs[0]
    assert position == 0
    assert np.array_equal(arrays[0].transpose(order), arrays[0].transpose(inward))
    assert np.array_equal(probes[0].outputs[0].transpose(back), probes[0].outputs[0].transpose(outward))


@pytest.mark.parametrize(("model", "file"), [((1, 2, 3), (1, 6)), ((1, 2, 3), (1, 2, 4)), ((1, 3), (1, 4))])
def test_shapes_that_do_not_fit_have_no_order(model: tuple[int, ...], file: tuple[int, ...]) -> None:
    assert axis_matching.permutations(model, file) == []


def test_orders_that_differ_by_axes_of_size_one_only_stand_for_one() -> None:
    assert axis_matching.permutations((1, 1, 49, 10), (1, 49, 10, 1)) == [(0, 2, 3, 1)]
    assert len(axis_matching.permutations((1, 4, 4, 4), (1, 4, 4, 4))) == math.factorial(3)


def test_noise_keeps_integers_in_their_range() -> None:
    sample = {"ids": np.array([[3, 5, 7]]), "x": np.full((1, 4), 2.0, np.float32)}
    made = axis_matching.noise_like(sample, seed=1)
    assert sorted(made["ids"].ravel()) == [3, 5, 7]
    assert made["x"].dtype == np.float32
    assert len(set(made["x"].ravel())) == 4


class _Answers(Session):
    """A session whose one output is given."""

    def __init__(self, answer: Array) -> None:
        self._answer = answer

    def run(self, inputs: list[Array]) -> list[Array]:
        return [self._answer]


def test_a_confident_probability_is_not_judged_by_its_last_digits() -> None:
    expected, got = np.array([[1e-9, 3e-8]], np.float32), np.array([[0.0, 5e-8]], np.float32)
    probes = [axis_matching.Probe([np.zeros((1, 2), np.float32)], [expected])]
    session = _Answers(got)
    plain = axis_matching.match(session, [(1, 2)], [0], probes)
    bounded = axis_matching.match(session, [(1, 2)], [0], probes, floors=[1e-3])
    assert plain is not None
    assert bounded is not None
    assert plain.off > 0.1
    assert bounded.off < 1e-3
    wrong = _Answers(np.array([[0.4, 5e-8]], np.float32))
    found = axis_matching.match(wrong, [(1, 2)], [0], probes, floors=[1e-3])
    assert found is not None
    assert found.off > 1
