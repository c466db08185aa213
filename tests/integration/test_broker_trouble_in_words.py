"""A connection that does not come about says what is wrong: TLS, the client's certificate, the clock, the port."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.brokers import Mosquitto, mosquitto, wait_for

from kedge_protocol.mqtt import Backoff, Broker, Connection, parse_broker

__all__ = ["mosquitto"]
pytestmark = pytest.mark.needs("mosquitto")


@dataclass
class Authority:
    """Signs certificates; ``ca`` is its own."""

    folder: Path
    name: str = "authority"

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.name)])
        made = self._builder(self._subject, self._key, 0).add_extension(x509.BasicConstraints(True, None), True)
        self.ca = self._write(f"{self.name}.pem", made.sign(self._key, hashes.SHA256()))

    def certificate(self, name: str, *, from_day: int = -1, days: int = 3650) -> tuple[Path, Path]:
        """Certificate and key, valid from so many days from now, for so many."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = self._builder(subject, key, from_day, days).add_extension(loopback, False)
        private = self.folder / f"{name}.key"
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        private.write_bytes(key.private_bytes(*form))
        return self._write(f"{name}.pem", made.sign(self._key, hashes.SHA256())), private

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, from_day: int, days: int = 3650
    ) -> x509.CertificateBuilder:
        since = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=from_day, hours=-1)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(since)
            .not_valid_after(since + datetime.timedelta(days=days))
        )

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


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
    connection.start()
    try:
        # The first version's trouble is not the last word where both are tried.
        wait_for(lambda: connection.problem is not None and connection.protocol == "5", what="a problem")
        return str(connection.problem)
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
