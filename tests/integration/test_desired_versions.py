"""Versions of the desired state: whoever counts wrong is outbid once, and what cannot end is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from tests.support.agents import AgentProcess
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.bundles import make_bundle
from tests.support.controllers import ControllerProcess
from tests.support.scripted_agent import ScriptedAgent, serving
from tests.support.waiting import wait_for

from kedge.fleet.results import DeviceRollout, Progress
from kedge.fleet.service import FleetService
from kedge_protocol import codec, topics
from kedge_protocol.messages import Desired, DesiredRefusal, RefusedDesired

__all__ = ["mosquitto"]
pytestmark = pytest.mark.needs("mosquitto")


@pytest.fixture
def fleet(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[FleetService]:
    with (
        FleetService(tmp_path / "fleet") as service,
        ControllerProcess(service.state, "--broker", mosquitto.url) as controller,
    ):
        service.publish(make_bundle(tmp_path, "tiny", "1.0"))
        service.device_add("dev", "generic-cpu")
        controller.start()
        yield service


def standing(fleet: FleetService) -> DeviceRollout:
    return fleet.rollout_status().devices[0]


def test_a_rollout_goes_above_what_the_device_answered_before(fleet: FleetService, mosquitto: Mosquitto) -> None:
    """A cloned card, or a new controller: the device holds a version of somebody else's."""
    with ScriptedAgent("dev", mosquitto.port) as agent:
        agent.birth()
        agent.report(57)
        wait_for(lambda: fleet.device("dev").device.reported is not None, what="a report in the database")
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: agent.desired, what="the desired state")
        assert agent.desired[-1].version == 58


def test_a_report_beyond_all_bounds_is_not_believed_and_is_named(fleet: FleetService, mosquitto: Mosquitto) -> None:
    with ScriptedAgent("dev", mosquitto.port) as agent:
        agent.birth()
        agent.report((1 << 53) - 1)
        wait_for(lambda: fleet.device("dev").device.reported is not None, what="a report in the database")
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: agent.desired, what="the desired state")
        assert agent.desired[-1].version == 1
        assert standing(fleet).progress is Progress.CONFLICT
        # One that the device refuses as too far above its own is named too.
        own = RefusedDesired(version=1, reason=DesiredRefusal.JUMP, came=agent.desired[-1].content)
        agent.report(0, refused=own)
        wait_for(lambda: "agent.json" in standing(fleet).detail, what="the refusal in words")


def test_other_content_under_the_same_version_is_outbid_once_and_then_named(
    fleet: FleetService, mosquitto: Mosquitto
) -> None:
    with ScriptedAgent("dev", mosquitto.port) as agent:
        agent.birth()
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: agent.desired, what="the desired state")
        first = agent.desired[-1]
        other = Desired(version=1, models={}, sizes={}).content
        refused = RefusedDesired(version=first.version, reason=DesiredRefusal.CONFLICT, came=first.content, held=other)
        agent.report(first.version, refused=refused)
        wait_for(lambda: agent.desired[-1].version == first.version + 1, what="a higher version")
        assert standing(fleet).progress is not Progress.CONFLICT
        agent.report(first.version + 2)
        wait_for(lambda: standing(fleet).progress is Progress.CONFLICT, what="the named state")
        assert "another controller speaks to it" in standing(fleet).detail
        assert fleet.device("dev").device.desired_version == first.version + 1
        # The operator's word counts anew.
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: agent.desired[-1].version == first.version + 3, what="a version above the other's")
        agent.report(first.version + 3, {"tiny": serving(agent.desired[-1].models["tiny"])})
        wait_for(lambda: standing(fleet).progress is Progress.DONE, what="the end of it")


def test_two_controllers_in_turn_come_to_an_end(fleet: FleetService, mosquitto: Mosquitto, tmp_path: Path) -> None:
    with (
        FleetService(tmp_path / "second") as second,
        ControllerProcess(second.state, "--broker", mosquitto.url) as controller,
        AgentProcess(tmp_path, mosquitto.url, serve=False) as agent,
    ):
        second.publish(make_bundle(tmp_path / "other", "tiny", "1.0", seed=5))
        second.device_add("dev", "generic-cpu")
        agent.start()
        wait_for(lambda: fleet.device("dev").device.reported is not None, what="a report")
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: standing(fleet).progress is Progress.DONE, what="the first controller's rollout")
        second.rollout_start("tiny:1.0")
        controller.start()
        services = (fleet, second)
        wait_for(lambda: Progress.CONFLICT in [standing(one).progress for one in services], what="a named state")
        loser, winner = services if standing(fleet).progress is Progress.CONFLICT else (second, fleet)
        wait_for(lambda: standing(winner).progress is Progress.DONE, what="the other's rollout")
        versions = [one.device("dev").device.desired_version for one in services]
        assert max(versions) <= 4
        assert loser.device("dev").device.desired_version < winner.device("dev").device.desired_version


def test_two_devices_of_one_name_are_a_named_state(fleet: FleetService, mosquitto: Mosquitto, tmp_path: Path) -> None:
    with ExitStack() as stack:
        agents = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            agents.append(stack.enter_context(AgentProcess(tmp_path / name, mosquitto.url, serve=False)).start())
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: standing(fleet).progress is Progress.CONFLICT, what="a named state")
        assert "two devices use this name" in standing(fleet).detail
        wait_for(
            lambda: any("another device uses the name dev" in one.text() for one in agents), what="a line in a log"
        )


def test_the_documented_access_rules_let_a_device_speak_and_not_command_itself(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text(encoding="utf-8")
    rules = next(block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "pattern" in block)
    (tmp_path / "acl").write_text(rules, encoding="utf-8")
    options = ("allow_anonymous true", "use_username_as_clientid true", f"acl_file {tmp_path / 'acl'}")
    assert options[1] in text
    broker = Mosquitto(tmp_path, options)
    broker.start()
    (tmp_path / "password").write_text("secret\n")
    password = f'username = "dev"\npassword_file = "{tmp_path / "password"}"\n'
    login = ("--username", "kedge-controller", "--password-file", str(tmp_path / "password"))
    try:
        with (
            FleetService(tmp_path / "fleet") as fleet,
            ControllerProcess(fleet.state, "--broker", broker.url, *login) as controller,
            AgentProcess(tmp_path, broker.url, serve=False, broker=password) as agent,
        ):
            fleet.publish(make_bundle(tmp_path, "tiny", "1.0"))
            fleet.device_add("dev", "generic-cpu")
            controller.start()
            agent.start()
            wait_for(lambda: fleet.device("dev").device.online, what="a device that is let in")
            fleet.rollout_start("tiny:1.0")
            wait_for(lambda: standing(fleet).progress is Progress.DONE, what="a rollout through the rules")
            agent.terminate()
            wait_for(lambda: not fleet.device("dev").device.online, what="the device's leave")
            before = fleet.device("dev").device.desired_version
            _speak_as_the_device(broker.port, before + 1)
            agent.start()
            wait_for(lambda: fleet.device("dev").device.online, what="the device again")
            wait_for(lambda: standing(fleet).progress is Progress.DONE, what="the device as it was")
            assert agent.current() is not None
            assert f"version {before + 1}" not in agent.text()
    finally:
        broker.kill()


def _speak_as_the_device(port: int, version: int) -> None:
    """Try to write what only the controller may, with the device's own user."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="dev")
    client.username_pw_set("dev", "secret")
    client.connect("127.0.0.1", port)
    client.loop_start()
    nothing = codec.encode(Desired(version=version, models={}, sizes={}))
    for topic in (topics.desired("dev"), topics.command("dev", "c"), topics.block("dev", "r")):
        client.publish(topic, nothing, qos=1, retain=True).wait_for_publish(60)
    client.disconnect()
    client.loop_stop()
