"""The agent against a real broker and the real controller: updates, crashes, refusals."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.support.agents import AgentProcess
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.bundles import make_bundle, samples
from tests.support.controllers import ControllerProcess
from tests.support.waiting import wait_for

from kedge.fleet import shadows
from kedge.fleet.results import DeviceDetail, Progress
from kedge.fleet.service import FleetService
from kedge_protocol import codec
from kedge_protocol.messages import ModelState, ReportedModel, Served

__all__ = ["mosquitto"]
pytestmark = pytest.mark.needs("mosquitto")


@dataclass
class Fleet:
    """A controller with one agent."""

    service: FleetService
    controller: ControllerProcess
    agent: AgentProcess
    folder: Path

    def publish(self, version: str, **options: object) -> str:
        """Publish a tiny model; the bundle's digest."""
        out = make_bundle(self.folder, "tiny", version, **options)  # type: ignore[arg-type]
        return self.service.publish(out).release.bundles[0].digest

    def roll_out(self, version: str) -> None:
        self.service.rollout_start(f"tiny:{version}")

    def detail(self) -> DeviceDetail:
        return self.service.device("dev")

    def model(self) -> ReportedModel | None:
        reported = self.detail().device.reported
        return None if reported is None else reported.models.get("tiny")

    def wait_state(self, state: ModelState, digest: str, timeout: float = 120.0) -> ReportedModel:
        """Wait until the device reports this state for this wanted digest."""

        def there() -> bool:
            model = self.model()
            return model is not None and (model.state, model.desired) == (state, digest)

        wait_for(there, timeout, what=f"{state} of {digest[:19]} (see {self.agent.log})")
        model = self.model()
        assert model is not None
        return model

    def served_again(self) -> int:
        return sum(transfer.finished_served_again for transfer in self.detail().transfers)


@pytest.fixture
def fleet(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Fleet]:
    state = tmp_path / "fleet"
    with (
        FleetService(state) as service,
        ControllerProcess(state, "--broker", mosquitto.url) as controller,
        # A small window: a download that a test can catch in the act.
        AgentProcess(tmp_path, mosquitto.url, more="[limits]\nwindow = 4\n") as agent,
    ):
        service.device_add("dev", "generic-cpu")
        controller.start()
        yield Fleet(service, controller, agent, tmp_path)


def test_a_release_is_installed_served_counted_and_then_replaced_by_few_blocks(fleet: Fleet) -> None:
    first = fleet.publish("1.0", mebibytes=4)
    second = fleet.publish("2.0", mebibytes=4, head_seed=3)
    fleet.agent.start()
    fleet.roll_out("1.0")
    model = fleet.wait_state(ModelState.SERVING, first)
    assert (model.digest, model.version, model.proved) == (first, "1.0", True)
    one = {"name": "input", "shape": [1, 16], "datatype": "FP32", "data": samples(1)[0].tolist()}
    answer = fleet.agent.ask("/v2/models/tiny/infer", {"inputs": [one]})
    assert answer is not None
    assert len(answer["outputs"][0]["data"]) == 4
    wait_for(
        lambda: any(told.models["tiny"].inferences_total == 1 for told in fleet.detail().telemetry if told.models),
        what="a counted call in the telemetry",
    )
    reported = fleet.detail().device.reported
    assert reported is not None
    assert reported.target == "generic-cpu"
    assert "onnxruntime" in reported.runtimes
    fleet.roll_out("2.0")
    model = fleet.wait_state(ModelState.SERVING, second)
    assert model.previous == first
    assert model.bytes_received < 4 * (1 << 20) / 4
    assert fleet.served_again() == 0


def attested(fleet: Fleet, digest: str) -> Served:
    """Wait until the device attests that it serves this bundle."""

    def there() -> bool:
        model = fleet.model()
        return model is not None and model.digest == digest and model.served is not None and model.served.by is not None

    wait_for(there, what=f"an attestation of {digest[:19]} (see {fleet.agent.log})")
    model = fleet.model()
    assert model is not None
    assert model.served is not None
    return model.served


def test_a_rollout_is_done_when_golden_samples_held_through_the_endpoint_and_then_users_call(fleet: Fleet) -> None:
    first = fleet.publish("1.0")
    fleet.agent.start()
    fleet.roll_out("1.0")
    served = attested(fleet, first)
    assert (served.by, served.calls) == ("golden", 0)
    (device,) = fleet.service.rollout_status(1).devices
    assert device.progress is Progress.DONE
    assert device.served == served
    assert "golden samples held through its served endpoint" in device.detail
    one = {"name": "input", "shape": [1, 16], "datatype": "FP32", "data": samples(1)[0].tolist()}
    assert fleet.agent.ask("/v2/models/tiny/infer", {"inputs": [one]}) is not None
    wait_for(lambda: attested(fleet, first).by == "calls", what="an attestation by the user's call")
    assert attested(fleet, first).calls == 1
    told = [message.models["tiny"] for message in fleet.detail().telemetry if "tiny" in message.models]
    # The golden samples are no calls.
    assert max(one.inferences_total for one in told) <= 1
    assert sum(sum(one.latency_buckets.values()) for one in told) <= 1
    assert any((one.memory_bytes or 0) > 1 << 20 for one in told)


def test_a_shadow_answers_live_calls_beside_what_serves_and_only_counts_come_home(fleet: Fleet) -> None:
    first, second = fleet.publish("1.0"), fleet.publish("2.0", head_seed=3)
    fleet.agent.start()
    fleet.roll_out("1.0")
    fleet.wait_state(ModelState.SERVING, first)
    assert shadows.start(fleet.service, "tiny:2.0", {}, share=0.2) == ("dev",)
    inputs, chance = samples(16), np.random.default_rng(7)

    def compared() -> bool:
        # In another order each time: else a look that is due after the pause below sees the same row again and again.
        for row in chance.permutation(inputs):
            one = {"name": "input", "shape": [1, 16], "datatype": "FP32", "data": row.tolist()}
            assert fleet.agent.ask("/v2/models/tiny/infer", {"inputs": [one]}) is not None
        (view,) = shadows.show(fleet.service)
        return view.compared > 20

    wait_for(compared, what=f"20 compared samples (see {fleet.agent.log})")
    (view,) = shadows.show(fleet.service)
    assert view.state is not None
    assert (view.digest, view.state.state, view.errors) == (second, ModelState.SERVING, 0)
    assert 0 < view.agreed < view.compared
    model = fleet.model()
    assert model is not None
    assert (model.digest, model.state) == (first, ModelState.SERVING)
    assert shadows.stop(fleet.service, "tiny", {}) == ("dev",)
    wait_for(lambda: (now := fleet.model()) is not None and now.shadow is None, what="the end of the shadow")
    assert [entry.action for entry in fleet.service.audit_log(limit=2)] == ["shadow.stop", "shadow.start"]
    assert all(len(codec.encode(message)) < 8192 for message in fleet.detail().telemetry)


def test_a_bundle_whose_weights_are_broken_leaves_the_old_one_serving(fleet: Fleet) -> None:
    good = fleet.publish("1.0")
    bad = fleet.publish("2.0", broken="weights")
    fleet.agent.start()
    fleet.roll_out("1.0")
    fleet.wait_state(ModelState.SERVING, good)
    fleet.roll_out("2.0")
    model = fleet.wait_state(ModelState.FAILED, bad)
    assert model.digest == good
    assert model.failure is not None
    assert model.failure.stage == "prove"
    assert "golden vectors do not hold" in model.failure.reason
    answer = fleet.agent.ask("/v2/models/tiny")
    assert answer is not None
    assert answer["parameters"]["digest"] == good
    # A restart does not try it again; the next rollout does.
    fleet.agent.terminate()
    fleet.agent.start()
    wait_for(lambda: fleet.agent.text().count("golden vectors do not hold") == 2, what="the failure in the log again")
    fleet.wait_state(ModelState.FAILED, bad)
    assert fleet.agent.text().count("tiny: proving") == 2
    better = fleet.publish("3.0", seed=4)
    fleet.roll_out("3.0")
    fleet.wait_state(ModelState.SERVING, better)


def test_killed_amid_a_download_it_goes_on_where_it_was(fleet: Fleet, mosquitto: Mosquitto) -> None:
    digest = fleet.publish("1.0", mebibytes=24)
    total, chance = 24 * 16, random.Random(11)
    fleet.agent.start()
    fleet.roll_out("1.0")

    def done() -> int:
        found = 0
        for path in (fleet.agent.state / "partial").glob("*"):
            with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile
                found += path.stat().st_blocks * 512
        return found >> 16

    kills = 0
    for share in sorted(chance.uniform(0.15, 0.8) for _ in range(3)):
        wait_for(lambda share=share: done() >= share * total or fleet.agent.current() is not None)  # type: ignore[misc]
        if fleet.agent.current() is None:
            fleet.agent.kill()
            kills += 1
            fleet.agent.start()
    mosquitto.kill()
    mosquitto.start()
    fleet.controller.kill()
    fleet.controller.start()
    model = fleet.wait_state(ModelState.SERVING, digest)
    assert kills
    assert model.digest == digest
    assert fleet.served_again() == 0


def test_a_clean_stop_says_offline_and_leaves_no_process(fleet: Fleet) -> None:
    digest = fleet.publish("1.0")
    fleet.agent.start()
    fleet.roll_out("1.0")
    fleet.wait_state(ModelState.SERVING, digest)
    wait_for(lambda: fleet.detail().device.online)
    children = fleet.agent.children()
    assert children
    assert fleet.agent.terminate() == 0
    wait_for(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()], what="the end of its children")
    wait_for(lambda: not fleet.detail().device.online, what="offline")


def test_a_killed_agent_takes_its_serving_child_along_and_starts_again(fleet: Fleet) -> None:
    digest = fleet.publish("1.0")
    fleet.agent.start()
    fleet.roll_out("1.0")
    fleet.wait_state(ModelState.SERVING, digest)
    children = fleet.agent.children()
    fleet.agent.kill()
    wait_for(lambda: not [pid for pid in children if _alive(pid)], what="the end of the serving child")
    # As of a shadow and of samples that were being collected.
    left = [fleet.agent.state / "models" / "tiny" / f"{name}.sock" for name in ("shadow", "low-confidence")]
    for path in left:
        path.touch()
    fleet.agent.start()
    wait_for(lambda: fleet.agent.ask("/v2/models/tiny") is not None, what="an endpoint that is open again")
    fleet.wait_state(ModelState.SERVING, digest)
    assert [path.name for path in left if path.exists()] == []


def test_a_killed_serving_child_is_started_again(fleet: Fleet) -> None:
    digest = fleet.publish("1.0")
    fleet.agent.start()
    fleet.roll_out("1.0")
    fleet.wait_state(ModelState.SERVING, digest)
    (child,) = fleet.agent.children()
    import os
    import signal

    os.kill(child, signal.SIGKILL)
    wait_for(lambda: fleet.agent.children() not in ([], [child]), what="another serving child")
    wait_for(lambda: fleet.agent.ask("/v2/models/tiny") is not None, what="an endpoint that is open again")


def test_what_was_desired_is_finished_without_a_broker(fleet: Fleet, mosquitto: Mosquitto) -> None:
    """All files are there, the broker goes, the agent is started anew: it proves and serves all the same."""
    digest = fleet.publish("1.0")
    fleet.agent.start()
    fleet.roll_out("1.0")
    fleet.wait_state(ModelState.SERVING, digest)
    fleet.agent.terminate()
    mosquitto.kill()
    fleet.agent.start()
    wait_for(lambda: fleet.agent.ask("/v2/models/tiny") is not None, what="serving without a broker")


def test_a_model_taken_back_is_removed(fleet: Fleet) -> None:
    digest = fleet.publish("1.0")
    fleet.agent.start()
    fleet.roll_out("1.0")
    fleet.wait_state(ModelState.SERVING, digest)
    fleet.service.rollout_revert()
    wait_for(lambda: fleet.agent.current() is None, what="the model's removal")
    wait_for(lambda: fleet.model() is None, what="a report without the model")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
