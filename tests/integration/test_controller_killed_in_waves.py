"""A real controller at a real broker that is killed with SIGKILL in each phase of a rollout."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.bundles import make_bundle
from tests.support.controllers import ControllerProcess
from tests.support.scripted_fleet import ScriptedFleet
from tests.support.waiting import wait_for

from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.service import FleetService
from kedge.fleet.staged.policy import Policy
from kedge_protocol.bundle.layout import Layout

__all__ = ["mosquitto"]

pytestmark = pytest.mark.needs("mosquitto")

POLICY = Policy(waves=("3", "100%"), min_per_target=1, soak=2.0, progress_timeout=300.0, parallel=4)
NAMES = [f"d{number}" for number in range(8)]


def carry_on(fleet: FleetService, controller: ControllerProcess, number: int, ends: str) -> list[tuple[str, int]]:
    """Kill the controller in each phase of each wave, and start it again, until the rollout ends."""
    killed: list[tuple[str, int]] = []
    deadline = time.monotonic() + 240.0
    while time.monotonic() < deadline:
        stage = fleet.rollout_status(number, shown=DeviceFilter(limit=0)).stage
        assert stage is not None
        if stage.phase.value == ends:
            return killed
        if (stage.phase.value, stage.wave) not in killed:
            controller.kill()
            killed.append((stage.phase.value, stage.wave))
            controller.start()
        time.sleep(0.05)
    pytest.fail(f"the rollout is {fleet.rollout_status(number)}")


def test_each_device_gets_each_step_once_although_the_controller_is_killed_in_each_phase(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    releases = {
        version: make_bundle(tmp_path, version=version, target="rpi4", head_seed=seed)
        for version, seed in (("1.0", None), ("2.0", 1))
    }
    digests = {version: Layout(path).bundle("rpi4").digest for version, path in releases.items()}
    with (
        FleetService(tmp_path / "state") as fleet,
        ControllerProcess(fleet.state, "--broker", mosquitto.url) as controller,
        ScriptedFleet(NAMES, mosquitto.port) as devices,
    ):
        for path in releases.values():
            fleet.publish(path)
        for name in NAMES:
            fleet.device_add(name, "rpi4")
        controller.start()
        fleet.rollout_start("tiny:1.0")
        assert fleet.rollout_status(wait=300).done
        number = fleet.rollout_start("tiny:2.0", policy=POLICY).rollout.id
        killed = carry_on(fleet, controller, number, "done")
        assert len(killed) > 1
        assert devices.serving("tiny", digests["2.0"]) == len(NAMES)
        assert {device.desired_version for device in fleet.devices()} == {2}
        controller.kill()
        fleet.rollout_revert(number)
        assert ("reverting", 2) in carry_on(fleet, controller, number, "aborted")
        wait_for(lambda: devices.serving("tiny", digests["1.0"]) == len(NAMES))
        assert {device.desired_version for device in fleet.devices()} == {3}
        fleet.audit_verify()
        waves = [one for one in fleet.audit_log(subject=f"rollout {number}") if one.action == "rollout.wave"]
        assert [one.evidence["wave"] for one in reversed(waves)] == [1, 2]
