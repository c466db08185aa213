"""The rollout of a simulation: how it is started, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kedge.fleet.results import Progress
from kedge.fleet.service import FleetService
from kedge.fleet.staged import policy as policies
from kedge.fleet.staged.phases import Phase

DONE, ABORTED, UNFINISHED = "done", "aborted", "unfinished"
_STAGE = "SELECT phase, reason, wave FROM rollout_stage WHERE rollout_id = ?"
_STATES = {
    Phase.DONE.value: DONE,
    Phase.INCOMPLETE.value: DONE,
    Phase.ABORTED.value: ABORTED,
    Phase.SUPERSEDED.value: ABORTED,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rollout ended, or stands.

    Attributes:
        state: see :class:`kedge.simulator.result.SimulationResult`.
        reason: the controller's, in words.
        wave: the last one that began; 0 of a plain rollout.
    """

    state: str
    reason: str = ""
    wave: int = 0


class Rollout:
    """The rollout of the new release.

    Args:
        fleet: where it runs.
        reference: ``NAME:VERSION``.
        policy: as a policy's TOML holds it; None for a plain rollout to all devices at once.
    """

    def __init__(self, fleet: FleetService, reference: str, policy: Mapping[str, Any] | None) -> None:
        self._fleet = fleet
        self._reference = reference
        self._policy = None if policy is None else policies.parse(policy, where="rollout")
        self._number = 0

    def start(self) -> int:
        """Start it; return its number."""
        self._number = self._fleet.rollout_start(self._reference, policy=self._policy).rollout.id
        return self._number

    def look(self) -> Outcome:
        """Return how it ended, or ``unfinished`` and where it stands."""
        if self._policy is None:
            return self._plain()
        # The phase alone: the status of each device costs a large fleet much more.
        with self._fleet.database.read() as session:
            row = session.row(_STAGE, (self._number,))
        if row is None:
            return Outcome(state=UNFINISHED)
        return Outcome(state=_STATES.get(row["phase"], UNFINISHED), reason=row["reason"], wave=row["wave"])

    def _plain(self) -> Outcome:
        (status,) = self._fleet.rollouts(limit=1)
        if set(status.counts) <= {Progress.DONE.value, Progress.FAILED.value}:
            return Outcome(state=DONE)
        return Outcome(state=UNFINISHED)
