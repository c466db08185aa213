"""What lying devices say."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.messages import ModelState, ReportedModel

if TYPE_CHECKING:
    from kedge.simulator.behaviour import Figures


class Lie(str, enum.Enum):
    """How a device lies."""

    IDLE = "idle"  # it claims to have done everything, and does nothing: its figures are the old release's
    STALE = "stale"  # it says that all is well, and that the old bundle serves: which it does
    INSTANT = "instant"  # its calls take no time
    FLAWLESS = "flawless"  # none of its calls fails
    PROOF = "proof"  # golden vectors always hold, and it serves what they would have refused

    @property
    def does_nothing(self) -> bool:
        """Whether the old bundle goes on answering, whatever it is told."""
        return self in (Lie.IDLE, Lie.STALE)

    @property
    def proves_all(self) -> bool:
        """Whether golden vectors hold, whatever the bundle."""
        return self.does_nothing or self is Lie.PROOF

    def reported(self, models: Mapping[str, ReportedModel], old: Bundle | None) -> dict[str, ReportedModel]:
        """Return what it says of its models.

        Args:
            old: the bundle that really answers.
        """
        if self is not Lie.STALE or old is None:
            return dict(models)
        return {
            name: dataclasses.replace(one, digest=old.digest, version=old.config.version)
            if one.state is ModelState.SERVING
            else one
            for name, one in models.items()
        }

    def figures(self, measured: Figures) -> Figures:
        """Return what it says that it measured."""
        if self is Lie.INSTANT:
            return dataclasses.replace(measured, latencies_ms=measured.latencies_ms * 0.0)
        if self is Lie.FLAWLESS:
            return dataclasses.replace(measured, inferences=measured.inferences + measured.errors, errors=0)
        return measured
