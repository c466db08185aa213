"""Where the other parts of split models are. The agent writes it into its state folder (``split.json``), because every
process that loads a model needs it."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from kedge_agent.files import storage_errors
from kedge_agent.serving.settings import ServerSettings
from kedge_protocol import addresses, broker, codec, files
from kedge_protocol.errors import ConfigError

log = logging.getLogger("kedge.split")

FILE = "split.json"


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How this device reaches those with the other parts of its models: ``[split]`` in ``agent.toml``.

    Attributes:
        listen: ``host:port`` at which it computes its layers for others; None for nowhere.
        next: model → ``host:port`` of the device with the layers after those of this device.
        seconds: time after which a device that does not answer is given up.
        ca, cert, key: PEM files, those of ``[broker]`` by default; both ends present a certificate of this authority.
            None for a link without TLS.
        insecure: whether a link to other machines may go without certificates.
    """

    listen: str | None = None
    next: dict[str, str] = field(default_factory=dict)
    seconds: float = 10.0
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    insecure: bool = False

    def checked(self) -> SplitSettings:
        """Check the addresses and certificates.

        Raises:
            ConfigError: one cannot be used, or a link beyond this machine has no certificates and is not ``insecure``.
        """
        named = [(address, f"split.next {model}") for model, address in self.next.items()]
        if self.listen is not None:
            named.append((self.listen, "split.listen"))
        if not 0.5 <= self.seconds <= 600:
            raise ConfigError(f"split.seconds is {self.seconds}", remedy="Use 0.5 to 600")
        exposed = [one for one, where in named if not addresses.is_loopback(addresses.parse(one, where=where)[0])]
        if self.cert is not None:
            self.server_context()
            self.client_context()
        elif exposed and not self.insecure:
            raise ConfigError(
                "is a link to other machines without certificates",
                where=exposed[0],
                remedy="Give [split] ca, cert and key (those of [broker] by default), or say that you want it insecure",
            )
        elif exposed:
            log.warning("the link to %s IS OPEN TO EVERYBODY: no certificates, texts in the clear", ", ".join(exposed))
        return self

    def server_context(self) -> ssl.SSLContext | None:
        """Return the TLS context of the end that listens, or None without certificates.

        Raises:
            ConfigError: a file cannot be used.
        """
        from kedge_agent.serving.access import tls_context

        context = tls_context(ServerSettings(tls_cert=self.cert, tls_key=self.key, tls_client_ca=self.ca))
        if context is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext | None:
        """Return the TLS context of the end that connects, or None without certificates. Certificates of devices name
        no host: that the fleet's authority signed them is what counts, and the bundle's digest tells who is meant.

        Raises:
            ConfigError: a file cannot be used.
        """
        if self.cert is None:
            return None
        context = broker.client_context(self.ca, self.cert, self.key, where=self.cert)
        context.check_hostname = False
        return context

    def after(self, model: str) -> str:
        """Return the address of the device with the layers after those of a model on this device.

        Raises:
            ConfigError: none is named.
        """
        if model not in self.next:
            raise ConfigError(
                "goes on at another device, and none is named",
                where=model,
                remedy=f'Give its address in [split.next] of agent.toml: {model} = "HOST:PORT"',
            )
        return self.next[model]


def write(state: Path, settings: SplitSettings) -> None:
    """Write the settings into a state folder; where there is nothing to say, no file is made.

    Raises:
        StorageError: the disk is full or not writable.
    """
    path = state / FILE
    if settings != SplitSettings() or path.exists():
        with storage_errors(path):
            files.write(path, codec.encode(settings), mode=0o644)


def read(state: Path) -> SplitSettings:
    """Return the settings in a state folder; without any, no other device is known.

    Raises:
        MessageError: the file is damaged.
        StorageError: it cannot be read.
    """
    path = state / FILE
    if not path.exists():
        return SplitSettings()
    with storage_errors(path):
        return codec.decode(path.read_bytes(), SplitSettings, where=str(path))
