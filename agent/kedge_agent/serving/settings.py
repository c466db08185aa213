"""Settings of the HTTP server, and addresses to listen on."""

from __future__ import annotations

import logging
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from kedge_protocol import addresses, credentials
from kedge_protocol.errors import ConfigError

log = logging.getLogger("kedge.serving")

_BACKLOG = 512
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+\Z")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and access rules of the HTTP server.

    Attributes:
        connections: largest number of open connections; one more replaces the one that has been idle longest.
        idle_seconds: time after which a connection without a request is closed.
        head_seconds, body_seconds: time limits of a request's head and body, from their first byte on.
        write_seconds: time after which a client that accepts no byte of an answer is disconnected.
        max_body_bytes: largest body of one request, decompressed; a larger one is refused with 413.
        all_bodies_bytes: largest total of all requests' bodies, at least one of the largest; what exceeds it is refused
            with 503.
        call_seconds: time from a request's arrival to its answer; after it the client gets 503. A call that takes
            longer has hung: the process is then restarted.
        load_seconds: time after which a load counts as hung.
        queue_limit: largest number of requests that wait for one model; one more is answered with 429.
        drain_seconds: time that accepted requests get when the server stops.
        token_file: file with the token that clients send as ``Authorization: Bearer``; None to require none.
        allowed_hosts: names allowed in the Host field besides localhost and IP addresses (any name if a token or TLS is
            used).
        cors_origins: origins whose web pages may call; ``*`` for any, without credentials.
        tls_cert, tls_key, tls_client_ca: PEM files; with a client CA every client must present a certificate.
        grpc_listen: ``host:port`` of the gRPC server; None for no gRPC.
        fleet: whether the fleet decides which models are loaded, not ``load`` and ``unload``.
        cache_bytes: size of the kept answers to requests that come again with the same bytes; 0 to keep none.
        cascade: whether inputs may go to the larger models that bundles name.
    """

    connections: int = 512
    idle_seconds: float = 60.0
    head_seconds: float = 20.0
    body_seconds: float = 120.0
    write_seconds: float = 30.0
    max_body_bytes: int = 32 << 20
    all_bodies_bytes: int = 64 << 20
    call_seconds: float = 30.0
    load_seconds: float = 180.0
    queue_limit: int = 64
    drain_seconds: float = 3.0
    token_file: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    grpc_listen: str | None = None
    fleet: bool = True
    cache_bytes: int = 0
    cascade: bool = False

    def token(self) -> bytes | None:
        """Return the token file's content, or None if no file is set.

        Raises:
            ConfigError: it cannot be read, or does not hold one word.
        """
        if self.token_file is None:
            return None
        try:
            lines = credentials.read(Path(self.token_file), "the token file").decode().split()
        except UnicodeDecodeError as error:
            raise ConfigError("the token is not UTF-8", where=self.token_file) from error
        if len(lines) != 1:
            raise ConfigError(
                "the token file does not hold one word",
                where=self.token_file,
                remedy="Write a random token into it, e.g. by: openssl rand -hex 32",
            )
        return lines[0].encode()


def checked_access(settings: ServerSettings) -> None:
    """Check that the rules of access say what they seem to.

    Raises:
        ConfigError: certificates are asked for without TLS, or an origin or a host is malformed.
    """
    if settings.tls_cert is None and (settings.tls_client_ca or settings.tls_key):
        raise ConfigError(
            "a client CA or a key is given, and no certificate: there is no TLS without the server's own",
            where=settings.tls_client_ca or settings.tls_key,
            remedy="Give the server's certificate too (--tls-cert, or tls_cert in [serve])",
        )
    for origin in settings.cors_origins:
        if origin not in ("*", "null") and not _ORIGIN.match(origin):
            raise ConfigError(
                f"{origin!r} is no origin of web pages",
                remedy="Use scheme://host or scheme://host:port without a path, as https://app.example; or *",
            )
    for host in settings.allowed_hosts:
        if not host or set("/:@ ").intersection(host):
            raise ConfigError(f"{host!r} is no host name", remedy="Use a name without scheme and port: edge.example")


def checked_exposure(listen: str, settings: ServerSettings, *, insecure: bool) -> None:
    """Check that clients from other machines must present a token or a certificate.

    Raises:
        ConfigError: an address beyond loopback with neither, without ``insecure``.
    """
    asks = settings.token_file is not None or settings.tls_client_ca is not None
    if listen.startswith("unix:") or addresses.is_loopback(addresses.parse(listen, any_port=True)[0]) or asks:
        return
    if not insecure:
        raise ConfigError(
            "can be reached from other machines, and clients are asked for nothing",
            where=listen,
            remedy="Ask them for a token (--token-file, or token_file in [serve]) or a certificate (--tls-client-ca, "
            "tls_client_ca), listen on 127.0.0.1, or let everybody in (--insecure, insecure = true)",
        )
    log.warning("%s IS OPEN TO EVERYBODY who reaches this machine: no token, no client certificate", listen)


def listening_socket(listen: str) -> socket.socket:
    """Listen on ``host:port``, or on ``unix:PATH``.

    Raises:
        ConfigError: the address is malformed, or the process cannot listen on it.
    """
    try:
        return _unix_socket(Path(listen.removeprefix("unix:"))) if listen.startswith("unix:") else _tcp_socket(listen)
    except OSError as error:
        raise ConfigError(
            f"cannot be listened on: {error.strerror or error}",
            where=listen,
            remedy="Choose a free port of this machine, or a folder that this user may write to",
        ) from error


def address_of(listening: socket.socket, *, encrypted: bool = False) -> str:
    """Return the address of a listening socket: ``http://host:port`` or ``https://host:port``, or ``unix:PATH``."""
    name = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"{'https' if encrypted else 'http'}://{addresses.join(str(name[0]), name[1])}"


def _tcp_socket(listen: str) -> socket.socket:
    host, port = addresses.parse(listen, where="listen", any_port=True)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _unix_socket(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()
        made.bind(os.fspath(path))
        # The folder's rights and these decide who may call: this user and this group.
        path.chmod(0o660)
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _answers(path: Path) -> bool:
    """Return whether a process listens on a socket file; one left by a killed process is in the way."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True
