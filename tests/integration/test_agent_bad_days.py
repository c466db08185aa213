"""An agent whose serving process hangs or dies again and again, and one whose disk takes nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.agents import AgentProcess
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.bundles import make_bundle, samples
from tests.support.controllers import ControllerProcess
from tests.support.waiting import wait_for

from kedge.fleet.service import FleetService
from kedge_protocol.messages import ModelState, Reported, ReportedModel

__all__ = ["mosquitto"]
pytestmark = pytest.mark.needs("mosquitto")

SETTINGS = "[limits]\nhang_seconds = 10\nreserve_mib = 0\n"


class Device:
    """A device with a model installed."""

    def __init__(self, folder: Path, service: FleetService, agent: AgentProcess) -> None:
        self.folder = folder
        self.service = service
        self.agent = agent

    def roll_out(self, version: str, *, seed: int = 1) -> str:
        out = make_bundle(self.folder, "tiny", version, seed=seed)
        digest = self.service.publish(out).release.bundles[0].digest
        self.service.rollout_start(f"tiny:{version}")
        self.wait(ModelState.SERVING, digest)
        return digest

    @property
    def reported(self) -> Reported:
        found = self.service.device("dev").device.reported
        assert found is not None
        return found

    def model(self) -> ReportedModel:
        return self.reported.models["tiny"]

    def wait(self, state: ModelState, digest: str) -> None:
        """Wait until it reports this state with this bundle current."""

        def there() -> bool:
            found = self.service.device("dev").device.reported
            model = None if found is None else found.models.get("tiny")
            return model is not None and (model.state, model.digest) == (state, digest)

        wait_for(there, what=f"{state} with {digest[:19]} (see {self.agent.log})")

    def answers(self) -> bool:
        """Whether a call over HTTP gives a result."""
        one = {"name": "input", "shape": [1, 16], "datatype": "FP32", "data": samples(1)[0].tolist()}
        return self.agent.ask("/v2/models/tiny/infer", {"inputs": [one]}) is not None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; the agent's state lies on it."""
    folder = tmp_path / "dev-state"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False)
    if done.returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def device(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Device]:
    with (
        FleetService(tmp_path / "fleet") as service,
        ControllerProcess(tmp_path / "fleet", "--broker", mosquitto.url) as controller,
        AgentProcess(tmp_path, mosquitto.url, more=SETTINGS) as agent,
    ):
        service.device_add("dev", "generic-cpu")
        controller.start()
        agent.start()
        yield Device(tmp_path, service, agent)
        if agent.process is not None and agent.process.poll() is None:
            agent.kill()


def test_a_stopped_serving_process_is_killed_and_one_that_dies_again_and_again_is_rolled_back(device: Device) -> None:
    first = device.roll_out("1.0")
    (child,) = device.agent.children()
    os.kill(child, signal.SIGSTOP)
    wait_for(lambda: device.reported.serving_restarts == 1, what="a restart that is reported")
    wait_for(device.answers, what="a door that is open again")
    assert "gave no sign of life" in device.agent.text()
    assert not Path(f"/proc/{child}").exists()
    second = device.roll_out("2.0", seed=2)
    for _ in range(2):
        before = device.reported.serving_restarts
        wait_for(device.agent.children, what="a serving process")
        os.kill(device.agent.children()[0], signal.SIGKILL)
        wait_for(lambda before=before: device.reported.serving_restarts > before, what="a restart that is reported")  # type: ignore[misc]
    device.wait(ModelState.FAILED, first)
    failure = device.model().failure
    assert failure is not None
    assert (failure.digest, failure.stage) == (second, "serve")
    assert "died 3 times" in failure.reason
    wait_for(device.answers, what="the bundle before, which serves again")


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_what_is_installed_serves_and_is_reported_from_a_disk_that_takes_nothing(
    disk: Path, device: Device, trouble: str
) -> None:
    digest = device.roll_out("1.0")
    device.agent.terminate()
    boot = device.reported.boot_id
    if trouble == "full":
        with (disk / "ballast").open("wb", buffering=0) as file:
            while _wrote(file.fileno(), bytes(1 << 16)) or _wrote(file.fileno(), b"0"):
                pass
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    device.agent.start()
    wait_for(device.answers, what=f"an open door (see {device.agent.log})")
    wait_for(lambda: device.reported.boot_id != boot, what="a report of this boot")
    device.wait(ModelState.SERVING, digest)
    assert "Traceback" not in device.agent.text()
    if trouble == "read-only":
        out = make_bundle(device.folder, "tiny", "2.0", seed=2)
        device.service.publish(out)
        device.service.rollout_start("tiny:2.0")
        device.wait(ModelState.FAILED, digest)
        failure = device.model().failure
        assert failure is not None
        assert "Read-only file system" in failure.reason
        assert device.answers()


def _wrote(file: int, data: bytes) -> bool:
    try:
        return os.write(file, data) > 0
    except OSError:
        return False
