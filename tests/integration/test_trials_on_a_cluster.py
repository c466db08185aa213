"""Trials on a Dask cluster: the same result as here, and clear words where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.compiling import Inputs, small_inputs

import kedge
from kedge_protocol.errors import BudgetError, ConfigError

pytestmark = pytest.mark.packages("distributed")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """A real scheduler with two worker processes, on the loopback."""
    import distributed

    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    )
    try:
        yield cluster.scheduler_address
    finally:
        cluster.close()


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return small_inputs(tmp_path)


def compiled(inputs: Inputs, out: str, **changes: object) -> kedge.Release:
    given: dict[str, object] = {
        "name": "tiny",
        "version": "1.0",
        "targets": ["generic-cpu"],
        "calibration": inputs.calibration,
        "evaluation": inputs.evaluation,
        "out": inputs.out.with_name(out),
        "max_drop": 0.05,
    }
    return kedge.compile(inputs.model, **{**given, **changes})  # type: ignore[arg-type]  # a test's shorthand


def test_the_release_is_the_same_as_from_here(inputs: Inputs, scheduler: str) -> None:
    metric = inputs.model.parent / "own.py"
    metric.write_text(
        "def f(outputs, inputs, labels):\n    return float((outputs['scores'].argmax(1) == labels).mean())\n"
    )
    here = compiled(inputs, "here", metric=f"{metric}:f")
    there = compiled(inputs, "there", metric=f"{metric}:f", scheduler=scheduler)
    assert here.digest == there.digest


def test_several_trials_with_steps_give_the_same_figures(inputs: Inputs, scheduler: str) -> None:
    """A budget that nothing keeps, so that everything cheap is tried."""
    tried = []
    for out, where in (("here", None), ("there", scheduler)):
        with pytest.raises(BudgetError):
            compiled(inputs, out, max_drop=0.0, max_size="0.01x", scheduler=where, effort="quick")
        report = json.loads((inputs.out.with_name(f"{out}.nearest") / "report.json").read_text())
        (bundle,) = report["bundles"]
        tried.append({a["label"]: (a["value"], a["size_bytes"]) for a in bundle["attempts"]})
    assert tried[0] == tried[1]
    assert len(tried[0]) > 1


def test_a_trial_that_fails_there_says_what_it_would_say_here(inputs: Inputs, scheduler: str) -> None:
    metric = inputs.model.parent / "own.py"
    metric.write_text("def f(outputs, _, labels):\n    return 'words' if 'kedge-trial' in __file__ else 1.0\n")
    with pytest.raises(ConfigError, match="gave 'words'"):
        compiled(inputs, "out", metric=f"{metric}:f", scheduler=scheduler)


def test_no_scheduler_there(inputs: Inputs) -> None:
    with pytest.raises(ConfigError, match="no Dask scheduler answers"):
        compiled(inputs, "out", scheduler="tcp://127.0.0.1:1")
    assert not inputs.out.exists()
