"""The fleet's signing keys, in ``STATE/keys``.

- ``release-ID.pem`` signs releases and rotations of keys. It is the root of trust: move it to offline storage, and give
  it to the commands that need it (``--release-key FILE``).
- ``controller-ID.pem`` signs what each device shall run; the controller reads it.
- ``keys.json`` holds the public keys, and all signed rotations so far. It decides which of the files count, so that a
  rotation is one write.

They are made on first use. See docs/security.md for what an attacker gains with each.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kedge.fleet.database import alone
from kedge_protocol import codec, credentials, files
from kedge_protocol.errors import ConfigError, FleetError, KedgeError, StorageError
from kedge_protocol.signatures import Envelope, PublicKey, parse_envelope, public_of, sign
from kedge_protocol.trust import RELEASE_TYPE, ROTATION_TYPE, ReleaseStatement, Role, Rotation, Trust

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

log = logging.getLogger(__name__)

FOLDER = "keys"
_KEYS = "keys.json"
_STATEMENT = "signed release"
_OFFLINE = "Give --release-key FILE, the key that was moved to offline storage"


@dataclass(frozen=True, kw_only=True)
class _Public:
    trust: Trust
    rotations: tuple[Envelope, ...] = ()


@dataclass(frozen=True, kw_only=True)
class KeyView:
    """One key of the fleet.

    Attributes:
        id: its short name; ``public`` its text in ``trust.json``.
        file: where its private half lies; None if that is not in the state folder.
    """

    role: str
    id: str
    public: str
    file: Path | None


class Keys:
    """The signing keys of one state folder, made if there are none.

    Args:
        state: the state folder.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, state: Path) -> None:
        self.folder = state / FOLDER
        if not (self.folder / _KEYS).is_file():
            with alone(state / "keys.lock"):
                if not (self.folder / _KEYS).is_file():
                    self._make()

    def trust(self) -> Trust:
        """Return the public keys, as a new kit gets them."""
        return self._public().trust.check()

    def rotations(self) -> tuple[Envelope, ...]:
        """Return all signed rotations so far, in their order."""
        return self._public().rotations

    def _public(self) -> _Public:
        path = self.folder / _KEYS
        return codec.decode(credentials.read(path), _Public, where=str(path))

    def _file(self, role: Role, key: PublicKey) -> Path:
        return self.folder / f"{role.value}-{key.id}.pem"

    def views(self) -> tuple[KeyView, ...]:
        """Return the trusted keys."""
        trust = self.trust()
        return tuple(
            KeyView(role=role.value, id=key.id, public=str(key), file=path if path.is_file() else None)
            for role in Role
            for key in trust.keys(role)
            if (path := self._file(role, key))
        )

    def private(self, role: Role, file: Path | None = None) -> Ed25519PrivateKey:
        """Return the private key of a role.

        Args:
            file: where it lies; None for the state folder.

        Raises:
            FleetError: it is not there, or devices do not trust it.
            ConfigError: the file cannot be read, or is no Ed25519 key.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        path = file or self._file(role, self.trust().keys(role)[0])
        if not path.is_file():
            remedy = _OFFLINE if role is Role.RELEASE else "Restore it from a backup, or: kedge keys rotate controller"
            raise FleetError(f"the {role.value} key is not there", where=str(path), remedy=remedy)
        try:
            key = load_pem_private_key(credentials.read(path), None)
        except (ValueError, TypeError) as error:
            raise ConfigError("is no private key in PEM form without a password", where=str(path)) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError("is no Ed25519 key", where=str(path))
        if public_of(key) not in self.trust().keys(role):
            raise FleetError(
                f"devices do not trust this {role.value} key ({public_of(key).id})",
                where=str(path),
                remedy="See kedge keys show",
            )
        return key

    def rotate(self, role: Role, *, release_key: Path | None = None) -> KeyView:
        """Replace the key of a role. Devices follow with their next desired state. The new private key lies in the
        state folder; the old one stays where it is, and signs nothing any more.

        Args:
            release_key: the release key that signs the rotation; None for the state folder's.

        Raises:
            FleetError: the release key is not there, or devices do not trust it.
            StorageError: the folder cannot be written.
        """
        signer = self.private(Role.RELEASE, release_key)
        trust, made = self.trust(), _new_key()
        keys = (str(public_of(made)),)
        rotation = Rotation(number=trust.rotation + 1, role=role, keys=keys, at=time.time())
        envelope = sign(ROTATION_TYPE, codec.encode(rotation), signer)
        public = _Public(trust=trust.followed([envelope]), rotations=(*self.rotations(), envelope))
        self._write({role: made}, public)
        return next(one for one in self.views() if one.role == role.value)

    def _make(self) -> None:
        made = {role: _new_key() for role in Role}
        texts = {role: (str(public_of(key)),) for role, key in made.items()}
        self._write(made, _Public(trust=Trust(release=texts[Role.RELEASE], controller=texts[Role.CONTROLLER])))
        log.warning(
            "made the fleet's signing keys in %s: whoever reads release-*.pem there can sign releases for every device."
            " Back it up, and move it to offline storage",
            self.folder,
        )

    def _write(self, made: Mapping[Role, Ed25519PrivateKey], public: _Public) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for role, key in made.items():
                files.write(self._file(role, public_of(key)), _pem(key), mode=0o600)
            files.write(self.folder / _KEYS, codec.encode(public), mode=0o644)
        except OSError as error:
            raise StorageError(f"the keys cannot be written: {error.strerror}", where=str(self.folder)) from error


def sign_release(statement: ReleaseStatement, key: Ed25519PrivateKey) -> bytes:
    """Return the signed statement of a release, as the database keeps it."""
    return codec.encode(sign(RELEASE_TYPE, codec.encode(statement), key))


def sign_again(statement: bytes, key: Ed25519PrivateKey) -> bytes:
    """Return a release's statement signed by another key."""
    envelope = parse_envelope(statement, where=_STATEMENT)
    return codec.encode(sign(RELEASE_TYPE, envelope.content(where=_STATEMENT), key))


def is_signed(statement: bytes | None, trust: Trust) -> bool:
    """Return whether a trusted release key signed this statement."""
    if statement is None:
        return False
    try:
        envelope = parse_envelope(statement, where=_STATEMENT)
        return bool(envelope.signers(trust.keys(Role.RELEASE), where=_STATEMENT))
    except KedgeError:
        return False


def _new_key() -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def _pem(key: Ed25519PrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
