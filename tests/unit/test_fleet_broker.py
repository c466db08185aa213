"""Addresses of brokers, options of the controller, waiting times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.fleet.embedded_broker import EmbeddedBroker
from kedge.fleet.options import ControllerOptions
from kedge_protocol import addresses
from kedge_protocol.errors import ConfigError
from kedge_protocol.mqtt import Backoff, parse_broker


def test_addresses_are_read_with_their_default_ports() -> None:
    for url, host, port, tls in (
        ("mqtt://broker", "broker", 1883, False),
        ("mqtt://broker:1999/", "broker", 1999, False),
        ("mqtts://broker.example.org", "broker.example.org", 8883, True),
        ("mqtt://[::1]:1884", "::1", 1884, False),
    ):
        broker = parse_broker(url)
        assert (broker.host, broker.port, broker.tls) == (host, port, tls)
        assert parse_broker(broker.url) == broker


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("broker:1883", "not a broker's address"),
        ("http://broker", "not a broker's address"),
        ("mqtt://", "not a broker's address"),
        ("mqtt://broker:x", "not a broker's address"),
        ("mqtt://broker:70000", "not a broker's address"),
        ("mqtt://broker:0", "not a port"),
        ("mqtt://broker/topic", "nothing may follow"),
        ("mqtt://broker?x=1", "nothing may follow"),
        ("mqtt://ann:secret@broker", "do not belong in the address"),
    ],
)
def test_what_is_no_address_is_refused_without_showing_a_password(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        parse_broker(url)
    assert "secret" not in str(caught.value)


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("no certificate", encoding="utf-8")
    with pytest.raises(ConfigError, match="no TLS"):
        parse_broker("mqtt://b", ca=pem)
    with pytest.raises(ConfigError, match="without its certificate"):
        parse_broker("mqtts://b", key=pem)
    with pytest.raises(ConfigError, match="does not exist"):
        parse_broker("mqtts://b", ca=tmp_path / "missing.pem")
    with pytest.raises(ConfigError, match="certificates cannot be used"):
        parse_broker("mqtts://b", ca=pem)
    with pytest.raises(ConfigError, match="without a user name"):
        parse_broker("mqtt://b", password="secret")


def test_a_password_never_shows(tmp_path: Path) -> None:
    broker = parse_broker("mqtt://127.0.0.1", username="ann", password="secret")
    assert "secret" not in repr(broker)
    assert "secret" not in broker.url


def test_the_controller_takes_one_broker_and_reads_the_password_from_a_file(tmp_path: Path) -> None:
    for options in (ControllerOptions(), ControllerOptions(broker="mqtt://b", embedded=True)):
        with pytest.raises(ConfigError, match="either --broker or --embedded"):
            options.parsed()
    file = tmp_path / "password"
    file.write_text("secret word\n", encoding="utf-8")
    given = ControllerOptions(broker="mqtt://localhost", username="ann", password_file=file).parsed()
    assert (given.username, given.password) == ("ann", "secret word")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="first line is empty"):
        ControllerOptions(broker="mqtt://b", username="ann", password_file=file).parsed()
    with pytest.raises(ConfigError, match="cannot be read"):
        ControllerOptions(broker="mqtt://b", username="ann", password_file=tmp_path / "none").parsed()
    assert ControllerOptions(embedded=True, listen="0.0.0.0:1999").parsed().url == "mqtt://127.0.0.1:1999"


def test_addresses_to_listen_at() -> None:
    assert addresses.parse("127.0.0.1:1883") == ("127.0.0.1", 1883)
    assert addresses.parse("[::1]:1883") == ("::1", 1883)
    assert EmbeddedBroker("[::]:1883").url == "mqtt://[::1]:1883"
    for text in ("1883", "127.0.0.1", ":1883", "a:b", "a:0", "a:65536", "a:-1", "a:1883²"):
        with pytest.raises(ConfigError, match="not an address to listen at"):
            addresses.parse(text)


@given(seed=st.integers(), base=st.floats(0.01, 5), factor=st.floats(1, 100))
def test_waiting_times_grow_to_the_cap_and_never_pass_it(seed: int, base: float, factor: float) -> None:
    cap = base * factor
    backoff = Backoff(base, cap, source=random.Random(seed))
    ceiling = base
    for _ in range(40):
        delay = backoff.next()
        assert ceiling / 2 <= delay <= ceiling
        ceiling = min(cap, ceiling * 2)
    backoff.reset()
    assert backoff.next() <= base


def test_a_fleet_does_not_come_back_in_step() -> None:
    delays = {Backoff().next() for _ in range(50)}
    assert len(delays) > 40
