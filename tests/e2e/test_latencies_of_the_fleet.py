"""A latency that a device measured decides on the host: from the proof of a bundle to ``--max-latency``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.brokers import Mosquitto
from tests.support.compiling import Inputs, kedge, small_inputs
from tests.support.field import DEVICE, Field, agent_of

TARGET = "rpi4"


def compiled(inputs: Inputs, *more: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, what was said, and the report, of OUT or of what came nearest."""
    done = kedge([*inputs.arguments(targets=(TARGET,), quantize="precision=int8"), "--force", *more])
    folder = inputs.out if done.returncode == 0 else inputs.out.with_name("OUT.nearest")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return done.returncode, done.stderr, report


@pytest.mark.needs("mosquitto")
def test_what_a_device_measured_takes_the_place_of_the_estimate(tmp_path: Path, mosquitto: Mosquitto) -> None:
    inputs = small_inputs(tmp_path)
    status, said, report = compiled(inputs)
    assert status == 0, said
    guessed = report["bundles"][0]["target_latency"]
    assert guessed["estimated"]
    assert "host's own time" in guessed["source"]
    with Field(tmp_path, mosquitto.url) as field:
        field.add("pi-7", TARGET, agent_of(DEVICE))
        field.publish(inputs.out)
        field.start_rollout("tiny:1.0")
        assert set(field.decided().values()) == {"done"}, field.reasons()
        record = tmp_path / "latencies.json"
        field.kedge("device", "latencies", "--target", TARGET, "-o", str(record))
        shown = json.loads(field.kedge("device", "latencies", "--json"))
    (measured,) = json.loads(record.read_text())["measurements"]
    assert measured["device"] == "pi-7"
    assert measured["p50_ms"] > 0
    assert [one["p50_ms"] for one in shown["measurements"]] == [measured["p50_ms"]]

    status, said, report = compiled(inputs, "--latencies", str(record), "--max-latency", "1000")
    assert status == 0, said
    known = report["bundles"][0]["target_latency"]
    assert known == {"p50": measured["p50_ms"], "source": "measured by pi-7", "estimated": False}

    status, said, report = compiled(inputs, "--latencies", str(record), "--max-latency", "0.0000001")
    assert status == 1
    assert "ms" in said
    assert "keeps the budget" in said
    assert report["bundles"][0]["target_latency"]["source"] == "measured by pi-7"
