"""All backends of a target are candidates, and what was measured chooses among them."""

from __future__ import annotations

from pathlib import Path

from tests.support.compiling import small_inputs

import kedge
from kedge_targets import target


def test_each_backend_of_a_target_is_tried_and_measured(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path)
    release = kedge.compile(
        inputs.model,
        name="tiny",
        version="1",
        targets=["intel-cpu"],
        calibration=inputs.calibration,
        evaluation=inputs.evaluation,
        out=inputs.out,
        max_drop=0.05,
    )
    assert release.report is not None
    (entry,) = release.report.bundles
    measured = {one.backend: one for one in entry.attempts if one.latency_ms is not None}
    assert set(measured) == {one.name for one in target.find("intel-cpu").backends}
    assert release.bundles["intel-cpu"].config.backend == entry.backend
    assert entry.backend in measured
    losers = [one for one in entry.attempts[:-1] if one.backend != entry.backend]
    assert losers
    assert all(one.reason for one in losers)


def test_quick_ends_with_the_first_that_holds(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path)
    release = kedge.compile(
        inputs.model,
        name="tiny",
        version="1",
        targets=["intel-cpu"],
        calibration=inputs.calibration,
        evaluation=inputs.evaluation,
        out=inputs.out,
        max_drop=0.05,
        effort="quick",
    )
    assert release.report is not None
    assert {one.backend for one in release.report.bundles[0].attempts} == {"openvino"}
