"""Who may call the HTTP server: with a token or certificate, under which names, from which web pages."""

from __future__ import annotations

import contextlib
import hmac
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_agent.serving.http_parser import Head, RefusedError
from kedge_protocol import addresses, credentials
from kedge_protocol.errors import ConfigError

if TYPE_CHECKING:
    import ssl

    from kedge_agent.serving.settings import ServerSettings

_PREFLIGHT_SECONDS = 600
_REMEMBERED = 256
"""Names of this machine that are looked up once."""
_LONGEST_REMEMBERED = 256
_READING = ("GET", "HEAD", "OPTIONS")
_OWN_PAGE = ("same-origin", "none")
_OUR_FIELDS = "Authorization, Content-Type, Inference-Header-Content-Length"


class Access:
    """Decides by its head whether a request is let in.

    Raises:
        ConfigError: a certificate or token file cannot be read.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.tls = tls_context(settings)
        self._token = settings.token()
        self._hosts = frozenset(map(str.lower, settings.allowed_hosts))
        self._origins = frozenset(map(str.lower, settings.cors_origins))
        self._our_names: set[str] = set()

    def checks_names(self, listening: socket.socket) -> bool:
        """Return whether requests that come by a socket must name this machine. By DNS rebinding, a web page may direct
        its visitor's browser to our address under a name of its own; that gains it nothing where clients must
        authenticate, and no browser speaks to a Unix socket."""
        asks_nothing = self._token is None and self.tls is None
        return asks_nothing and listening.family != socket.AF_UNIX and _is_local(listening)

    def admit(self, head: Head, *, by_name: bool) -> None:
        """Check a head before its body is read.

        Args:
            by_name: see :meth:`checks_names`.

        Raises:
            RefusedError: the Host field names another machine, a valid token is missing, or a web page asks that may
                not.
        """
        authority = head.authority
        if by_name and authority is not None and authority not in self._our_names:
            if not self._is_our_name(authority):
                text = (
                    f"the Host field names another machine: {authority[:100]!r}; "
                    "this one answers to localhost, IP addresses and allowed hosts"
                )
                raise RefusedError(421, text)
            if len(self._our_names) < _REMEMBERED and len(authority) <= _LONGEST_REMEMBERED:
                self._our_names.add(authority)
        if self._token is not None:
            if head.method != "OPTIONS" and not self._is_token(head.fields.get("authorization", "")):
                raise RefusedError(401, "a valid token is needed", (("WWW-Authenticate", "Bearer"),))
        elif "origin" in head.fields and head.method not in _READING and not self._may_change(head):
            raise RefusedError(403, f"web pages of {head.fields['origin'][:100]!r} may not call; CORS origins allow it")

    def cross_origin(self, head: Head) -> Sequence[tuple[str, str]]:
        """Return header fields for a page of another origin (WHATWG Fetch, section 3.2); none if it may not call."""
        origin = head.fields.get("origin") if self._origins else None
        if origin is None:
            return ()
        every = "*" in self._origins
        if not every and origin.lower() not in self._origins:
            return (("Vary", "Origin"),)
        fields = [("Access-Control-Allow-Origin", "*" if every else origin), ("Vary", "Origin")]
        fields.append(("Access-Control-Expose-Headers", "Inference-Header-Content-Length, Retry-After"))
        if head.method == "OPTIONS":
            # Client libraries send fields of their own; none of them means anything here.
            wanted = head.fields.get("access-control-request-headers")
            fields += [
                ("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
                ("Access-Control-Allow-Headers", wanted or _OUR_FIELDS),
                ("Access-Control-Max-Age", str(_PREFLIGHT_SECONDS)),
            ]
        return fields

    def _is_token(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self._token or b"")

    def _may_change(self, head: Head) -> bool:
        """Return whether a page's request may do more than read. A browser sends some of them without asking by a
        preflight, for any page that its user visits: one could unload models, or keep the processor busy. A page of
        this server, also behind a proxy, is told by what the browser states and no page can."""
        origin = head.fields["origin"].lower()
        if "*" in self._origins or origin in self._origins or head.fields.get("sec-fetch-site") in _OWN_PAGE:
            return True
        return head.authority is not None and origin.partition("://")[2] == head.authority.lower()

    def _is_our_name(self, authority: str) -> bool:
        host = authority.lower()
        bare = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        return bare == "localhost" or bare.endswith(".localhost") or bare in self._hosts or _is_address(bare)


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """Return the context of the server's TLS, or None without a certificate.

    Raises:
        ConfigError: a file cannot be read.
    """
    if settings.tls_cert is None:
        return None
    import ssl

    for file, what in (
        (settings.tls_cert, "the certificate"),
        (settings.tls_key, "the certificate's key"),
        (settings.tls_client_ca, "the client CA"),
    ):
        if file is not None:
            credentials.read(Path(file), what)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    where = settings.tls_cert
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.tls_client_ca is not None:
            where = settings.tls_client_ca
            context.load_verify_locations(settings.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"no certificate can be read: {error.strerror or error}",
            where=where,
            remedy="Give PEM files that this user may read, the key without a passphrase",
        ) from error
    return context


def _is_local(listening: socket.socket) -> bool:
    return addresses.is_loopback(str(listening.getsockname()[0]))


def _is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return True
    return False
