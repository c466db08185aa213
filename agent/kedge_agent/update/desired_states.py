"""Decides which desired state is in force, and why another is refused."""

from __future__ import annotations

from kedge_protocol import codec, digest
from kedge_protocol.errors import KedgeError, MessageError
from kedge_protocol.messages import MAX_VERSION_STEP, Desired, DesiredRefusal, RefusedDesired
from kedge_protocol.topics import checked_name

MAX_VERSION = 1 << 52
"""A stored desired version above this is a mistake: no controller counts that far."""


class DesiredStates:
    """The desired states of one device in the order of arrival.

    Args:
        remembered: the state in force before a restart (JSON); empty for none. A version that no controller can exceed
            is discarded, since it would lock the device out.
    """

    def __init__(self, remembered: str) -> None:
        self.current: Desired | None = None
        self.problem: str | None = None
        """Why the latest state was refused."""
        self.refused: RefusedDesired | None = None
        """The latest state, if it was understood and refused."""
        self.news = False
        """Whether the latest state differs from the one in force."""
        desired = self._parsed(remembered.encode()) if remembered else None
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
        desired = self._parsed(raw)
        own = self.current
        self.news = desired is None or own is None or (desired.version, desired.content) != (own.version, own.content)
        if desired is None or not self._is_next(desired):
            return False
        self.current, self.refused = desired, None
        return True

    def _parsed(self, raw: bytes) -> Desired | None:
        try:
            desired = codec.decode(raw, Desired, where="desired state")
            for name, bundle in desired.models.items():
                checked_name(name, "model name")
                digest.checked(bundle, where=f"desired state of {name}")
            if desired.version < 1 or any(size < 1 for size in desired.sizes.values()):
                raise MessageError("a version or a size is not above 0", where="desired state")
        except KedgeError as error:
            self.problem = str(error)
            return None
        self.problem = None
        return desired

    def _is_next(self, desired: Desired) -> bool:
        own = self.current
        if own is not None and desired.version <= own.version:
            if desired.version == own.version and desired.content != own.content:
                self._refuse(desired, DesiredRefusal.CONFLICT, f"version {own.version} is held with other content")
            return False
        if desired.version > self.version + MAX_VERSION_STEP:
            words = f"version {desired.version} lies more than {MAX_VERSION_STEP} above {self.version}"
            self._refuse(desired, DesiredRefusal.JUMP, words)
            return False
        return True

    def _refuse(self, desired: Desired, reason: DesiredRefusal, words: str) -> None:
        held = "" if self.current is None else self.current.content
        self.refused = RefusedDesired(version=desired.version, reason=reason, came=desired.content, held=held)
        self.problem = words
