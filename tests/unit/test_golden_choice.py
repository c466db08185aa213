"""Choosing golden vectors and measuring their tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.evaluation import golden as choosing
from kedge_protocol.bundle.config import FileTensor, TensorSpec
from kedge_protocol.golden import deviation


def spec(*, scale: float | None = None, dtype: str = "float32") -> TensorSpec:
    file = FileTensor(name="y", index=0, shape=(None, 4), dtype=dtype, scale=scale, zero_point=None)
    return TensorSpec(name="y", shape=(None, 4), dtype="float32", file=file)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


@given(count=st.integers(1, 500), wanted=st.integers(1, 200))
def test_candidates_are_distinct_and_in_range(count: int, wanted: int) -> None:
    found = choosing.candidates(count, wanted)
    assert found == sorted(set(found))
    assert len(found) == min(count, wanted)
    assert 0 <= found[0] <= found[-1] < count


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 60),
    noise=st.floats(0, 0.5),
    sets=st.integers(1, 3),
    eight_bits=st.booleans(),
    softened=st.booleans(),
)
def test_every_kernel_set_that_was_measured_is_allowed(
    seed: int, count: int, noise: float, sets: int, eight_bits: bool, softened: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(count, 4)) * 3
    runs = []
    for _ in range(sets):
        moved = scores + noise * rng.normal(size=scores.shape) * bool(runs)
        runs.append({"y": softmax(moved) if softened else moved.astype(np.float32)})
    picked = choosing.choose(runs, [spec()], eight_bits=eight_bits)
    assert picked == sorted(set(picked))
    assert min(count, choosing.LEAST) <= len(picked) <= choosing.WANTED
    allowed = choosing.tolerances(runs, picked, [spec()], eight_bits=eight_bits)["y"]
    for run in runs:
        largest, rms = deviation(runs[0]["y"][picked], run["y"][picked])
        assert largest <= allowed.max_abs
        assert rms <= allowed.rms


def test_rows_on_which_the_kernels_agree_are_taken() -> None:
    first = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    second = first.copy()
    second[::2] += 1.0
    picked = choosing.choose([{"y": first}, {"y": second}], [spec()], eight_bits=True)
    assert all(index % 2 == 1 for index in picked)


def test_saturated_rows_are_left_aside() -> None:
    rng = np.random.default_rng(0)
    outputs = softmax(rng.normal(size=(60, 4)))
    outputs[::2] = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 30)]
    picked = choosing.choose([{"y": outputs}, {"y": outputs}], [spec()], eight_bits=True)
    assert len(picked) == choosing.WANTED
    assert all(index % 2 == 1 for index in picked)


def test_every_class_is_there() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(100, 4))
    scores[:, 0] += 1.5  # most rows are of one class
    picked = choosing.choose([{"y": softmax(scores)}], [spec()], eight_bits=True)
    assert set(scores[picked].argmax(axis=1)) == {0, 1, 2, 3}


def test_a_quantized_output_has_its_scale_as_step() -> None:
    assert choosing.quantum(np.zeros((3, 4), np.float32), spec(scale=0.25, dtype="int8")) == 0.25


@given(step=st.floats(1e-3, 10), offset=st.integers(-40, 40), seed=st.integers(0, 100))
def test_the_step_of_scores_on_a_grid_is_found(step: float, offset: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 60, size=(100, 4)) + offset
    scores = (levels * step).astype(np.float32)
    assert choosing.quantum(scores, spec()) == pytest.approx(step, rel=1e-3)


@given(step=st.floats(0.05, 0.3), seed=st.integers(0, 100))
def test_the_step_before_softmax_is_found(step: float, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(-30, 30, size=(200, 4))
    assert choosing.quantum(softmax(levels * step), spec()) == pytest.approx(step / 4, rel=0.02)


@given(seed=st.integers(0, 100))
def test_what_moves_freely_has_no_step(seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(200, 4)).astype(np.float32)
    assert choosing.quantum(scores, spec()) == 0.0
    assert choosing.quantum(softmax(scores), spec()) == 0.0


def test_without_8_bits_only_float_noise_is_allowed() -> None:
    outputs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    allowed = choosing.tolerances([{"y": outputs}], [0, 1], [spec()], eight_bits=False)["y"]
    assert allowed.max_abs == pytest.approx(1e-5 * np.abs(outputs).max())
