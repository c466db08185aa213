"""Calls that wait for others run together in one call of the runtime, and get each its own answer or its own error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.waiting import wait_for

from kedge_targets.calls.gathering import Gathering
from kedge_targets.calls.plan import Gathered

pytestmark = pytest.mark.device

Array = npt.NDArray[Any]


class Runtime:
    """Doubles each sample and sums it; refuses a batch with NaN in it. The batch is the second axis of its input and
    the first of its output. Its first call waits until ``others`` wait behind it."""

    def __init__(self, *, others: int = 0, at_once: int = 1) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.running = self.most = 0
        self._others = others
        self._at_once = at_once
        self._lock = threading.Lock()
        self.gathering: Gathering

    def __call__(self, arrays: list[Array]) -> list[Array]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            first = not self.sizes
            self.sizes.append(arrays[0].shape)
        if first:
            wait_for(lambda: len(self.gathering._waiting) >= self._others)
        try:
            if np.isnan(arrays[0]).any():
                raise ValueError("no number")
            return [arrays[0].sum(axis=0) * 2]
        finally:
            with self._lock:
                self.running -= 1


def gathering(runtime: Runtime, *, most: int = 4, at_once: int = 1, values: int = 8) -> Gathering:
    limits = (Gathered(values=values, most=most, gain=2.0), Gathered(values=100, most=1, gain=1.0))
    runtime.gathering = Gathering(runtime, axes_in=[1], axes_out=[0], gathered=limits, at_once=at_once)
    return runtime.gathering


def sample(values: int, rows: int = 1, *, start: float = 1.0) -> Array:
    return np.arange(start, start + values * rows, dtype=np.float32).reshape(values, rows)


def test_what_came_during_a_call_runs_together_up_to_the_limit() -> None:
    runtime = Runtime(others=6)
    call = gathering(runtime, most=4)
    arrays = [sample(3, start=float(number)) for number in range(7)]
    with ThreadPoolExecutor(7) as pool:
        answers = list(pool.map(lambda array: call([array])[0], arrays))
    assert [size[1] for size in runtime.sizes] == [1, 4, 2]
    for array, answer in zip(arrays, answers, strict=True):
        np.testing.assert_array_equal(answer, array.sum(axis=0) * 2)
    assert {size: count for size, (count, _) in call.sizes.items()} == {1: 1, 4: 1, 2: 1}


def test_the_mistake_in_one_call_is_the_error_of_that_one_alone() -> None:
    runtime = Runtime(others=3)
    call = gathering(runtime, most=8)
    arrays = [sample(3, start=float(number)) for number in range(4)]

    def ask(array: Array) -> Array | Exception:
        try:
            return call([array])[0]
        except ValueError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, arrays[0])
        wait_for(lambda: runtime.sizes)
        wrong = pool.submit(ask, np.full((3, 1), np.nan, np.float32))
        others = [pool.submit(ask, array) for array in arrays[1:3]]
        assert isinstance(wrong.result(60), ValueError)
        for array, done in zip(arrays, [first, *others], strict=False):
            np.testing.assert_array_equal(done.result(60), array.sum(axis=0) * 2)
    assert [size[1] for size in runtime.sizes] == [1, 3, 1, 1, 1]


def test_what_does_not_gain_runs_by_itself() -> None:
    runtime = Runtime(others=4)
    call = gathering(runtime, most=4, values=8)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda values: call([sample(values)]), [9, 9, 9, 200, 200]))
    assert [size[1] for size in runtime.sizes] == [1] * 5


@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(1, 5)), min_size=1, max_size=12),
    st.integers(2, 6),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_call_gets_its_own_answer(asked: list[tuple[int, int]], most: int, at_once: int) -> None:
    runtime = Runtime()
    call = gathering(runtime, most=most, at_once=at_once)
    arrays = [sample(values, rows, start=float(number)) for number, (values, rows) in enumerate(asked)]
    with ThreadPoolExecutor(len(arrays)) as pool:
        answers = list(pool.map(lambda array: call([array])[0], arrays))
    for array, answer in zip(arrays, answers, strict=True):
        np.testing.assert_array_equal(answer, array.sum(axis=0) * 2)
    assert runtime.most <= at_once
    assert sum(size[1] for size in runtime.sizes) == sum(rows for _, rows in asked)
    largest = max(rows for _, rows in asked)
    assert all(size[1] <= max(most, largest) for size in runtime.sizes)
