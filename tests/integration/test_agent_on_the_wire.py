"""The agent's manners on MQTT: presence, commands, sizes, one agent a state folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from click.testing import CliRunner
from paho.mqtt.enums import CallbackAPIVersion
from tests.support.agents import AgentProcess
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.waiting import wait_for

from kedge_agent import persistent_state
from kedge_agent.cli import cli
from kedge_agent.mqtt_link import Link
from kedge_protocol import codec, topics
from kedge_protocol.blocks import MAX_MESSAGE_BYTES
from kedge_protocol.broker import parse_broker
from kedge_protocol.errors import StorageError
from kedge_protocol.messages import Ack, Command, Failure, ModelState, Reported, ReportedModel, Status, Telemetry

__all__ = ["mosquitto"]
pytestmark = [pytest.mark.needs("mosquitto"), pytest.mark.device]


class Ear:
    """Hears everything of one device, and may speak."""

    def __init__(self, port: int, name: str = "ear") -> None:
        self.heard: list[tuple[str, bytes, bool]] = []
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name)
        ready = threading.Event()
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.on_message = lambda _, __, m: self.heard.append((m.topic, m.payload, m.retain))
        self.client.connect("127.0.0.1", port)
        self.client.subscribe("kedge/v1/d/dev/#", qos=1)
        self.client.loop_start()
        assert ready.wait(60)

    def of(self, topic: str) -> list[bytes]:
        return [payload for heard, payload, _ in list(self.heard) if heard == topic]

    def statuses(self) -> list[Status]:
        return [codec.decode(raw, Status, where="status") for raw in self.of(topics.status("dev"))]

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(60)


@pytest.fixture
def ear(mosquitto: Mosquitto) -> Iterator[Ear]:
    made = Ear(mosquitto.port)
    yield made
    made.client.loop_stop()


@pytest.fixture
def agent(tmp_path: Path, mosquitto: Mosquitto, ear: Ear) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path, mosquitto.url, serve=False) as made:
        made.start()
        wait_for(lambda: ear.of(topics.reported("dev")), what="a first report")
        yield made


def test_presence_is_said_at_birth_at_a_stop_and_by_the_will(agent: AgentProcess, ear: Ear) -> None:
    assert ear.statuses()[-1].online
    first = ear.statuses()[-1].boot_id
    agent.terminate()
    wait_for(lambda: not ear.statuses()[-1].online, what="a word of leave")
    agent.start()
    wait_for(lambda: ear.statuses()[-1].online)
    second = ear.statuses()[-1].boot_id
    assert second != first
    agent.kill()
    wait_for(lambda: not ear.statuses()[-1].online, what="the will")
    assert ear.statuses()[-1].boot_id == second


def test_a_late_will_is_contradicted(agent: AgentProcess, ear: Ear) -> None:
    late = Status(online=False, boot_id="an-earlier-boot", session=3)
    ear.say(topics.status("dev"), codec.encode(late), retain=True)
    wait_for(lambda: ear.statuses()[-1].online and len(ear.statuses()) >= 3, what="the contradiction")


def test_a_command_is_done_once_and_a_retained_one_never(agent: AgentProcess, ear: Ear) -> None:
    reports = len(ear.of(topics.reported("dev")))
    command = codec.encode(Command(cid="c1", verb="report"))
    ear.say(topics.command("dev", "c1"), command)
    wait_for(lambda: len(ear.of(topics.ack("dev", "c1"))) == 1, what="the acknowledgement")
    ear.say(topics.command("dev", "c1"), command)
    wait_for(lambda: len(ear.of(topics.ack("dev", "c1"))) == 2, what="the acknowledgement again")
    assert len(ear.of(topics.reported("dev"))) == reports + 1
    ear.say(topics.command("dev", "c2"), codec.encode(Command(cid="c2", verb="report")), retain=True)
    ear.say(topics.command("dev", "c3"), codec.encode(Command(cid="c3", verb="dance")))
    wait_for(lambda: ear.of(topics.ack("dev", "c3")))
    refused = codec.decode(ear.of(topics.ack("dev", "c3"))[0], Ack, where="ack")
    assert (refused.ok, refused.detail) == (False, "unknown verb 'dance'")
    # The retained one came live to this agent; to the next it comes as retained, and is left alone.
    before = len(ear.of(topics.ack("dev", "c2")))
    agent.terminate()
    wait_for(lambda: not ear.statuses()[-1].online, what="a word of leave")
    agent.start()
    wait_for(lambda: ear.statuses()[-1].online)
    ear.say(topics.command("dev", "c4"), codec.encode(Command(cid="c4", verb="report")))
    wait_for(lambda: ear.of(topics.ack("dev", "c4")))
    assert len(ear.of(topics.ack("dev", "c2"))) == before


def test_nonsense_on_its_topics_does_not_end_it(agent: AgentProcess, ear: Ear) -> None:
    for topic in (topics.desired("dev"), topics.command("dev", "x"), topics.block("dev", "x"), topics.status("dev")):
        for payload in (b"", b"{", b"[1]", b"\xff\x00", b'{"version": "1"}'):
            ear.say(topic, payload)
    ear.say(topics.command("dev", "c9"), codec.encode(Command(cid="c9", verb="report")))
    wait_for(lambda: ear.of(topics.ack("dev", "c9")), what="an agent that still answers")


def test_telemetry_comes_with_figures_of_the_device(agent: AgentProcess, ear: Ear) -> None:
    wait_for(lambda: len(ear.of(topics.telemetry("dev", "metrics"))) >= 3, what="telemetry")
    told = [codec.decode(raw, Telemetry, where="t") for raw in ear.of(topics.telemetry("dev", "metrics"))]
    assert [one.seq for one in told] == sorted(one.seq for one in told)
    assert told[-1].memory_total_bytes > told[-1].memory_available_bytes > 0
    assert told[-1].agent_bytes > 10 << 20
    assert 0 <= told[-1].cpu_percent <= 100
    assert told[-1].interval >= 0.5  # a busy machine makes it longer


def test_a_reported_state_with_long_reasons_stays_below_the_limit(mosquitto: Mosquitto, ear: Ear) -> None:
    link = Link(parse_broker(mosquitto.url), "dev", "boot", post=lambda _: None, command=lambda _: None)
    link.start()
    assert link.connection.wait_connected(120)
    failure = Failure(digest="sha256:" + "0" * 64, stage="prove", reason="x" * 20_000)
    models = {f"model-{n}": ReportedModel(state=ModelState.FAILED, failure=failure) for n in range(100)}
    link.reported(
        Reported(
            boot_id="boot",
            seq=1,
            target="t",
            agent_version="0",
            architecture="a",
            python="3",
            runtimes={},
            free_bytes=1,
            desired_version=1,
            models=models,
        )
    )
    wait_for(lambda: ear.of(topics.reported("dev")))
    link.stop()
    raw = ear.of(topics.reported("dev"))[0]
    assert len(raw) <= MAX_MESSAGE_BYTES
    assert len(codec.decode(raw, Reported, where="r").models) == 100


def test_a_second_agent_on_the_same_state_is_refused(agent: AgentProcess) -> None:
    with pytest.raises(StorageError, match=f"another agent \\(process {agent.pid}\\)"):
        persistent_state.lock(agent.state)
    found = CliRunner().invoke(cli, ["status", "--config", str(agent.config)])
    assert "the agent is running" in found.output
    agent.terminate()
    found = CliRunner().invoke(cli, ["status", "--state", str(agent.state)])
    assert "not running" in found.output


def test_a_broker_that_forbids_its_topics_is_named_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mosquitto says yes to the subscription and then lets nothing through."""
    (tmp_path / "acl").write_text("topic readwrite somewhere/else\n")
    broker = Mosquitto(tmp_path, ("allow_anonymous true", f"acl_file {tmp_path / 'acl'}"))
    broker.start()
    heard: list[object] = []
    link = Link(parse_broker(broker.url), "dev", "boot", post=heard.append, command=lambda _: None)
    said: list[str] = []
    monkeypatch.setattr("kedge_agent.mqtt_link.log.error", lambda text, *values: said.append(text % values))
    link.start()
    try:
        wait_for(lambda: heard, what="a connection")
        link.watch(100.0)
        link.watch(114.0)
        assert said == []
        link.watch(115.0)
        assert "lets nothing through on kedge/v1/d/dev/status" in said[0]
        link.watch(1000.0)
        assert len(said) == 1
    finally:
        link.stop()
        broker.kill()


def test_telemetry_of_a_time_without_a_controller_is_accounted_for(
    agent: AgentProcess, ear: Ear, mosquitto: Mosquitto
) -> None:
    def reported() -> Reported:
        return codec.decode(ear.of(topics.reported("dev"))[-1], Reported, where="r")

    def ask_for_a_report() -> None:
        ear.say(
            topics.command("dev", f"c{len(ear.heard)}"), codec.encode(Command(cid=f"c{len(ear.heard)}", verb="report"))
        )

    count = len(ear.of(topics.telemetry("dev", "metrics")))
    wait_for(lambda: len(ear.of(topics.telemetry("dev", "metrics"))) >= count + 3, what="telemetry")
    ask_for_a_report()
    wait_for(lambda: reported().unheard_seconds > 1.0, what="the time that no controller heard of")
    online = Status(online=True, boot_id="controller", session=1)
    before = reported().seq
    ear.say(topics.CONTROLLER_STATUS, codec.encode(online), retain=True)
    wait_for(lambda: reported().seq > before, what="a report to the controller")
    unheard = []
    for _ in range(2):  # what was being measured while the controller came may still count
        count = len(ear.of(topics.telemetry("dev", "metrics")))
        wait_for(lambda count=count: len(ear.of(topics.telemetry("dev", "metrics"))) >= count + 3, what="telemetry")  # type: ignore[misc]
        before = reported().seq
        ask_for_a_report()
        wait_for(lambda before=before: reported().seq > before, what="another report")  # type: ignore[misc]
        unheard.append(reported().unheard_seconds)
    assert unheard[0] == unheard[1]


def test_what_is_measured_without_a_connection_is_told_afterwards(
    agent: AgentProcess, ear: Ear, mosquitto: Mosquitto
) -> None:
    topic = topics.telemetry("dev", "metrics")
    wait_for(lambda: ear.of(topic), what="telemetry")
    mosquitto.kill()
    wait_for(lambda: agent.text().count("no connection to") >= 4, what="an agent that was cut off for a while")
    before = codec.decode(ear.of(topic)[-1], Telemetry, where="t")
    mosquitto.start()
    later = Ear(mosquitto.port, "later")
    try:
        wait_for(lambda: later.of(topic), what="telemetry again")
        after = codec.decode(later.of(topic)[0], Telemetry, where="t")
        # One long interval, no lost ones: only what was on its way until the agent saw that the broker had died.
        assert after.interval > max(1.0, 0.5 * (after.seq - before.seq))
    finally:
        later.client.loop_stop()
