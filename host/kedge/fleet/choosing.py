"""Tells which of several bundles the devices of a rollout have, and by which figures."""

from __future__ import annotations

from collections.abc import Mapping

from kedge.fleet import candidates, releases
from kedge.fleet.candidates import Assigned, Candidate, Evidence
from kedge.fleet.database import Row, Session
from kedge.fleet.results import BackendChoice, TargetChoice

_COUNTS = """
SELECT assignment.target, assignment.state, part.digest, count(*) AS devices FROM assignment
JOIN rollout_device AS part USING (rollout_id, device_id) WHERE rollout_id = ? AND superseded_by IS NULL
GROUP BY 1, 2, 3
"""
_ONE = {Assigned.MEASURED.value, Assigned.GIVEN.value}


def choices(session: Session, rollout: Row) -> tuple[TargetChoice, ...]:
    """Return what the devices of a rollout have, of targets for which its release holds several bundles."""
    counts: dict[str, list[Row]] = {}
    for row in session.rows(_COUNTS, (rollout["id"],)):
        counts.setdefault(row["target"], []).append(row)
    release = releases.by_name(session, rollout["model"], rollout["version"]) if counts else None
    if release is None:
        return ()
    several = candidates.of_release(session, release["id"])
    return tuple(
        _target(target, several[target], rows, candidates.evidence(session, release, target, several[target]))
        for target, rows in sorted(counts.items())
        if target in several
    )


def _target(target: str, several: tuple[Candidate, ...], rows: list[Row], known: Evidence) -> TargetChoice:
    have: dict[str, int] = {}
    for row in rows:
        if row["state"] in _ONE:
            have[row["digest"]] = have.get(row["digest"], 0) + row["devices"]
    states = {state: sum(row["devices"] for row in rows if row["state"] == state.value) for state in Assigned}
    return TargetChoice(
        target=target,
        backends=tuple(_backend(one, known, have) for one in several),
        measuring=states[Assigned.MEASURING],
        waiting=states[Assigned.WAITING],
    )


def _backend(one: Candidate, known: Evidence, have: Mapping[str, int]) -> BackendChoice:
    figure = known.figures.get(one.digest)
    return BackendChoice(
        backend=one.backend,
        digest=one.digest,
        devices=have.get(one.digest, 0),
        p50_ms=None if figure is None else figure.p50_ms,
        p95_ms=None if figure is None else figure.p95_ms,
        measured=0 if figure is None else figure.devices,
        refused=known.refused.get(one.digest, 0),
        figures_of="" if figure is None else figure.release,
    )
