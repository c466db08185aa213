"""The controller at a real broker: what it publishes, what it believes, and that it lives through what is broken."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.bundles import make_bundle
from tests.support.controllers import ControllerProcess
from tests.support.ports import free_port
from tests.support.scripted_agent import ScriptedAgent, failed, serving
from tests.support.waiting import wait_for

from kedge.cli.main import main
from kedge.fleet.results import DeviceRollout, Progress
from kedge.fleet.service import FleetService
from kedge_protocol import codec, topics
from kedge_protocol.blocks import MAX_MESSAGE_BYTES, BlockStatus
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.messages import Ack, Command, ModelState, ReportedModel, Status, decode_desired

__all__ = ["mosquitto"]

pytestmark = pytest.mark.needs("mosquitto")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    return {
        "1.0": make_bundle(folder, version="1.0", target="rpi4"),
        "2.0": make_bundle(folder, version="2.0", target="rpi4", head_seed=1),
    }


@pytest.fixture
def fleet(tmp_path: Path, layouts: dict[str, Path]) -> Iterator[FleetService]:
    with FleetService(tmp_path / "state") as made:
        for layout in layouts.values():
            made.publish(layout)
        made.device_add("pi", "rpi4")
        yield made


@pytest.fixture
def controller(fleet: FleetService, mosquitto: Mosquitto) -> Iterator[ControllerProcess]:
    with ControllerProcess(fleet.state, "--broker", mosquitto.url) as running:
        running.start()
        yield running


def standing(fleet: FleetService, device: str = "pi") -> DeviceRollout:
    return next(one for one in fleet.rollout_status().devices if one.device == device)


def wait_progress(fleet: FleetService, progress: Progress) -> None:
    wait_for(lambda: standing(fleet).progress is progress, what=f"the device being {progress.value}")


def digest_of(layouts: dict[str, Path], version: str) -> str:
    return Layout(layouts[version]).bundle("rpi4").digest


def retained(port: int, topic: str) -> bytes | None:
    """The message that the broker retains there."""
    got: list[bytes] = []
    done: list[bool] = []
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_connect = lambda one, *_: one.subscribe([(topic, 1), ("end", 0)])
    client.on_message = lambda _, __, message: (
        done.append(True) if message.topic == "end" else got.append(bytes(message.payload))
    )
    # The end comes after the retained message on the same connection.
    client.on_subscribe = lambda one, *_: one.publish("end", b"x")
    client.connect("127.0.0.1", port)
    client.loop_start()
    wait_for(lambda: done)
    client.disconnect()
    client.loop_stop()
    return got[0] if got else None


def test_done_only_on_the_devices_own_proof(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, layouts: dict[str, Path]
) -> None:
    wanted = digest_of(layouts, "1.0")
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        agent.report(0)
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: agent.desired)
        desired = agent.desired[-1]
        assert desired.models == {"tiny": wanted}
        wait_progress(fleet, Progress.PENDING)
        fetching = ReportedModel(state=ModelState.FETCHING, desired=wanted, blocks_done=1, blocks_total=4)
        agent.report(desired.version, {"tiny": fetching})
        wait_progress(fleet, Progress.FETCHING)
        assert (standing(fleet).blocks_done, standing(fleet).blocks_total) == (1, 4)
        agent.report(desired.version, {"tiny": replace(fetching, state=ModelState.PROVING)})
        wait_progress(fleet, Progress.PROVING)
        agent.report(desired.version, {"tiny": serving(wanted, proved=False)})
        wait_progress(fleet, Progress.PENDING)
        agent.report(desired.version - 1, {"tiny": serving(wanted)})
        agent.report(desired.version, {"tiny": serving("sha256:" + "0" * 64)})
        wait_for(lambda: standing(fleet).serving == "sha256:" + "0" * 64)
        assert not fleet.rollout_status().done
        agent.report(desired.version, {"tiny": serving(wanted)})
        status = fleet.rollout_status(wait=300)
        assert status.done
        assert status.devices[0].serving == wanted


def test_a_refused_bundle_is_failed_with_the_devices_reason_and_revert_is_a_new_version(
    fleet: FleetService,
    controller: ControllerProcess,
    mosquitto: Mosquitto,
    layouts: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = digest_of(layouts, "1.0"), digest_of(layouts, "2.0")
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: agent.desired)
        agent.report(agent.desired[-1].version, {"tiny": serving(one)})
        assert fleet.rollout_status(wait=300).done
        fleet.rollout_start("tiny:2.0")
        wait_for(lambda: agent.desired[-1].models == {"tiny": two})
        agent.report(agent.desired[-1].version, {"tiny": failed(two, "12 of 80 \x1b[31mvalues\ndiffer", still=one)})
        status = fleet.rollout_status(wait=300)
        assert not status.done
        assert status.devices[0].progress is Progress.FAILED
        assert status.devices[0].detail == "prove: 12 of 80 \x1b[31mvalues\ndiffer"
        with pytest.raises(SystemExit):
            main(["rollout", "status", "--state", str(fleet.state)])
        assert "prove: 12 of 80  [31mvalues differ" in capsys.readouterr().out
        assert status.devices[0].serving == one
        before = agent.desired[-1].version
        fleet.rollout_revert()
        wait_for(lambda: agent.desired[-1].models == {"tiny": one})
        assert agent.desired[-1].version > before
        # It serves that already, but has not answered this version: not done yet.
        assert standing(fleet).progress is Progress.PENDING
        agent.report(agent.desired[-1].version, {"tiny": serving(one)})
        assert fleet.rollout_status(wait=300).done


def test_desired_state_is_retained_and_published_again_to_a_broker_that_forgot_it(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    fleet.rollout_start("tiny:1.0")
    topic = topics.desired("pi")
    wait_for(lambda: retained(mosquitto.port, topic))
    first = decode_desired(retained(mosquitto.port, topic) or b"", where=topic)
    boot = json.loads(retained(mosquitto.port, topics.CONTROLLER_STATUS) or b"")
    mosquitto.kill()
    mosquitto.start()
    assert retained(mosquitto.port, "nothing") is None
    wait_for(lambda: retained(mosquitto.port, topic))
    again = decode_desired(retained(mosquitto.port, topic) or b"", where=topic)
    assert (again.version, again.models) == (first.version, first.models)
    status = json.loads(retained(mosquitto.port, topics.CONTROLLER_STATUS) or b"")
    assert status["online"]
    assert status["boot_id"] == boot["boot_id"]
    assert status["session"] > boot["session"]


def test_a_removed_devices_desired_state_is_cleared_even_if_the_controller_was_away(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    fleet.rollout_start("tiny:1.0")
    wait_for(lambda: retained(mosquitto.port, topics.desired("pi")))
    assert controller.terminate() == 0
    fleet.device_remove("pi")
    controller.start()
    wait_for(lambda: retained(mosquitto.port, topics.desired("pi")) is None)


def test_a_controller_says_good_bye_on_sigterm_and_its_will_does_when_it_is_killed(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    def online() -> bool:
        return bool(json.loads(retained(mosquitto.port, topics.CONTROLLER_STATUS) or b"{}").get("online"))

    # What a process has sent before it says so, or ends, may still be on its way through the broker.
    wait_for(online)
    assert controller.terminate() == 0
    wait_for(lambda: not online())
    controller.start()
    wait_for(online)
    controller.kill()
    wait_for(lambda: not online())
    controller.start()
    wait_for(online)


def test_presence_survives_late_wills(fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto) -> None:
    def online() -> bool:
        return fleet.device("pi").device.online

    with ScriptedAgent("pi", mosquitto.port, boot="one") as first:
        first.birth()
        wait_for(online)
        with ScriptedAgent("pi", mosquitto.port, boot="two") as second:
            second.birth()
            first.lose()
            # The will of the first boot is retained now; a message after it shows that it was worked off.
            wait_for(lambda: b'"one"' in (retained(mosquitto.port, topics.status("pi")) or b""))
            second.report(0)
            wait_for(lambda: fleet.device("pi").device.reported)
            assert online()
            # A controller that begins now finds nothing but the old will; the first word tells it better.
            controller.terminate()
            assert not online()
            controller.start()
            second.telemetry(1)
            wait_for(online)
            second.lose()
            wait_for(lambda: not online())


def test_a_device_that_went_while_no_controller_was_there_is_not_called_online(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        wait_for(lambda: fleet.device("pi").device.online)
        controller.kill()
        agent.lose()
        wait_for(lambda: b'"online":false' in (retained(mosquitto.port, topics.status("pi")) or b""))
        controller.start()
        wait_for(lambda: not fleet.device("pi").device.online)


def test_what_was_reported_before_is_not_believed_after(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, layouts: dict[str, Path]
) -> None:
    wanted = digest_of(layouts, "1.0")
    fleet.rollout_start("tiny:1.0")
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        agent.report(1, {"tiny": failed(wanted, "no")})
        old = retained_when(mosquitto.port, topics.reported("pi"))
        agent.report(1, {"tiny": serving(wanted)})
        # Not by status(wait): a device that failed is the end of the wait, and this one may be seen to have failed.
        wait_for(lambda: fleet.rollout_status().done, what="the second report")
        agent.say("reported", old, retain=True)
        agent.telemetry(1)
        wait_for(lambda: fleet.device("pi").telemetry)
        assert fleet.rollout_status().done


def retained_when(port: int, topic: str) -> bytes:
    wait_for(lambda: retained(port, topic))
    return retained(port, topic) or b""


def test_telemetry_is_kept_short_and_newest_last(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    with ScriptedAgent("pi", mosquitto.port) as agent:
        for number in range(10):
            for step in range(8):
                agent.telemetry(8 * number + step + 1)
            wait_for(lambda last=8 * number + 8: [t.seq for t in fleet.device("pi").telemetry][-1:] == [last])
    kept = [one.seq for one in fleet.device("pi").telemetry]
    assert kept == list(range(21, 81))


def test_a_device_that_nobody_added_is_noted_once_and_not_served(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, layouts: dict[str, Path]
) -> None:
    model = Layout(layouts["1.0"]).bundle("rpi4").files["model.onnx"].digest
    with ScriptedAgent("stranger", mosquitto.port) as stranger, ScriptedAgent("pi", mosquitto.port) as known:
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: known.desired)
        for _ in range(5):
            stranger.birth()
            stranger.report(0)
            stranger.ask(model, [0])
        known.fetch(model, [0])
        known.report(0)
        wait_for(lambda: fleet.device("pi").device.reported)
        assert stranger.answers == []
        assert controller.text().count("stranger is not a known device") == 1
        fleet.device_add("stranger", "rpi4")
        fleet.rollout_start("tiny:1.0")
        wait_for(lambda: stranger.desired)
        stranger.fetch(model, [0])


def test_a_device_gets_the_blobs_of_its_own_bundles_and_no_others(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, layouts: dict[str, Path]
) -> None:
    models = {version: Layout(layouts[version]).bundle("rpi4").files["model.onnx"].digest for version in layouts}
    fleet.device_add("other", "rpi4", {"site": "x"})
    fleet.rollout_start("tiny:1.0", {"site": "x"})
    with ScriptedAgent("pi", mosquitto.port) as agent, ScriptedAgent("other", mosquitto.port) as wanted:
        wait_for(lambda: wanted.desired)
        wanted.fetch(models["1.0"], [0])
        for version in ("1.0", "2.0"):
            agent.ask(models[version], [0])
        wait_for(lambda: len(agent.answers) == 2)
        assert {answer.status for _, answer in agent.answers} == {BlockStatus.NOT_FOUND}
        # What it says that it runs, or works towards, it may repair.
        agent.report(0, {"tiny": serving(digest_of(layouts, "2.0"))})
        wait_for(lambda: fleet.device("pi").device.reported)
        agent.fetch(models["2.0"], [0])
        agent.ask(models["1.0"], [0])
        wait_for(lambda: [answer.status for _, answer in agent.answers].count(BlockStatus.NOT_FOUND) == 3)


def test_a_device_added_again_while_the_controller_was_away_is_told_nothing_old(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    fleet.rollout_start("tiny:1.0")
    wait_for(lambda: retained(mosquitto.port, topics.desired("pi")))
    assert controller.terminate() == 0
    fleet.device_remove("pi")
    fleet.device_add("pi", "rpi4")
    controller.start()
    wait_for(lambda: retained(mosquitto.port, topics.desired("pi")) is None)
    with ScriptedAgent("pi", mosquitto.port, boot="fresh") as agent:
        agent.birth()
        wait_for(lambda: fleet.device("pi").device.online)
        assert agent.desired == []


def test_broken_messages_are_dropped_and_the_rest_goes_on(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    good = {
        "boot_id": "b",
        "seq": 1,
        "target": "rpi4",
        "agent_version": "0",
        "architecture": "x",
        "python": "3",
        "runtimes": {},
        "free_bytes": 0,
        "desired_version": 0,
    }
    with ScriptedAgent("pi", mosquitto.port) as agent:
        for payload in (
            b"",
            b"\xff\xfe",
            b"[]",
            b"null",
            b'{"boot_id": 3}',
            b"[" * 50_000,
            b"x" * (MAX_MESSAGE_BYTES + 1000),
            json.dumps(good | {"seq": 2**70}).encode(),
            json.dumps(good | {"desired_version": -1}).encode(),
            json.dumps(good | {"boot_id": "\ud800"}).encode(),
            json.dumps(good | {"boot_id": "b" * 1000}).encode(),
            json.dumps(good | {"models": {"\udfff": {"state": "serving"}}}).encode(),
        ):
            for kind in ("reported", "status", "tele/metrics", "ack/1", "req/1", "unknown", "req/1/2"):
                agent.say(kind, payload)
        agent.client.publish("kedge/v1/d//status", b"x")
        agent.client.publish("kedge/v1/d/.hidden/status", b"x")
        agent.client.publish(topics.CONTROLLER_STATUS, b"nonsense")
        agent.birth()
        agent.report(7)
        wait_for(lambda: fleet.device("pi").device.reported)
        reported = fleet.device("pi").device.reported
        assert reported is not None
        assert reported.desired_version == 7
        assert fleet.device("pi").device.online
    assert "Traceback" not in controller.text()
    assert controller.text().count("was dropped") < 30
    assert controller.terminate() == 0


def test_a_late_will_of_the_controller_does_not_stand(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    with ScriptedAgent("pi", mosquitto.port) as agent:
        wait_for(lambda: agent.statuses and agent.statuses[-1].online)
        boot = agent.statuses[-1].boot_id
        late = codec.encode(Status(online=False, boot_id="former", session=1))
        agent.client.publish(topics.CONTROLLER_STATUS, late, qos=1, retain=True)
        wait_for(lambda: any(not status.online for status in agent.statuses))
        wait_for(lambda: agent.statuses[-1].online)
        assert agent.statuses[-1].boot_id == boot


def test_a_device_is_asked_to_report_and_its_answer_is_told(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        commands: list[Command] = []

        def obey(_: object, __: object, message: paho.MQTTMessage) -> None:
            command = codec.decode(message.payload, Command, where="command")
            commands.append(command)
            agent.report(0)
            agent.say(f"ack/{command.cid}", codec.encode(Ack(cid=command.cid, ok=True)))

        agent.client.message_callback_add(topics.command("pi", "+"), obey)
        subscribed = threading.Event()
        agent.client.on_subscribe = lambda *_: subscribed.set()
        agent.client.subscribe(topics.command("pi", "+"), 1)
        assert subscribed.wait(60)
        asked = fleet.device_report("pi", wait=300)
        assert (asked.sent, asked.ok) == (True, True)
        assert [(one.cid, one.verb) for one in commands] == [(asked.cid, "report")]
        wait_for(lambda: fleet.device("pi").device.reported)
        # Once done, it is not sent again to whoever comes back.
        mosquitto.kill()
        mosquitto.start()
        wait_for(lambda: agent.statuses[-1].session > agent.statuses[0].session)
        assert len(commands) == 1
    controller.terminate()
    silent = fleet.device_report("pi")
    assert (silent.sent, silent.ok) == (False, None)


def test_a_device_of_another_target_than_it_was_added_with_says_so(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.rollout_start("tiny:1.0")
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        agent.report(0, target="jetson-thor")
        wait_for(lambda: fleet.device("pi").device.reported_target == "jetson-thor")
        assert standing(fleet).reported_target == "jetson-thor"
        for arguments in (["device", "list"], ["device", "show", "pi"], ["rollout", "status"]):
            with pytest.raises(SystemExit):
                main([*arguments, "--state", str(fleet.state)])
            assert "rpi4 (says jetson-thor)" in capsys.readouterr().out
        agent.report(0, target="rpi4")
        wait_for(lambda: fleet.device("pi").device.reported_target is None)


def test_what_was_sent_and_what_the_device_received_are_told_apart(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, layouts: dict[str, Path]
) -> None:
    wanted = digest_of(layouts, "1.0")
    fleet.rollout_start("tiny:1.0")
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        wait_for(lambda: agent.desired)
        agent.fetch(wanted, [0])
        size = Layout(layouts["1.0"]).blob_path(wanted).stat().st_size
        wait_for(lambda: standing(fleet).bytes_sent == size)
        assert standing(fleet).bytes_received == 0
        fetching = ReportedModel(state=ModelState.FETCHING, desired=wanted, bytes_received=7)
        agent.report(agent.desired[-1].version, {"tiny": fetching})
        wait_for(lambda: standing(fleet).bytes_received == 7)
        fleet.rollout_start("tiny:2.0")
        # Of the new bundle nothing came yet.
        assert (standing(fleet).bytes_sent, standing(fleet).bytes_received) == (0, 0)


def test_telemetry_alone_keeps_a_device_seen_without_a_write_for_each(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.telemetry(1)
        wait_for(lambda: fleet.device("pi").device.online)
        seen = fleet.device("pi").device.seen_at
        agent.telemetry(2)
        wait_for(lambda: len(fleet.device("pi").telemetry) == 2)
        assert fleet.device("pi").device.seen_at == seen
        agent.birth()
        agent.lose()
        wait_for(lambda: not fleet.device("pi").device.online)
        assert fleet.device("pi").device.seen_at > seen


def test_a_device_that_was_told_more_by_a_lost_database_is_spoken_to_above_that(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, layouts: dict[str, Path]
) -> None:
    fleet.rollout_start("tiny:1.0")
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        agent.report(41)
        wait_for(lambda: agent.desired and agent.desired[-1].version == 42)
        assert agent.desired[-1].models == {"tiny": digest_of(layouts, "1.0")}


def test_one_state_folder_has_one_controller(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    with ControllerProcess(fleet.state, "--broker", mosquitto.url) as second:
        second.start(connected=False)
        assert second.wait() == 1
        assert "another controller runs on this state folder" in second.text()
        assert controller.running


def test_a_locked_database_only_delays(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto
) -> None:
    with ScriptedAgent("pi", mosquitto.port) as agent:
        other = sqlite3.connect(fleet.state / "fleet.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        agent.birth()
        agent.report(3)
        time.sleep(1.0)
        other.execute("ROLLBACK")
        other.close()
        wait_for(lambda: fleet.device("pi").device.reported)


def test_no_broker_yet_is_waited_for(tmp_path: Path, fleet: FleetService) -> None:
    fleet.rollout_start("tiny:1.0")
    late = Mosquitto(tmp_path)
    with ControllerProcess(fleet.state, "--broker", late.url) as waiting:
        waiting.start(connected=False)
        wait_for(lambda: "no connection to" in waiting.text())
        late.start()
        wait_for(lambda: retained(late.port, topics.desired("pi")))
        late.kill()


def test_the_embedded_broker_serves_devices_and_leaves_with_the_controller(
    fleet: FleetService, layouts: dict[str, Path]
) -> None:
    port = free_port()
    wanted = digest_of(layouts, "1.0")
    with ControllerProcess(fleet.state, "--embedded", "--listen", f"127.0.0.1:{port}") as controller:
        controller.start()
        with ScriptedAgent("pi", port) as agent:
            agent.birth()
            fleet.rollout_start("tiny:1.0")
            wait_for(lambda: agent.desired)
            agent.report(agent.desired[-1].version, {"tiny": serving(wanted)})
            assert fleet.rollout_status(wait=300).done
            # A client that sends too much is put out; the others stay.
            with ScriptedAgent("rude", port) as rude:
                gone: list[bool] = []
                rude.client.on_disconnect = lambda *_: gone.append(True)
                rude.client.reconnect_delay_set(60, 60)
                rude.say("status", os.urandom(2 * MAX_MESSAGE_BYTES))
                wait_for(lambda: gone)
            agent.report(99)
            wait_for(lambda: getattr(fleet.device("pi").device.reported, "desired_version", 0) == 99)
        assert controller.terminate() == 0
        assert "Traceback" not in controller.text()
        controller.start()
        assert controller.terminate() == 0


def test_an_address_that_is_taken_is_one_clear_error(fleet: FleetService, mosquitto: Mosquitto) -> None:
    with ControllerProcess(fleet.state, "--embedded", "--listen", f"127.0.0.1:{mosquitto.port}") as controller:
        controller.start(connected=False)
        assert controller.wait() == 1
        assert "the embedded broker cannot start" in controller.text()
        assert "Traceback" not in controller.text()
