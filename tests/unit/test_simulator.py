"""Simulated fleets in virtual time: the real update machine against the real controller."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.fleet.candidates import MEASURING
from kedge.fleet.results import Progress
from kedge.fleet.service import FleetService
from kedge.simulator import scenario as scenarios
from kedge.simulator.behaviour import Figures
from kedge.simulator.result import SimulationResult
from kedge.simulator.virtual import simulate
from kedge_protocol import toml
from kedge_protocol.errors import ConfigError
from kedge_protocol.latency_buckets import bucket_of

EXAMPLES = Path(__file__).parents[2] / "examples" / "simulate"


def run(log: io.StringIO | None = None, **document: Any) -> SimulationResult:
    """Simulate a small fleet of two targets."""
    fleet = [{"target": "rpi4", "count": 8}, {"target": "rpi5", "count": 8}]
    return simulate(scenarios.parse({"fleet": fleet, "before": 120, **document}), log=log)


def test_a_good_release_reaches_every_device() -> None:
    found = run()
    assert (found.state, found.reached, found.reverted, found.failed) == ("done", 16, 0, 0)


def test_every_device_is_reached_in_spite_of_losses_reboots_and_a_partition() -> None:
    faults = {
        "loss": 0.1,
        "jitter": 1.0,
        "reboots_per_day": 200.0,
        "clock_skew": 1e9,
        "slow": 0.3,
        "partition": {"after": 2.0, "seconds": 300.0},
    }
    log = io.StringIO()
    found = run(log, faults=faults)
    assert (found.state, found.reached) == ("done", 16)
    assert " reboot" in log.getvalue()
    assert " - partition " in log.getvalue()
    assert " - mended " in log.getvalue()


def test_devices_refuse_a_bundle_whose_golden_vectors_fail() -> None:
    log = io.StringIO()
    found = run(log, new={"version": "2.0", "defects": [{"targets": ["rpi4"], "golden_vectors": True}]})
    assert (found.reached, found.failed) == (8, 8)
    assert log.getvalue().count("failed prove: golden vectors do not match") == 8


def test_a_bundle_that_does_not_load_is_rolled_back_by_the_device() -> None:
    found = run(new={"version": "2.0", "defects": [{"targets": ["rpi4"], "refuses_to_load": True}]})
    assert (found.reached, found.reverted, found.failed) == (16, 8, 8)


def test_a_device_without_room_refuses() -> None:
    log = io.StringIO()
    found = run(log, faults={"disk_full": 0.3})
    assert 0 < found.failed < 16
    assert found.reached == 16 - found.failed
    assert log.getvalue().count("failed check: the bundle needs 0.1 MiB of disk") == found.failed


def test_a_device_without_users_attests_by_golden_samples(tmp_path: Path) -> None:
    fleet = [{"target": "rpi4", "count": 2}]
    document = {"fleet": fleet, "before": 120, "runtime": {"calls_per_minute": 0.0}}
    assert simulate(scenarios.parse(document), state=tmp_path).state == "done"
    with FleetService(tmp_path) as service:
        models = [device.reported.models["model"] for device in service.devices() if device.reported]
    assert [(model.served.calls, model.served.golden) for model in models if model.served] == [(0, 8), (0, 8)]


def test_the_histogram_of_a_message_is_the_agents() -> None:
    latencies = np.exp(np.random.default_rng(1).uniform(np.log(1e-4), np.log(2e5), 2000))
    figures = Figures(inferences=2000, errors=0, latencies_ms=latencies, memory_bytes=1, temperature_c=0.0)
    expected = Counter(str(bucket_of(int(one * 1e6))) for one in latencies)
    assert figures.latency_buckets() == dict(expected)


def test_a_lying_device_counts_as_done_and_is_not_reached() -> None:
    found = run(faults={"lying": 1.0}, new={"version": "2.0", "defects": [{"golden_vectors": True}]})
    assert (found.state, found.reached, found.failed) == ("done", 0, 0)


WAVES: dict[str, Any] = {"waves": ["65%", "100%"], "soak": "20m"}


@pytest.mark.parametrize("lie", ["instant", "flawless", "proof"])
def test_a_bad_release_is_stopped_although_devices_lie(lie: str) -> None:
    """Those that say that their golden vectors hold serve what they would have refused."""
    defect = {"errors": 0.3, "latency": 2.0, "golden_vectors": lie == "proof"}
    found = run(
        faults={"lying": 0.2, "lies": [lie]},
        new={"version": "2.0", "defects": [defect]},
        rollout=WAVES,
        telemetry=60,
        seed=3,
    )
    assert (found.state, found.wave) == ("aborted", 1), found
    assert found.reverted == found.reached
    assert (found.reached > 0) is (found.failed < 16)


def test_a_device_that_says_that_the_old_bundle_serves_never_counts_as_done(tmp_path: Path) -> None:
    document = {"seed": 5, "fleet": [{"target": "rpi4", "count": 8}], "before": 120, "rollout": WAVES}
    document |= {"faults": {"lying": 0.2, "lies": ["stale"]}}
    found = simulate(scenarios.parse(document), state=tmp_path)
    with FleetService(tmp_path) as fleet:
        stands = Counter(device.progress for device in fleet.rollout_status(2).devices)
    liars = 8 - found.reached
    assert 0 < liars < 3
    assert found.state == "done"
    assert stands == {Progress.DONE: found.reached, Progress.SILENT: liars}


@pytest.mark.parametrize("seed", [1, 2])
def test_wrong_lost_and_stepping_clocks_change_nothing(seed: int) -> None:
    faults = {"loss": 0.05, "jitter": 1.0, "reboots_per_day": 50.0}
    clocks = {"clock_skew": 4e9, "clock_steps_per_day": 500.0, "clock_lost": 0.3}
    right, wrong = (run(faults={**faults, **more}, rollout=WAVES, seed=seed) for more in ({}, clocks))
    assert (wrong.log, wrong.state, wrong.messages) == (right.log, right.state, right.messages)
    assert wrong.bytes != right.bytes


def test_only_changed_blocks_are_pulled() -> None:
    new = {"version": "2.0", "size": 1 << 20}
    old = {"version": "1.0", "size": 1 << 20}
    whole = run(old=old, new=new)
    small = run(old=old, new={**new, "changed": 0.1})
    assert whole.bytes > 16 << 20
    assert small.bytes < whole.bytes / 3


STAGED = {"waves": ["50%", "100%"], "soak": "10m"}


def test_a_staged_rollout_of_a_good_release_passes_its_waves() -> None:
    found = run(rollout=STAGED, faults={"slow": 0.1, "reboots_per_day": 5.0})
    assert (found.state, found.reached, found.reverted, found.wave) == ("done", 16, 0, 2)
    assert found.seconds > 2 * 600


@pytest.mark.parametrize(
    ("defect", "gate"),
    [
        ({"golden_vectors": True}, "golden"),
        ({"errors": 0.3}, "error_rate"),
        ({"latency": 2.5}, "_ratio of rpi4"),
        ({"leak_mb_per_minute": 20.0}, "memory"),
    ],
)
def test_a_bad_release_is_stopped_in_its_first_wave_and_taken_back(defect: dict[str, Any], gate: str) -> None:
    new = {"version": "2.0", "defects": [{"targets": ["rpi4"], **defect}]}
    found = run(rollout={"waves": ["65%", "100%"], "soak": "20m"}, new=new, telemetry=60)
    assert (found.state, found.wave) == ("aborted", 1)
    assert found.reached <= 12
    assert found.reverted == found.reached
    assert gate in found.reason


@pytest.mark.parametrize(("name", "state"), [("good", "done"), ("bad", "aborted")])
def test_the_examples_end_as_they_say(name: str, state: str) -> None:
    document = toml.loads((EXAMPLES / f"{name}.toml").read_text())
    small = [{**group, "count": max(8, group["count"] // 8)} for group in document["fleet"]]
    policy = {**document["rollout"], "waves": ["60%", "100%"]}
    found = simulate(scenarios.parse({**document, "fleet": small, "rollout": policy}))
    assert found.state == state
    assert found.reverted == (found.reached if state == "aborted" else 0)


SEVERAL = {"version": "2.0", "backends": {"first": 1.0, "fast": 0.4, "slow": 3.0}}


@pytest.mark.parametrize(
    "rollout", [None, {"waves": ["4", "100%"], "soak": "1m", "gates": {"off": ["memory_per_minute"]}}]
)
def test_a_few_devices_of_each_target_measure_and_all_end_with_the_fastest(rollout: dict[str, Any] | None) -> None:
    found = run(new=SEVERAL, rollout=rollout, telemetry=30.0)
    assert (found.state, found.reached, found.failed) == ("done", 16, 0)
    # One in each pair at least is the fast one, except where the first of a target measured the other two.
    assert found.backends["fast"] >= 12
    assert set(found.backends) <= {"first", "fast"}
    assert 0 < found.measured <= 2 * MEASURING


def test_a_backend_whose_golden_vectors_fail_costs_no_device() -> None:
    defects = [{"backends": ["fast"], "golden_vectors": True}]
    faults = {"reboots_per_day": 400.0, "loss": 0.1}
    found = run(new={**SEVERAL, "defects": defects}, faults=faults)
    assert (found.state, found.reached, found.failed) == ("done", 16, 0)
    assert "fast" not in found.backends
    assert sum(found.backends.values()) == 16


def test_equal_scenarios_have_equal_logs_whatever_the_process() -> None:
    faults = {"loss": 0.05, "reboots_per_day": 50.0, "slow": 0.2}
    first, other = run(faults=faults), run(faults=faults, seed=2)
    assert first.log != other.log
    code = (
        "import json, sys; from kedge.simulator import scenario, virtual;"
        "print(virtual.simulate(scenario.parse(json.load(sys.stdin))).log)"
    )
    fleet = [{"target": "rpi4", "count": 8}, {"target": "rpi5", "count": 8}]
    document = json.dumps({"fleet": fleet, "before": 120, "faults": faults})
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=document, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == first.log


def test_a_release_without_a_version_has_the_documented_one() -> None:
    fleet = [{"target": "rpi4", "count": 1}]
    found = scenarios.parse({"fleet": fleet, "old": {"size": 9}, "new": {"defects": [{"errors": 0.1}]}})
    assert (found.old.version, found.new.version, found.new.defects[0].errors) == ("1.0", "2.0", 0.1)


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({}, "fleet: missing"),
        ({"fleet": []}, "1 to 100000 devices"),
        ({"fleet": [{"target": "rpi4", "count": 0}]}, "at least one in each group"),
        ({"fleet": [{"target": "rpi4", "count": 1}], "fault": {}}, "did you mean 'faults'"),
        ({"fleet": [{"target": "rpi4", "count": 1}], "faults": {"slow": 2.0}}, "faults.slow = 2 is no share"),
        (
            {"fleet": [{"target": "rpi4", "count": 1}], "new": {"version": "2", "defects": [{"targets": ["rpi5"]}]}},
            "a defect names 'rpi5'",
        ),
        ({"fleet": [{"target": "rpi4", "count": 1}], "rollout": {"waves": ["1%"]}}, "the last wave reaches 1%"),
        ({"fleet": [{"target": "rpi4", "count": 1}], "new": {"version": "1.0"}}, "both releases have the version 1.0"),
    ],
)
def test_a_scenario_that_does_not_fit_is_refused(document: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        scenarios.parse(document)
    assert problem in str(refused.value)
