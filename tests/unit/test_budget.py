"""Budgets: sizes as people write them, what is over and how far."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.search.budget import Budget, size_bytes
from kedge_protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("12345", 12345),
        ("200k", 200_000),
        ("1.5MB", 1_500_000),
        ("300KiB", 300 * 1024),
        ("2 MiB", 2 << 20),
        ("700 B", 700),
        ("0.3x", 300),
        ("30%", 300),
    ],
)
def test_sizes(text: str, bytes_: int) -> None:
    assert size_bytes(text, of=1000, where="--max-size") == bytes_


@pytest.mark.parametrize("text", ["", "small", "-3k", "0", "0x", "3 T", "1e3", "k"])
def test_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        size_bytes(text, of=1000, where="--max-size")


def test_what_is_over_is_said_with_both_figures() -> None:
    budget = Budget(max_drop=0.01, max_size=1000, max_latency=2.0)
    assert budget.said(drop=0.01, size=1000, latency=2.0) == ""
    said = budget.said(drop=0.05, size=1500, latency=3.0)
    assert "dropped by 0.05, allowed are 0.01" in said
    assert "1500 bytes, allowed are 1000" in said
    assert "3 ms, allowed are 2" in said
    assert budget.excess(drop=0.02, size=1500, latency=4.0) == pytest.approx({"drop": 1.0, "size": 0.5, "latency": 1.0})


def test_answers_may_be_asked_to_stay_the_same() -> None:
    budget = Budget(max_drop=0.01, min_agreement=0.95)
    assert budget.excess(drop=-0.1, size=1, latency=None, agreement=0.93) == pytest.approx({"agreement": 2.0})
    assert "on 0.93, wanted are 0.95" in budget.said(drop=-0.1, size=1, latency=None, agreement=0.93)
    assert budget.excess(drop=0.0, size=1, latency=None, agreement=0.95) == {}
    # Where there are no answers to compare, and where nobody asks.
    assert budget.excess(drop=0.0, size=1, latency=None) == {}
    assert Budget(max_drop=0.01).excess(drop=0.0, size=1, latency=None, agreement=0.0) == {}


def test_a_metric_that_is_no_number_is_over() -> None:
    assert Budget(max_drop=0.5).excess(drop=math.nan, size=1, latency=None) == {"drop": math.inf}


@given(
    drop=st.floats(-1, 1),
    size=st.integers(1, 10**9),
    latency=st.none() | st.floats(0.001, 1e6),
    max_drop=st.floats(0, 1),
    max_size=st.none() | st.integers(1, 10**9),
    max_latency=st.none() | st.floats(0.001, 1e6),
)
def test_said_and_excess_agree(
    drop: float,
    size: int,
    latency: float | None,
    max_drop: float,
    max_size: int | None,
    max_latency: float | None,
) -> None:
    budget = Budget(max_drop=max_drop, max_size=max_size, max_latency=max_latency)
    over = budget.excess(drop=drop, size=size, latency=latency)
    assert bool(over) == bool(budget.said(drop=drop, size=size, latency=latency))
    assert all(value > 0 or math.isclose(value, 0, abs_tol=1e-9) for value in over.values())


def test_with_a_confidence_the_agreement_must_be_shown_too() -> None:
    kept = {"drop": 0.0, "size": 1, "latency": None, "agreement": 1.0, "upper": 0.0}
    assert not Budget(max_drop=0.1, min_agreement=0.95).excess(**kept, samples=40)
    sure = Budget(max_drop=0.1, min_agreement=0.95, confidence=0.95)
    assert set(sure.excess(**kept, samples=40)) == {"agreement"}
    assert sure.said(**kept, samples=40).startswith("agrees with the float model on 1, and 0.95 sure is only 0.9124")
    assert not sure.excess(**kept, samples=400)
