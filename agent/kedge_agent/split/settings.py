"""Where the other parts of split models are. The agent writes it into its state folder (``split.json``), because every
process that loads a model needs it."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from kedge_protocol import addresses, codec, files
from kedge_protocol.errors import ConfigError, MessageError, StorageError

log = logging.getLogger("kedge.split")

FILE = "split.json"


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How this device reaches those with the other parts of its models.

    Attributes:
        listen: ``host:port`` at which it computes its layers for others; None for nowhere.
        following: model → ``host:port`` of the device with the layers after those of this device.
        seconds: time after which a device that does not answer is given up.
        ca, cert, key: PEM files; both ends present a certificate of this authority. None for a link without TLS.
    """

    listen: str | None = None
    following: dict[str, str] = field(default_factory=dict)
    seconds: float = 10.0
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def checked(self, *, insecure: bool) -> SplitSettings:
        """Check the addresses and certificates.

        Raises:
            ConfigError: one cannot be used, or a link beyond this machine has no certificates without ``insecure``.
        """
        named = [(address, f"split.next {model}") for model, address in self.following.items()]
        if self.listen is not None:
            named.append((self.listen, "split.listen"))
        if not 0.5 <= self.seconds <= 600:
            raise ConfigError(f"split.seconds is {self.seconds}", remedy="Use 0.5 to 600")
        exposed = [one for one, where in named if not addresses.is_loopback(addresses.parse(one, where=where)[0])]
        if self.cert is not None:
            self.context(server=True)
        elif exposed and not insecure:
            raise ConfigError(
                "is a link to other machines without certificates",
                where=exposed[0],
                remedy="Give [split] ca, cert and key (those of [broker] by default), or say that you want it insecure",
            )
        elif exposed:
            log.warning("the link to %s IS OPEN TO EVERYBODY: no certificates, texts in the clear", ", ".join(exposed))
        return self

    def context(self, *, server: bool) -> ssl.SSLContext | None:
        """Return the TLS context of one end, or None without certificates. Certificates of devices name no host: that
        the fleet's authority signed them is what counts, and the bundle's digest tells who is meant.

        Raises:
            ConfigError: a file cannot be used.
        """
        if self.cert is None:
            return None
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self.cert, self.key)
            context.load_verify_locations(self.ca)
        except (OSError, ValueError, TypeError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(
                f"the certificates cannot be used: {error}",
                where=self.cert,
                remedy="Give PEM files that this user may read: ca, cert and key of [split] or [broker]",
            ) from error
        return context


def write(state: Path, settings: SplitSettings) -> None:
    """Write the settings into a state folder; where there is nothing to say, no file is made.

    Raises:
        StorageError: the disk is full or not writable.
    """
    if settings == SplitSettings() and not (state / FILE).exists():
        return
    try:
        files.write(state / FILE, codec.encode(settings), mode=0o644)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(state / FILE)) from error


def read(state: Path) -> SplitSettings:
    """Return the settings in a state folder; without any, no other device is known.

    Raises:
        ConfigError: the file is damaged.
    """
    path = state / FILE
    try:
        return codec.decode(path.read_bytes(), SplitSettings, where=str(path))
    except FileNotFoundError:
        return SplitSettings()
    except (OSError, MessageError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from error
