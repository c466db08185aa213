"""Options of the page. The module is light: the command line imports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kedge.options import Option
from kedge_protocol import addresses
from kedge_protocol.errors import ConfigError

MIN_TOKEN = 16
"""Characters. Shorter ones can be guessed."""


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Options of the controller's page; without ``page`` there is none."""

    page: Annotated[str | None, Option("Serve the page at this address.", metavar="HOST:PORT")] = None
    page_token_file: Annotated[
        Path | None, Option("Page: file with a line NAME:TOKEN for each person, needed beyond loopback.")
    ] = None
    page_cert: Annotated[Path | None, Option("Page: PEM file with the server's certificate, for TLS.")] = None
    page_key: Annotated[Path | None, Option("Page: PEM file with the certificate's private key.")] = None

    def parsed(self) -> PageAddress | None:
        """Return where and how the page is served; None for no page.

        Raises:
            ConfigError: the address is none, or a page beyond loopback lacks a token file or TLS.
        """
        others = {name: value for name, value in vars(self).items() if name != "page" and value is not None}
        if self.page is None:
            if others:
                raise ConfigError(f"--{next(iter(others)).replace('_', '-')} is of use with --page only")
            return None
        host, port = _address(self.page)
        if (self.page_cert is None) != (self.page_key is None):
            raise ConfigError("--page-cert and --page-key belong together")
        for path in (self.page_cert, self.page_key):
            if path is not None and not path.is_file():
                raise ConfigError("there is no such file", where=str(path))
        if not addresses.is_loopback(host) and (self.page_token_file is None or self.page_cert is None):
            raise ConfigError(
                f"--page {self.page} can be reached from other machines, and needs a token and TLS",
                remedy="Give --page-token-file, --page-cert and --page-key, or listen on 127.0.0.1",
            )
        return PageAddress(
            host=host,
            port=port,
            tokens={} if self.page_token_file is None else read_tokens(self.page_token_file),
            cert=self.page_cert,
            key=self.page_key,
        )


@dataclass(frozen=True, kw_only=True)
class PageAddress:
    """Where and how the page is served.

    Attributes:
        port: 0 for any free one.
        tokens: person → token; empty where no token is asked for.
        cert, key: PEM files; None for plain HTTP.
    """

    host: str
    port: int
    tokens: dict[str, str]
    cert: Path | None = None
    key: Path | None = None


def read_tokens(path: Path) -> dict[str, str]:
    """Read a token file: a line ``NAME:TOKEN`` for each person.

    Raises:
        ConfigError: it cannot be read, is empty, or holds a line or token that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file cannot be read: {error}", where=str(path)) from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, colon, token = line.strip().partition(":")
        if not colon or not name.isidentifier() or len(token) < MIN_TOKEN or not token.isascii() or name in found:
            raise ConfigError(
                f"line {number} is not NAME:TOKEN with a new name and a token of at least {MIN_TOKEN} characters",
                where=str(path),
                remedy="Make a token with: openssl rand -hex 24",
            )
        found[name] = token
    if not found:
        raise ConfigError("the token file is empty", where=str(path), remedy="Write a line NAME:TOKEN")
    return found


def _address(text: str) -> tuple[str, int]:
    try:
        return addresses.parse(text, any_port=True)
    except ConfigError as error:
        raise ConfigError(
            f"--page {text} is not HOST:PORT", remedy="Give an address such as 127.0.0.1:8090 or [::1]:8090"
        ) from error
