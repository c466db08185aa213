"""Where a latency comes from: measured here, by a device, from a record, or estimated and said to be."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import pytest

from kedge.search.latency import HOST, LatencyLog, LatencyTable, Measurement, read, written
from kedge_protocol.bundle.config import Verified
from kedge_protocol.errors import ConfigError
from kedge_targets import target
from kedge_targets.contract import Estimate

HERE = dataclasses.replace(
    target.find("generic-cpu"),
    processor=dataclasses.replace(target.find("generic-cpu").processor, architecture=platform.machine()),
)
ELSEWHERE = dataclasses.replace(HERE, processor=dataclasses.replace(HERE.processor, architecture="armv7l"))


def measured(files: str, p50: float, device: str = "kitchen", name: str = HERE.name) -> Measurement:
    return Measurement(device=device, target=name, files=files, p50_ms=p50, p95_ms=2 * p50)


def test_what_runs_here_is_measured_here() -> None:
    found = LatencyTable(HERE).of("sha256:a", 2.0, Verified.EXECUTED, None)
    assert (found.p50, found.estimated) == (2.0, False)


@pytest.mark.parametrize(("device", "verified"), [(ELSEWHERE, Verified.EXECUTED), (HERE, Verified.CHECKED)])
def test_what_does_not_run_here_is_said_to_be_an_estimate(device: target.Target, verified: Verified) -> None:
    found = LatencyTable(device).of("sha256:a", 2.0, verified, None)
    assert found.estimated
    assert "estimated" in found.source


def test_a_device_that_ran_the_same_files_is_believed() -> None:
    book = LatencyTable(
        ELSEWHERE, [measured("sha256:a", 9.0), measured("sha256:a", 11.0, "hall"), measured("sha256:b", 1.0)]
    )
    found = book.of("sha256:a", 2.0, Verified.EXECUTED, None)
    assert (found.p50, found.estimated) == (10.0, False)
    assert "hall, kitchen" in found.source


def test_other_files_on_the_device_give_a_ratio_which_is_an_estimate() -> None:
    book = LatencyTable(ELSEWHERE, [measured("sha256:a", 9.0)])
    book.seen("sha256:a", 3.0)
    found = book.of("sha256:b", 2.0, Verified.EXECUTED, None)
    assert (found.p50, found.estimated) == (6.0, True)


def test_another_targets_measurements_are_not_taken() -> None:
    book = LatencyTable(HERE, [measured("sha256:a", 9.0, name="other")])
    assert book.of("sha256:a", 2.0, Verified.EXECUTED, None).p50 == 2.0


def test_a_record_of_this_host_is_taken_instead_of_a_new_measurement(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    path.write_text(written([measured("sha256:a", 5.0, HOST)]))
    record = read(path)
    assert record == LatencyLog(measurements=(measured("sha256:a", 5.0, HOST),))
    found = LatencyTable(HERE, record.measurements).of("sha256:a", 2.0, Verified.EXECUTED, None)
    assert (found.p50, found.source) == (5.0, "recorded in an earlier search")


def test_the_tools_estimate_is_taken_where_nothing_else_is_known() -> None:
    estimate = Estimate(source="the tool 1.0", latency_ms=0.25, frames_per_second=4000.0)
    found = LatencyTable(ELSEWHERE).of("sha256:a", 2.0, Verified.SIMULATED, estimate)
    assert (found.p50, found.estimated) == (0.25, True)
    assert "the tool 1.0" in found.source


@pytest.mark.parametrize("text", ["", "[]", '{"measurements": [{"device": 3}]}'])
def test_a_broken_record_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "latencies.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(path)
