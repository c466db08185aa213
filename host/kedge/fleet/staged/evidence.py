"""Collects the evidence of a rollout from the database."""

from __future__ import annotations

from kedge.fleet.database import Session
from kedge.fleet.staged.gates import CohortEvidence

_COUNTS = """
SELECT target, sum(step <> 'waiting') AS devices, sum(step = 'serving') AS serving, sum(step = 'failed') AS failed,
       sum(step = 'silent') AS silent, sum(step = 'failed' AND stage = 'prove') AS proof_failed
FROM rollout_member WHERE rollout_id = ? AND step <> 'gone' GROUP BY target ORDER BY target
"""


def collect(session: Session, rollout_id: int, *, now: float) -> tuple[CohortEvidence, ...]:
    """Return the evidence of each target of a rollout.

    Args:
        now: seconds since 1970.
    """
    return tuple(CohortEvidence(**dict(row)) for row in session.rows(_COUNTS, (rollout_id,)))
