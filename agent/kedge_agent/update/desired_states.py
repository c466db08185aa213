"""Decides which desired state is in force, and why another is refused."""

from __future__ import annotations

from dataclasses import dataclass

from kedge_protocol import digest, trust
from kedge_protocol.errors import KedgeError, MessageError
from kedge_protocol.messages import (
    MAX_SOAK,
    MAX_VERSION_STEP,
    Desired,
    DesiredRefusal,
    RefusedDesired,
    Shadow,
    open_desired,
)
from kedge_protocol.signatures import Envelope
from kedge_protocol.topics import checked_name
from kedge_protocol.trust import DESIRED_TYPE, Role, Trust

MAX_VERSION = 1 << 52
"""A stored desired version above this is a mistake: no controller counts that far."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who this device is, for the checks of signed states.

    Attributes:
        device, target: its name and its target.
        trust: the keys that it trusts; None to take unsigned states.
    """

    device: str = ""
    target: str = ""
    trust: Trust | None = None


class DesiredStates:
    """The desired states of one device in the order of arrival.

    With trusted keys, a state is taken only if a controller key signed it, for this device, and a release key vouches
    for each of its bundles, for that model and this target.

    Args:
        remembered: the state in force before a restart (JSON); empty for none. A version that no controller can exceed
            is discarded, since it would lock the device out. It was checked when it came.
        identity: who this device is, and whom it trusts.
    """

    def __init__(self, remembered: str, identity: Identity | None = None) -> None:
        identity = identity or Identity()
        self._device, self._target = identity.device, identity.target
        self.trust = identity.trust
        """The trusted keys after all rotations; None if unsigned states are taken."""
        self.current: Desired | None = None
        self.problem: str | None = None
        """Why the latest state was refused."""
        self.refused: RefusedDesired | None = None
        """The latest state, if it was understood and refused."""
        self.news = False
        """Whether the latest state differs from the one in force."""
        _, desired = self._parsed(remembered.encode()) if remembered else (None, None)
        if desired is not None and desired.version > MAX_VERSION:
            self.problem = f"the remembered desired version {desired.version} is beyond all bounds and is forgotten"
        else:
            self.current = desired

    @property
    def version(self) -> int:
        """Return the version of the desired state in force; 0 before the first."""
        return 0 if self.current is None else self.current.version

    def take(self, raw: bytes) -> bool:
        """Return whether the received state is now in force. If not, :attr:`news` says whether its sender should learn
        of it."""
        envelope, desired = self._parsed(raw)
        own = self.current
        self.news = desired is None or own is None or (desired.version, desired.content) != (own.version, own.content)
        if desired is None or not self._is_trusted(envelope, desired) or not self._is_next(desired):
            return False
        self.current, self.refused = desired, None
        return True

    def _parsed(self, raw: bytes) -> tuple[Envelope | None, Desired | None]:
        try:
            envelope, desired = open_desired(raw, where="desired state")
            for name, bundle in (*desired.models.items(), *desired.rivals.items()):
                checked_name(name, "model name")
                digest.checked(bundle, where=f"desired state of {name}")
            if desired.version < 1 or any(size < 1 for size in desired.sizes.values()):
                raise MessageError("a version or a size is not above 0", where="desired state")
            if odd := [name for name in desired.rivals if desired.models.get(name) in (None, desired.rivals[name])]:
                raise MessageError("it is the rival of no bundle, or of itself", where=f"desired state, {odd[0]}")
            for name, shadow in desired.shadows.items():
                _check_shadow(name, shadow, desired)
            for name, request in desired.samples.items():
                checked_name(name, "model name")
                request.check(where=f"desired state, samples of {name}")
            if any(not 1 <= order <= desired.version for order in desired.orders.values()):
                raise MessageError("a model was asked for with no version up to this one", where="desired state")
            if any(not 0 <= soak <= MAX_SOAK for soak in desired.soaks.values()):
                raise MessageError(f"a soak is not 0 to {MAX_SOAK:g} s", where="desired state")
        except KedgeError as error:
            self.problem = str(error)
            return None, None
        self.problem = None
        return envelope, desired

    def _is_trusted(self, envelope: Envelope | None, desired: Desired) -> bool:
        """Check the signatures of a state; rotations of keys are followed first, and are kept by themselves."""
        if self.trust is None:
            return True
        if envelope is None:
            self._refuse(desired, DesiredRefusal.UNSIGNED, "it is not signed, and this device takes signed ones only")
            return False
        try:
            self.trust = self.trust.followed(desired.rotations)
            signed = envelope.signers(self.trust.keys(Role.CONTROLLER), where="desired state")
        except MessageError as error:
            self._refuse(desired, DesiredRefusal.SIGNATURE, error.what)
            return False
        if envelope.payload_type != DESIRED_TYPE or not signed:
            self._refuse(desired, DesiredRefusal.SIGNATURE, "it is signed by no controller key that this device trusts")
        elif desired.device != self._device:
            self._refuse(desired, DesiredRefusal.DEVICE, f"it is for the device {desired.device!r}")
        elif problem := self._unvouched(desired, self.trust):
            self._refuse(desired, DesiredRefusal.RELEASE, problem)
        else:
            return True
        return False

    def _unvouched(self, desired: Desired, trusted: Trust) -> str | None:
        shadows = [(name, shadow.digest) for name, shadow in desired.shadows.items()]
        for model, bundle in sorted([*desired.models.items(), *desired.rivals.items(), *shadows]):
            if problem := trust.release_problem(model, bundle, self._target, desired.releases, trusted):
                return f"{model}: {problem}"
        return None

    def _is_next(self, desired: Desired) -> bool:
        own = self.current
        if own is not None and desired.version < own.version:
            self._refuse(desired, DesiredRefusal.OLDER, f"version {own.version} is held, this is {desired.version}")
            return False
        if own is not None and desired.version == own.version:
            if desired.content != own.content:
                self._refuse(desired, DesiredRefusal.CONFLICT, f"version {own.version} is held with other content")
            return False
        if desired.version > self.version + MAX_VERSION_STEP:
            words = f"version {desired.version} lies more than {MAX_VERSION_STEP} above {self.version}"
            self._refuse(desired, DesiredRefusal.JUMP, words)
            return False
        return True

    def _refuse(self, desired: Desired, reason: DesiredRefusal, words: str) -> None:
        held = "" if self.current is None else self.current.content
        self.refused = RefusedDesired(
            version=desired.version, reason=reason, came=desired.content, held=held, detail=words
        )
        self.problem = words


def _check_shadow(name: str, shadow: Shadow, desired: Desired) -> None:
    """Check one shadow of a desired state.

    Raises:
        KedgeError: its name or its digest is none, or a budget is out of range, or it is a shadow of nothing.
    """
    where = f"desired state, shadow of {name}"
    checked_name(name, "model name")
    digest.checked(shadow.digest, where=where)
    if name not in desired.models or shadow.digest in (desired.models[name], desired.rivals.get(name)):
        raise MessageError("it is the shadow of no model, or of itself", where=where)
    if shadow.size < 1 or not 0 < shadow.share <= 1 or shadow.memory_bytes < 1:
        raise MessageError("its size, share or memory is out of range", where=where)
