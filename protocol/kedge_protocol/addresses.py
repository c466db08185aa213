"""Parses network addresses and identifies those that only this machine can reach."""

from __future__ import annotations

import ipaddress

from kedge_protocol.errors import ConfigError


def parse(text: str, *, where: str | None = None, any_port: bool = False) -> tuple[str, int]:
    """Read ``host:port``, or ``[host]:port`` for an IPv6 address.

    Args:
        where: the place named in the error.
        any_port: whether port 0, a free port that the system chooses, is allowed.

    Returns:
        The host, without brackets, and the port.

    Raises:
        ConfigError: the address has another form, or the port is out of range.
    """
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    is_port = port.isascii() and port.isdigit() and (0 if any_port else 1) <= int(port) < 65536
    if not host or not is_port or (":" in host) != bracketed:
        raise ConfigError(
            f"{text!r} is not an address to listen at", where=where, remedy="Use host:port, for example 127.0.0.1:8080"
        )
    return host, int(port)


def join(host: str, port: int) -> str:
    """Return ``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
