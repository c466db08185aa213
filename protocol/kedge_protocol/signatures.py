"""Detached Ed25519 signatures in DSSE envelopes.

An envelope holds the signed bytes as they are, so that nothing is serialized again to be checked (DSSE v1.0.2, secure
systems lab: the signature is over the pre-authentication encoding of type and payload). An envelope may hold several
signatures; which keys count for what is decided by :mod:`kedge_protocol.trust`.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kedge_protocol import codec
from kedge_protocol.codec import named
from kedge_protocol.errors import ConfigError, MessageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_KIND = "ed25519:"
_KEY_BYTES = 32


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key; its text is ``ed25519:`` and 32 bytes in base64."""

    raw: bytes

    @property
    def id(self) -> str:
        """Return the key's short name: the first 16 hexadecimal digits of its SHA-256."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def __str__(self) -> str:
        return _KIND + base64.b64encode(self.raw).decode()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Return whether the signature is this key's over the message."""
        return _verifies(self.raw, signature, message)


@functools.lru_cache(maxsize=16)
def _verifies(key: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether a signature holds. The latest answers are kept: one release is checked with each desired state."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def parse_key(text: str, *, where: str) -> PublicKey:
    """Read a public key.

    Raises:
        ConfigError: the text is none.
    """
    kind, body = text[: len(_KIND)], text[len(_KIND) :].strip()
    try:
        raw = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if kind != _KIND or len(raw) != _KEY_BYTES:
        raise ConfigError(
            f"{text[:60]!r} is no public key",
            where=where,
            remedy="Copy it from `kedge keys show`: ed25519: and 44 characters",
        )
    return PublicKey(raw)


def public_of(key: Ed25519PrivateKey) -> PublicKey:
    """Return the public half of a private key."""
    return PublicKey(key.public_key().public_bytes_raw())


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One signature: the signer's key id, and 64 bytes in base64."""

    keyid: str
    sig: str


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A signed document: its type, its bytes in base64, and the signatures."""

    payload_type: str = named("payloadType")
    payload: str
    signatures: tuple[Signature, ...]

    def content(self, *, where: str) -> bytes:
        """Return the signed bytes.

        Raises:
            MessageError: the payload is not base64.
        """
        return _decoded(self.payload, where=where)

    def signers(self, keys: Iterable[PublicKey], *, where: str) -> tuple[PublicKey, ...]:
        """Return those of ``keys`` that signed this envelope. The key id only saves time: the signature decides.

        Raises:
            MessageError: the payload or a signature is not base64.
        """
        signed = pre_authentication_encoding(self.payload_type, self.content(where=where))
        found = [(one.keyid, _decoded(one.sig, where=where)) for one in self.signatures]
        return tuple(key for key in keys if any(keyid == key.id and key.verifies(sig, signed) for keyid, sig in found))


def sign(payload_type: str, content: bytes, *keys: Ed25519PrivateKey) -> Envelope:
    """Return an envelope that holds ``content``, signed by each of the keys."""
    signed = pre_authentication_encoding(payload_type, content)
    return Envelope(
        payload_type=payload_type,
        payload=base64.b64encode(content).decode(),
        signatures=tuple(
            Signature(keyid=public_of(key).id, sig=base64.b64encode(key.sign(signed)).decode()) for key in keys
        ),
    )


def pre_authentication_encoding(payload_type: str, content: bytes) -> bytes:
    """Return what is signed: ``DSSEv1``, then the lengths and the bytes of type and content (DSSE v1.0.2, protocol)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(content), content)


def parse_envelope(raw: bytes, *, where: str) -> Envelope:
    """Parse an envelope.

    Raises:
        MessageError: it is none.
    """
    return codec.decode(raw, Envelope, where=where)


def find_envelope(raw: bytes, *, where: str) -> Envelope | None:
    """Parse a document that may be an envelope: one with a payload and its type. None if it is another one.

    Raises:
        MessageError: it is not JSON, or a broken envelope.
    """
    data = codec.loads(raw, where=where)
    if not isinstance(data, dict) or not {"payload", "payloadType"} <= data.keys():
        return None
    return codec.structure(data, Envelope, where=where)


def _decoded(text: str, *, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MessageError(f"a signed document is not base64: {error}", where=where) from error
