"""Explains TLS errors in words that name the remedy; the library's own text is an alert and a line of C."""

from __future__ import annotations

import socket
import ssl
import time

from kedge_protocol.broker import Broker
from kedge_protocol.errors import ConfigError

_NOT_YET_VALID, _EXPIRED = 9, 10
_PROBE_SECONDS = 3.0
_CLIENT_ALERTS = (
    "CERTIFICATE_REQUIRED",
    "HANDSHAKE_FAILURE",
    "BAD_CERTIFICATE",
    "UNKNOWN_CA",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "ACCESS_DENIED",
)


def explained(error: OSError, broker: Broker) -> str:
    """Return the error's text with a remedy; errors not from TLS are returned as they are."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{_plain(error)}{_about_verification(error)}"
    if broker.tls and isinstance(error, (ConnectionResetError, ssl.SSLEOFError)):
        return (
            f"the broker broke the TLS handshake off; does it speak TLS on port {broker.port}? Without, it is mqtt://"
        )
    if not isinstance(error, ssl.SSLError):
        return str(error)
    reason = error.reason or ""
    if "WRONG_VERSION_NUMBER" in reason or "HTTP_REQUEST" in reason:
        return f"the broker does not speak TLS on port {broker.port}; without TLS it is mqtt:// ({_plain(error)})"
    if any(alert in reason for alert in _CLIENT_ALERTS):
        return f"{_about_client(broker)} ({_plain(error)})"
    return f"TLS failed: {_plain(error)}"


def _about_verification(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        return f". This machine's clock says {now}: is it right? Without a clock set, no certificate is valid"
    return ". Is the authority (ca) the one that signed the broker's certificate, and the address the one in it?"


def _about_client(broker: Broker) -> str:
    if broker.cert is None:
        return "the broker asks for a client certificate and none was given: give cert and key"
    return f"the broker refuses the client certificate {broker.cert}: is it valid, and of an authority that it trusts?"


def _plain(error: ssl.SSLError) -> str:
    """Return the error's text without the location in the C source."""
    return str(error).partition(" (_ssl.c")[0].partition("] ")[2] or str(error)


def alert_of(broker: Broker) -> str | None:
    """Return why a broker closed a TLS connection without an answer, determined by a separate handshake: with TLS 1.3
    the refusal of a client certificate comes after the handshake, where an MQTT client only sees the end. Return None
    if TLS is not the cause."""
    try:
        context = broker.tls_context()
        if context is None:
            return None
        with (
            socket.create_connection((broker.host, broker.port), timeout=_PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=broker.host) as wrapped,
        ):
            wrapped.recv(1)
    except (ssl.SSLError, ConfigError) as error:
        return explained(error, broker) if isinstance(error, ssl.SSLError) else str(error)
    except OSError:
        return None
    return None
