"""The status of rollouts: each device judged from its reports, counted, filtered and paged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kedge.fleet import devices
from kedge.fleet.database import Row, Session
from kedge.fleet.device_progress import NAMESAKE, LastReport, Standing, contradiction, judge
from kedge.fleet.results import DeviceRollout, Progress, RolloutStatus, RolloutSummary
from kedge.fleet.rollouts import ACTIVE, bytes_sent
from kedge_protocol.messages import DesiredRefusal, Failure, ModelState, RefusedDesired, ReportedModel, Served

_PARTS = """
SELECT device.id, name, target, labels, part.digest AS wanted, part.previous, part.desired_version, bytes_before,
       superseded_by, online, told_target, device.desired_version AS version_now,
       refused_version, refused_reason, refused_came, refused_held, namesake,
       CASE WHEN reported IS NULL THEN NULL ELSE answered_version END AS answered,
       told.state, told.desired, told.digest, told.version, told.proved, blocks_done, blocks_total, bytes_received,
       failure_digest, failure_stage, failure_reason, detail, served_calls, served_golden, served_problem
FROM rollout_device AS part JOIN device ON device.id = part.device_id
LEFT JOIN device_state ON device_state.device_id = device.id
LEFT JOIN reported_model AS told ON told.device_id = device.id AND told.model = :model
WHERE rollout_id = :rollout {own} ORDER BY name
"""
_SUPERSEDED = "SELECT count(*) FROM rollout_device WHERE rollout_id = ? AND superseded_by IS NOT NULL"
_FINAL = {Progress.DONE.value, Progress.FAILED.value, Progress.SUPERSEDED.value, Progress.CONFLICT.value}


@dataclass(frozen=True, kw_only=True)
class DeviceFilter:
    """A filter for the devices of a rollout.

    Attributes:
        progress: only those that stand there; empty for all.
        select: only those with these labels.
        limit, offset: so many of what is left, after so many; None for all.
    """

    progress: frozenset[Progress] = frozenset()
    select: Mapping[str, str] | None = None
    limit: int | None = None
    offset: int = 0


def status(session: Session, rollout: Row, shown: DeviceFilter) -> RolloutStatus:
    """Return a rollout with the progress of its devices."""
    rows = session.rows(_PARTS.format(own=""), {"model": rollout["model"], "rollout": rollout["id"]})
    judged = [(row, _judged(session, row)) for row in rows]
    summary = _summary(rollout, Counter(standing.progress.value for _, standing in judged))
    matching = [(row, standing) for row, standing in judged if _matches(row, standing, shown)]
    end = None if shown.limit is None else shown.offset + shown.limit
    page = matching[shown.offset : end]
    sent = bytes_sent(session, sorted({row["wanted"] for row, _ in page if row["wanted"]}))
    return RolloutStatus(
        **vars(summary),
        matching=len(matching),
        devices=tuple(_device(row, standing, sent.get((row["id"], row["wanted"]), 0)) for row, standing in page),
    )


def summary(session: Session, rollout: Row) -> RolloutSummary:
    """Return a rollout with its counts only. Superseded devices are counted, not read, so that a list of many rollouts
    reads each device and model once."""
    query = _PARTS.format(own="AND superseded_by IS NULL")
    rows = session.rows(query, {"model": rollout["model"], "rollout": rollout["id"]})
    counts = Counter(_judged(session, row).progress.value for row in rows)
    counts[Progress.SUPERSEDED.value] = session.value(_SUPERSEDED, (rollout["id"],))
    return _summary(rollout, counts)


def is_settled(status: RolloutSummary) -> bool:
    """Return whether waiting longer is pointless: every device is done, has failed or was taken over."""
    return status.state != ACTIVE or set(status.counts) <= _FINAL


def _summary(rollout: Row, counts: Counter[str]) -> RolloutSummary:
    own = counts.total() - counts[Progress.SUPERSEDED.value]
    return RolloutSummary(
        id=rollout["id"],
        model=rollout["model"],
        version=rollout["version"],
        kind=rollout["kind"],
        state=rollout["state"],
        started_at=rollout["started_at"],
        selected=json.loads(rollout["selected"]),
        done=rollout["state"] == ACTIVE and 0 < own == counts[Progress.DONE.value],
        counts={one.value: counts[one.value] for one in Progress if counts[one.value]},
    )


def _matches(row: Row, standing: Standing, shown: DeviceFilter) -> bool:
    if shown.progress and standing.progress not in shown.progress:
        return False
    return not shown.select or shown.select.items() <= json.loads(row["labels"]).items()


def _judged(session: Session, row: Row) -> Standing:
    told = LastReport(row["answered"], _model(row), bool(row["online"]))
    standing = judge(wanted=row["wanted"], version=row["desired_version"], told=told)
    if row["superseded_by"] is not None:
        return Standing(Progress.SUPERSEDED, f"rollout {row['superseded_by']} took it over", standing.serving)
    trouble = NAMESAKE if row["namesake"] is not None else contradiction(row["answered"], *_refused(session, row))
    return standing if trouble is None else Standing(Progress.CONFLICT, trouble, standing.serving)


def _refused(session: Session, row: Row) -> tuple[RefusedDesired | None, int, str]:
    """What the device did not take; the desired version it is given now, and its content where that matters."""
    if row["refused_version"] is None:
        return None, row["version_now"], ""
    refused = RefusedDesired(
        version=row["refused_version"],
        reason=DesiredRefusal(row["refused_reason"]),
        came=row["refused_came"],
        held=row["refused_held"],
    )
    return refused, row["version_now"], devices.desired_state(session, row["id"], row["version_now"]).content


def _model(row: Row) -> ReportedModel | None:
    if row["state"] is None:
        return None
    failure = None
    if row["failure_digest"] is not None:
        failure = Failure(digest=row["failure_digest"], stage=row["failure_stage"], reason=row["failure_reason"])
    return ReportedModel(
        state=ModelState(row["state"]),
        desired=row["desired"],
        digest=row["digest"],
        version=row["version"],
        proved=bool(row["proved"]),
        blocks_done=row["blocks_done"],
        blocks_total=row["blocks_total"],
        bytes_received=row["bytes_received"],
        failure=failure,
        detail=row["detail"],
        served=_served(row),
    )


def _served(row: Row) -> Served | None:
    if row["served_calls"] is None:
        return None
    return Served(calls=row["served_calls"], golden=row["served_golden"], problem=row["served_problem"])


def _device(row: Row, standing: Standing, sent: int) -> DeviceRollout:
    received = row["bytes_received"] if row["wanted"] is not None and row["desired"] == row["wanted"] else None
    return DeviceRollout(
        device=row["name"],
        target=row["target"],
        progress=standing.progress,
        digest=row["wanted"],
        serving=standing.serving,
        previous=row["previous"],
        desired_version=row["desired_version"],
        detail=standing.detail,
        served=standing.served,
        blocks_done=standing.blocks_done,
        blocks_total=standing.blocks_total,
        bytes_sent=max(0, sent - row["bytes_before"]),
        bytes_received=received or 0,
        reported_target=devices.reported_target(row),
    )
