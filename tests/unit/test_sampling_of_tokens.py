"""Picking tokens: each option restricts what may come, and equal seeds give equal answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge_agent.generation.sampling import Sampler, Sampling, log_probabilities
from kedge_protocol.errors import InputError

LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.15, 0.1], np.float32))


def _drawn(sampling: Sampling, count: int = 200) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.pick(LOGITS, ()) for _ in range(count)]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=0), {1}),
        (Sampling(temperature=1, seed=1), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1, top_k=2, seed=1), {1, 2}),
        (Sampling(temperature=1, top_p=0.6, seed=1), {1, 2}),
        (Sampling(temperature=1, min_p=0.3, seed=1), {1, 2, 3}),
    ],
)
def test_only_what_is_allowed_comes_and_all_of_it(sampling: Sampling, allowed: set[int]) -> None:
    assert set(_drawn(sampling)) == allowed


def test_frequencies_are_the_probabilities() -> None:
    drawn = np.bincount(_drawn(Sampling(temperature=1, seed=3), 4000)) / 4000
    assert np.abs(drawn - np.exp(LOGITS)).max() < 0.03


def test_a_seed_repeats_and_another_does_not() -> None:
    assert _drawn(Sampling(temperature=1, seed=5)) == _drawn(Sampling(temperature=1, seed=5))
    assert _drawn(Sampling(temperature=1, seed=5)) != _drawn(Sampling(temperature=1, seed=6))


def test_what_was_said_is_said_less() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    before = LOGITS.copy()
    assert sampler.pick(LOGITS, [1]) == 2
    assert np.array_equal(LOGITS, before)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"temperature": float("nan")}]
)
def test_an_option_out_of_its_range_is_an_error(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="sampling"):
        Sampling(**options)  # type: ignore[arg-type]


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.integers(0, 5))
def test_log_probabilities_sum_up_to_one_and_the_best_come_first(logits: list[float], top: int) -> None:
    array = np.array(logits, np.float32)
    total = sum(np.exp(log_probabilities(array, token, 0)[0]) for token in range(len(logits)))
    assert total == pytest.approx(1.0, abs=1e-5)
    found = log_probabilities(array, 0, top)[1]
    assert len(found) == min(top, len(logits))
    assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)


def test_logits_that_differ_a_little_give_the_same_tokens_for_the_same_seeds() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, 5000).astype(np.float32)
    near = (logits + random.normal(0, 0.05, 5000)).astype(np.float32)
    same = [
        Sampler(Sampling(temperature=1, seed=seed)).pick(logits, [])
        == Sampler(Sampling(temperature=1, seed=seed)).pick(near, [])
        for seed in range(200)
    ]
    assert np.mean(same) > 0.9
