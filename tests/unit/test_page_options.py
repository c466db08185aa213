"""Where a page may be served, and who may come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge.page.options import PageOptions
from kedge_protocol.errors import ConfigError

TOKEN = "0123456789abcdef"


def test_without_an_address_there_is_no_page() -> None:
    assert PageOptions().parsed() is None
    with pytest.raises(ConfigError, match="--page-cert is of use with --page only"):
        PageOptions(page_cert=Path("cert.pem")).parsed()


@pytest.mark.parametrize("text", ["8090", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:x", ":8090"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        PageOptions(page=text).parsed()


def test_loopback_needs_no_password() -> None:
    for text, host in (("127.0.0.1:8090", "127.0.0.1"), ("[::1]:8090", "::1"), ("localhost:8090", "localhost")):
        address = PageOptions(page=text).parsed()
        assert address is not None
        assert (address.host, address.port, address.tokens) == (host, 8090, {})


def test_beyond_loopback_a_token_and_tls_are_needed(tmp_path: Path) -> None:
    tokens, pem = tmp_path / "tokens", tmp_path / "cert.pem"
    tokens.write_text(f"anna:{TOKEN}\n")
    pem.touch()
    for options in (
        PageOptions(page="0.0.0.0:8090"),
        PageOptions(page="0.0.0.0:8090", page_token_file=tokens),
        PageOptions(page="0.0.0.0:8090", page_cert=pem, page_key=pem),
        PageOptions(page="fleet.example:8090"),
    ):
        with pytest.raises(ConfigError, match="needs a token and TLS"):
            options.parsed()
    address = PageOptions(page="0.0.0.0:8090", page_token_file=tokens, page_cert=pem, page_key=pem).parsed()
    assert address is not None
    assert address.tokens == {"anna": TOKEN}


@pytest.mark.parametrize("text", ["", "anna", "anna:short", f":{TOKEN}", f"a b:{TOKEN}", f"anna:{TOKEN}\nanna:{TOKEN}"])
def test_a_token_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match="tokens"):
        PageOptions(page="127.0.0.1:8090", page_token_file=path).parsed()
