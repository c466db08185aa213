"""Options of the fleet's commands. The module is light, since every command imports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from kedge.options import Option
from kedge_protocol.credentials import read_password
from kedge_protocol.errors import ConfigError

if TYPE_CHECKING:
    from kedge_protocol.broker import Broker

DEFAULT_LISTEN = "127.0.0.1:1883"


@dataclass(frozen=True, kw_only=True)
class ControllerOptions:
    """Options of the controller."""

    broker: Annotated[str | None, Option("Broker: mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS.")] = None
    embedded: Annotated[bool, Option("Run a broker in this process (for up to about two hundred devices).")] = False
    listen: Annotated[str, Option("Listen address of the embedded broker.", metavar="HOST:PORT")] = DEFAULT_LISTEN
    ca: Annotated[Path | None, Option("PEM file with the CA certificate that signed the broker's certificate.")] = None
    cert: Annotated[Path | None, Option("PEM file with the controller's certificate.")] = None
    key: Annotated[Path | None, Option("PEM file with the certificate's private key.")] = None
    username: Annotated[str | None, Option("User name for the broker.")] = None
    password_file: Annotated[Path | None, Option("File with the password on its first line.")] = None

    def parsed(self) -> Broker:
        """Return the broker that these options name.

        Raises:
            ConfigError: none or two brokers are named, or an option does not fit.
        """
        if self.embedded == (self.broker is not None):
            raise ConfigError("give either --broker or --embedded")
        password = None if self.password_file is None else read_password(self.password_file)
        from kedge.fleet.embedded_broker import EmbeddedBroker
        from kedge_protocol.broker import parse_broker

        url = self.broker or EmbeddedBroker(self.listen).url
        return parse_broker(url, ca=self.ca, cert=self.cert, key=self.key, username=self.username, password=password)


@dataclass(frozen=True, kw_only=True)
class KitOptions:
    """Options of a kit.

    Attributes:
        kit: the file that is made; None makes none, and then nothing else may be given.
    """

    kit: Annotated[
        Path | None, Option("Write the setup kit of the board, credentials included.", metavar="OUT.tar.gz")
    ] = None
    broker: Annotated[str | None, Option("Kit: the broker's address as seen from the device, mqtts://HOST:PORT.")] = (
        None
    )
    ca: Annotated[
        Path | None, Option("Kit: PEM file with the CA certificate that signed the broker's certificate.")
    ] = None
    cert: Annotated[Path | None, Option("Kit: PEM file with the device's certificate.")] = None
    key: Annotated[Path | None, Option("Kit: PEM file with the certificate's private key.")] = None
    username: Annotated[str | None, Option("Kit: user name for the broker [default: the device's name].")] = None
    password_file: Annotated[Path | None, Option("Kit: file with the device's password on its first line.")] = None
    like: Annotated[
        str | None, Option("Kit: the built-in target whose setup files your own board uses.", metavar="TARGET")
    ] = None

    def check(self) -> None:
        """Raise :class:`ConfigError` if kit options are given without ``--kit``."""
        given = {name: value for name, value in vars(self).items() if name != "kit" and value is not None}
        if self.kit is None and given:
            raise ConfigError(f"--{next(iter(given)).replace('_', '-')} is of use in a kit only", remedy="Give --kit")
