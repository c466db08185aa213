"""The status of rollouts: each device judged from its reports, counted, filtered and paged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kedge.fleet import choosing, devices
from kedge.fleet.candidates import Assigned
from kedge.fleet.database import Row, Session
from kedge.fleet.device_progress import NAMESAKE, LastReport, Standing, contradiction, judge
from kedge.fleet.results import DeviceRollout, Progress, RolloutStatus, RolloutSummary, StageView
from kedge.fleet.rollouts import ACTIVE, bytes_sent
from kedge.fleet.staged import stages
from kedge.fleet.staged.phases import Phase, Step
from kedge_protocol.messages import DesiredRefusal, Failure, ModelState, RefusedDesired, ReportedModel, Served

_PARTS = """
SELECT device.id, name, device.target, labels, part.digest AS wanted, part.previous, part.desired_version, bytes_before,
       superseded_by, online, told_target, device.desired_version AS version_now,
       refused_version, refused_reason, refused_came, refused_held, namesake,
       CASE WHEN reported IS NULL THEN NULL ELSE answered_version END AS answered,
       told.state, told.desired, told.digest, told.version, told.proved, blocks_done, blocks_total, bytes_received,
       failure_digest, failure_stage, failure_reason, detail, served_calls, served_golden, served_problem,
       assignment.state AS assigned, assignment.rival, assignment.reason AS why
FROM rollout_device AS part JOIN device ON device.id = part.device_id
LEFT JOIN assignment ON assignment.rollout_id = part.rollout_id AND assignment.device_id = part.device_id
LEFT JOIN device_state ON device_state.device_id = device.id
LEFT JOIN reported_model AS told ON told.device_id = device.id AND told.model = :model
WHERE part.rollout_id = :rollout {own} ORDER BY name
"""
_UNTOLD = """
SELECT device.id, device.name, device.target, labels, member.wave, member.step, bundle.digest AS wanted, told.digest
FROM rollout_member AS member JOIN device ON device.id = member.device_id JOIN rollout ON rollout.id = member.rollout_id
LEFT JOIN release ON release.name = rollout.model AND release.version = rollout.version
LEFT JOIN bundle ON bundle.release_id = release.id AND bundle.target = member.target AND bundle.preference = 0
LEFT JOIN reported_model AS told ON told.device_id = member.device_id AND told.model = rollout.model
WHERE member.rollout_id = :rollout AND NOT EXISTS (
    SELECT 1 FROM rollout_device WHERE rollout_id = member.rollout_id AND device_id = member.device_id
) ORDER BY device.name
"""
_SUPERSEDED = "SELECT count(*) FROM rollout_device WHERE rollout_id = ? AND superseded_by IS NOT NULL"
_ONE = {Assigned.MEASURED.value, Assigned.GIVEN.value}
_ANSWERED = {Progress.DONE, Progress.FAILED, Progress.SUPERSEDED, Progress.CONFLICT}
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
    query = {"model": rollout["model"], "rollout": rollout["id"]}
    stage = stages.view(session, rollout["id"])
    members = {} if stage is None else stages.members(session, rollout["id"])
    judged = [(row, _late(_judged(session, row), members, row)) for row in session.rows(_PARTS.format(own=""), query)]
    untold = [] if stage is None else [(row, _untold(row)) for row in session.rows(_UNTOLD, query)]
    counts = Counter(standing.progress.value for _, standing in [*judged, *untold])
    matching = [(row, standing) for row, standing in [*judged, *untold] if _matches(row, standing, shown)]
    if untold:
        matching.sort(key=lambda found: str(found[0]["name"]))
    end = None if shown.limit is None else shown.offset + shown.limit
    page = matching[shown.offset : end]
    told = {row["id"] for row, _ in judged}
    bundles = {one for row, _ in page if row["id"] in told for one in (row["wanted"], row["rival"]) if one}
    bundles |= {row["wanted"] for row, _ in page if row["wanted"]}
    sent = bytes_sent(session, sorted(bundles))
    choices = choosing.choices(session, rollout)
    backends = {one.digest: one.backend for choice in choices for one in choice.backends}
    found = [
        replace(
            _device(row, standing, sum(sent.get((row["id"], one), 0) for one in (row["wanted"], row["rival"]))),
            backend=backends.get(row["wanted"]) if row["assigned"] in _ONE else None,
        )
        if row["id"] in told
        else _waiting(row, standing)
        for row, standing in page
    ]
    return RolloutStatus(
        **vars(_summary(rollout, stage, counts)),
        matching=len(matching),
        choices=choices,
        devices=tuple(
            replace(device, wave=members[row["id"]].wave) if row["id"] in members else device
            for device, (row, _) in zip(found, page, strict=True)
        ),
    )


def summary(session: Session, rollout: Row) -> RolloutSummary:
    """Return a rollout with its counts only. Superseded devices are counted, not read, so that a list of many rollouts
    reads each device and model once."""
    query = {"model": rollout["model"], "rollout": rollout["id"]}
    stage = stages.view(session, rollout["id"])
    members = {} if stage is None else stages.members(session, rollout["id"], silent=True)
    rows = session.rows(_PARTS.format(own="AND superseded_by IS NULL"), query)
    counts = Counter(_late(_judged(session, row), members, row).progress.value for row in rows)
    counts[Progress.SUPERSEDED.value] = session.value(_SUPERSEDED, (rollout["id"],))
    if stage is not None:
        counts.update(_untold(row).progress.value for row in session.rows(_UNTOLD, query))
    return _summary(rollout, stage, counts)


def _late(standing: Standing, members: Mapping[int, stages.MemberView], row: Row) -> Standing:
    member = members.get(row["id"])
    if member is None or member.step is not Step.SILENT or standing.progress in _ANSWERED:
        return standing
    return replace(standing, progress=Progress.SILENT, detail=f"it did not answer in time: {standing.detail}")


def _untold(row: Row) -> Standing:
    if row["step"] == Step.GONE.value:
        return Standing(Progress.SUPERSEDED, "a newer rollout has it; this one did not reach it", row["digest"])
    return Standing(Progress.WAITING, f"wave {row['wave']} has not reached it", row["digest"])


def _waiting(row: Row, standing: Standing) -> DeviceRollout:
    return DeviceRollout(
        device=row["name"],
        target=row["target"],
        progress=standing.progress,
        digest=row["wanted"],
        serving=standing.serving,
        detail=standing.detail,
    )


def standings(session: Session, rollout: Row, condition: str) -> list[tuple[Row, Standing]]:
    """Return the told devices of a rollout that meet an SQL condition, each with its row and where it stands."""
    query = _PARTS.format(own=condition)
    return [
        (row, _judged(session, row))
        for row in session.rows(query, {"model": rollout["model"], "rollout": rollout["id"]})
    ]


def is_settled(status: RolloutSummary) -> bool:
    """Return whether waiting longer is pointless: every device is done, has failed or was taken over."""
    if status.stage is not None:
        return stages.has_ended(status.stage)
    return status.state != ACTIVE or set(status.counts) <= _FINAL


def _summary(rollout: Row, stage: StageView | None, counts: Counter[str]) -> RolloutSummary:
    own = counts.total() - counts[Progress.SUPERSEDED.value]
    through = stage is None or stage.phase is Phase.DONE
    return RolloutSummary(
        id=rollout["id"],
        model=rollout["model"],
        version=rollout["version"],
        kind=rollout["kind"],
        state=rollout["state"],
        started_at=rollout["started_at"],
        selected=json.loads(rollout["selected"]),
        done=rollout["state"] == ACTIVE and through and 0 < own == counts[Progress.DONE.value],
        counts={one.value: counts[one.value] for one in Progress if counts[one.value]},
        stage=stage,
    )


def _matches(row: Row, standing: Standing, shown: DeviceFilter) -> bool:
    if shown.progress and standing.progress not in shown.progress:
        return False
    return not shown.select or shown.select.items() <= json.loads(row["labels"]).items()


def _judged(session: Session, row: Row) -> Standing:
    told = LastReport(row["answered"], _model(row), bool(row["online"]))
    standing = judge(wanted=row["wanted"], version=row["desired_version"], told=told)
    if row["assigned"] == Assigned.WAITING.value:
        standing = Standing(Progress.WAITING, row["why"], standing.serving)
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


def waits_for_calls(row: Row) -> bool:
    """Return whether the device serves and proved what is wanted, and nothing attests yet that it answers."""
    served = _served(row)
    is_there = row["state"] == ModelState.SERVING.value and row["digest"] == row["wanted"] and bool(row["proved"])
    return is_there and served is not None and served.by is None and served.problem is None


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
        choice=row["why"] or "",
    )
