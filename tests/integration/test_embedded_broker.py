"""The embedded broker with many clients at once, beside mosquitto: one set of tests for both."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from tests.conftest import ROOT
from tests.support.brokers import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import wait_for

from kedge.fleet.embedded_broker import EmbeddedBroker
from kedge_protocol import topics

CLIENTS = 200
_ALONE = "KEDGE_TEST_ALONE"


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=pytest.mark.needs("mosquitto"))])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """The port of a running broker, of each kind in turn."""
    if request.param == "mosquitto":
        broker = Mosquitto(tmp_path)
        broker.start()
        yield broker.port
        broker.kill()
        return
    embedded = EmbeddedBroker(f"127.0.0.1:{free_port()}")
    embedded.start()
    yield embedded.port
    embedded.stop()


class Client:
    """A device's connection: a last will, three subscriptions, one retained birth once all three are granted."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.received: list[tuple[str, bytes, bool]] = []
        self.lost = 0
        self.online = threading.Event()
        self.paho = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv311)
        self.paho.will_set(topics.status(name), b"offline", qos=1, retain=True)
        self.paho.on_connect = self._connected
        self.paho.on_subscribe = lambda *_: self.paho.publish(topics.status(name), b"online", qos=1, retain=True)
        self.paho.on_publish = lambda *_: self.online.set()
        self.paho.on_disconnect = self._disconnected
        self.paho.on_message = lambda _, __, one: self.received.append((one.topic, one.payload, one.retain))
        self.paho.connect_async("127.0.0.1", port)

    def _connected(self, *_: Any) -> None:
        name = self.name
        self.paho.subscribe([(topics.desired(name), 1), (topics.block(name, "+"), 0), (topics.CONTROLLER_STATUS, 1)])

    def _disconnected(self, *_: Any) -> None:
        self.lost += 1

    def cut(self) -> None:
        """Break the connection without a word."""
        self.paho.loop_stop()
        sock = self.paho.socket()
        if sock is not None:
            sock.close()

    def leave(self) -> None:
        """Disconnect."""
        self.paho.disconnect()
        self.paho.loop_stop()


@pytest.fixture
def controller(port: int) -> Iterator[tuple[paho.Client, dict[str, bytes]]]:
    """What a controller is to the broker: it wants each device's status; the dictionary holds the latest."""
    latest: dict[str, bytes] = {}
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="controller", protocol=MQTTProtocolVersion.MQTTv311)
    granted = threading.Event()
    client.on_connect = lambda one, *_: one.subscribe([(topics.status("+"), 1), (topics.reported("+"), 1)])
    client.on_subscribe = lambda *_: granted.set()
    client.on_message = lambda _, __, one: latest.update({one.topic: one.payload})
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert granted.wait(60)
    yield client, latest
    client.disconnect()
    client.loop_stop()


def _alone(test: str) -> None:
    """Run a test in a process of its own: paho waits by select(), which knows descriptors below 1024 only, and the
    process of many tests has some hundred open."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", test]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, _ALONE: "1"}, capture_output=True, text=True, check=False, timeout=550
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_two_hundred_clients_at_once_come_online_and_none_is_lost(
    port: int, controller: tuple[paho.Client, dict[str, bytes]], request: pytest.FixtureRequest
) -> None:
    if _ALONE not in os.environ:
        _alone(request.node.nodeid)
        return
    speaker, latest = controller
    names = [f"device-{number:03d}" for number in range(CLIENTS)]
    for name in names:
        speaker.publish(topics.desired(name), name.encode(), qos=1, retain=True)
    clients = [Client(name, port) for name in names]
    try:
        for one in clients:
            one.paho.loop_start()
        wait_for(lambda: all(one.online.is_set() for one in clients), timeout=240, what="200 clients")
        wait_for(
            lambda: all(latest.get(topics.status(name)) == b"online" for name in names), timeout=120, what="200 births"
        )
        wait_for(lambda: all(one.received for one in clients), timeout=120, what="each client's retained message")
        # Each got its own message (twice where it subscribed between the sending and the keeping), nobody else's.
        received = [{(topic, payload) for topic, payload, _ in one.received} for one in clients]
        assert received == [{(topics.desired(name), name.encode())} for name in names]
        assert sum(len(one.received) for one in clients) <= 2 * CLIENTS
        assert sum(one.lost for one in clients) == 0
        for one in clients[::2]:
            one.cut()
        wait_for(
            lambda: all(latest[topics.status(one.name)] == b"offline" for one in clients[::2]),
            timeout=120,
            what="the last wills",
        )
        assert all(latest[topics.status(one.name)] == b"online" for one in clients[1::2])
    finally:
        for one in clients:
            one.leave()


def test_a_client_that_returns_finds_what_was_retained_meanwhile(
    port: int, controller: tuple[paho.Client, dict[str, bytes]]
) -> None:
    speaker, _ = controller
    for payload in (b"first", b"second"):
        speaker.publish(topics.desired("pi"), payload, qos=1, retain=True).wait_for_publish(20)
        client = Client("pi", port)
        client.paho.loop_start()
        wait_for(lambda one=client: one.received, what="the retained message")
        assert client.received == [(topics.desired("pi"), payload, True)]
        client.leave()
