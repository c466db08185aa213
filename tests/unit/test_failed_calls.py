"""One share of failed calls: the agent counts it, gates judge it, the page draws it, the simulator plays it."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_call_figures import message

from kedge.fleet.call_figures import Figures
from kedge.page.views import failed_share
from kedge.simulator.behaviour import SimulatedRuntime
from kedge.simulator.scenario import Defect, Runtime
from kedge_agent import counters
from kedge_protocol.messages import ModelTelemetry

BUNDLE = "sha256:" + "a" * 64


def counted(answered: int, failed: int) -> ModelTelemetry:
    """What an agent tells of a process's calls."""
    with tempfile.TemporaryDirectory() as folder:
        counter = counters.Counter(Path(folder), digest=BUNDLE, generation=0)
        for _ in range(answered):
            counter.record(1000)
        for _ in range(failed):
            counter.error()
        total = counters.collect(Path(folder))
        counter.close()
    return ModelTelemetry(
        digest=BUNDLE,
        inferences=total.inferences,
        errors=total.errors,
        inferences_total=total.inferences,
        errors_total=total.errors,
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_page_and_gates_see_the_share_of_failed_calls_that_the_device_counted(answered: int, failed: int) -> None:
    told = counted(answered, failed)
    figures = Figures(since=0.0, until=0.0)
    figures.add(1.0, message(BUNDLE), told, count=True)
    figures.add(100.0, message(BUNDLE), counted(0, 0), count=True)
    assert (figures.calls.total, figures.calls.bad) == (answered + failed, failed)
    shown = failed_share(told)
    assert shown == (pytest.approx(100 * figures.calls.rate) if answered + failed else None)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.08, 0.5, 1.0]))
def test_a_simulated_device_counts_calls_as_an_agent_does(seed: int, errors: float) -> None:
    def measured(share: float) -> tuple[int, int, int]:
        noise = np.random.default_rng(seed)
        runtime = SimulatedRuntime(Runtime(errors=0.0), random.Random(seed), noise, slow=1.0)
        found = runtime.measure(300.0, Defect(errors=share))
        return found.inferences, found.errors, len(found.latencies_ms)

    answered, failed, timed = measured(errors)
    assert answered + failed == sum(measured(0.0)[:2]), "a failed call is not one more"
    assert timed == answered, "only an answered call has a time"
    assert failed == pytest.approx(errors * (answered + failed), abs=5 * (answered + failed) ** 0.5)
