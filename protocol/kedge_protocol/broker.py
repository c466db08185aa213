"""The broker's address and credentials: URL, TLS, user name and password."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from kedge_protocol.addresses import is_loopback
from kedge_protocol.errors import ConfigError

log = logging.getLogger(__name__)

_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, kw_only=True)
class Broker:
    """The broker's address and credentials; see :func:`parse_broker`."""

    host: str
    port: int
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The broker's address without secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the TLS context: TLS 1.2 or newer, with host name check; None without TLS.

        Raises:
            ConfigError: a certificate or key cannot be used.
        """
        if not self.tls:
            return None
        return client_context(self.ca, self.cert, self.key, where=self.url)


def client_context(
    ca: Path | str | None, cert: Path | str | None, key: Path | str | None, *, where: str
) -> ssl.SSLContext:
    """Return the TLS context of a client: TLS 1.2 or newer, with host name check.

    Args:
        ca: PEM file of the authority; None for the system's.
        cert, key: PEM files of the client's certificate; the key may be in ``cert``.

    Raises:
        ConfigError: a certificate or key cannot be used; it names ``where``.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if cert is not None:
            context.load_cert_chain(cert, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"the certificates cannot be used: {error}",
            where=where,
            remedy="Give PEM files that this user may read: ca of the authority, cert and key of this client",
        ) from error
    return context


def parse_broker(
    url: str,
    *,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    username: str | None = None,
    password: str | None = None,
) -> Broker:
    """Read ``mqtt://host[:port]`` (1883) or ``mqtts://host[:port]`` (TLS, 8883).

    Args:
        ca: PEM file of the authority that signed the broker's certificate; None for the system's.
        cert, key: PEM files of this client's certificate; the key may be in ``cert``.
        username, password: for the broker; a password is never part of the URL, where every process list would show it.

    Raises:
        ConfigError: the scheme is unknown, the host is missing, the port is invalid, something follows the port, files
            are missing, or options conflict.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a broker's address: {error}", remedy="Use mqtt://host:port") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ConfigError(
            f"{url!r} is not a broker's address", remedy="Use mqtt://host:port, or mqtts://host:port with TLS"
        )
    shown = f"{parts.scheme}://{parts.hostname}"
    if parts.username is not None or parts.password is not None:
        raise ConfigError("user name and password do not belong in the address", where=shown, remedy="Use the options")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError("nothing may follow the port", where=shown, remedy="Use mqtt://host:port")
    if port == 0:
        raise ConfigError("0 is not a port that can be connected to", where=shown)
    tls = parts.scheme == "mqtts"
    _check_files({"ca": ca, "cert": cert, "key": key}, tls=tls, where=shown)
    if password is not None and username is None:
        raise ConfigError("a password was given without a user name", where=shown, remedy="Give the user name too")
    broker = Broker(
        host=parts.hostname,
        port=port or _PORTS[parts.scheme],
        tls=tls,
        username=username,
        password=password,
        ca=ca,
        cert=cert,
        key=key,
    )
    broker.tls_context()
    if password is not None and not tls and not is_loopback(broker.host):
        log.warning("the password travels to %s in the clear; use mqtts://", broker.url)
    return broker


def _check_files(files: dict[str, Path | None], *, tls: bool, where: str) -> None:
    if not tls and any(files.values()):
        raise ConfigError("certificates were given, but mqtt:// has no TLS", where=where, remedy="Use mqtts://")
    if files["key"] is not None and files["cert"] is None:
        raise ConfigError("a key was given without its certificate", where=where, remedy="Give --cert too")
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise ConfigError(f"the {name} file does not exist", where=str(path))
