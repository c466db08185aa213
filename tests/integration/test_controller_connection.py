"""The connection to a broker: versions of MQTT, reconnection, wills, refusals, TLS."""

from __future__ import annotations

import queue
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.ports import free_port
from tests.support.waiting import wait_for

from kedge_protocol.blocks import MAX_MESSAGE_BYTES
from kedge_protocol.errors import MessageError
from kedge_protocol.mqtt import Backoff, Broker, Connection, parse_broker

__all__ = ["mosquitto"]


class Client:
    """A connection that notes what it hears."""

    def __init__(self, broker: Broker, name: str, *patterns: str | tuple[str, int], **options: Any) -> None:
        self.sessions: list[int] = []
        self.reasons: list[str] = []
        self.messages: queue.Queue[tuple[str, bytes, bool]] = queue.Queue()
        self.connection = Connection(
            broker,
            name,
            will_topic=f"will/{name}",
            will_payload=b"gone",
            subscriptions=patterns,
            on_connected=self.sessions.append,
            on_disconnected=self.reasons.append,
            on_message=lambda *message: self.messages.put(message),
            backoff=Backoff(0.1, 0.3),
            **options,
        )


@contextmanager
def client(broker: Broker, name: str, *patterns: str | tuple[str, int], **options: Any) -> Iterator[Client]:
    made = Client(broker, name, *patterns, **options)
    made.connection.start()
    try:
        yield made
    finally:
        made.connection.stop()


@pytest.mark.needs("mosquitto")
def test_mqtt_5_is_used_where_offered_and_messages_arrive_whole(mosquitto: Mosquitto) -> None:
    broker = parse_broker(mosquitto.url)
    with client(broker, "a", "x/#") as receiver, client(broker, "b") as sender:
        assert receiver.connection.wait_connected(120)
        assert sender.connection.wait_connected(120)
        assert receiver.connection.protocol == "5"
        payload = bytes(range(256)) * (MAX_MESSAGE_BYTES // 256)
        assert sender.connection.publish("x/1", payload)
        assert receiver.messages.get(timeout=60) == ("x/1", payload, False)
        with pytest.raises(MessageError, match="over the limit"):
            sender.connection.publish("x/1", payload + b"!")
    assert receiver.reasons == ["stopped"]


@pytest.mark.needs("mosquitto")
def test_what_is_published_from_many_threads_arrives_undamaged(mosquitto: Mosquitto) -> None:
    broker = parse_broker(mosquitto.url)
    with client(broker, "a", "x/#") as receiver, client(broker, "b") as sender:
        assert receiver.connection.wait_connected(120)
        assert sender.connection.wait_connected(120)

        def send(number: int) -> None:
            for _ in range(50):
                while not sender.connection.publish(f"x/{number}", bytes([number]) * 60_000):
                    sender.connection.wait_sent(1 << 20, 1.0)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(200):
            topic, payload, _ = receiver.messages.get(timeout=60)
            assert payload == bytes([int(topic[2:])]) * 60_000


@pytest.mark.needs("mosquitto")
def test_a_restarted_broker_is_found_again_and_nothing_old_is_sent_again(mosquitto: Mosquitto) -> None:
    with client(parse_broker(mosquitto.url), "a", "x/#") as one:
        assert one.connection.wait_connected(120)
        mosquitto.kill()
        wait_for(lambda: one.reasons)
        assert not one.connection.publish("x/1", b"lost", qos=1)
        mosquitto.start()
        wait_for(lambda: len(one.sessions) == 2)
        assert one.sessions[1] > one.sessions[0]
        assert one.connection.publish("x/2", b"new", qos=1)
        assert one.messages.get(timeout=60) == ("x/2", b"new", False)


@pytest.mark.needs("mosquitto")
def test_a_clean_stop_publishes_the_will_of_that_session(mosquitto: Mosquitto) -> None:
    broker = parse_broker(mosquitto.url)
    with client(broker, "a") as one:
        assert one.connection.wait_connected(120)
        one.connection.set_will(lambda session: b"gone from %d" % session)
        (session,) = one.sessions
    with client(broker, "b", ("will/a", 0)) as other:
        assert other.messages.get(timeout=60) == ("will/a", b"gone from %d" % session, True)


@pytest.mark.needs("mosquitto")
def test_a_user_that_is_refused_keeps_trying_and_says_why(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "ann", "secret"], check=True)
    server = Mosquitto(tmp_path, ("allow_anonymous false", f"password_file {passwords}"))
    server.start()
    try:
        with client(parse_broker(server.url, username="ann", password="secret"), "a") as good:
            assert good.connection.wait_connected(120)
        with client(parse_broker(server.url, username="ann", password="wrong"), "b") as bad:
            wait_for(lambda: "not authori" in (bad.connection.problem or "").lower())
            assert bad.sessions == []
            assert bad.connection.protocol == "5"
    finally:
        server.kill()


def test_a_broker_that_closes_at_once_is_asked_in_both_versions() -> None:
    levels: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while len(levels) < 4:
                accepted, _ = listener.accept()
                with accepted:
                    levels.append(accepted.recv(100)[8])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with client(parse_broker(f"mqtt://127.0.0.1:{listener.getsockname()[1]}"), "a") as one:
            thread.join(60)
            assert one.sessions == []
    assert levels == [5, 4, 5, 4]


def test_nobody_listening_is_a_problem_in_words() -> None:
    with client(parse_broker(f"mqtt://127.0.0.1:{free_port()}"), "a") as one:
        wait_for(lambda: one.connection.problem)
        assert "refused" in str(one.connection.problem)
        assert not one.connection.connected


@pytest.mark.needs("mosquitto", "openssl")
def test_tls_checks_the_broker_and_shows_the_clients_certificate(tmp_path: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, cwd=tmp_path, capture_output=True)

    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *ec, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1", encoding="utf-8")
    for name in ("server", "device"):
        openssl("req", *ec, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    files = {"cafile": "ca.pem", "certfile": "server.pem", "keyfile": "server.key"}
    lines = [f"{key} {tmp_path / value}" for key, value in files.items()]
    server = Mosquitto(tmp_path, (*lines, "require_certificate true", "use_identity_as_username true"))
    server.start()
    url = f"mqtts://127.0.0.1:{server.port}"
    ca, cert, key = tmp_path / "ca.pem", tmp_path / "device.pem", tmp_path / "device.key"
    try:
        with client(parse_broker(url, ca=ca, cert=cert, key=key), "a", "x") as good:
            assert good.connection.wait_connected(120)
            assert good.connection.publish("x", b"1" * 90_000)
            assert good.messages.get(timeout=60)[1] == b"1" * 90_000
        with client(parse_broker(url), "b") as stranger:
            wait_for(lambda: "certificate verify failed" in (stranger.connection.problem or ""))
        with client(parse_broker(url, ca=ca), "c") as nameless:
            wait_for(lambda: nameless.connection.problem)
            assert nameless.sessions == []
    finally:
        server.kill()
