"""Who may call the HTTP server: tokens, names of this machine, web pages; settings that let in more than they say."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_http_server import Running, run

from kedge_agent.serving import access
from kedge_agent.serving.http_server import HttpServer
from kedge_agent.serving.settings import ServerSettings, address_of, checked_access, checked_exposure, listening_socket
from kedge_protocol.errors import ConfigError

pytestmark = pytest.mark.device

__all__ = ["run"]

PAGE = "https://app.example"


def test_pages_of_other_origins_may_call_when_they_are_named(run: Callable[..., Running]) -> None:
    server = run(cors_origins=(PAGE,))
    ours = server.ask("POST", "/t/post", b"x", Origin=PAGE)
    assert ours.headers["Access-Control-Allow-Origin"] == PAGE
    asked = server.ask("OPTIONS", "/t/post", Origin=PAGE, Access_Control_Request_Method="POST")
    assert (asked.status, asked.headers["Access-Control-Allow-Methods"]) == (204, "GET, POST, OPTIONS")
    theirs = server.ask("GET", "/t/now", Origin="https://evil.example")
    assert "Access-Control-Allow-Origin" not in theirs.headers
    for answer in (ours, asked, theirs):
        assert "Access-Control-Allow-Credentials" not in answer.headers
    assert "Access-Control-Allow-Origin" not in run().ask("GET", "/t/now", Origin=PAGE).headers


def test_a_page_may_send_the_fields_of_its_client_library(run: Callable[..., Running]) -> None:
    # OpenAI's client for JavaScript sends some that begin with x-stainless.
    wanted = "authorization,content-type,x-stainless-os"
    server = run(cors_origins=("*",))
    asked = server.ask("OPTIONS", "/t/post", Origin=PAGE, Access_Control_Request_Headers=wanted)
    assert asked.headers["Access-Control-Allow-Headers"] == wanted


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"Origin": PAGE}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}, 403),
        # A page behind the same proxy, whose name the proxy does not pass on.
        ({"Origin": PAGE, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://localhost:8080", "Host": "localhost:8080"}, 200),
        ({"Origin": "http://localhost:3000", "Host": "localhost:8080"}, 403),
    ],
)
def test_a_page_that_was_not_named_changes_nothing(
    run: Callable[..., Running], fields: dict[str, Any], status: int
) -> None:
    # Browsers send a POST of plain text for any page, without a preflight; the answer alone they keep from it.
    server = run()
    assert server.ask("POST", "/t/post", b"x", **fields).status == status
    assert server.ask("GET", "/t/now", **fields).status == 200
    assert bool(server.handler.threads) == (status == 200)


def test_a_page_may_call_where_every_page_may_or_a_token_is_asked_for(
    run: Callable[..., Running], tmp_path: Path
) -> None:
    assert run(cors_origins=("*",)).ask("POST", "/t/post", b"x", Origin=PAGE).status == 200
    (tmp_path / "token").write_text("s3cret")
    server = run(token_file=str(tmp_path / "token"))
    assert server.ask("POST", "/t/post", b"x", Origin=PAGE, Authorization="Bearer s3cret").status == 200


def test_a_page_can_read_why_it_is_refused(run: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    server = run(token_file=str(tmp_path / "token"), cors_origins=(PAGE,), max_body_bytes=10)
    for body, fields, status in (
        (b"x", {}, 401),
        (bytes(11), {"Authorization": "Bearer s3cret"}, 413),
    ):
        refused = server.ask("POST", "/t/post", body, Origin=PAGE, **fields)
        assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (status, PAGE)


def test_a_token_is_asked_for_where_one_is_set(run: Callable[..., Running], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    server = run(token_file=str(token))
    refused = server.ask("GET", "/t/now")
    assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert server.ask("GET", "/t/now", Authorization="Bearer wrong").status == 401
    assert server.ask("GET", "/t/now", Authorization="bearer s3cret", Host="any.example").status == 200
    token.write_text("")
    with pytest.raises(ConfigError, match="does not hold one word"):
        ServerSettings(token_file=str(token)).token()


def test_another_machines_name_is_refused_by_name_unless_it_is_allowed(run: Callable[..., Running]) -> None:
    server = run(allowed_hosts=("Edge.example",))
    refused = server.ask("GET", "/t/now", Host="evil.example:8080")
    assert refused.status == 421
    assert b"evil.example:8080" in refused.read()
    for name in ("edge.example", "EDGE.example:8443", "localhost:1", "app.localhost", "10.0.0.7", "[::1]:80"):
        assert server.ask("GET", "/t/now", Host=name).status == 200, name


class Both(Running):
    """A server on a loopback address and on a Unix socket."""

    def __init__(self, unix: socket.socket) -> None:
        self.unix = unix
        super().__init__(ServerSettings())

    def made(self, settings: ServerSettings) -> HttpServer:
        return HttpServer([self.socket, self.unix], [("/t", self.handler)], settings)


def test_a_unix_socket_beside_loopback_takes_any_name(tmp_path: Path) -> None:
    # No browser speaks to a Unix socket, and clients call it by whatever name they like.
    path = tmp_path / "kedge.sock"
    server = Both(listening_socket(f"unix:{path}"))
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(path))
            link.sendall(b"GET /t/now HTTP/1.1\r\nHost: whatever\r\n\r\n")
            assert link.recv(4096).startswith(b"HTTP/1.1 200 OK")
        assert server.ask("GET", "/t/now", Host="whatever").status == 421
    finally:
        server.stop()
        server.unix.close()


def test_beyond_this_machine_it_is_not_opened_to_everybody(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="asked for nothing"):
        checked_exposure("0.0.0.0:8080", ServerSettings(), insecure=False)
    checked_exposure("0.0.0.0:8080", ServerSettings(token_file="t"), insecure=False)
    checked_exposure("127.0.0.1:8080", ServerSettings(), insecure=False)
    checked_exposure("unix:/x", ServerSettings(), insecure=False)
    assert not caplog.records
    checked_exposure("[::]:8080", ServerSettings(), insecure=True)
    assert "OPEN TO EVERYBODY" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # It would have listened beyond loopback, without TLS, and asked nobody for a certificate.
        ({"tls_client_ca": "ca.pem"}, "no TLS without the server's own"),
        ({"tls_key": "key.pem"}, "no TLS without the server's own"),
        # None of these would ever have been equal to what a browser sends.
        ({"cors_origins": ("https://app.example/",)}, "no origin of web pages"),
        ({"cors_origins": ("app.example",)}, "no origin of web pages"),
        ({"allowed_hosts": ("edge.example:8080",)}, "no host name"),
    ],
)
def test_settings_that_do_not_do_what_they_seem_to_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        checked_access(ServerSettings(**changes))
    checked_access(ServerSettings(cors_origins=("*", PAGE, "http://localhost:3000", "null"), allowed_hosts=("edge",)))


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key", "tls_client_ca"])
def test_a_file_of_tls_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    files = {name: tmp_path / f"{name}.pem" for name in ("tls_cert", "tls_key", "tls_client_ca")}
    for name, file in files.items():
        if name != missing:
            file.write_text("no certificate")
    with pytest.raises(ConfigError, match=rf"{missing}\.pem: .* cannot be read: No such file"):
        access.tls_context(ServerSettings(**{name: str(file) for name, file in files.items()}))


def test_an_address_says_whether_it_is_encrypted() -> None:
    with listening_socket("127.0.0.1:0") as listening:
        assert address_of(listening, encrypted=True).startswith("https://127.0.0.1:")
        assert address_of(listening).startswith("http://127.0.0.1:")
