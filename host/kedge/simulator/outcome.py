"""The rollout of a simulation: how it is started, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kedge.fleet.results import Progress
from kedge.fleet.service import FleetService


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rollout ended."""

    state: str
    failed: int = 0
    reason: str = ""


class Rollout:
    """The rollout of the new release.

    Args:
        fleet: where it runs.
        reference: ``NAME:VERSION``.
        policy: as a policy's TOML holds it.
    """

    def __init__(self, fleet: FleetService, reference: str, policy: Mapping[str, Any]) -> None:
        self._fleet = fleet
        self._reference = reference
        self._policy = policy
        self._number = 0

    def start(self) -> None:
        """Start it."""
        self._number = self._fleet.rollout_start(self._reference).rollout.id

    def ended(self) -> Outcome | None:
        """Return how it ended; None while it goes on."""
        status = self._fleet.rollout_status(self._number)
        if status.done:
            return Outcome(state="done")
        counts = status.counts
        if set(counts) <= {Progress.DONE.value, Progress.FAILED.value}:
            return Outcome(state="done", failed=counts.get(Progress.FAILED.value, 0))
        return None
