"""Latencies in turns: what disturbs the machine falls on all alike, and what is not sure is not said to be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.evaluation import latency_race
from kedge.evaluation.latency_race import RelativeLatency, interval, race


class Machine:
    """A clock that only calls move; ``busy`` says how many times as long a call takes at a time. Processor time does
    not count what others do."""

    def __init__(self, busy: Callable[[float], float]) -> None:
        self.now = self.spent = 0.0
        self._busy = busy

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.spent

    def call(self, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += milliseconds / 1000 * self._busy(self.now)
            self.spent += milliseconds / 1000

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], float]], Machine]:
    def made(busy: Callable[[float], float]) -> Machine:
        found = Machine(busy)
        monkeypatch.setattr(latency_race.time, "perf_counter", found.perf_counter)
        monkeypatch.setattr(latency_race.time, "process_time", found.process_time)
        return found

    return made


def test_the_pace_is_right_while_the_machine_gets_slower_and_slower(machine: Callable[..., Machine]) -> None:
    here = machine(lambda now: 1 + 2 * now)
    first, second = race([here.call(2.0), here.call(3.0)], seconds=2.0)
    assert second.pace(first).ratio == pytest.approx(1.5, rel=0.05)
    assert second.pace(first).slower


def test_calls_that_others_disturb_do_not_count(machine: Callable[..., Machine]) -> None:
    rng = np.random.default_rng(0)
    here = machine(lambda now: 20.0 if rng.random() < 0.3 else 1.0)
    first, second = race([here.call(0.2), here.call(0.21)], seconds=2.0)
    pace = second.pace(first)
    assert pace.ratio == pytest.approx(1.05)
    assert not pace.slower
    assert first.latency.p95 > 3.0
    assert first.latency.p50 == pytest.approx(0.2)


def test_on_a_machine_at_other_work_processor_time_decides(machine: Callable[..., Machine]) -> None:
    # Both contenders wait for their threads, the second for many times as long as it computes.
    rng = np.random.default_rng(0)
    here = machine(lambda now: float(rng.lognormal(1.0, 1.2)))
    first, second, third = race([here.call(5.0), here.call(5.2), here.call(9.0)], seconds=3.0)
    assert second.pace(first).busy
    assert second.pace(first).ratio == pytest.approx(1.04)
    assert not second.pace(first).slower
    assert third.pace(first).slower
    assert "processor time" in third.pace(first).text
    assert second.latency.least == pytest.approx(5.2)


def test_a_race_ends_when_it_is_sure(machine: Callable[..., Machine]) -> None:
    here = machine(lambda now: 1.0)
    race([here.call(1.0), here.call(2.0)], seconds=100.0)
    assert here.now < 0.5


def test_a_race_ends_when_the_time_is_up(machine: Callable[..., Machine]) -> None:
    rng = np.random.default_rng(0)
    here = machine(lambda now: float(rng.uniform(1, 3)))
    _, second = turns = race([here.call(50.0), here.call(50.0)], seconds=2.0)
    assert here.now < 3.0
    pace = second.pace(turns[0])
    assert not pace.slower
    assert not pace.faster


def test_long_calls_have_few_rounds_and_a_wide_interval(machine: Callable[..., Machine]) -> None:
    here = machine(lambda now: 1.0 + now % 0.7)
    turns = race([here.call(900.0), here.call(1000.0)], seconds=1.0)
    assert 1 <= len(turns[0].rounds) <= 3
    latency = turns[1].latency
    assert latency.low is not None
    assert latency.high is not None
    assert latency.low <= latency.p50 <= latency.high


def test_the_only_round_of_a_stalled_machine_is_not_sure_of_anything(machine: Callable[..., Machine]) -> None:
    stalled = 1.0
    here = machine(lambda now: stalled)

    def second() -> None:
        nonlocal stalled
        stalled = 1000.0
        here.call(1.0)()
        stalled = 1.0

    turns = race([here.call(1.0), second], seconds=1.0)
    assert len(turns[0].rounds) == 1  # the time is up, and a round alone has no spread
    one, other = turns
    assert not other.pace(one).slower
    assert not one.pace(other).faster
    assert other.pace(one).ratio == pytest.approx(1000.0)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    for count in (6, 9, 40):
        ends = [interval(rng.exponential(size=count).tolist()) for _ in range(2000)]
        assert np.mean([low <= np.log(2) <= high for low, high in ends]) >= 0.94


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=30))
def test_the_interval_lies_within_what_was_seen(values: list[float]) -> None:
    low, high = interval(values)
    assert min(values) <= low <= float(np.median(values)) <= high <= max(values)


def test_a_pace_is_compared_with_the_machines_mood_in_mind() -> None:
    near, far = RelativeLatency(ratio=1.02, low=1.01, high=1.03), RelativeLatency(ratio=1.5, low=1.4, high=1.6)
    assert not near.slower
    assert far.slower
    assert near.overlaps(RelativeLatency(ratio=1.0, low=1.0, high=1.0))
    assert not far.overlaps(near)
    assert far.beside(far).low < 1 < far.beside(far).high
    for one, two in pairwise([RelativeLatency(ratio=r, low=r * 0.99, high=r * 1.01) for r in (0.5, 0.9, 1.3, 2.0)]):
        assert two.beside(one).slower
        assert one.beside(two).faster


def test_what_nobody_notices_is_not_held_against_a_candidate() -> None:
    pace = RelativeLatency(ratio=1.5, low=1.45, high=1.55)
    assert not pace.noticed(0.02)
    assert pace.noticed(2.0)
    assert not RelativeLatency(ratio=1.5, low=0.9, high=2.0).noticed(2.0)
