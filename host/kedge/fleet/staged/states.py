"""What the machine of staged rollouts reads and writes: states, facts and actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from kedge.fleet.staged.gates import GateResult
from kedge.fleet.staged.phases import REACHED, Phase, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A device in a rollout.

    Attributes:
        wave: from 1 on; one above the last wave for devices that came later.
        told_at, moved_at: when it was told last (0 for never), and when it showed progress last (seconds since 1970).
        mark: what it showed then; another mark is progress.
        tries: how often it was told, a person's retry beginning anew.
        stage: at which stage it failed.
    """

    target: str
    wave: int
    step: Step = Step.WAITING
    told_at: float = 0.0
    moved_at: float = 0.0
    mark: str = ""
    tries: int = 0
    stage: str = ""

    @property
    def reached(self) -> bool:
        """Return whether it is to run the new bundle; one that waits for another try still is."""
        return self.step in REACHED or (self.step is Step.WAITING and self.told_at > 0)


class Answer:
    """What a device says of what it was told: the values of :attr:`Sight.answer`."""

    SERVES, FAILED, UNDER_WAY, GONE = "serves", "failed", "under way", "gone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a device shows of its latest step.

    Attributes:
        answer: one of :class:`Answer`.
        mark: changes with each progress.
        stage: at which stage it failed; empty where nothing but a person can help.
    """

    answer: str
    mark: str = ""
    stage: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known in a round.

    Attributes:
        seen: device → what it shows; devices without news may be missing.
        gates: what the gates say; None where they were not asked in this round.
        in_the_way: rollouts that have some of the devices, where this one shall wait for them.
        newcomers: devices that meet the selector since (number → target).
        listening_since: since when nothing that devices say was missed: silence before is not theirs.
    """

    seen: Mapping[int, Sight] = field(default_factory=dict)
    gates: tuple[GateResult, ...] | None = None
    in_the_way: tuple[int, ...] = ()
    newcomers: Mapping[int, str] = field(default_factory=dict)
    listening_since: float = 0.0


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a rollout stands.

    Attributes:
        waves: how many there are.
        wave: the one that is under way, from 1 on; 0 before the first.
        since: when the phase began (seconds since 1970).
        reason: why it is in this phase, in words.
        paused: whether nothing new begins until a person resumes it. The gates go on watching.
        approved: the wave after which a person has promoted.
        members: device → where it stands, in the order in which devices are told.
    """

    waves: int
    phase: Phase = Phase.QUEUED
    wave: int = 0
    since: float = 0.0
    reason: str = ""
    paused: bool = False
    approved: int = 0
    members: Mapping[int, Member] = field(default_factory=dict)

    def counts(self) -> Counter[str]:
        """Return how many devices are at which step."""
        return Counter(member.step.value for member in self.members.values())


@dataclass(frozen=True)
class Send:
    """Devices are told to run the bundle of their target; those that were told before are told again."""

    devices: tuple[int, ...]


@dataclass(frozen=True)
class Shadow:
    """Devices are told to run the bundle of their target beside the one that they run."""

    devices: tuple[int, ...]


@dataclass(frozen=True)
class Unshadow:
    """Devices are told to end that."""

    devices: tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """The rollout takes its devices over from older ones of the same model."""


@dataclass(frozen=True)
class Revert:
    """Devices are told to go back to what they were to run before."""

    devices: tuple[int, ...]


@dataclass(frozen=True)
class Note:
    """An entry for the audit log."""

    action: str
    evidence: Mapping[str, object]


Action = Send | Shadow | Unshadow | Claim | Revert | Note
