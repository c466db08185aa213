"""A connection that does not come about says what is wrong: TLS, the client's certificate, the clock, the port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.authority import Authority
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.waiting import wait_for

from kedge_protocol.mqtt import Backoff, Broker, Connection, parse_broker

__all__ = ["mosquitto"]
pytestmark = pytest.mark.needs("mosquitto")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def secure(tmp_path: Path, authority: Authority) -> Iterator[Mosquitto]:
    """A broker with TLS that asks for client certificates of ``authority``."""
    server = started(tmp_path, authority, *authority.certificate("server"), more=("require_certificate true",))
    yield server
    server.kill()


def started(folder: Path, authority: Authority, cert: Path, key: Path, *, more: tuple[str, ...] = ()) -> Mosquitto:
    files = (f"cafile {authority.ca}", f"certfile {cert}", f"keyfile {key}")
    server = Mosquitto(folder, (*files, "allow_anonymous true", *more))
    server.start()
    return server


def connection_to(broker: Broker) -> Connection:
    """A connection that soon tries again."""
    return Connection(
        broker,
        "a",
        will_topic="will/a",
        will_payload=b"",
        subscriptions=(),
        on_connected=lambda _: None,
        on_disconnected=lambda _: None,
        on_message=lambda *_: None,
        backoff=Backoff(0.1, 0.3),
    )


def problem(broker: Broker) -> str:
    """What the connection says of its trouble, once it has tried."""
    connection = connection_to(broker)
    said: list[str | None] = [None]

    def tried() -> bool:
        # The first version's trouble is not the last word where both are tried.
        said[0] = connection.problem
        return said[0] is not None and connection.protocol == "5" and connection.problem is said[0]

    connection.start()
    try:
        wait_for(tried, what="a problem")
        return str(said[0])
    finally:
        connection.stop()


def test_a_client_certificate_that_is_missing_or_foreign_is_named_and_the_version_of_mqtt_is_not(
    tmp_path: Path, secure: Mosquitto, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"mqtts://127.0.0.1:{secure.port}"
    caplog.set_level("INFO")
    said = problem(parse_broker(url, ca=authority.ca))
    assert "asks for a client certificate and none was given" in said
    cert, key = Authority(tmp_path, "foreign").certificate("stranger")
    said = problem(parse_broker(url, ca=authority.ca, cert=cert, key=key))
    assert f"refuses the client certificate {cert}" in said
    assert "MQTT 5" not in caplog.text


def test_complaint_9_a_certificate_that_is_not_valid_yet_names_the_clock(tmp_path: Path, authority: Authority) -> None:
    server = started(tmp_path, authority, *authority.certificate("server", from_day=30))
    try:
        said = problem(parse_broker(f"mqtts://127.0.0.1:{server.port}", ca=authority.ca))
        assert "not yet valid" in said
        assert "clock says 20" in said
        assert "is it right?" in said
    finally:
        server.kill()


def test_complaint_10_a_certificate_that_expired_is_named_and_a_renewed_one_is_taken_without_a_restart(
    secure: Mosquitto, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = authority.certificate("device", from_day=-30, days=10)
    connection = connection_to(parse_broker(f"mqtts://127.0.0.1:{secure.port}", ca=authority.ca, cert=cert, key=key))
    connection.start()
    try:
        wait_for(lambda: connection.problem is not None, what="a problem")
        assert f"refuses the client certificate {cert}" in str(connection.problem)
        assert not connection.connected
        assert str(cert) in caplog.text
        # Whoever renews it writes the same files.
        assert authority.certificate("device") == (cert, key)
        wait_for(lambda: connection.connected, what="the connection with the renewed certificate")
    finally:
        connection.stop()


def test_an_authority_that_did_not_sign_is_named(tmp_path: Path, secure: Mosquitto) -> None:
    other = Authority(tmp_path, "other")
    said = problem(parse_broker(f"mqtts://127.0.0.1:{secure.port}", ca=other.ca))
    assert "certificate verify failed" in said
    assert "authority (ca)" in said


def test_tls_and_plain_ports_that_are_mixed_up_are_named(secure: Mosquitto, mosquitto: Mosquitto) -> None:
    assert "mqtts://" in problem(parse_broker(f"mqtt://127.0.0.1:{secure.port}"))
    assert "without" in problem(parse_broker(f"mqtts://127.0.0.1:{mosquitto.port}")).lower()
