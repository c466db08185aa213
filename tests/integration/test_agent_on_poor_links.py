"""A real agent behind a link that carries little, and at a broker that takes no whole block."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.agents import AgentProcess
from tests.support.brokers import Mosquitto
from tests.support.bundles import make_bundle
from tests.support.controllers import ControllerProcess
from tests.support.waiting import wait_for

from kedge.fleet.results import Progress
from kedge.fleet.service import FleetService
from kedge_protocol.broker import parse_broker
from kedge_protocol.errors import MessageError
from kedge_protocol.mqtt import Connection

pytestmark = pytest.mark.needs("mosquitto")


class SlowProxy:
    """Hands connections on to a port, towards the client at so many bytes a second. A context manager."""

    def __init__(self, port: int, bytes_per_second: int) -> None:
        self._target = port
        self._rate = bytes_per_second
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> SlowProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.socket()
            # Little is taken ahead: what waits, waits at the broker.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            server.connect(("127.0.0.1", self._target))
            for source, sink, rate in ((client, server, 0), (server, client, self._rate)):
                threading.Thread(target=self._carry, args=(source, sink, rate), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket, rate: int) -> None:
        try:
            while data := source.recv(2048):
                sink.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
        except OSError:
            pass
        for end in (source, sink):
            end.close()


def _fleet(stack: ExitStack, folder: Path, broker: Mosquitto, agent: AgentProcess) -> FleetService:
    """A controller that knows the agent's device, and the agent; both run."""
    service = stack.enter_context(FleetService(folder / "fleet"))
    controller = stack.enter_context(ControllerProcess(service.state, "--broker", broker.url))
    service.device_add("dev", "generic-cpu")
    controller.start()
    stack.enter_context(agent).start()
    wait_for(lambda: service.device("dev").device.online, what="the device")
    return service


@pytest.mark.campaign
def test_a_pull_of_a_megabyte_at_16_kb_a_second_costs_its_bytes(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    broker.start()
    with ExitStack() as stack:
        stack.callback(broker.kill)
        proxy = stack.enter_context(SlowProxy(broker.port, 16_000))
        agent = AgentProcess(tmp_path, f"mqtt://127.0.0.1:{proxy.port}", serve=False)
        service = _fleet(stack, tmp_path, broker, agent)
        out = make_bundle(tmp_path, "tiny", "1.0", mebibytes=1)
        size = service.publish(out).release.bundles[0].total_bytes
        service.rollout_start("tiny:1.0")
        wait_for(lambda: service.rollout_status().devices[0].progress is Progress.DONE, 300, what="the rollout")
        standing = service.rollout_status().devices[0]
        assert standing.bytes_sent <= 1.1 * size
        assert standing.bytes_received <= 1.1 * size
        assert proxy.connections == 1


@pytest.fixture
def narrow(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mosquitto]:
    """A broker with a limit on messages."""
    broker = Mosquitto(tmp_path, ("allow_anonymous true", request.param))
    broker.start()
    yield broker
    broker.kill()


@pytest.mark.parametrize("narrow", ["message_size_limit 50000", "max_packet_size 50000"], indirect=True)
def test_a_broker_that_takes_no_whole_block_is_named(tmp_path: Path, narrow: Mosquitto) -> None:
    with ExitStack() as stack:
        agent = AgentProcess(tmp_path, narrow.url, serve=False, more="[limits]\nsilence_seconds = 0.3\n")
        service = _fleet(stack, tmp_path, narrow, agent)
        service.publish(make_bundle(tmp_path, "tiny", "1.0", mebibytes=1))
        service.rollout_start("tiny:1.0")
        words = "message_size_limit, max_packet_size|mosquitto: max_packet_size"
        wait_for(
            lambda: any(one in service.rollout_status().devices[0].detail for one in words.split("|")),
            what=f"the limit in words (see {agent.log})",
        )
        wait_for(lambda: any(one in agent.text() for one in words.split("|")), what="the limit in the agent's log")


@pytest.mark.parametrize("narrow", ["max_packet_size 50000"], indirect=True)
def test_a_message_that_the_broker_does_not_take_is_refused_before_it_is_sent(narrow: Mosquitto) -> None:
    connection = Connection(
        parse_broker(narrow.url),
        "one",
        will_topic="will",
        will_payload=b"",
        subscriptions=[],
        on_connected=lambda _: None,
        on_disconnected=lambda _: None,
        on_message=lambda *_: None,
    )
    connection.start()
    try:
        assert connection.wait_connected(120)
        assert connection.publish("topic", b"x" * 40_000)
        with pytest.raises(MessageError, match="more than the broker takes \\(50000\\)"):
            connection.publish("topic", b"x" * 60_000)
    finally:
        connection.stop()
