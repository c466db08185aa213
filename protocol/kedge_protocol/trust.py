"""Which keys a device trusts for what, and the checks of a signed desired state.

There are two roles. *Release* keys are kept offline: they sign releases, and the rotation of the keys of both roles,
so that they are the root of trust. *Controller* keys sign assignments: what one device shall run, by version. A device
gets its first keys with its kit and follows signed rotations from there. The Update Framework's metadata can come later
in the place of :class:`Rotation` and :class:`ReleaseStatement`; the messages that carry the envelopes stay.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kedge_protocol import codec
from kedge_protocol.errors import ConfigError, KedgeError, MessageError
from kedge_protocol.signatures import Envelope, PublicKey, parse_key

DESIRED_TYPE = "application/vnd.kedge.desired.v1+json"
RELEASE_TYPE = "application/vnd.kedge.release.v1+json"
ROTATION_TYPE = "application/vnd.kedge.rotation.v1+json"


class Role(str, enum.Enum):
    """What a key may sign."""

    RELEASE = "release"
    CONTROLLER = "controller"


@dataclass(frozen=True, kw_only=True)
class SignedBundle:
    """A bundle in a release's statement: its target, and the digest of its manifest."""

    target: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class ReleaseStatement:
    """The bundles of a release, as its release key signs them. ``at``: seconds since 1970 by the signer's clock."""

    name: str
    version: str
    bundles: tuple[SignedBundle, ...]
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """New keys of one role, signed by a release key that was trusted before.

    Attributes:
        number: 1 for the first rotation of any role, and one more for each next one.
        keys: all keys of the role from now on, as text.
    """

    number: int
    role: Role
    keys: tuple[str, ...]
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trust:
    """The keys that a device trusts, as text; ``rotation`` is the number of the last rotation that it followed."""

    release: tuple[str, ...] = ()
    controller: tuple[str, ...] = ()
    rotation: int = 0

    def keys(self, role: Role) -> tuple[PublicKey, ...]:
        """Return the keys of a role.

        Raises:
            ConfigError: one of them is no key.
        """
        texts = self.release if role is Role.RELEASE else self.controller
        return tuple(parse_key(text, where=f"trusted {role.value} keys") for text in texts)

    def check(self) -> Trust:
        """Return this trust if both roles have keys.

        Raises:
            ConfigError: a role has none, or one of its keys is none.
        """
        for role in Role:
            if not self.keys(role):
                raise ConfigError(f"no {role.value} key is trusted", remedy="Make the device's kit again")
        return self

    def followed(self, rotations: Iterable[Envelope]) -> Trust:
        """Return the trust after these rotations, in their order; those that were followed before are skipped.

        Raises:
            MessageError: a rotation is missing, or is not signed by a trusted release key, or leaves a role without
                keys.
        """
        trust = self
        for envelope in rotations:
            trust = trust._rotated(envelope)
        return trust

    def _rotated(self, envelope: Envelope) -> Trust:
        where = "key rotation"
        rotation = codec.decode(envelope.content(where=where), Rotation, where=where)
        if rotation.number <= self.rotation:
            return self
        if rotation.number != self.rotation + 1:
            raise MessageError(f"rotation {self.rotation + 1} is missing", where=where)
        if envelope.payload_type != ROTATION_TYPE or not envelope.signers(self.keys(Role.RELEASE), where=where):
            raise MessageError(f"rotation {rotation.number} is not signed by a trusted release key", where=where)
        try:
            keys = {rotation.role.value: rotation.keys}
            return replace(self, rotation=rotation.number, **keys).check()
        except ConfigError as error:
            raise MessageError(str(error), where=where) from error


def release_problem(model: str, digest: str, target: str, statements: Sequence[Envelope], trust: Trust) -> str | None:
    """Return why a bundle is not of a signed release; None if a trusted release key vouches for it, for this model and
    this target."""
    keys, unsigned, other = trust.keys(Role.RELEASE), False, ""
    for envelope in statements:
        where = f"release of {model}"
        try:
            if envelope.payload_type != RELEASE_TYPE:
                continue
            statement = codec.decode(envelope.content(where=where), ReleaseStatement, where=where)
            if all(bundle.digest != digest for bundle in statement.bundles):
                continue
            if not envelope.signers(keys, where=where):
                unsigned = True
            elif statement.name != model:
                other = f"it is a bundle of {statement.name}"
            elif all((bundle.target, bundle.digest) != (target, digest) for bundle in statement.bundles):
                targets = ", ".join(bundle.target for bundle in statement.bundles if bundle.digest == digest)
                other = f"it is a bundle for {targets}, this device is {target}"
            else:
                return None
        except KedgeError as error:
            other = str(error)
    if other:
        return other
    return "its release is signed by no key that this device trusts" if unsigned else "its release is not signed"
